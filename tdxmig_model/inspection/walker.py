"""One framing, record by record: what every walker shares, and how a bundle is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Final

from tdxmig_model.errors import WireError
from tdxmig_model.inspection.entry import Entry, Problem, ranges
from tdxmig_model.inspection.judge import Judge
from tdxmig_model.inspection.reader import Ended, Reader
from tdxmig_model.wire.constants import (
    GPA_ENTRY_SIZE,
    MAC_SIZE,
    MAX_ENTRIES,
    MBMD_SIZE,
    PAGE_SIZE,
    START_EPOCH,
)
from tdxmig_model.wire.gpa_list import Column, check_entries, entries_from_bytes
from tdxmig_model.wire.layout import MBMD, MBMD_SPECIFIC, MESSAGE, TDX_HEADER, Structure, Value
from tdxmig_model.wire.mbmd import BundleType, Mbmd
from tdxmig_model.wire.records import HEADER_SIZE, MEMORY_TYPES, MigrationHeader, check_head

_TYPES: Final = {kind.value: kind for kind in BundleType}
_NAMES: Final = {
    BundleType.IMMUTABLE_TD_STATE: "immutable state",
    BundleType.MUTABLE_TD_STATE: "TD state",
    BundleType.MUTABLE_VCPU_STATE: "vCPU state",
    BundleType.MEM: "memory",
    BundleType.EPOCH_TOKEN: "epoch token",
    BundleType.ABORT_TOKEN: "abort token",
}


class Lost(Exception):
    """Where the next record begins cannot be known."""

    def __init__(self, offset: int, text: str) -> None:
        self.offset, self.text = offset, text
        super().__init__(text)


class NotDescribed(Exception):
    """What follows is somebody else's and has no length; nothing is wrong with it."""


class Walker(ABC):
    """Reads the records of one file."""

    def __init__(self, reader: Reader, judge: Judge) -> None:
        self.reader = reader
        self.judge = judge

    def entries(self) -> Iterator[Entry]:
        """Every record, up to the end of the file or to where the stream is lost."""
        while self.reader.peek(1):
            entry, lost = Entry("unknown", self.reader.offset), True
            try:
                self._read(entry)
                lost = False
            except Ended as end:
                text = f"the file ends inside this record: {end.found} of {end.wanted} bytes"
                entry.blame(end.offset, text)
            except NotDescribed as why:
                entry.fields["note"] = f"{why}; reading ends here"
            except Lost as why:
                entry.blame(why.offset, f"{why.text}; what follows cannot be decoded")
            entry.length = self.reader.offset - entry.offset
            yield entry
            if lost:
                return

    @abstractmethod
    def _read(self, entry: Entry) -> None:
        """Read one record, at least one byte, into `entry`.  Raises Ended or Lost."""

    def _judged(self, entry: Entry, check: Callable[[], object], at: int = 0) -> bool:
        """Whether a strict decoder takes what was read; what it says is noted."""
        try:
            check()
        except WireError as error:
            entry.problems.append(Problem.of(error, at))
            return False
        return True

    # --- bundles ---------------------------------------------------------------------------------

    def _read_bundle(self, entry: Entry, allowed: frozenset[BundleType]) -> tuple[int, Column]:
        """A bundle of the single-channel framing; the flags of its header and its GPA list."""
        at = self.reader.offset
        fixed = self.reader.take(HEADER_SIZE + MBMD_SIZE)
        header = numbers(TDX_HEADER, fixed)
        entry.fields |= header
        self._name_bundle(entry, fixed[HEADER_SIZE:])
        mbmd = self._judge_head(entry, fixed, allowed, at)
        count = header["buf_list_num"]
        if count > MAX_ENTRIES:
            raise Lost(at + 2, f"{count} buffers, and a bundle has at most {MAX_ENTRIES}")
        self._check_size(entry, at + HEADER_SIZE)
        memory = self._is_memory(entry, allowed == MEMORY_TYPES)
        self.reader.skip(count * PAGE_SIZE)
        entries = self._read_list(entry, count if memory else 0)
        self.reader.skip(count * MAC_SIZE if memory else 0)
        if mbmd is not None:
            self.judge.bundle(entry, mbmd)
        return header["flags"], entries

    def _judge_head(
        self, entry: Entry, fixed: bytes, allowed: frozenset[BundleType], at: int
    ) -> Mbmd | None:
        """The MBMD if the strict decoder takes it; each of three judges tells its first finding."""
        found: list[Mbmd] = []
        header: list[MigrationHeader] = []
        head = fixed[:HEADER_SIZE]
        self._judged(entry, lambda: header.append(MigrationHeader.unpack(head, stream_offset=at)))
        self._judged(
            entry,
            lambda: found.append(Mbmd.unpack(fixed, offset=HEADER_SIZE, stream_offset=at)),
        )
        if header and found:
            self._judged(entry, lambda: check_head(header[0], found[0], allowed, at))
        return found[0] if found else None

    def _name_bundle(self, entry: Entry, raw: bytes) -> None:
        """Note the fields of an MBMD, and name the record after it."""
        fields = MBMD.decode(raw)
        kind = _TYPES.get(as_number(fields["bundle_type"]))
        if kind is not None:
            del fields["type_specific"]
            own = Structure(MBMD.name, "", MBMD.size, MBMD.byteorder, MBMD_SPECIFIC[kind])
            fields |= own.decode(raw)
            start = kind is BundleType.EPOCH_TOKEN and fields["mig_epoch"] == START_EPOCH
            entry.record = "start token" if start else _NAMES[kind]
        entry.mbmd = fields

    def _check_size(self, entry: Entry, at: int) -> None:
        size = as_number((entry.mbmd or {})["size"])
        if size != MBMD_SIZE:
            raise Lost(at, f"an MBMD of {size} bytes, and there is none but of {MBMD_SIZE}")

    def _is_memory(self, entry: Entry, expected: bool) -> bool:
        """Whether a GPA list and MACs follow: as the MBMD says, or else as its place does."""
        kind = as_number((entry.mbmd or {})["bundle_type"])
        return kind == BundleType.MEM if kind in _TYPES else expected

    def _read_list(self, entry: Entry, count: int) -> Column:
        at = self.reader.offset
        entries = entries_from_bytes(self.reader.take(count * GPA_ENTRY_SIZE))
        self._judged(entry, lambda: check_entries(entries, offset=at))
        entry.gpas = ranges(entries)
        return entries

    # --- messages --------------------------------------------------------------------------------

    def _read_frame(self, entry: Entry) -> bytes:
        """A message of ours or of QEMU's return path, with its frame; its type gives the name."""
        frame = self.reader.take(MESSAGE.size)
        found = numbers(MESSAGE, frame)
        entry.fields |= found
        payload = self.reader.take(found["length"])
        return frame + payload


def numbers(structure: Structure, raw: bytes) -> dict[str, int]:
    """The fields of a structure that has numbers only."""
    return {name: as_number(value) for name, value in structure.decode(raw).items()}


def as_number(value: Value) -> int:
    """A field that is a number."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no number")
    return value
