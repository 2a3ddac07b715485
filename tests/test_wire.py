"""Do bytes become records and records bytes, and does nothing but WireError come out of garbage?"""

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
    BundleType,
    Capability,
    EndOfPass,
    EndSection,
    EpochRecord,
    Footer,
    GpaEntry,
    GpaOperation,
    Hello,
    Mbmd,
    MemoryRecord,
    MigrationHeader,
    MultifdFlush,
    Record,
    RecordParser,
    SharedPage,
    SourceAbort,
    StartSection,
    encode,
)
from tdxmig_model.wire.gpa_list import build_entries, entries_to_bytes
from tdxmig_model.wire.incremental import MAX_RECORD_SIZE

PAGE = bytes(range(256)) * 16
ZERO_PAGE = bytes(4096)
SESSION = bytes(range(16))


def memory_bundle(
    count: int = 1, operation: GpaOperation = GpaOperation.MIGRATE, gpa: int = 0x2000
) -> Bundle:
    mbmd = Mbmd.memory(num_gpas=count, mb_counter=3, mig_epoch=1, iv_counter=7, migs_index=1)
    entries = build_entries(gpa + 4096 * np.arange(count), operation)
    return Bundle.of(mbmd, [PAGE] * count, entries_to_bytes(entries), bytes(range(16)) * count)


def start_token(total_mb: int = 9) -> Bundle:
    return Bundle.of(Mbmd.epoch_token(total_mb=total_mb, mig_epoch=0xFFFFFFFF, iv_counter=20))


def every_record() -> list[Record]:
    """A whole migration, with each kind of record and of bundle."""
    td_state = Mbmd.td_state(mb_counter=2, mig_epoch=2, iv_counter=11)
    vcpu_state = Mbmd.vcpu_state(vp_index=1, mb_counter=3, mig_epoch=2, iv_counter=12)
    immutable = Mbmd.immutable_state(iv_counter=1, num_forward_streams=2)
    capabilities = Capability.BATCH | Capability.CANCEL
    return [
        Hello(SESSION, capabilities, page_count=64, vcpu_count=2, streams=1),
        StartSection(Bundle.of(immutable, [PAGE, ZERO_PAGE, PAGE])),
        EpochRecord(Bundle.of(Mbmd.epoch_token(total_mb=2, mig_epoch=1, iv_counter=2))),
        MemoryRecord(0x2000, "pc.ram", memory_bundle()),
        MemoryRecord(0x5000, "pc.ram", memory_bundle(3), same_block=True),
        MemoryRecord(0x2000, "pc.ram", memory_bundle(2, GpaOperation.CANCEL), cancel=True),
        EndSection(),
        Bundle.of(td_state, [PAGE, PAGE], another_follows=True),
        Bundle.of(vcpu_state, [PAGE] * 5, another_follows=True),
        start_token(),
        Footer(),
        MemoryRecord(0x9000, "pc.ram", memory_bundle(gpa=0x9000)),
        SharedPage(0xA000, "pc.bios", PAGE),
        SharedPage(0xB000, "pc.bios", ZERO_PAGE, fill=0, same_block=True),
        MultifdFlush(),
        EndOfPass(),
        SourceAbort("the operator cancelled"),
    ]


def to_bytes(records: Iterable[Record]) -> bytes:
    return b"".join(itertools.chain.from_iterable(encode(record) for record in records))


def parse_as_far_as_possible(data: bytes) -> tuple[list[Record], RecordParser, WireError | None]:
    parser = RecordParser()
    records: list[Record] = []
    try:
        for record in parser.records(data):
            records.append(record)
    except WireError as error:
        return records, parser, error
    return records, parser, None


def parse(data: bytes) -> list[Record]:
    parser = RecordParser()
    records = list(parser.records(data))
    parser.end_of_stream()
    return records


# The bytes themselves.


