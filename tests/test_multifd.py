"""Are multifd packets the bytes that QEMU's are, and does garbage give nothing but WireError?"""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxmig_model.errors import UsageError, WireError
from tdxmig_model.wire import (
    Bundle,
    GpaOperation,
    InitialPacket,
    Mbmd,
    MultifdParser,
    Packet,
    PrivatePacket,
    SharedPacket,
    encode_packet,
    iov_num,
)
from tdxmig_model.wire.gpa_list import build_entries, entries_to_bytes
from tdxmig_model.wire.incremental import MAX_RECORD_SIZE

PAGE = bytes(range(256)) * 16
OTHER_PAGE = bytes(4095) + b"\xff"
UUID = bytes.fromhex("00112233445566778899aabbccddeeff")
MACS = bytes(range(32))
HEADER = 320 + 8 * 128


def memory(count: int, *, stream: int = 1, gpa: int = 0x2000) -> Bundle:
    mbmd = Mbmd.memory(num_gpas=count, mb_counter=3, mig_epoch=1, iv_counter=7, migs_index=stream)
    entries = build_entries(gpa + 4096 * np.arange(count), GpaOperation.MIGRATE)
    pages = [PAGE if index % 2 == 0 else OTHER_PAGE for index in range(count)]
    macs = b"".join(index.to_bytes(16, "big") for index in range(count))
    return Bundle.of(mbmd, pages, entries_to_bytes(entries), macs)


def private(count: int, **rest: int) -> PrivatePacket:
    offsets = tuple(0x2000 + 4096 * index for index in range(count))
    return PrivatePacket(9, "pc.ram", offsets, memory(count), slots=rest.get("slots", 128))


def every_packet() -> list[Packet]:
    return [
        InitialPacket(1, UUID),
        private(1),
        private(128),
        SharedPacket(10, "pc.ram", (0x8000, 0x1000), [PAGE, OTHER_PAGE]),
        replace(private(3), sync=True),
        SharedPacket(11, sync=True),
        SharedPacket(12),
    ]


def to_bytes(packets: Iterable[Packet]) -> bytes:
    return b"".join(itertools.chain.from_iterable(encode_packet(packet) for packet in packets))


def parse_as_far_as_possible(data: bytes) -> tuple[list[Packet], MultifdParser, WireError | None]:
    parser = MultifdParser(512)
    packets: list[Packet] = []
    try:
        for packet in parser.records(data):
            packets.append(packet)
    except WireError as error:
        return packets, parser, error
    return packets, parser, None


def parse(data: bytes, slots: int = 128) -> list[Packet]:
    parser = MultifdParser(slots)
    packets = list(parser.records(data))
    parser.end_of_stream()
    return packets


def refuses(packet: bytes, slots: int = 128) -> WireError:
    """The error for a page packet that follows an initial packet; offsets from its head."""
    with pytest.raises(WireError) as caught:
        parse(to_bytes([InitialPacket(1, UUID)]) + packet, slots)
    caught.value.offset -= 64
    return caught.value


def patched(data: bytes, at: int, layout: str, value: int | bytes) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, at, value)
    return bytes(changed)


# The bytes, written down from the layout and not from the code.


def test_the_initial_packet_is_the_documented_bytes() -> None:
    wire = to_bytes([InitialPacket(1, UUID)])
    assert wire.hex() == "11223344" + "00000001" + UUID.hex() + "01" + "00" * 7 + "00" * 32
    assert len(wire) == 64


def test_a_private_packet_is_the_documented_bytes() -> None:
    entries = build_entries(np.array([0x2000, 0x7000]), GpaOperation.MIGRATE)
    mbmd = Mbmd.memory(num_gpas=2, mb_counter=3, mig_epoch=1, iv_counter=7, migs_index=1)
    bundle = Bundle.of(mbmd, [PAGE, OTHER_PAGE], entries_to_bytes(entries), MACS)
    packet = PrivatePacket(0x1122, "pc.ram", (0x2000, 0x7000), bundle)
    header = (
        "11223344" + "00000001"  # magic, version
        "00000008"  # flags: private pages
        "00000080" + "00000002"  # 128 offsets, 2 of them used
        "00002060"  # next_packet_size: 48 + 2 * (8 + 16 + 4096) = 8288
        "0000000000001122"  # packet_num
        + "00" * 32
        + "70632e72616d"  # pc.ram
        + "00" * 250
        + "0000000000002000"
        + "0000000000007000"
        + "00" * 8 * 126
    )
    payload = (
        "300000000100100003000000010000000700000000000000"  # MBMD: header fields
        "0200000000000000"  # NUM_GPAS
        + "00" * 16  # its MAC
        + "0020000000001000"  # MIGRATE 0x2000
        + "0070000000001000"  # MIGRATE 0x7000
        + MACS.hex()
        + PAGE.hex()
        + OTHER_PAGE.hex()
    )
    assert to_bytes([packet]).hex() == header + payload


