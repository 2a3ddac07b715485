"""The single-channel framing of QEMU's TDX migration: bytes <-> records.

::

    0x09 bundle                              immutable state
    be64 0x800, bundle                       epoch token
    be64 offset|0x400[|0x20] [u8 length, block name] bundle     memory; 0x20 = block as before
    be64 offset|0x008[|0x20] [u8 length, block name] 4096 bytes shared page
    be64 offset|0x002[|0x20] [u8 length, block name] u8         shared page full of that byte
    be64 0x200 / be64 0x10                   multifd channels are in step / end of the pass
    0x0A bundle bundle ... [0x7E]            TD state, vCPU states, start token; footer
    0x54 message                             ours, see `extensions`

    bundle = TDX header, MBMD, n pages of 4096 [, n GPA list entries of 8, n MACs of 16 if memory]
    TDX header = u16 flags (bit 0: another bundle follows), u16 n

QEMU's own integers are big-endian, the TDX header and everything of the TDX module are
little-endian.  QEMU sends one page per memory bundle; n up to 512 is what its loader reads.
CANCEL is a memory record whose GPA list says so: QEMU's flag 0x1000 is bit 12 of the offset.

Only form is judged here: no order of records, no counters, no keys.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Final, TypeAlias

import numpy as np

from tdxmig_model.wire.constants import (
    ADDRESS_BITS,
    GPA_ENTRY_SIZE,
    MAC_SIZE,
    MAX_ENTRIES,
    MBMD_SIZE,
    PAGE_SIZE,
    ByteBuffer,
)
from tdxmig_model.wire.extensions import (
    EXTENSION_MARK,
    Hello,
    MessageType,
    SourceAbort,
    encode_forward,
    parse_forward,
)
from tdxmig_model.wire.fault import fault
from tdxmig_model.wire.gpa_list import (
    GpaOperation,
    check_entries,
    entries_from_bytes,
    entry_operations,
)
from tdxmig_model.wire.incremental import IncrementalParser, Needs
from tdxmig_model.wire.mbmd import BundleType, Mbmd

SECTION_START: Final = 0x09
SECTION_END: Final = 0x0A
FOOTER: Final = 0x7E
RAM_BLOCK: Final = "pc.ram"
HEADER_SIZE: Final = 4
FLAG_CONTINUE: Final = 0x1

_HEADER: Final = struct.Struct("<HH")
_RAM: Final = struct.Struct(">Q")
_FLAGS_MASK: Final = PAGE_SIZE - 1
_NO_BLOCK: Final = "no 0x20: no block was named yet"
START_TYPES: Final = frozenset({BundleType.IMMUTABLE_TD_STATE})
EPOCH_TYPES: Final = frozenset({BundleType.EPOCH_TOKEN})
MEMORY_TYPES: Final = frozenset({BundleType.MEM})
END_TYPES: Final = frozenset(
    {BundleType.MUTABLE_TD_STATE, BundleType.MUTABLE_VCPU_STATE, BundleType.EPOCH_TOKEN}
)


class RamFlags(IntFlag):
    """The low 12 bits of a RAM record's be64 (QEMU).  Only the last three carry private memory."""

    ZERO = 0x02
    MEMORY_SIZE = 0x04
    PAGE = 0x08
    END_OF_SECTION = 0x10
    XBZRLE = 0x40
    COMPRESS = 0x100
    MULTIFD_FLUSH = 0x200
    CONTINUE = 0x20
    CGS_STATE = 0x400
    CGS_EPOCH = 0x800


# Flags of the records that name a page, and of those that are nothing but their be64.
_PAGE_FLAGS: Final = (RamFlags.CGS_STATE, RamFlags.PAGE, RamFlags.ZERO)
_MARKS: Final = (RamFlags.MULTIFD_FLUSH, RamFlags.END_OF_SECTION)


