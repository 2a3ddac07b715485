"""Do the tables of fields say the same as the decoders, field by field?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tdxmig_model.wire import (
    BundleType,
    Capability,
    GpaEntry,
    GpaOperation,
    GpaStatus,
    Hello,
    InitialPacket,
    Mbmd,
    MigrationHeader,
    SharedPacket,
    SharedPage,
    encode,
    encode_packet,
)
from tdxmig_model.wire.extensions import encode_forward
from tdxmig_model.wire.layout import (
    GPA_ENTRY,
    HELLO,
    MBMD,
    MBMD_SPECIFIC,
    MESSAGE,
    MULTIFD_INITIAL,
    MULTIFD_PACKET,
    RAM_RECORD,
    STRUCTURES,
    TDX_HEADER,
    Structure,
    value_name,
)

# One byte each, so that a field that is read from a wrong place shows it.
NUMBERED = bytes(range(1, 49))
MBMDS = {
    BundleType.IMMUTABLE_TD_STATE: Mbmd.immutable_state(
        iv_counter=0x1122334455667788, num_forward_streams=0x0102, num_sys_md_pages=3
    ),
    BundleType.MUTABLE_TD_STATE: Mbmd.td_state(mb_counter=9, mig_epoch=1, iv_counter=20),
    BundleType.MUTABLE_VCPU_STATE: Mbmd.vcpu_state(
        vp_index=0x0304, mb_counter=1, mig_epoch=4, iv_counter=6, migs_index=510
    ),
    BundleType.MEM: Mbmd.memory(
        num_gpas=0x0102, mb_counter=0x01020304, mig_epoch=0x05060708, iv_counter=5, migs_index=257
    ),
    BundleType.EPOCH_TOKEN: Mbmd.epoch_token(total_mb=1 << 40, mig_epoch=7, iv_counter=8),
    BundleType.ABORT_TOKEN: Mbmd.abort_token(mb_counter=1, iv_counter=2),
}


@pytest.mark.parametrize("kind", BundleType)
def test_an_mbmd_is_where_the_table_says(kind: BundleType) -> None:
    mbmd = replace(MBMDS[kind], mac=bytes(range(16)), mig_version=0x0A0B)
    wire = mbmd.pack()
    fields = MBMD.decode(b"xx" + wire, 2)
    assert fields.pop("reserved") == 0
    assert fields == {name: getattr(mbmd, name) for name in fields}
    specific = Structure("mbmd", "", 48, "little", MBMD_SPECIFIC[kind]).decode(wire)
    assert specific == {name: getattr(mbmd, name) for name in specific}
    assert value_name(MBMD.fields[3], kind) == kind.name


def test_every_type_specific_field_of_the_decoder_is_in_a_table() -> None:
    told = {one.name for fields in MBMD_SPECIFIC.values() for one in fields}
    expected = {"num_gpas", "total_mb", "vp_index", "num_forward_streams", "num_sys_md_pages"}
    assert told == expected
    assert all(isinstance(getattr(Mbmd, name), property) for name in told)


@pytest.mark.parametrize(
    "entry",
    [
        GpaEntry(0x2000, GpaOperation.MIGRATE),
        GpaEntry((1 << 52) - 4096, GpaOperation.CANCEL, GpaStatus.INVALID_PAGE_MAC, pending=True),
        GpaEntry(1 << 51, GpaOperation.REMIGRATE, level=2, l2_map=5, mig_type=1),
    ],
)
def test_a_gpa_entry_is_where_the_table_says(entry: GpaEntry) -> None:
    fields = GPA_ENTRY.decode(entry.pack())
    reserved = [fields.pop(f"reserved_{number}") for number in range(3)]
    assert fields == {name: getattr(entry, name) for name in fields}
    assert reserved == [0, 0, 0]


def test_the_headers_are_where_the_tables_say() -> None:
    header = MigrationHeader(1, 0x0102)
    assert TDX_HEADER.decode(header.pack()) == {"flags": 1, "buf_list_num": 0x0102}
    ram = b"".join(encode(SharedPage(0x3000, "pc.ram", bytes(4096))))
    assert RAM_RECORD.decode(ram) == {"offset": 0x3000, "flags": 0x8}
    hello = Hello(NUMBERED[:16], Capability.BATCH | Capability.CANCEL, 3 << 32, 7, 2)
    wire = encode_forward(hello)
    assert MESSAGE.decode(wire, 1) == {"type": 0x5401, "length": 40}
    fields = HELLO.decode(wire, 5)
    assert fields.pop("reserved") == 0
    assert fields == {name: getattr(hello, name) for name in fields}


def test_multifd_is_where_the_tables_say() -> None:
    initial = encode_packet(InitialPacket(7, NUMBERED[:16]))[0]
    assert MULTIFD_INITIAL.decode(initial) == {
        "magic": 0x11223344,
        "version": 1,
        "uuid": NUMBERED[:16],
        "channel": 7,
        "unused": bytes(39),
    }
    packet = SharedPacket(1 << 40, "pc.ram", (0, 4096), [bytes(4096)] * 2, True, slots=5)
    assert MULTIFD_PACKET.decode(encode_packet(packet)[0]) == {
        "magic": 0x11223344,
        "version": 1,
        "flags": 1,
        "pages_alloc": 5,
        "normal_pages": 2,
        "next_packet_size": 8192,
        "packet_num": 1 << 40,
        "unused": bytes(32),
        "block": "pc.ram",
    }


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda one: one.name)
def test_the_fields_of_a_structure_cover_it_once(structure: Structure) -> None:
    seen: list[int] = []
    for one in structure.fields:
        first, width = one.bits or (0, one.size * 8)
        if structure.byteorder == "big" and one.bits:
            first = one.size * 8 - first - width  # counted from the first byte on
        seen += range(one.offset * 8 + first, one.offset * 8 + first + width)
    assert sorted(seen) == list(range(structure.size * 8))


def test_what_is_cut_short_or_has_no_name_is_still_told() -> None:
    assert MBMD.decode(b"\x30")["size"] == 0x30
    assert MULTIFD_PACKET.decode(bytes(64) + b"a\xff\0b")["block"] == "a\\xff"
    kind, flags = MBMD.fields[3], RAM_RECORD.fields[1]
    assert value_name(kind, 99) == ""
    assert value_name(flags, 0x401) == "CGS_STATE|0x1"
    assert value_name(MBMD.fields[0], 48) == ""