def test_a_shared_packet_is_the_documented_bytes() -> None:
    wire = to_bytes([SharedPacket(5, "pc.ram", (0x3000,), [PAGE])])
    assert wire[:32].hex() == "1122334400000001000000000000008000000001000010000000000000000005"
    assert wire[HEADER:] == PAGE
    sync = to_bytes([SharedPacket(6, sync=True)])
    assert sync[:32].hex() == "1122334400000001000000010000008000000000000000000000000000000006"
    assert sync[32:] == bytes(HEADER - 32)


def test_the_sizes_are_those_of_the_facts() -> None:
    whole = to_bytes([private(128)])
    assert (HEADER, len(whole) - HEADER, len(whole)) == (1344, 527408, 528752)
    assert int.from_bytes(whole[20:24], "big") == 527408


@pytest.mark.parametrize("count", [1, 2, 128, 256, 257, 512])
def test_the_buffers_are_in_the_order_and_number_of_the_seed(count: int) -> None:
    buffers = encode_packet(private(count, slots=512))[1:]
    macs = 1 if count <= 256 else 2
    assert len(buffers) == iov_num(count) == count + 2 + macs
    sizes = [len(buffer) for buffer in buffers]
    assert sizes[:2] == [48, 8 * count]
    assert sizes[2 : 2 + macs] == ([16 * count] if macs == 1 else [4096, 16 * count - 4096])
    assert sizes[2 + macs :] == [4096] * count


@pytest.mark.parametrize("count", [-1, 0, 513])
def test_there_are_no_buffers_for_other_numbers_of_pages(count: int) -> None:
    with pytest.raises(UsageError, match="1 to 512 pages"):
        iov_num(count)


# Round trips.


def test_packets_survive_the_round_trip() -> None:
    packets = every_packet()
    wire = to_bytes(packets)
    assert parse(wire) == packets
    assert to_bytes(parse(wire)) == wire


def test_the_largest_packet_survives_the_round_trip() -> None:
    packets = [InitialPacket(0), private(512, slots=512)]
    assert parse(to_bytes(packets), 512) == packets


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_packet_survives_any_split(data: st.DataObject) -> None:
    slots = data.draw(st.sampled_from([1, 5, 128]))
    packets: list[Packet] = [InitialPacket(data.draw(st.integers(0, 255)), UUID)]
    numbers = st.integers(0, (1 << 40) - 1).map(lambda page: page * 4096)
    for _ in range(data.draw(st.integers(0, 4))):
        offsets = tuple(data.draw(st.lists(numbers, max_size=min(slots, 4))))
        number, sync = data.draw(st.integers(0, (1 << 64) - 1)), data.draw(st.booleans())
        if offsets and data.draw(st.booleans()):
            bundle = memory(len(offsets), stream=data.draw(st.integers(0, 510)))
            packets.append(PrivatePacket(number, "a b", offsets, bundle, sync, slots))
        else:
            pages = [PAGE] * len(offsets) or ()
            name = "x" * 255 if offsets else ""
            packets.append(SharedPacket(number, name, offsets, pages, sync, slots))
    wire = to_bytes(packets)
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=6))
    parser = MultifdParser(slots)
    parsed: list[Packet] = []
    for first, past in itertools.pairwise([0, *sorted(cuts), len(wire)]):
        parsed += parser.records(wire[first:past])
    parser.end_of_stream()
    assert parsed == packets