@dataclass(frozen=True, slots=True)
class MigrationHeader:
    """The TDX header of a bundle: 4 bytes, little-endian."""

    flags: int = 0
    buf_list_num: int = 0

    @property
    def another_follows(self) -> bool:
        """Flag bit 0: the chain of the end section goes on after this bundle."""
        return bool(self.flags & FLAG_CONTINUE)

    def pack(self) -> bytes:
        """The 4 bytes.  Raises WireError as `unpack`."""
        self._check(0)
        return _HEADER.pack(self.flags, self.buf_list_num)

    @classmethod
    def unpack(cls, buffer: ByteBuffer, *, stream_offset: int = 0) -> MigrationHeader:
        """Decode 4 bytes.  Raises WireError on undefined flags or more than 512 buffers."""
        length = memoryview(buffer).nbytes
        if length != HEADER_SIZE:
            raise fault("TDX header", stream_offset, "length", length, str(HEADER_SIZE))
        header = cls(*_HEADER.unpack(buffer))
        header._check(stream_offset)
        return header

    def _check(self, at: int) -> None:
        if self.flags not in (0, FLAG_CONTINUE):
            raise fault("TDX header", at, "flags", hex(self.flags), "0 or 1")
        if not 0 <= self.buf_list_num <= MAX_ENTRIES:
            bound = f"0 to {MAX_ENTRIES}"
            raise fault("TDX header", at + 2, "buf_list_num", self.buf_list_num, bound)


@dataclass(frozen=True, slots=True)
class Bundle:
    """One migration bundle as it travels.

    `pages` are buffers of 4096 bytes; `gpa_list` (8 bytes per page) and `macs` (16 per page) are
    empty unless the bundle is memory.  As a record of its own it is a link of the end section.
    """

    header: MigrationHeader
    mbmd: Mbmd
    pages: Sequence[ByteBuffer] = ()
    gpa_list: bytes = b""
    macs: bytes = b""

    @classmethod
    def of(
        cls,
        mbmd: Mbmd,
        pages: Sequence[ByteBuffer] = (),
        gpa_list: bytes = b"",
        macs: bytes = b"",
        *,
        another_follows: bool = False,
    ) -> Bundle:
        """A bundle with the header that its pages ask for."""
        flags = FLAG_CONTINUE if another_follows else 0
        return cls(MigrationHeader(flags, len(pages)), mbmd, pages, gpa_list, macs)


@dataclass(frozen=True, slots=True)
class StartSection:
    """0x09: the immutable state."""

    bundle: Bundle


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """RAM record 0x800: an epoch token."""

    bundle: Bundle


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """RAM record 0x400: private pages.

    `offset` is that of the first page in the RAM block, in bytes; nothing ties it to the GPAs of
    the list, so the receiver has to compare them.  `same_block` is flag 0x20: the block name is
    left out because it is that of the record before.  `cancel` is no flag on the wire: it says
    that the list has CANCEL entries and none with content.
    """

    offset: int
    block: str
    bundle: Bundle
    cancel: bool = False
    same_block: bool = False


@dataclass(frozen=True, slots=True)
class SharedPage:
    """RAM record 0x008 or 0x002: one page that the guest shares with the host, in the clear.

    `page` is its 4096 bytes.  `fill`, 0 to 255, stands for all of them (0x002) and is then sent
    instead; None sends `page`.  `offset`, `block` and `same_block` as in `MemoryRecord`.
    """

    offset: int
    block: str
    page: ByteBuffer
    fill: int | None = None
    same_block: bool = False


@dataclass(frozen=True, slots=True)
class MultifdFlush:
    """RAM record 0x200: what follows comes after everything that the channels carry before their
    next sync."""


@dataclass(frozen=True, slots=True)
class EndOfPass:
    """RAM record 0x010: the end of the RAM records of a section."""


@dataclass(frozen=True, slots=True)
class EndSection:
    """0x0A: `Bundle` records follow, up to and with the start token."""


@dataclass(frozen=True, slots=True)
class Footer:
    """0x7E: closes the end section (not sent by the oldest QEMU generation)."""


Record: TypeAlias = (
    StartSection
    | EpochRecord
    | MemoryRecord
    | SharedPage
    | MultifdFlush
    | EndOfPass
    | EndSection
    | Bundle
    | Footer
    | Hello
    | SourceAbort
)