def test_a_memory_record_is_the_documented_bytes() -> None:
    wire = to_bytes([MemoryRecord(0x2000, "pc.ram", memory_bundle())])
    mbmd = "30000000010010000300000001000000070000000000000001000000000000000000000000000000"
    assert wire.hex() == (
        "0000000000002400"  # be64: offset 0x2000, flag 0x400
        "0670632e72616d"  # the length and name of the block
        "00000100"  # TDX header: flags 0, one buffer
        + mbmd
        + "0000000000000000"  # the rest of the MBMD's MAC
        + PAGE.hex()
        + "0020000000001000"  # GPA list entry: MIGRATE 0x2000
        + bytes(range(16)).hex()
    )
    assert len(wire) == 8 + 7 + 4172


def test_the_other_records_are_the_documented_bytes() -> None:
    epoch = to_bytes([EpochRecord(start_token())])
    assert epoch[:12].hex() == "0000000000000800" + "00000000"
    assert len(epoch) == 8 + 52
    chained = Bundle.of(
        Mbmd.td_state(mb_counter=1, mig_epoch=1, iv_counter=2), [PAGE], another_follows=True
    )
    end = to_bytes([EndSection(), chained, start_token(), Footer()])
    assert end[:5].hex() == "0a" + "01000100"
    assert end[5 + 48 + 4096 :].hex().startswith("00000000" + "30000000")
    assert end[-1:] == b"\x7e"
    same = to_bytes([MemoryRecord(0x2000, "pc.ram", memory_bundle(), same_block=True)])
    assert same[:12].hex() == "0000000000002420" + "00000100"


def test_records_survive_the_round_trip() -> None:
    records = every_record()
    wire = to_bytes(records)
    assert parse(wire) == records
    assert to_bytes(parse(wire)) == wire


def test_the_largest_bundle_survives_the_round_trip() -> None:
    for count in (1, 256, 257, 512):
        record = MemoryRecord(0, "pc.ram", memory_bundle(count))
        assert parse(to_bytes([record])) == [record]


# Feeding.


def test_one_byte_at_a_time_gives_the_same_records() -> None:
    records = every_record()
    wire = to_bytes(records)
    parser = RecordParser()
    parsed: list[Record] = []
    for at in range(len(wire)):
        parsed += parser.records(wire[at : at + 1])
    parser.end_of_stream()
    assert parsed == records


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 80000), max_size=12))
def test_any_split_gives_the_same_records(cuts: list[int]) -> None:
    records = every_record()
    wire = to_bytes(records)
    edges = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
    parser = RecordParser()
    parsed: list[Record] = []
    for first, past in itertools.pairwise(edges):
        parsed += parser.records(wire[first:past])
    parser.end_of_stream()
    assert parsed == records


def test_feeding_ahead_of_reading_gives_the_same_records() -> None:
    records = every_record()
    wire = to_bytes(records)
    parser = RecordParser()
    for at in range(0, len(wire), 1000):
        parser.feed(wire[at : at + 1000])
    assert list(iter(parser.next_record, None)) == records


def test_a_buffer_may_be_reused_after_it_was_fed() -> None:
    wire = bytearray(to_bytes([MemoryRecord(0x2000, "pc.ram", memory_bundle())]))
    parser = RecordParser()
    parser.feed(wire)
    wire[:] = bytes(len(wire))
    assert parser.next_record() == MemoryRecord(0x2000, "pc.ram", memory_bundle())


def test_the_offset_is_where_the_next_record_begins() -> None:
    records = every_record()
    parser = RecordParser()
    parser.feed(to_bytes(records))
    for count in range(1, len(records) + 1):
        parser.next_record()
        assert parser.offset == len(to_bytes(records[:count]))
    assert parser.at_boundary


def test_truncation_at_each_byte_is_noticed() -> None:
    records: list[Record] = [
        MemoryRecord(0x2000, "pc.ram", memory_bundle()),
        EndSection(),
        start_token(),
        SourceAbort("gone"),
    ]
    edges = {len(to_bytes(records[:count])) for count in range(len(records) + 1)}
    inside_chain = len(to_bytes(records[:2]))
    wire = to_bytes(records)
    for length in range(len(wire) + 1):
        parser = RecordParser()
        parsed = list(parser.records(wire[:length]))
        assert to_bytes(parsed) == wire[: parser.offset]
        assert parser.at_boundary == (length in edges)
        if length in edges - {inside_chain}:
            parser.end_of_stream()
            continue
        with pytest.raises(WireError) as caught:
            parser.end_of_stream()
        assert caught.value.offset == length