def test_leftovers_of_qemu_in_an_empty_packet_mean_nothing() -> None:
    """QEMU does not clear size, offsets and name of the packet before."""
    leftover = bytearray(to_bytes([private(3)])[:HEADER])
    struct.pack_into(">III", leftover, 8, 0x1, 128, 0)
    head = to_bytes([InitialPacket(1, UUID)])
    assert parse(head + bytes(leftover))[1:] == [SharedPacket(9, sync=True)]


def test_offsets_after_the_used_ones_mean_nothing() -> None:
    wire = patched(to_bytes([private(3)]), 320 + 3 * 8, ">Q", 0xDEADBEEF)
    assert parse(to_bytes([InitialPacket(1, UUID)]) + wire)[1:] == [private(3)]


# Garbage.


@pytest.mark.parametrize(
    ("at", "layout", "value", "field", "offset"),
    [
        (0, ">I", 0x11223345, "magic", 0),
        (4, ">I", 2, "version", 4),
        (8, ">I", 0x2, "flags", 8),
        (8, ">I", 0x4, "flags", 8),
        (8, ">I", 0xA, "flags", 8),
        (8, ">I", 0x10, "flags", 8),
        (8, ">I", 0x80000008, "flags", 8),
        (12, ">I", 0, "pages_alloc", 12),
        (12, ">I", 129, "pages_alloc", 12),
        (12, ">I", 0xFFFFFFFF, "pages_alloc", 12),
        (16, ">I", 0, "normal_pages", 16),
        (16, ">I", 129, "normal_pages", 16),
        (16, ">I", 0xFFFFFFFF, "normal_pages", 16),
        (16, ">I", 3, "next_packet_size", 20),
        (20, ">I", 0, "next_packet_size", 20),
        (20, ">I", 0xFFFFFFFF, "next_packet_size", 20),
        (32, ">I", 1, "unused", 32),
        (64, ">B", 0, "block", 64),
        (64, ">B", 0x7F, "block", 64),
        (64, ">B", 0xE9, "block", 64),
        (72, ">B", 0x41, "block", 64),
        (320, ">Q", 0x2001, "offset 0", 320),
        (328, ">Q", 1 << 52, "offset 1", 328),
        (HEADER, "<H", 47, "size", HEADER),
        (HEADER, "<H", 0xFFFF, "size", HEADER),
        (HEADER + 4, "<H", 511, "migs_index", HEADER + 4),
        (HEADER + 6, "<B", 32, "bundle_type", HEADER + 6),
        (HEADER + 6, "<B", 255, "bundle_type", HEADER + 6),
        (HEADER + 24, "<H", 1, "num_gpas", HEADER + 24),
        (HEADER + 24, "<H", 513, "num_gpas", HEADER + 24),
        (HEADER + 48, "<Q", 0x2008, "reserved", HEADER + 48),
        (HEADER + 56, "<Q", 0x3001, "level", HEADER + 56),
    ],
)
def test_a_packet_out_of_bounds_is_refused(
    at: int, layout: str, value: int, field: str, offset: int
) -> None:
    error = refuses(patched(to_bytes([private(2)]), at, layout, value))
    assert (error.field, error.offset) == (field, offset)


def test_a_name_without_an_end_is_refused() -> None:
    wire = patched(to_bytes([private(1)]), 64, "256s", b"b" * 256)
    assert refuses(wire).field == "block"


def test_compressed_pages_are_refused_by_the_name_of_the_method() -> None:
    wire = to_bytes([SharedPacket(1, "pc.ram", (0,), [PAGE])])
    assert refuses(patched(wire, 8, ">I", 0x2)).value == "0x2 (zlib)"
    assert refuses(patched(wire, 8, ">I", 0x5)).value == "0x5 (zstd)"


@pytest.mark.parametrize("at", [0, 4, 25, 31, 32, 63])
def test_a_wrong_initial_packet_is_refused(at: int) -> None:
    wire = bytearray(to_bytes([InitialPacket(1, UUID)]))
    wire[at] ^= 0x80
    with pytest.raises(WireError):
        parse(bytes(wire))


def test_the_number_of_offsets_is_bounded_by_the_reader() -> None:
    wire = to_bytes([private(3, slots=512)])
    assert refuses(wire, 128).field == "pages_alloc"
    assert parse(to_bytes([InitialPacket(1, UUID)]) + wire, 512)[1] == private(3, slots=512)
    for slots in (0, 513):
        with pytest.raises(UsageError, match="1 to 512 offsets"):
            MultifdParser(slots)


