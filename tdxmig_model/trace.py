"""Trace records and trace files: what one side did, one JSON object per line (NDJSON).

A trace holds what happened and what could be seen, never a judgement: there is no model in this
module.  Two traces of one migration session, one per side, are merged by (session, stream, IV) of
the messages and judged by `replay`.  The format is described by `specs/trace.schema.json`.

Records are buffered.  Whoever sends a bundle calls `TraceWriter.flush` first, so that a bundle seen
by a destination is always described in the trace of its source, even when that process is killed.
"""

from __future__ import annotations

import enum
import io
import json
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.errors import UsageError, WireError
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.mbmd import BundleType, Mbmd

FORMAT_VERSION: Final = 1
SIDES: Final = ("source", "destination")
KINDS: Final = ("leaf", "lifecycle", "note")

MAX_PAGES: Final = 1 << 40
"""4 KiB pages of the whole guest physical address space."""
_LONGEST_LINE: Final = 16 << 20
"""Bytes; longer lines are refused before they are decoded."""
_LATEST: Final = 1e15

_BUFFERED_LINES: Final = 256
_SHOWN_CHARACTERS: Final = 60


@dataclass(frozen=True, slots=True)
class Message:
    """A bundle that the step made (source) or consumed (destination), without its payload.

    `iv` is the IV_COUNTER of the bundle on its stream; session, stream and iv identify
    the bundle on both sides.  `total_mb` is given by epoch tokens alone.  `n` counts the 4 KiB
    pages of the bundle.
    """

    stream: int
    iv: int
    kind: str
    epoch: int
    mb_counter: int
    total_mb: int | None
    n: int


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a trace.  `t` is seconds of a monotonic clock; `params` and `state` are JSON."""

    seq: int
    t: float
    side: str
    session: str
    kind: str
    step: str
    params: Mapping[str, object] = field(default_factory=dict)
    state: Mapping[str, object] = field(default_factory=dict)
    message: Message | None = None
    status: int | None = None
    status_name: str | None = None

    def gpas(self) -> NDArray[np.uint64]:
        """GPAs of a bulk step, in the order of its list; empty if the step has none."""
        return expand_ranges(self.params.get("gpas", ()))


def message_of(mbmd: Mbmd, pages: int) -> Message:
    """What a trace says about a bundle with this MBMD and this number of 4 KiB pages."""
    token = mbmd.bundle_type is BundleType.EPOCH_TOKEN
    return Message(
        stream=mbmd.migs_index,
        iv=mbmd.iv_counter,
        kind=mbmd.bundle_type.name,
        epoch=mbmd.mig_epoch,
        mb_counter=mbmd.mb_counter,
        total_mb=mbmd.total_mb if token else None,
        n=pages,
    )


def page_ranges(gpas: NDArray[np.uint64]) -> list[list[int]]:
    """Run lengths of 4 KiB-aligned GPAs, [[first_page, count], ...]; order and duplicates stay."""
    if len(gpas) == 0:
        return []
    pages = (np.asarray(gpas, dtype=np.uint64) // np.uint64(PAGE_SIZE)).astype(np.int64)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(pages) != 1) + 1))
    counts = np.diff(np.concatenate((starts, [len(pages)])))
    return [[int(first), int(count)] for first, count in zip(pages[starts], counts, strict=True)]


def expand_ranges(ranges: object, pages: int = MAX_PAGES) -> NDArray[np.uint64]:
    """The GPAs that `page_ranges` was given.

    `pages` is one more than the highest page number, and how many there may be.  UsageError if this
    is not a list of ranges or exceeds that.
    """
    if not isinstance(ranges, Iterable):
        raise UsageError(f"page ranges must be a list of [first_page, count], not {ranges!r}")
    parts: list[NDArray[np.uint64]] = []
    left = pages
    for item in ranges:
        match item:
            case [int(first), int(count)] if first >= 0 and count > 0:
                left -= count
                if first + count > pages or left < 0:
                    raise UsageError(f"page range {item!r} goes beyond {pages} pages")
                parts.append(np.arange(first, first + count, dtype=np.uint64))
            case _:
                raise UsageError(f"a page range must be [first_page, count], not {item!r}")
    if not parts:
        return np.zeros(0, dtype=np.uint64)
    return np.concatenate(parts) * np.uint64(PAGE_SIZE)


class TraceWriter:
    """Writes the trace of one side.  `clock` returns monotonic seconds.

    Both sides of one host may share a clock (time.monotonic is the same in each process of a host);
    across hosts only the order within one side means anything.

    A file that can no longer be written (a full disk) raises nothing, because a record is made in
    the middle of a step that has happened already: `failure` says so, and whoever drives the steps
    asks for it between them.  Nothing more is written after that.
    """

    def __init__(
        self,
        path: str | Path,
        side: str,
        session: str | bytes,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if side not in SIDES:
            raise UsageError(f"a trace belongs to {' or '.join(SIDES)}, not to {side!r}")
        self.path = Path(path)
        self.side = side
        self.session = session.hex() if isinstance(session, bytes) else session
        self._clock = clock
        self.failure: str | None = None
        """Why the trace is incomplete, None as long as it is not."""
        self._lines: list[str] = []
        self._seq = 0
        self._file = _open_regular(self.path, "write", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def record(
        self,
        step: str,
        params: Mapping[str, object] | None = None,
        state: Mapping[str, object] | None = None,
        message: Message | None = None,
        *,
        kind: str = "leaf",
        status: int | None = None,
        status_name: str | None = None,
    ) -> None:
        """Add one record.  A NumPy array under params["gpas"] is written as page ranges."""
        if kind not in KINDS:
            raise UsageError(f"a trace record is one of {', '.join(KINDS)}, not {kind!r}")
        line: dict[str, object] = {
            "v": FORMAT_VERSION,
            "seq": self._seq,
            "t": round(self._clock(), 6),
            "side": self.side,
            "session": self.session,
            "kind": kind,
            "step": step,
            "params": {name: _json_value(value) for name, value in (params or {}).items()},
            "state": {name: _json_value(value) for name, value in (state or {}).items()},
        }
        if message is not None:
            line["message"] = {name: getattr(message, name) for name in Message.__slots__}
        if status is not None:
            line["status"] = int(status)
        if status_name is not None:
            line["status_name"] = status_name
        self._lines.append(json.dumps(line, separators=(",", ":"), allow_nan=False))
        self._seq += 1
        if len(self._lines) >= _BUFFERED_LINES:
            self.flush()

    def lifecycle(
        self, step: str, params: Mapping[str, object] | None = None, state: str = ""
    ) -> None:
        """A lifecycle event that was accepted, with the state it led to."""
        self.record(step, params, {"lifecycle": state}, kind="lifecycle")

    def note(self, text: str, **params: object) -> None:
        """Something worth reading that is no step: why the session ended, what the peer said."""
        self.record("note", {"text": text, **params}, kind="note")

    def flush(self) -> None:
        """Hand every record so far to the operating system, as whole lines; see `failure`."""
        if not self._lines:
            return
        data = memoryview(("\n".join(self._lines) + "\n").encode())
        self._lines.clear()
        try:
            while data and self.failure is None:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.failure = f"cannot write the trace {self.path}: {error.strerror}"

    def close(self) -> None:
        """Flush and close.  Safe to call twice."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_trace(path: str | Path) -> Iterator[Record]:
    """The records of a trace file, in order.

    Raises UsageError if the file cannot be opened or is no regular file, and WireError, which names
    the line, for a line that is cut, too long, no JSON, lacks a field, has a field of a wrong type,
    or is out of sequence.
    """
    path = Path(path)
    offset = 0
    with io.BufferedReader(_open_regular(path, "read", os.O_RDONLY)) as file:
        lines = iter(lambda: file.readline(_LONGEST_LINE), b"")
        for number, line in enumerate(lines, start=1):
            record = _parse_line(line, _Place(path, number, offset))
            if record.seq != number - 1:
                raise _Place(path, number, offset).error(
                    "seq", record.seq, str(number - 1), "records are missing or out of order"
                )
            yield record
            offset += len(line)