def test_pages_are_not_copied_in_either_direction() -> None:
    page = memoryview(bytearray(PAGE))
    bundle = replace(memory_bundle(), pages=[page])
    written = encode(MemoryRecord(0x2000, "pc.ram", bundle))
    page[0] = 0xEE
    assert written[1][0] == 0xEE
    wire = b"".join(written)
    parser = RecordParser()
    parser.feed(wire)
    record = parser.next_record()
    assert isinstance(record, MemoryRecord)
    read = record.bundle.pages[0]
    assert isinstance(read, memoryview)
    assert read.obj is wire
    assert read.readonly


def test_an_undrained_parser_refuses_to_grow() -> None:
    parser = RecordParser()
    parser.feed(bytes(MAX_RECORD_SIZE))
    parser.feed(b"\0")
    with pytest.raises(UsageError, match="call next_record until it returns None first"):
        parser.feed(b"\0")


def test_no_record_is_larger_than_the_parser_says() -> None:
    largest = to_bytes([MemoryRecord(0, "b" * 255, memory_bundle(512))])
    assert len(largest) <= MAX_RECORD_SIZE
    parser = RecordParser()
    for at in range(0, len(largest), 4096):
        parser.feed(largest[at : at + 4096])
        done = parser.next_record()
    assert done is not None