def encode(record: Record) -> list[bytes | memoryview]:
    """The record as a list of buffers to write in order; pages are referenced, not copied.

    Raises WireError on anything that `RecordParser` would refuse.
    """
    match record:
        case StartSection(bundle):
            return _encode_bundle(bytes((SECTION_START,)), bundle, START_TYPES)
        case EpochRecord(bundle):
            return _encode_bundle(_RAM.pack(RamFlags.CGS_EPOCH), bundle, EPOCH_TYPES)
        case MemoryRecord():
            return _encode_memory(record)
        case SharedPage():
            return _encode_shared(record)
        case MultifdFlush():
            return [_RAM.pack(RamFlags.MULTIFD_FLUSH)]
        case EndOfPass():
            return [_RAM.pack(RamFlags.END_OF_SECTION)]
        case EndSection():
            return [bytes((SECTION_END,))]
        case Bundle():
            return _encode_bundle(b"", record, END_TYPES)
        case Footer():
            return [bytes((FOOTER,))]
        case Hello() | SourceAbort():
            return [encode_forward(record)]
    raise fault("record", 0, "type", type(record).__name__, "a record of the forward path")


class RecordParser(IncrementalParser[Record]):
    """Decodes the forward path.

    The end section comes as EndSection, then one Bundle each, then Footer if there is one.
    """

    def __init__(self) -> None:
        self._in_end_section = False
        self._block: str | None = None
        super().__init__()

    @property
    def in_end_section(self) -> bool:
        """True after EndSection until its last bundle: the stream must not end here."""
        return self._in_end_section

    def _check_end(self) -> None:
        if self._in_end_section:
            at = self.offset
            raise fault("the stream ends inside the end section", at, "bundle", None, "a bundle")

    def _parse(self) -> Generator[int | Record, memoryview, None]:
        footer_allowed = False
        while True:
            first = (yield 1)[0]
            if first == SECTION_END:
                yield EndSection()
                self._in_end_section = True
                footer_allowed = yield from self._parse_chain()
                self._in_end_section = False
                continue
            if first == FOOTER and footer_allowed:
                yield Footer()
            else:
                yield (yield from self._parse_simple(first))
            footer_allowed = False

    def _parse_simple(self, first: int) -> Needs[Record]:
        """A record that stands alone, of which the first byte is known."""
        at = self.offset
        if first == 0:
            return (yield from self._parse_ram(at))
        if first == SECTION_START:
            return StartSection((yield from _parse_bundle(at + 1, b"", START_TYPES)))
        if first == EXTENSION_MARK:
            return (yield from parse_forward(at))
        bound = "0x00 RAM record, 0x09 start, 0x0a end, 0x54 message, 0x7e only after the end"
        raise fault("record", at, "first byte", hex(first), bound)

    def _parse_ram(self, at: int) -> Needs[Record]:
        word = int.from_bytes((yield 7), "big")
        offset, flags = word & ~_FLAGS_MASK, word & _FLAGS_MASK
        if flags in (RamFlags.CGS_EPOCH, *_MARKS):
            if offset:
                name = "epoch record" if flags == RamFlags.CGS_EPOCH else "RAM record"
                raise fault(name, at, "offset", hex(offset), "0")
            if flags == RamFlags.CGS_EPOCH:
                return EpochRecord((yield from _parse_bundle(at + 8, b"", EPOCH_TYPES)))
            return MultifdFlush() if flags == RamFlags.MULTIFD_FLUSH else EndOfPass()
        kind = flags & ~RamFlags.CONTINUE
        if kind not in _PAGE_FLAGS:
            bound = "0x400 private memory, 0x8 or 0x2 shared, each with or without 0x20; "
            bound += "0x800 epoch, 0x200 flush, 0x10 end"
            raise fault("RAM record", at + 6, "flags", hex(flags), bound)
        if offset >> ADDRESS_BITS:
            raise fault("RAM record", at, "offset", hex(offset), f"below 2**{ADDRESS_BITS}")
        same_block = bool(flags & RamFlags.CONTINUE)
        return (yield from self._parse_page(at, offset, kind, same_block))

    def _parse_page(self, at: int, offset: int, kind: int, same_block: bool) -> Needs[Record]:
        """A record that names a page, from its block name on."""
        header_at = at + 8
        if not same_block:
            length = (yield 1)[0]
            self._block = yield from _parse_block(length, header_at)
            header_at += 1 + length
        if self._block is None:
            raise fault("RAM record", at + 6, "flags", hex(kind | RamFlags.CONTINUE), _NO_BLOCK)
        if kind == RamFlags.ZERO:
            fill = (yield 1)[0]
            return SharedPage(offset, self._block, bytes((fill,)) * PAGE_SIZE, fill, same_block)
        if kind == RamFlags.PAGE:
            return SharedPage(offset, self._block, (yield PAGE_SIZE), None, same_block)
        bundle = yield from _parse_bundle(header_at, b"", MEMORY_TYPES)
        return MemoryRecord(offset, self._block, bundle, cancels(bundle), same_block)

    def _parse_chain(self) -> Generator[int | Record, memoryview, bool]:
        """The bundles of the end section.  True when they are complete, False when aborted."""
        while True:
            first = bytes((yield 1))
            if first[0] == EXTENSION_MARK:
                yield (yield from parse_forward(self.offset, MessageType.SOURCE_ABORT))
                return False
            bundle = yield from _parse_bundle(self.offset, first, END_TYPES)
            yield bundle
            if not bundle.header.another_follows:
                return True


