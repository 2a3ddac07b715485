"""The walkers: single-channel records, multifd packets, the return path."""

from __future__ import annotations

import struct
from typing import Final

from tdxmig_model.inspection.entry import Entry
from tdxmig_model.inspection.walker import Lost, Walker, as_number, numbers
from tdxmig_model.wire.constants import MAC_SIZE, MAX_ENTRIES, MBMD_SIZE, PAGE_SIZE
from tdxmig_model.wire.extensions import EXTENSION_MARK, MessageType, ReturnPathParser
from tdxmig_model.wire.layout import (
    HELLO,
    MULTIFD_INITIAL,
    MULTIFD_PACKET,
    RAM_RECORD,
)
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.multifd import (
    INITIAL_SIZE,
    MAGIC,
    PACKET_HEADER_SIZE,
    VERSION,
    MultifdParser,
    PacketHead,
    check_packet_mbmd,
)
from tdxmig_model.wire.records import (
    END_TYPES,
    EPOCH_TYPES,
    FLAG_CONTINUE,
    FOOTER,
    MEMORY_TYPES,
    RAM_BLOCK,
    SECTION_END,
    SECTION_START,
    START_TYPES,
    RamFlags,
    RecordParser,
)

_MESSAGES: Final = {kind.value: kind.name for kind in MessageType}
QEMU_MESSAGES: Final = range(1, 8)
_PRIVATE: Final = 0x8
_COMPRESSION: Final = 0xE


class RecordWalker(Walker):
    """The single-channel framing, or the main channel beside multifd."""

    _chained = False
    _footer_allowed = False
    _block: str | None = None

    def _read(self, entry: Entry) -> None:
        footer_allowed, self._footer_allowed = self._footer_allowed, False
        first = self.reader.peek(1)[0]
        if first == EXTENSION_MARK:
            self._read_message(entry)
        elif self._chained:
            self._read_link(entry)
        elif first == SECTION_START:
            self._take_section_byte()
            self._read_bundle(entry, START_TYPES)
        elif first == SECTION_END:
            entry.record = "end section"
            self._take_section_byte()
            self._chained = True
        elif first == FOOTER:
            entry.record = "footer"
            if not footer_allowed:
                entry.blame(entry.offset, "a footer that does not follow the start token")
            self.reader.take(1)
        elif first == 0:
            self._read_ram(entry)
        else:
            raise Lost(entry.offset, f"no record begins with {first:#04x}")

    def _take_section_byte(self) -> None:
        self.reader.take(1)

    def _read_link(self, entry: Entry) -> None:
        flags, _ = self._read_bundle(entry, END_TYPES)
        self._chained = bool(flags & FLAG_CONTINUE)
        self._footer_allowed = not self._chained

    def _read_message(self, entry: Entry) -> None:
        self.reader.take(1)
        frame = self._read_frame(entry)
        kind = as_number(entry.fields["type"])
        entry.record = _MESSAGES.get(kind, f"message {kind:#06x}")
        whole = bytes((EXTENSION_MARK,)) + frame
        self._judged(entry, lambda: list(RecordParser().records(whole)), entry.offset)
        note_payload(entry, kind, frame[4:])
        if self._chained:
            if kind != MessageType.SOURCE_ABORT:
                entry.blame(entry.offset, f"{entry.record} inside the end section")
            self._chained = False

    def _read_ram(self, entry: Entry) -> None:
        entry.record = "RAM record"
        at = self.reader.offset
        fields = numbers(RAM_RECORD, self.reader.take(8))
        entry.fields |= {f"ram_{name}": value for name, value in fields.items()}
        flags = fields["flags"]
        kind = flags & ~RamFlags.CONTINUE
        if flags == RamFlags.CGS_EPOCH:
            self._blame_offset(entry, fields["offset"])
            self._read_bundle(entry, EPOCH_TYPES)
        elif flags in (RamFlags.END_OF_SECTION, RamFlags.MULTIFD_FLUSH):
            self._blame_offset(entry, fields["offset"])
            end = flags == RamFlags.END_OF_SECTION
            entry.record = "end of pass" if end else "multifd flush"
        elif kind in (RamFlags.CGS_STATE, RamFlags.PAGE, RamFlags.ZERO):
            self._read_block(entry, flags, at)
            self._read_page(entry, kind, fields["offset"])
        else:
            raise Lost(at + 6, f"RAM flags {flags:#x} of no known record")

    def _blame_offset(self, entry: Entry, offset: int) -> None:
        if offset:
            entry.blame(entry.offset, f"offset {offset:#x} in a record that names no page")

    def _read_block(self, entry: Entry, flags: int, at: int) -> None:
        if not flags & RamFlags.CONTINUE:
            length = self.reader.take(1)[0]
            raw = self.reader.take(length)
            name = raw.decode("ascii", "backslashreplace")
            if not (name and raw.isascii() and name.isprintable()):
                entry.blame(at + 9, f"block name {name!r}, expected printable ASCII")
            self._block = name
        elif self._block is None:
            entry.blame(at + 6, "flag 0x20 (block as before), and no block was named yet")
        entry.fields["block"] = self._block or ""

    def _read_page(self, entry: Entry, kind: int, offset: int) -> None:
        if kind == RamFlags.CGS_STATE:
            _, entries = self._read_bundle(entry, MEMORY_TYPES)
            if self._block == RAM_BLOCK:
                self.judge.offsets(entry, [offset], entries)
            return
        entry.record = "shared page" if kind == RamFlags.PAGE else "shared page of one byte"
        if kind == RamFlags.PAGE:
            self.reader.skip(PAGE_SIZE)
        else:
            entry.fields["fill"] = self.reader.take(1)[0]