def test_the_parser_holds_one_record_and_no_more() -> None:
    stream = 5 * to_bytes([MemoryRecord(0, "pc.ram", memory_bundle(512))])
    parser, count = RecordParser(), 0
    tracemalloc.start()
    for at in range(0, len(stream), 60000):
        count += sum(1 for _ in parser.records(stream[at : at + 60000]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5
    # The record that was handed out is still there while the next one arrives.
    assert peak < 2.2 * MAX_RECORD_SIZE


# Garbage.


def refuses(data: bytes) -> WireError:
    parser = RecordParser()
    with pytest.raises(WireError) as caught:
        list(parser.records(data))
    with pytest.raises(WireError):
        parser.next_record()
    with pytest.raises(WireError):
        parser.end_of_stream()
    return caught.value


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_flipped_bit_is_refused_or_seen_in_the_record() -> None:
    """Every bit outside the pages of every kind of record."""
    for record, prefix in flip_targets():
        head = to_bytes(prefix)
        wire = to_bytes([record])
        content = wire.find(PAGE)
        pages = range(content, content + 4096) if content >= 0 else range(0)
        for bit in range(len(wire) * 8):
            if bit // 8 in pages:
                continue
            changed = flip(wire, bit)
            parsed, parser, error = parse_as_far_as_possible(head + changed)
            if error:
                assert len(head) <= error.offset <= len(head) + len(wire), bit
                continue
            # A longer length may want more bytes; what was read is what the changed bytes say.
            assert to_bytes(parsed) == (head + changed)[: parser.offset], bit
            assert parsed != [*prefix, record], bit


def flip_targets() -> list[tuple[Record, list[Record]]]:
    td_state = Mbmd.td_state(mb_counter=2, mig_epoch=2, iv_counter=11)
    vcpu_state = Mbmd.vcpu_state(vp_index=1, mb_counter=3, mig_epoch=2, iv_counter=12)
    immutable = Mbmd.immutable_state(iv_counter=1, num_forward_streams=2)
    return [
        (Hello(SESSION, Capability.BATCH, page_count=64, vcpu_count=2, streams=1), []),
        (StartSection(Bundle.of(immutable, [PAGE])), []),
        (EpochRecord(start_token()), []),
        (MemoryRecord(0x2000, "pc.ram", memory_bundle()), []),
        (Bundle.of(td_state, [PAGE], another_follows=True), [EndSection()]),
        (Bundle.of(vcpu_state, [PAGE], another_follows=True), [EndSection()]),
        (start_token(), [EndSection()]),
        (SharedPage(0x2000, "pc.ram", PAGE), []),
        (SharedPage(0x2000, "pc.ram", ZERO_PAGE, fill=0), []),
        (MultifdFlush(), []),
        (EndOfPass(), []),
        (SourceAbort("why"), []),
    ]


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_give_records_or_wire_errors(data: bytes) -> None:
    parsed, parser, error = parse_as_far_as_possible(data)
    assert error is None or 0 <= error.offset <= len(data)
    assert to_bytes(parsed) == data[: parser.offset]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_stream_gives_records_or_wire_errors(data: st.DataObject) -> None:
    wire = bytearray(to_bytes(every_record()))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wire) - 1))
        wire[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    parsed, parser, _ = parse_as_far_as_possible(bytes(wire))
    assert to_bytes(parsed) == bytes(wire)[: parser.offset]


# Bounds and cross-checks, each with the message it gives.

HEADER_AT = 8 + 7
MBMD_AT = HEADER_AT + 4


def patched(data: bytes, at: int, layout: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, at, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("at", "layout", "value", "field", "offset"),
    [
        (0, ">Q", 0x3000, "flags", 6),
        (0, ">Q", 0x2000 | 0x1000, "flags", 6),  # CANCEL as QEMU would write it
        (0, ">Q", 0x2000 | 0x01, "flags", 6),
        (0, ">Q", 0x2000 | 0x800, "offset", 0),
        (0, ">Q", 1 << 52 | 0x400, "offset", 0),
        (0, ">Q", 0x2000 | 0x420, "flags", 6),  # the block before, and there was none
        (8, ">B", 0, "block name length", 8),
        (9, ">B", 0x07, "block", 9),
        (9, ">B", 0xE9, "block", 9),
        (HEADER_AT, "<H", 1, "flags", HEADER_AT),
        (HEADER_AT, "<H", 2, "flags", HEADER_AT),
        (HEADER_AT + 2, "<H", 0, "buf_list_num", HEADER_AT + 2),
        (HEADER_AT + 2, "<H", 2, "num_gpas", MBMD_AT + 24),
        (HEADER_AT + 2, "<H", 513, "buf_list_num", HEADER_AT + 2),
        (HEADER_AT + 2, "<H", 0xFFFF, "buf_list_num", HEADER_AT + 2),
        (MBMD_AT, "<H", 0, "size", MBMD_AT),
        (MBMD_AT, "<H", 47, "size", MBMD_AT),
        (MBMD_AT, "<H", 49, "size", MBMD_AT),
        (MBMD_AT, "<H", 0xFFFF, "size", MBMD_AT),
        (MBMD_AT + 4, "<H", 511, "migs_index", MBMD_AT + 4),
        (MBMD_AT + 6, "<B", 3, "bundle_type", MBMD_AT + 6),
        (MBMD_AT + 6, "<B", 32, "bundle_type", MBMD_AT + 6),
        (MBMD_AT + 7, "<B", 1, "reserved", MBMD_AT + 7),
        (MBMD_AT + 24, "<H", 0, "num_gpas", MBMD_AT + 24),
        (MBMD_AT + 24, "<H", 513, "num_gpas", MBMD_AT + 24),
        (MBMD_AT + 26, "<H", 1, "reserved", MBMD_AT + 26),
        (MBMD_AT + 48 + 4096, "<Q", 0x2001, "level", MBMD_AT + 48 + 4096),
        (MBMD_AT + 48 + 4096, "<Q", 0x2008, "reserved", MBMD_AT + 48 + 4096),
        (MBMD_AT + 48 + 4096, "<Q", 16 << 56, "status", MBMD_AT + 48 + 4096 + 7),
    ],
)
def test_a_memory_record_out_of_bounds_is_refused(
    at: int, layout: str, value: int, field: str, offset: int
) -> None:
    wire = to_bytes([MemoryRecord(0x2000, "pc.ram", memory_bundle())])
    error = refuses(patched(wire, at, layout, value))
    assert (error.field, error.offset) == (field, offset)


def test_error_offsets_count_from_the_head_of_the_stream() -> None:
    before = to_bytes(every_record()[:5])
    wire = to_bytes([MemoryRecord(0x2000, "pc.ram", memory_bundle())])
    error = refuses(before + patched(wire, MBMD_AT, "<H", 47))
    assert error.offset == len(before) + MBMD_AT
    assert str(error) == f"MBMD: byte {error.offset}, field size, value 47, expected 48"


@pytest.mark.parametrize(
    ("before", "record", "at", "field"),
    [
        ([], every_record()[1], 1 + 4, "size"),
        ([], every_record()[2], 8 + 4, "size"),
        ([EndSection()], start_token(), 4, "size"),
        ([EndSection()], SourceAbort("x"), 1 + 2, "length"),
        ([], SourceAbort("x"), 1, "type"),
    ],
)
def test_each_kind_of_record_counts_its_offsets_right(
    before: list[Record], record: Record, at: int, field: str
) -> None:
    head = to_bytes([*every_record()[:2], *before])
    error = refuses(head + patched(to_bytes([record]), at, "<H", 0xFFFF))
    assert (error.field, error.offset) == (field, len(head) + at)


def test_a_failed_parser_keeps_its_first_error() -> None:
    parser = RecordParser()
    parser.feed(b"\0\0\0\0\0\0\0\0")
    errors = []
    for call in (parser.next_record, parser.next_record, parser.end_of_stream):
        with pytest.raises(WireError) as caught:
            call()
        errors.append(caught.value)
        parser.feed(b"\x0a")
    assert errors == [errors[0]] * 3


def test_extreme_offsets_and_block_names_are_accepted() -> None:
    for offset, block in ((0, "a"), ((1 << 52) - 4096, "b" * 255)):
        record = MemoryRecord(offset, block, memory_bundle())
        assert parse(to_bytes([record])) == [record]


def test_an_entry_may_say_that_it_was_skipped_or_is_pending() -> None:
    entry = GpaEntry(0x2000, GpaOperation.REMIGRATE, pending=True, l2_map=3, mig_type=1)
    bundle = replace(memory_bundle(), gpa_list=entry.pack())
    record = MemoryRecord(0x2000, "pc.ram", bundle)
    assert parse(to_bytes([record])) == [record]


def test_tokens_have_no_pages_and_state_has_some() -> None:
    token = to_bytes([EpochRecord(start_token())])
    assert refuses(patched(token, 10, "<H", 1)).field == "buf_list_num"
    start = to_bytes([every_record()[1]])
    assert refuses(patched(start, 3, "<H", 0)).field == "buf_list_num"


def test_a_bundle_stands_only_in_its_own_record() -> None:
    start = to_bytes([every_record()[1]])
    for number in (1, 2, 32, 33):
        assert refuses(patched(start, 1 + 4 + 6, "<B", number)).field in ("bundle_type", "reserved")
    token = to_bytes([EpochRecord(start_token())])
    assert refuses(patched(token, 8 + 4 + 6, "<B", 16)).field in ("bundle_type", "num_gpas")
    memory = memory_bundle()
    wire = b"\x0a" + b"".join(encode(MemoryRecord(0, "pc.ram", memory)))[HEADER_AT:]
    assert refuses(wire).field == "bundle_type"


def test_the_end_section_is_a_chain_that_the_token_ends() -> None:
    td_state = Mbmd.td_state(mb_counter=2, mig_epoch=2, iv_counter=11)
    chained = Bundle.of(td_state, [PAGE], another_follows=True)
    loose = to_bytes([EndSection(), chained])
    assert refuses(patched(loose, 1, "<H", 0)).field == "flags"
    token = to_bytes([EndSection(), start_token()])
    assert refuses(patched(token, 1, "<H", 1)).field == "flags"
    assert refuses(b"\x7e").field == "first byte"
    assert refuses(token + b"\x7e\x7e").offset == len(token) + 1


def test_the_source_may_abort_inside_the_end_section() -> None:
    records = [*every_record()[6:8], SourceAbort("vCPU 1 cannot be exported")]
    assert parse(to_bytes(records)) == records
    hello = to_bytes(every_record()[:1])
    assert refuses(to_bytes(records[:2]) + hello).field == "type"


def test_a_cancel_is_a_memory_record_whose_list_says_so() -> None:
    bundle = memory_bundle(2, GpaOperation.CANCEL)
    wire = to_bytes([MemoryRecord(0x2000, "pc.ram", bundle, cancel=True)])
    assert wire[:8].hex() == "0000000000002400"
    (record,) = parse(wire)
    assert isinstance(record, MemoryRecord)
    assert record.cancel
    with pytest.raises(WireError, match="field cancel, value False"):
        encode(MemoryRecord(0x2000, "pc.ram", bundle))
    with pytest.raises(WireError, match="field cancel, value True"):
        encode(MemoryRecord(0x2000, "pc.ram", memory_bundle(), cancel=True))


def test_a_cancel_that_the_module_skipped_can_be_sent() -> None:
    record = MemoryRecord(0, "pc.ram", memory_bundle(1, GpaOperation.NOP), cancel=True)
    assert parse(to_bytes([record])) == [replace(record, cancel=False)]


@pytest.mark.parametrize(
    "damage",
    [
        lambda bundle: replace(bundle, pages=[PAGE[:-1]]),
        lambda bundle: replace(bundle, pages=[PAGE, PAGE]),
        lambda bundle: replace(bundle, pages=[memoryview(PAGE * 2)[::2]]),
        lambda bundle: replace(bundle, gpa_list=b""),
        lambda bundle: replace(bundle, gpa_list=bytes((8, *bytes(7)))),
        lambda bundle: replace(bundle, macs=bytes(15)),
        lambda bundle: replace(bundle, header=MigrationHeader(0, 2)),
        lambda bundle: replace(bundle, header=MigrationHeader(2, 1)),
        lambda bundle: replace(bundle, header=MigrationHeader(0, 513)),
        lambda bundle: replace(bundle, mbmd=replace(bundle.mbmd, size=47)),
        lambda bundle: replace(bundle, mbmd=replace(bundle.mbmd, mac=b"")),
        lambda bundle: replace(bundle, mbmd=replace(bundle.mbmd, mb_counter=1 << 32)),
        lambda bundle: start_token(),
    ],
)
def test_what_the_parser_would_refuse_is_not_encoded(damage: Callable[[Bundle], Bundle]) -> None:
    with pytest.raises(WireError):
        encode(MemoryRecord(0x2000, "pc.ram", damage(memory_bundle())))


@pytest.mark.parametrize(
    ("offset", "block"),
    [(0x2001, "pc.ram"), (-4096, "pc.ram"), (1 << 52, "pc.ram"), (0, ""), (0, "b" * 256)],
)
def test_offsets_and_names_that_do_not_fit_are_not_encoded(offset: int, block: str) -> None:
    with pytest.raises(WireError):
        encode(MemoryRecord(offset, block, memory_bundle()))


def test_a_header_is_four_bytes() -> None:
    assert MigrationHeader.unpack(bytes.fromhex("01000002")) == MigrationHeader(1, 512)
    assert MigrationHeader(1, 3).another_follows
    with pytest.raises(WireError, match="field length, value 3, expected 4"):
        MigrationHeader.unpack(bytes(3))


def test_bundle_types_know_what_they_carry() -> None:
    assert [kind.name for kind in BundleType if kind.is_token] == ["EPOCH_TOKEN", "ABORT_TOKEN"]
    assert sum(kind.is_state for kind in BundleType) == 3


def test_an_end_inside_a_record_is_final() -> None:
    parser = RecordParser()
    assert list(parser.records(b"\x09abc")) == []
    for attempt in (parser.end_of_stream, parser.end_of_stream, parser.next_record):
        with pytest.raises(WireError, match="ends inside a record"):
            attempt()
