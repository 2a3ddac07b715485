"""The multifd framing of QEMU's TDX migration: packets of many pages on side channels.

Each side channel begins with one initial packet and goes on with page packets::

    initial  be32 magic, be32 version, 16-byte UUID, u8 channel, 7 + 32 unused bytes
    packet   be32 magic, be32 version, be32 flags, be32 pages_alloc, be32 normal_pages,
             be32 next_packet_size, be64 packet_num, 4 unused u64, 256-byte block name,
             be64 offset[pages_alloc], payload of next_packet_size bytes
    payload  private   MBMD, GPA list (8n), MACs (16n), n pages
             shared    n pages

    flags    0x1 sync; 0x8 private pages, a value inside QEMU's compression field (0xE)

Only the first normal_pages offsets mean anything.  A packet without pages has no payload, whatever
QEMU left in its next_packet_size, offsets and block name.  QEMU always has 128 offsets.

Tokens and state never travel here but on the main channel (`records`); a packet with the sync flag
tells where they stand between the packets of a channel.  Only form is judged: whether offsets and
GPAs name the same pages depends on the RAM block, so that is the receiver's to compare.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Final, TypeAlias

from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import (
    ADDRESS_BITS,
    GPA_ENTRY_SIZE,
    MAC_SIZE,
    MAX_ENTRIES,
    MBMD_SIZE,
    PAGE_SIZE,
    ByteBuffer,
)
from tdxmig_model.wire.fault import fault
from tdxmig_model.wire.gpa_list import check_entries, entries_from_bytes
from tdxmig_model.wire.incremental import IncrementalParser, Needs
from tdxmig_model.wire.mbmd import BundleType, Mbmd
from tdxmig_model.wire.records import Bundle, page_view

MAGIC: Final = 0x11223344
VERSION: Final = 1
UUID_SIZE: Final = 16
BLOCK_NAME_SIZE: Final = 256
QEMU_SLOTS: Final = 128
"""Offsets of a packet as QEMU sends it: 512 KiB of pages."""
MACS_PER_PAGE: Final = PAGE_SIZE // MAC_SIZE
"""MACs in one page of a MAC list; more pages than that need the second MAC page."""

_INITIAL: Final = struct.Struct(">II16sB7s32s")
_PACKET: Final = struct.Struct(">IIIIIIQ32s256s")
INITIAL_SIZE: Final = _INITIAL.size
PACKET_HEADER_SIZE: Final = _PACKET.size
"""Bytes of a page packet before its offsets."""
_COMPRESSION_MASK: Final = 0xE
_KNOWN_FLAGS: Final = _COMPRESSION_MASK | 0x1
_COMPRESSIONS: Final = {0x2: "zlib", 0x4: "zstd"}


class PacketFlags(IntFlag):
    """Flags of a page packet."""

    SYNC = 0x1
    PRIVATE = 0x8


@dataclass(frozen=True, slots=True)
class InitialPacket:
    """First packet of a channel.  `uuid` is that of the guest (16 bytes), 0 to 255 `channel`."""

    channel: int
    uuid: bytes = bytes(UUID_SIZE)


@dataclass(frozen=True, slots=True)
class PrivatePacket:
    """Private pages: one memory bundle.

    `offsets` are bytes in the RAM block, one per page, in the order of the GPA list.  `slots` is
    pages_alloc.  The TDX header of `bundle` does not travel.
    """

    packet_num: int
    block: str
    offsets: Sequence[int]
    bundle: Bundle
    sync: bool = False
    slots: int = QEMU_SLOTS


@dataclass(frozen=True, slots=True)
class SharedPacket:
    """Shared pages as they are, or none: then it is the sync flag that matters.

    `offsets` as in `PrivatePacket`; `pages` are buffers of 4096 bytes.
    """

    packet_num: int
    block: str = ""
    offsets: Sequence[int] = ()
    pages: Sequence[ByteBuffer] = ()
    sync: bool = False
    slots: int = QEMU_SLOTS


Packet: TypeAlias = InitialPacket | PrivatePacket | SharedPacket


def iov_num(pages: int) -> int:
    """Buffers of the payload of a private packet: MBMD, GPA list, one or two MAC pages, pages.

    UsageError: not 1 to 512 pages.
    """
    if not 1 <= pages <= MAX_ENTRIES:
        raise UsageError(f"a private packet has 1 to {MAX_ENTRIES} pages, not {pages}")
    return 2 + -(-pages // MACS_PER_PAGE) + pages


def payload_size(pages: int, *, private: bool) -> int:
    """Bytes of the payload of a packet with `pages` pages."""
    if not pages or not private:
        return pages * PAGE_SIZE
    return MBMD_SIZE + pages * (GPA_ENTRY_SIZE + MAC_SIZE + PAGE_SIZE)


def encode_packet(packet: Packet) -> list[bytes | memoryview]:
    """The packet as a list of buffers to write in order; pages are referenced, not copied.

    The buffers after the first are `iov_num` many for a private packet.  Raises WireError on
    anything that `MultifdParser` would refuse.
    """
    match packet:
        case InitialPacket():
            return [_encode_initial(packet)]
        case PrivatePacket():
            payload = _private_payload(packet)
            return [_encode_header(packet, PacketFlags.PRIVATE), *payload]
        case SharedPacket():
            if len(packet.pages) != len(packet.offsets):
                bound = f"{len(packet.offsets)} (offsets)"
                raise fault("packet", 0, "pages", len(packet.pages), bound)
            pages = [page_view(page, index) for index, page in enumerate(packet.pages)]
            return [_encode_header(packet, PacketFlags(0)), *pages]
    raise fault("packet", 0, "type", type(packet).__name__, "a packet of this module")


class MultifdParser(IncrementalParser[Packet]):
    """Decodes one side channel.

    `slots` is the most offsets that a packet may have (1 to 512) and so bounds what is held.
    """

    def __init__(self, slots: int = QEMU_SLOTS) -> None:
        if not 1 <= slots <= MAX_ENTRIES:
            raise UsageError(f"a packet has 1 to {MAX_ENTRIES} offsets, not {slots}")
        self._slots = slots
        super().__init__()

    def _parse(self) -> Generator[int | Packet, memoryview, None]:
        yield _decode_initial((yield INITIAL_SIZE), self.offset)
        while True:
            yield (yield from self._parse_packet(self.offset))

    def _parse_packet(self, at: int) -> Needs[Packet]:
        head = PacketHead.unpack((yield PACKET_HEADER_SIZE), at, self._slots)
        column = yield head.slots * 8
        offsets = struct.unpack(f">{head.pages}Q", column[: head.pages * 8])
        _check_offsets(offsets, at)
        payload_at = at + PACKET_HEADER_SIZE + head.slots * 8
        size = payload_size(head.pages, private=head.private)
        payload = (yield size) if size else memoryview(b"")
        if not head.private:
            pages = _cut(payload, 0, head.pages) if size else ()
            return SharedPacket(
                head.packet_num, head.block, offsets, pages, head.sync, slots=head.slots
            )
        bundle = _decode_bundle(payload, head.pages, payload_at)
        return PrivatePacket(
            head.packet_num, head.block, offsets, bundle, head.sync, slots=head.slots
        )


@dataclass(frozen=True, slots=True)
class PacketHead:
    """The 320 fixed bytes of a page packet, checked; `block` is empty when there are no pages."""

    sync: bool
    private: bool
    slots: int
    pages: int
    packet_num: int
    block: str

    @classmethod
    def unpack(cls, raw: ByteBuffer, at: int, most_slots: int) -> PacketHead:
        """Decode and judge the 320 bytes at `at` of the stream.  Raises WireError."""
        magic, version, flags, slots, pages, size, number, unused, name = _PACKET.unpack(raw)
        _check_magic(magic, version, at)
        private = _check_flags(flags, at)
        if not 1 <= slots <= most_slots:
            raise fault("packet", at + 12, "pages_alloc", slots, f"1 to {most_slots}")
        if not int(private) <= pages <= slots:
            raise fault("packet", at + 16, "normal_pages", pages, f"{int(private)} to {slots}")
        expected = payload_size(pages, private=private)
        if pages and size != expected:
            raise fault("packet", at + 20, "next_packet_size", size, str(expected))
        if any(unused):
            raise fault("packet", at + 32, "unused", unused.hex(), "zero bytes")
        block = _decode_block(name, at + 64) if pages else ""
        return cls(bool(flags & PacketFlags.SYNC), private, slots, pages, number, block)


def _check_magic(magic: int, version: int, at: int) -> None:
    if magic != MAGIC:
        raise fault("packet", at, "magic", hex(magic), hex(MAGIC))
    if version != VERSION:
        raise fault("packet", at + 4, "version", version, str(VERSION))


def _check_flags(flags: int, at: int) -> bool:
    """True when the packet says that its pages are private."""
    method = flags & _COMPRESSION_MASK
    if flags & ~_KNOWN_FLAGS or method not in (0, PacketFlags.PRIVATE):
        how = _COMPRESSIONS.get(method)
        value = f"{flags:#x} ({how})" if how else hex(flags)
        raise fault("packet", at + 8, "flags", value, "0, 0x1, 0x8 or 0x9: no compression")
    return method == PacketFlags.PRIVATE


def _decode_block(raw: bytes, at: int) -> str:
    name, _, rest = raw.partition(b"\0")
    if any(rest):
        raise fault("packet", at, "block", raw[:32], "zero bytes after the name")
    try:
        return _check_block(name.decode("ascii"), at)
    except UnicodeDecodeError:
        raise fault("packet", at, "block", name[:32], "printable ASCII") from None


def _check_block(name: str, at: int) -> str:
    # The last of the 256 bytes is the end of the name.
    if not (1 <= len(name) < BLOCK_NAME_SIZE and name.isascii() and name.isprintable()):
        raise fault("packet", at, "block", name[:32], "1 to 255 printable ASCII characters")
    return name


def _check_offsets(offsets: Sequence[int], at: int) -> None:
    for index, offset in enumerate(offsets):
        if offset % PAGE_SIZE or not 0 <= offset < 1 << ADDRESS_BITS:
            where = at + PACKET_HEADER_SIZE + index * 8
            bound = f"4 KiB aligned, below 2**{ADDRESS_BITS}"
            raise fault("packet", where, f"offset {index}", hex(offset), bound)


def _cut(payload: memoryview, first: int, count: int) -> list[memoryview]:
    past = first + count * PAGE_SIZE
    return [payload[start : start + PAGE_SIZE] for start in range(first, past, PAGE_SIZE)]


def _decode_bundle(payload: memoryview, count: int, at: int) -> Bundle:
    mbmd = Mbmd.unpack(payload[:MBMD_SIZE], stream_offset=at)
    check_packet_mbmd(mbmd, count, at)
    macs_at = MBMD_SIZE + count * GPA_ENTRY_SIZE
    pages_at = macs_at + count * MAC_SIZE
    gpa_list = bytes(payload[MBMD_SIZE:macs_at])
    check_entries(entries_from_bytes(gpa_list), offset=at + MBMD_SIZE)
    macs = bytes(payload[macs_at:pages_at])
    return Bundle.of(mbmd, _cut(payload, pages_at, count), gpa_list, macs)


def check_packet_mbmd(mbmd: Mbmd, count: int, at: int) -> None:
    """Compare an MBMD, at byte `at`, with the pages of its packet.  Raises WireError."""
    if mbmd.bundle_type is not BundleType.MEM:
        raise fault("packet", at + 6, "bundle_type", mbmd.bundle_type.name, "MEM")
    if mbmd.num_gpas != count:
        raise fault("packet", at + 24, "num_gpas", mbmd.num_gpas, f"{count} (normal_pages)")


def _decode_initial(raw: memoryview, at: int) -> InitialPacket:
    magic, version, uuid, channel, unused, more = _INITIAL.unpack(raw)
    _check_magic(magic, version, at)
    if any(unused) or any(more):
        raise fault("initial packet", at + 25, "unused", (unused + more).hex(), "zero bytes")
    return InitialPacket(channel, uuid)


def _encode_initial(packet: InitialPacket) -> bytes:
    if not 0 <= packet.channel <= 0xFF:
        raise fault("initial packet", 24, "channel", packet.channel, "0 to 255")
    if len(packet.uuid) != UUID_SIZE:
        length = f"{len(packet.uuid)} bytes"
        raise fault("initial packet", 8, "uuid", length, f"{UUID_SIZE} bytes")
    return _INITIAL.pack(MAGIC, VERSION, packet.uuid, packet.channel, b"", b"")


def _encode_header(packet: PrivatePacket | SharedPacket, kind: PacketFlags) -> bytes:
    pages, private = len(packet.offsets), bool(kind & PacketFlags.PRIVATE)
    if not 1 <= packet.slots <= MAX_ENTRIES:
        raise fault("packet", 12, "pages_alloc", packet.slots, f"1 to {MAX_ENTRIES}")
    if not int(private) <= pages <= packet.slots:
        bound = f"{int(private)} to {packet.slots} (slots)"
        raise fault("packet", 16, "normal_pages", pages, bound)
    if not 0 <= packet.packet_num <= 0xFFFFFFFFFFFFFFFF:
        raise fault("packet", 24, "packet_num", packet.packet_num, "u64")
    _check_offsets(packet.offsets, 0)
    if not pages and packet.block:
        raise fault("packet", 64, "block", packet.block[:32], "no name: there are no pages")
    block = _check_block(packet.block, 64) if pages else ""
    head = _PACKET.pack(
        MAGIC,
        VERSION,
        kind | (PacketFlags.SYNC if packet.sync else 0),
        packet.slots,
        pages,
        payload_size(pages, private=private),
        packet.packet_num,
        b"",
        block.encode("ascii"),
    )
    return head + struct.pack(f">{packet.slots}Q", *packet.offsets, *[0] * (packet.slots - pages))


def _private_payload(packet: PrivatePacket) -> list[bytes | memoryview]:
    """MBMD, GPA list, MACs in parts of one MAC page, then each page."""
    bundle, count = packet.bundle, len(packet.offsets)
    at = PACKET_HEADER_SIZE + packet.slots * 8
    mbmd = bundle.mbmd.pack()
    check_packet_mbmd(Mbmd.unpack(mbmd), count, at)
    for field, found, expected in (
        ("pages", len(bundle.pages), count),
        ("gpa_list bytes", len(bundle.gpa_list), count * GPA_ENTRY_SIZE),
        ("macs bytes", len(bundle.macs), count * MAC_SIZE),
    ):
        if found != expected:
            raise fault("packet", at, field, found, f"{expected} (for {count} offsets)")
    check_entries(entries_from_bytes(bundle.gpa_list), offset=at + MBMD_SIZE)
    macs = [
        bundle.macs[start : start + PAGE_SIZE] for start in range(0, len(bundle.macs), PAGE_SIZE)
    ]
    pages = [page_view(page, index) for index, page in enumerate(bundle.pages)]
    return [mbmd, bundle.gpa_list, *macs, *pages]