class MultifdWalker(Walker):
    """A side channel of multifd."""

    _begun = False

    def _read(self, entry: Entry) -> None:
        begun, self._begun = self._begun, True
        head = self.reader.peek(PACKET_HEADER_SIZE)
        fields = MULTIFD_PACKET.decode(head)
        magic, version = as_number(fields["magic"]), as_number(fields["version"])
        if (magic, version) != (MAGIC, VERSION):
            raise Lost(entry.offset, f"no packet begins with magic {magic:#x}, version {version}")
        # An initial packet has zeros, or the UUID, where a packet has its number of offsets.
        slots = as_number(fields["pages_alloc"])
        if not begun and not (
            1 <= slots <= MAX_ENTRIES and as_number(fields["normal_pages"]) <= slots
        ):
            self._read_initial(entry)
        else:
            self._read_packet(entry)

    def _read_initial(self, entry: Entry) -> None:
        entry.record = "initial packet"
        raw = self.reader.take(INITIAL_SIZE)
        entry.fields |= MULTIFD_INITIAL.decode(raw)
        self._judged(entry, lambda: list(MultifdParser().records(raw)), entry.offset)

    def _read_packet(self, entry: Entry) -> None:
        entry.record, at = "packet", entry.offset
        raw = self.reader.take(PACKET_HEADER_SIZE)
        entry.fields |= MULTIFD_PACKET.decode(raw)
        self._judged(entry, lambda: PacketHead.unpack(raw, at, MAX_ENTRIES))
        flags, slots, pages = (
            as_number(entry.fields[name]) for name in ("flags", "pages_alloc", "normal_pages")
        )
        if not 1 <= slots <= MAX_ENTRIES:
            raise Lost(at + 12, f"room for {slots} offsets, and a packet has 1 to {MAX_ENTRIES}")
        if pages > slots:
            raise Lost(at + 16, f"{pages} pages in a packet with room for {slots} offsets")
        column = self.reader.take(slots * 8)
        offsets = list(struct.unpack(f">{pages}Q", column[: pages * 8]))
        method = flags & _COMPRESSION
        if pages and method == _PRIVATE:
            self._read_private(entry, offsets)
        elif pages:
            entry.record = "shared pages"
            entry.fields["offsets"] = spans(offsets)
            size = as_number(entry.fields["next_packet_size"])
            self.reader.skip(size if method else pages * PAGE_SIZE)
        else:
            entry.record = "sync" if flags & 1 else "empty packet"

    def _read_private(self, entry: Entry, offsets: list[int]) -> None:
        at, pages = self.reader.offset, len(offsets)
        raw = self.reader.take(MBMD_SIZE)
        self._name_bundle(entry, raw)
        found: list[Mbmd] = []
        self._judged(entry, lambda: found.append(Mbmd.unpack(raw, stream_offset=at)))
        if found:
            self._judged(entry, lambda: check_packet_mbmd(found[0], pages, at))
        entries = self._read_list(entry, pages)
        self.reader.skip(pages * (MAC_SIZE + PAGE_SIZE))
        if found:
            self.judge.bundle(entry, found[0])
        if entry.fields["block"] == RAM_BLOCK:
            self.judge.offsets(entry, offsets, entries)


class ReturnPathWalker(Walker):
    """The return path: messages of ours, and QEMU's own between them."""

    def _read(self, entry: Entry) -> None:
        frame = self._read_frame(entry)
        kind = as_number(entry.fields["type"])
        if kind in QEMU_MESSAGES:
            entry.record = f"QEMU return-path message {kind}"
            return
        entry.record = _MESSAGES.get(kind, f"message {kind:#06x}")
        self._judged(entry, lambda: list(ReturnPathParser().records(frame)), entry.offset)
        note_payload(entry, kind, frame[4:])
        if kind == MessageType.ABORT_TOKEN and len(frame) == 4 + MBMD_SIZE:
            self._name_bundle(entry, frame[4:])
            entry.record = MessageType.ABORT_TOKEN.name


def note_payload(entry: Entry, kind: int, payload: bytes) -> None:
    """Note what a message says beside its type."""
    if kind == MessageType.HELLO:
        entry.fields |= HELLO.decode(payload)
    elif kind in (MessageType.FAILED, MessageType.SOURCE_ABORT):
        entry.fields["reason"] = payload.decode("utf-8", "backslashreplace")
    elif kind == MessageType.COMMITTED and payload:
        entry.fields["digest"] = payload


def spans(offsets: list[int]) -> str:
    """Offsets of pages as text: runs of neighbours as first..past."""
    runs: list[list[int]] = []
    for offset in offsets:
        if runs and offset == runs[-1][1]:
            runs[-1][1] += PAGE_SIZE
        else:
            runs.append([offset, offset + PAGE_SIZE])
    return " ".join(f"{first:#x}..{past:#x}" for first, past in runs)