def _parse_block(length: int, at: int) -> Needs[str]:
    if not length:
        raise fault("RAM record", at, "block name length", 0, "1 to 255")
    name = bytes((yield length))
    try:
        return _check_block(name.decode("ascii"), at + 1)
    except UnicodeDecodeError:
        raise fault("RAM record", at + 1, "block", name, "printable ASCII") from None


def _check_block(name: str, at: int) -> str:
    if not (1 <= len(name) <= 255 and name.isascii() and name.isprintable()):
        raise fault("RAM record", at, "block", name, "1 to 255 printable ASCII characters")
    return name


def _parse_bundle(at: int, head: bytes, allowed: frozenset[BundleType]) -> Needs[Bundle]:
    """Decode the bundle at `at`, of which `head` has been read already."""
    fixed = head + bytes((yield HEADER_SIZE + MBMD_SIZE - len(head)))
    header = MigrationHeader.unpack(fixed[:HEADER_SIZE], stream_offset=at)
    mbmd = Mbmd.unpack(fixed, offset=HEADER_SIZE, stream_offset=at)
    check_head(header, mbmd, allowed, at)
    count = header.buf_list_num
    if not count:
        return Bundle(header, mbmd)
    memory = mbmd.bundle_type is BundleType.MEM
    body = yield count * (PAGE_SIZE + (GPA_ENTRY_SIZE + MAC_SIZE if memory else 0))
    pages = [body[start : start + PAGE_SIZE] for start in range(0, count * PAGE_SIZE, PAGE_SIZE)]
    if not memory:
        return Bundle(header, mbmd, pages)
    gpa_list_at = count * PAGE_SIZE
    macs_at = gpa_list_at + count * GPA_ENTRY_SIZE
    gpa_list = bytes(body[gpa_list_at:macs_at])
    list_offset = at + HEADER_SIZE + MBMD_SIZE + gpa_list_at
    check_entries(entries_from_bytes(gpa_list), offset=list_offset)
    return Bundle(header, mbmd, pages, gpa_list, bytes(body[macs_at:]))


def check_head(
    header: MigrationHeader, mbmd: Mbmd, allowed: frozenset[BundleType], at: int
) -> None:
    """Cross-check header, MBMD and the kind of record they stand in, which is told by the types
    that it can hold.  Raises WireError; `at` is where the bundle begins."""
    kind, count = mbmd.bundle_type, header.buf_list_num
    type_at = at + HEADER_SIZE + 6
    if kind not in allowed:
        bound = " or ".join(member.name for member in sorted(allowed))
        raise fault("bundle of another record", type_at, "bundle_type", kind.name, bound)
    if kind.is_token and count:
        raise fault(f"{kind.name} bundle", at + 2, "buf_list_num", count, "0")
    if not kind.is_token and not count:
        raise fault(f"{kind.name} bundle", at + 2, "buf_list_num", 0, f"1 to {MAX_ENTRIES}")
    if kind is BundleType.MEM and mbmd.num_gpas != count:
        field_at = at + HEADER_SIZE + 24
        raise fault("MEM bundle", field_at, "num_gpas", mbmd.num_gpas, f"{count} (buf_list_num)")
    # Only the end section is a chain, and its start token is what ends it.
    chained = allowed is END_TYPES and not kind.is_token
    if header.another_follows != chained:
        raise fault(f"{kind.name} bundle", at, "flags", header.flags, str(int(chained)))


