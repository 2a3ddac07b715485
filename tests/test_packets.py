"""Do memory records survive the way over a multifd channel, and does no packet name other pages?"""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_play import exported, gpas, play
from test_engine import paused

from tdxmig_model.engine import RamBlock
from tdxmig_model.engine.packets import packet_of, record_of
from tdxmig_model.errors import PeerError, UsageError
from tdxmig_model.wire import GpaOperation, InitialPacket, MemoryRecord, MultifdParser
from tdxmig_model.wire.multifd import PrivatePacket, encode_packet

RAM = RamBlock()
SPLIT = RamBlock(below_4g=0x80000000)


def sent(*pages: int, ram: RamBlock = RAM) -> MemoryRecord:
    """What the source engine sends for these pages."""
    engine = paused()
    engine.ram = ram
    (record,) = play(engine.export_memory(gpas(*pages)), exported()).records
    assert isinstance(record, MemoryRecord)
    return record


def over_a_channel(packet: PrivatePacket, slots: int) -> PrivatePacket:
    parser = MultifdParser(slots)
    wire = b"".join([*encode_packet(InitialPacket(0)), *encode_packet(packet)])
    _, arrived = parser.records(wire)
    assert isinstance(arrived, PrivatePacket)
    return arrived


@pytest.mark.parametrize("slots", [128, 512])
def test_a_record_arrives_over_a_channel(slots: int) -> None:
    record = sent(*range(7, 7 + slots))
    packet = over_a_channel(packet_of(record, RAM, 5, slots=slots), slots)
    assert (packet.packet_num, packet.offsets[-1]) == (5, (6 + slots) * 4096)
    assert record_of(packet, RAM) == record


def test_pages_above_the_hole_have_the_offsets_of_the_block() -> None:
    record = sent(1, 1 << 20, ram=SPLIT)
    packet = packet_of(record, SPLIT, 1)
    assert packet.offsets == (0x1000, 0x80000000)
    assert record_of(packet, SPLIT) == record
    with pytest.raises(PeerError, match="offset 0x80000000"):
        record_of(packet, RAM)


def test_a_cancel_is_known_again() -> None:
    (record,) = play(paused().cancel_page(gpas(1, 2)), exported()).records
    assert record.cancel
    assert record_of(packet_of(record, RAM, 1), RAM) == record
    operations = [GpaOperation.CANCEL, GpaOperation.MIGRATE]
    entries = [int(one) << 52 | (index + 1) << 12 for index, one in enumerate(operations)]
    mixed = b"".join(entry.to_bytes(8, "little") for entry in entries)
    packet = packet_of(record, RAM, 1)
    other = replace(packet, bundle=replace(packet.bundle, gpa_list=mixed))
    assert record_of(other, RAM).cancel is False


def test_a_bundle_that_is_too_large_for_a_packet_is_refused() -> None:
    with pytest.raises(UsageError, match="129 pages does not fit into a packet of 128"):
        packet_of(sent(*range(129)), RAM, 1)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_offset_is_compared_with_its_gpa(index: int) -> None:
    packet = packet_of(sent(1, 2, 3), RAM, 9)
    offsets = list(packet.offsets)
    offsets[index] = 0x9000
    with pytest.raises(PeerError) as caught:
        record_of(replace(packet, offsets=tuple(offsets)), RAM)
    assert str(caught.value) == (
        f"packet 9 says offset 0x9000 (GPA 0x9000), its bundle has GPA {(index + 1) << 12:#x} there"
    )