def _open_regular(path: Path, what: str, flags: int) -> io.FileIO:
    """Open a regular file; anything else (a FIFO waits for somebody) is refused at once."""
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"cannot {what} the trace {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"cannot {what} the trace {path}: it is no regular file")
    return io.FileIO(descriptor, "rb" if what == "read" else "wb")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in which file, for messages."""

    path: Path
    line: int
    offset: int

    def error(self, name: str, value: object, bound: str, what: str) -> WireError:
        return WireError(
            f"{self.path}, line {self.line}: {what}",
            offset=self.offset,
            field=name,
            value=value,
            bound=bound,
        )


_NULLABLE_INT: Final = (int, type(None))
_MESSAGE_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "stream": (int,),
    "iv": (int,),
    "kind": (str,),
    "epoch": (int,),
    "mb_counter": (int,),
    "total_mb": _NULLABLE_INT,
    "n": (int,),
}
_RECORD_FIELDS: Final[Mapping[str, tuple[type, ...]]] = {
    "v": (int,),
    "seq": (int,),
    "t": (int, float),
    "side": (str,),
    "session": (str,),
    "kind": (str,),
    "step": (str,),
    "params": (dict,),
    "state": (dict,),
}


def _parse_line(line: bytes, place: _Place) -> Record:
    shown = line[:_SHOWN_CHARACTERS].decode(errors="replace")
    if not line.endswith(b"\n"):
        raise place.error("line", shown, "a line end", "the last record is cut")
    try:
        data = json.loads(line, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise place.error("line", shown, "one JSON object", "not JSON") from error
    if not isinstance(data, dict):
        raise place.error("line", shown, "one JSON object", "not a trace record")
    _require(data, _RECORD_FIELDS, place)
    if data["v"] != FORMAT_VERSION:
        raise place.error(
            "v", data["v"], str(FORMAT_VERSION), "unknown version of the trace format"
        )
    for name, allowed in (("side", SIDES), ("kind", KINDS)):
        if data[name] not in allowed:
            raise place.error(name, data[name], " or ".join(allowed), "unknown value")
    if not -_LATEST < data["t"] < _LATEST:  # false for NaN, and never converts a long integer
        raise place.error("t", str(data["t"])[:_SHOWN_CHARACTERS], "seconds", "no time")
    message = data.get("message")
    if message is not None:
        if not isinstance(message, dict):
            raise place.error("message", message, "an object", "wrong type")
        _require(message, _MESSAGE_FIELDS, place)
    optional = {"status": _NULLABLE_INT, "status_name": (str, type(None))}
    _require({name: data.get(name) for name in optional}, optional, place)
    return Record(
        seq=data["seq"],
        t=float(data["t"]),
        side=data["side"],
        session=data["session"],
        kind=data["kind"],
        step=data["step"],
        params=data["params"],
        state=data["state"],
        message=None
        if message is None
        else Message(**{key: message[key] for key in _MESSAGE_FIELDS}),
        status=data.get("status"),
        status_name=data.get("status_name"),
    )


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; ValueError if a name is there twice, since readers differ in which counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _require(
    data: Mapping[str, object], fields: Mapping[str, tuple[type, ...]], place: _Place
) -> None:
    for name, kinds in fields.items():
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        if name not in data:
            raise place.error(name, None, names, "a field is missing")
        value = data[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise place.error(name, value, names, "a field has a wrong type")


def _json_value(value: object) -> object:
    """JSON form of a parameter or state value; NumPy GPAs become page ranges, bytes become hex."""
    match value:
        case np.ndarray():
            return page_ranges(value)
        case enum.Enum():
            return value.name
        case np.generic():
            return value.item()
        case bytes() | bytearray() | memoryview():
            return bytes(value).hex()
        case dict():
            return {str(name): _json_value(item) for name, item in value.items()}
        case list() | tuple():
            return [_json_value(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise UsageError(f"{type(value).__name__} cannot be written to a trace: {value!r}")