def _page_head(record: MemoryRecord | SharedPage, kind: RamFlags) -> bytes:
    """The be64 and the block name of a record that names a page."""
    if record.offset & _FLAGS_MASK or not 0 <= record.offset < 1 << ADDRESS_BITS:
        bound = f"4 KiB aligned, below 2**{ADDRESS_BITS}"
        raise fault("RAM record", 0, "offset", hex(record.offset), bound)
    head = _RAM.pack(record.offset | kind | (RamFlags.CONTINUE if record.same_block else 0))
    name = _check_block(record.block, 9).encode("ascii")
    return head if record.same_block else head + bytes((len(name),)) + name


def _encode_shared(record: SharedPage) -> list[bytes | memoryview]:
    page = page_view(record.page, 0)
    if record.fill is None:
        return [_page_head(record, RamFlags.PAGE), page]
    if not 0 <= record.fill <= 0xFF:
        raise fault("shared page", 8, "fill", record.fill, "0 to 255")
    if bytes(page) != bytes((record.fill,)) * PAGE_SIZE:
        raise fault("shared page", 8, "fill", record.fill, "None: the page holds something else")
    return [_page_head(record, RamFlags.ZERO) + bytes((record.fill,))]


def _encode_memory(record: MemoryRecord) -> list[bytes | memoryview]:
    head = _page_head(record, RamFlags.CGS_STATE)
    buffers = _encode_bundle(head, record.bundle, MEMORY_TYPES)
    operations = entry_operations(entries_from_bytes(record.bundle.gpa_list))
    # A cancel that the module refused is a NOP, so a cancel record may have no CANCEL entry left.
    if record.cancel and (operations & 1).any():
        raise fault("memory record", 0, "cancel", True, "a GPA list without MIGRATE or REMIGRATE")
    if not record.cancel and cancels(record.bundle):
        raise fault("memory record", 0, "cancel", False, "True: its GPA list says CANCEL")
    return buffers


def cancels(bundle: Bundle) -> bool:
    """True when the GPA list of a memory bundle has CANCEL entries and none that migrates."""
    operations = entry_operations(entries_from_bytes(bundle.gpa_list))
    # MIGRATE and REMIGRATE are the odd operations.
    return bool(np.any(operations == GpaOperation.CANCEL)) and not bool((operations & 1).any())


def _encode_bundle(
    head: bytes, bundle: Bundle, allowed: frozenset[BundleType]
) -> list[bytes | memoryview]:
    header, mbmd = bundle.header.pack(), bundle.mbmd.pack()
    at = len(head)
    check_head(bundle.header, Mbmd.unpack(mbmd), allowed, at)
    count = bundle.header.buf_list_num
    if len(bundle.pages) != count:
        raise fault("bundle", at + 2, "buf_list_num", count, f"{len(bundle.pages)} (pages)")
    memory = bundle.mbmd.bundle_type is BundleType.MEM
    entries, tags = (count, count) if memory else (0, 0)
    for field, value, size in (
        ("gpa_list", bundle.gpa_list, entries * GPA_ENTRY_SIZE),
        ("macs", bundle.macs, tags * MAC_SIZE),
    ):
        if len(value) != size:
            raise fault("bundle", at, field, f"{len(value)} bytes", f"{size} bytes")
    buffers: list[bytes | memoryview] = [head + header + mbmd]
    buffers += [page_view(page, index) for index, page in enumerate(bundle.pages)]
    if memory:
        check_entries(entries_from_bytes(bundle.gpa_list))
        buffers += [bundle.gpa_list, bundle.macs]
    return buffers


def page_view(page: ByteBuffer, index: int) -> bytes | memoryview:
    """Page `index` of a bundle as 4096 plain bytes, not copied.  Raises WireError."""
    if isinstance(page, bytes):
        view: bytes | memoryview = page
    else:
        try:
            view = memoryview(page).cast("B")
        except TypeError:
            raise fault("bundle", 0, f"page {index}", page, "a contiguous buffer") from None
    if len(view) != PAGE_SIZE:
        raise fault("bundle", 0, f"page {index}", f"{len(view)} bytes", f"{PAGE_SIZE} bytes")
    return view
