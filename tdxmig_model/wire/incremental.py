"""A sans-I/O parser: bytes are fed in pieces of any size, records come out whole.

A parser is a generator that yields how many bytes it needs next and receives exactly those, and
yields a record when one is complete.  It never asks for more than it has bounded, so what is held
is at most the part of one record that has arrived.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Final, Generic, TypeAlias, TypeVar

from tdxmig_model.errors import UsageError, WireError
from tdxmig_model.wire.constants import (
    GPA_ENTRY_SIZE,
    MAC_SIZE,
    MAX_ENTRIES,
    PAGE_SIZE,
    ByteBuffer,
)

Record_co = TypeVar("Record_co", covariant=True)
Item = TypeVar("Item")
Needs: TypeAlias = Generator[int, memoryview, Item]
"""A part of a parser: yields byte counts, receives those bytes, returns what it decoded."""

MAX_RECORD_SIZE: Final = MAX_ENTRIES * (PAGE_SIZE + GPA_ENTRY_SIZE + MAC_SIZE) + 2 * PAGE_SIZE
"""Upper bound in bytes for every record of every format here."""

_NOTHING: Final = memoryview(b"")


class IncrementalParser(Generic[Record_co]):
    """Feeds a parsing generator.  Subclasses give `_parse`.

    Call `next_record` until it returns None after each `feed`; then at most one unfinished record
    is held.  `bytes` are kept without a copy and may be referenced by the pages of a record, other
    buffers are copied.  After a WireError the stream is lost: every later call raises it again.
    """

    def __init__(self) -> None:
        self._chunk = _NOTHING
        self._queue = bytearray()
        self._partial = bytearray()
        self._filled = 0
        self._taken = 0
        self._record_start = 0
        self._failure: WireError | None = None
        self._parsing = self._parse()
        self._need: int | Record_co = next(self._parsing)

    def _parse(self) -> Generator[int | Record_co, memoryview, None]:
        raise NotImplementedError

    def _check_end(self) -> None:
        """Raise WireError when the stream must not end between these two records."""

    @property
    def offset(self) -> int:
        """Offset in the stream of the record that comes next or is under way."""
        return self._record_start

    @property
    def at_boundary(self) -> bool:
        """True between records: nothing of another record has been fed."""
        held = self._filled or self._chunk.nbytes or self._queue
        return self._taken == self._record_start and not held

    def feed(self, data: ByteBuffer) -> None:
        """Add the next bytes of the stream.

        Raises UsageError when more than a whole record is waiting already, that is when
        `next_record` was not called until it returned None.
        """
        if not self._chunk.nbytes and not self._queue:
            self._chunk = memoryview(data if isinstance(data, bytes) else bytes(data))
            return
        if self._chunk.nbytes + len(self._queue) > MAX_RECORD_SIZE:
            raise UsageError(
                f"feed with {self._chunk.nbytes + len(self._queue)} bytes still waiting; "
                "call next_record until it returns None first"
            )
        self._queue += data

    def next_record(self) -> Record_co | None:
        """The next whole record, or None when more bytes are needed.  Raises WireError."""
        if self._failure:
            raise self._failure
        try:
            while isinstance(self._need, int):
                data = self._take(self._need)
                if data is None:
                    return None
                self._need = self._parsing.send(data)
            record = self._need
            self._record_start = self._taken
            self._need = next(self._parsing)
        except WireError as failure:
            self._failure = failure
            self._chunk, self._partial, self._queue = _NOTHING, bytearray(), bytearray()
            raise
        return record

    def records(self, data: ByteBuffer = b"") -> Iterator[Record_co]:
        """Feed `data` and give every record that is then whole."""
        self.feed(data)
        while (record := self.next_record()) is not None:
            yield record

    def end_of_stream(self) -> None:
        """Say that no more bytes will come.  Raises WireError when that is inside a record."""
        if self._failure:
            raise self._failure
        if not self.at_boundary:
            arrived = self._taken + self._filled + self._chunk.nbytes + len(self._queue)
            self._failure = WireError(
                "the stream ends inside a record",
                offset=arrived,
                field="record",
                value=f"{arrived - self._record_start} bytes",
                bound=f"the rest of the record that began at byte {self._record_start}",
            )
            raise self._failure
        try:
            self._check_end()
        except WireError as failure:
            self._failure = failure
            raise

    def _take(self, count: int) -> memoryview | None:
        """Exactly `count` bytes, or None while they have not all arrived."""
        if not self._filled and self._chunk.nbytes >= count:
            data, self._chunk = self._chunk[:count], self._chunk[count:]
            self._taken += count
            return data
        return self._assemble(count)

    def _assemble(self, count: int) -> memoryview | None:
        """Collect `count` bytes that did not arrive in one piece."""
        while self._filled < count:
            if not self._chunk.nbytes:
                if not self._queue:
                    return None
                self._chunk, self._queue = memoryview(bytes(self._queue)), bytearray()
            if not self._filled:
                self._partial = bytearray(count)
            piece = self._chunk[: count - self._filled]
            self._partial[self._filled : self._filled + piece.nbytes] = piece
            self._filled += piece.nbytes
            self._chunk = self._chunk[piece.nbytes :]
        data = memoryview(self._partial).toreadonly()
        self._partial, self._filled = bytearray(), 0
        self._taken += count
        return data