def test_an_end_at_any_byte_is_told() -> None:
    wire = to_bytes([InitialPacket(1, UUID), private(1)])
    for length in (*range(1, 64), *range(65, 500), *range(500, len(wire), 61)):
        parser = MultifdParser()
        assert len(list(parser.records(wire[:length]))) == int(length >= 64)
        with pytest.raises(WireError) as caught:
            parser.end_of_stream()
        assert caught.value.offset == length


def test_a_flipped_bit_is_refused_or_seen_in_the_packet() -> None:
    """Every bit of the header and of what stands before the pages."""
    head = to_bytes([InitialPacket(1, UUID)])
    for packet, used in (
        (private(2), [*range(336), *range(HEADER, HEADER + 96)]),
        (SharedPacket(3, "pc.ram", (0x1000,), [PAGE], sync=True), range(328)),
    ):
        wire = to_bytes([packet])
        for at in used:
            for bit in range(8):
                changed = bytearray(wire)
                changed[at] ^= 1 << bit
                packets, parser, error = parse_as_far_as_possible(head + bytes(changed))
                if error:
                    assert 64 <= error.offset <= 64 + len(wire)
                else:
                    assert packets[1:] != [packet], (at, bit)
                    assert to_bytes(packets) == (head + changed)[: parser.offset]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_channel_gives_packets_or_wire_errors(data: st.DataObject) -> None:
    wire = bytearray(to_bytes([packet for packet in every_packet() if packet != private(128)]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wire) - 1))
        wire[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    packets, _, error = parse_as_far_as_possible(bytes(wire))
    assert error is None or 0 <= error.offset <= len(wire)
    assert parse_as_far_as_possible(to_bytes(packets))[0] == packets


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=600))
def test_random_bytes_give_packets_or_wire_errors(data: bytes) -> None:
    packets, _, error = parse_as_far_as_possible(data)
    assert not packets
    assert error is None or error.offset <= len(data)


def test_the_parser_holds_one_packet_and_no_more() -> None:
    stream = to_bytes([InitialPacket(1, UUID), *[private(512, slots=512)] * 5])
    parser, count = MultifdParser(512), 0
    tracemalloc.start()
    for at in range(0, len(stream), 60000):
        count += sum(1 for _ in parser.records(stream[at : at + 60000]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6
    assert peak < 2.2 * MAX_RECORD_SIZE


@pytest.mark.parametrize(
    "damage",
    [
        lambda packet: replace(packet, packet_num=-1),
        lambda packet: replace(packet, packet_num=1 << 64),
        lambda packet: replace(packet, block=""),
        lambda packet: replace(packet, block="b" * 256),
        lambda packet: replace(packet, offsets=(0x2000,)),
        lambda packet: replace(packet, offsets=()),
        lambda packet: replace(packet, offsets=(0x2000, 0x2001)),
        lambda packet: replace(packet, offsets=(0x2000, -4096)),
        lambda packet: replace(packet, slots=1),
        lambda packet: replace(packet, slots=513),
        lambda packet: replace(packet, bundle=memory(1)),
        lambda packet: replace(packet, bundle=replace(packet.bundle, pages=[PAGE])),
        lambda packet: replace(packet, bundle=replace(packet.bundle, macs=bytes(31))),
        lambda packet: replace(packet, bundle=replace(packet.bundle, gpa_list=bytes(8))),
        lambda packet: replace(
            packet, bundle=replace(packet.bundle, gpa_list=bytes((8, *bytes(15))))
        ),
    ],
)
def test_what_the_parser_would_refuse_is_not_encoded(
    damage: Callable[[PrivatePacket], PrivatePacket],
) -> None:
    encode_packet(private(2))
    with pytest.raises(WireError):
        encode_packet(damage(private(2)))


def test_an_initial_or_shared_packet_that_does_not_fit_is_not_encoded() -> None:
    for packet in (
        InitialPacket(256),
        InitialPacket(0, bytes(15)),
        SharedPacket(0, "pc.ram", (0,), [PAGE, PAGE]),
        SharedPacket(0, "pc.ram", (0,), [PAGE[:-1]]),
        SharedPacket(0, "pc.ram"),
    ):
        with pytest.raises(WireError):
            encode_packet(packet)
