"""Does inspection show what a stream holds, and say what is wrong, whatever the bytes?"""

from __future__ import annotations

import io
import itertools
import os
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_multifd import every_packet
from test_multifd import to_bytes as packets_to_bytes
from test_wire import every_record, to_bytes

from tdxmig_model.errors import UsageError
from tdxmig_model.inspection import Entry, Framing, Summary, inspect
from tdxmig_model.inspection.channels import MultifdWalker, RecordWalker, ReturnPathWalker
from tdxmig_model.inspection.judge import Judge, Totals
from tdxmig_model.inspection.reader import Reader
from tdxmig_model.wire import (
    AbortToken,
    Bundle,
    Committed,
    EndOfPass,
    EndSection,
    EpochRecord,
    Failed,
    Footer,
    GpaOperation,
    InitialPacket,
    Mbmd,
    MemoryRecord,
    PrivatePacket,
    Record,
    SessionStarted,
    SharedPacket,
    SourceAbort,
    StartSection,
    encode_packet,
    encode_return,
)
from tdxmig_model.wire.gpa_list import build_entries, entries_to_bytes

PAGE = bytes(range(256)) * 16
START = 0xFFFFFFFF


# A stream in which every counter is right.


def memory(
    gpa: int,
    count: int = 1,
    *,
    counter: int,
    iv: int,
    epoch: int = 1,
    stream: int = 0,
    operation: GpaOperation = GpaOperation.MIGRATE,
) -> Bundle:
    mbmd = Mbmd.memory(
        num_gpas=count, mb_counter=counter, mig_epoch=epoch, iv_counter=iv, migs_index=stream
    )
    entries = build_entries(gpa + 4096 * np.arange(count), operation)
    return Bundle.of(mbmd, [PAGE] * count, entries_to_bytes(entries), bytes(16 * count))


def token(total: int, iv: int, epoch: int) -> Bundle:
    return Bundle.of(Mbmd.epoch_token(total_mb=total, mig_epoch=epoch, iv_counter=iv))


def good_stream() -> list[Record]:
    """Two epochs, two streams, one vCPU, and one page after the start token."""
    td = Mbmd.td_state(mb_counter=1, mig_epoch=2, iv_counter=10)
    vcpu = Mbmd.vcpu_state(vp_index=0, mb_counter=2, mig_epoch=2, iv_counter=11)
    return [
        StartSection(Bundle.of(Mbmd.immutable_state(iv_counter=1, num_forward_streams=2), [PAGE])),
        EpochRecord(token(2, 2, 1)),
        MemoryRecord(0x2000, "pc.ram", memory(0x2000, 4, counter=1, iv=3)),
        MemoryRecord(0x8000, "pc.ram", memory(0x8000, 2, counter=0, iv=1, stream=1)),
        EpochRecord(token(5, 8, 2)),
        MemoryRecord(0x9000, "pc.ram", memory(0x9000, counter=1, iv=4, epoch=2, stream=1)),
        EndOfPass(),
        EndSection(),
        Bundle.of(td, [PAGE], another_follows=True),
        Bundle.of(vcpu, [PAGE, PAGE], another_follows=True),
        token(9, 12, START),
        Footer(),
        MemoryRecord(0xA000, "pc.ram", memory(0xA000, counter=0, iv=6, epoch=START, stream=1)),
    ]


def changed(at: int, **fields: Any) -> list[Record]:
    """The good stream with other fields in the MBMD of one record."""
    records = good_stream()
    record: Any = records[at]
    bundle = record if isinstance(record, Bundle) else record.bundle
    other = replace(bundle, mbmd=replace(bundle.mbmd, **fields))
    records[at] = other if record is bundle else replace(record, bundle=other)
    return records


def walk(
    data: bytes, kind: type[RecordWalker | MultifdWalker | ReturnPathWalker] = RecordWalker
) -> list[Entry]:
    judge = Judge(alone=True, totals=Totals())
    return list(kind(Reader(io.BytesIO(data)), judge).entries())


def texts(entries: Iterable[Entry]) -> list[str]:
    return [problem.text for entry in entries for problem in entry.problems]


def patched(data: bytes, at: int, layout: str, value: int) -> bytes:
    other = bytearray(data)
    struct.pack_into(layout, other, at, value)
    return bytes(other)


# What is there.


def test_a_good_stream_is_shown_and_has_no_problem() -> None:
    records = good_stream()
    entries = walk(to_bytes(records))
    assert texts(entries) == []
    assert [entry.record for entry in entries] == [
        "immutable state",
        "epoch token",
        "memory",
        "memory",
        "epoch token",
        "memory",
        "end of pass",
        "end section",
        "TD state",
        "vCPU state",
        "start token",
        "footer",
        "memory",
    ]
    ends = [len(to_bytes(records[:count])) for count in range(len(records) + 1)]
    assert [entry.offset for entry in entries] == ends[:-1]
    assert [entry.length for entry in entries] == [b - a for a, b in itertools.pairwise(ends)]


def test_the_fields_of_a_memory_record_are_shown() -> None:
    entry = walk(to_bytes(good_stream()))[3]
    assert entry.fields == {
        "ram_offset": 0x8000,
        "ram_flags": 0x400,
        "block": "pc.ram",
        "flags": 0,
        "buf_list_num": 2,
    }
    assert entry.mbmd is not None
    assert entry.mbmd["num_gpas"] == 2
    names = ("migs_index", "mb_counter", "mig_epoch", "iv_counter", "bundle_type")
    assert [entry.mbmd[name] for name in names] == [1, 0, 1, 1, 16]
    assert [str(one) for one in entry.gpas] == ["0x8000..0xa000"]


def test_a_gpa_list_is_shown_as_runs_that_say_the_same() -> None:
    gpas = np.array([0x1000, 0x2000, 0x4000, 0x5000, 0x6000], dtype=np.uint64)
    entries = build_entries(gpas)
    entries[3:] = build_entries(gpas[3:], GpaOperation.REMIGRATE)
    entries[4] |= np.uint64(3 << 56 | 4)
    mbmd = Mbmd.memory(num_gpas=5, mb_counter=1, mig_epoch=1, iv_counter=1)
    bundle = Bundle.of(mbmd, [PAGE] * 5, entries_to_bytes(entries), bytes(80))
    (entry,) = walk(to_bytes([MemoryRecord(0x1000, "pc.ram", bundle)]))
    assert [str(one) for one in entry.gpas] == [
        "0x1000..0x3000",
        "0x4000..0x5000",
        "0x5000..0x6000 REMIGRATE",
        "0x6000..0x7000 REMIGRATE SEPT_ENTRY_BUSY_HOST_PRIORITY pending",
    ]


def test_every_record_of_the_wire_is_known() -> None:
    entries = walk(to_bytes(every_record()))
    assert len(entries) == len(every_record())
    assert "unknown" not in {entry.record for entry in entries}
    shared = [entry.record for entry in entries if entry.record.startswith("shared")]
    assert shared == ["shared page", "shared page of one byte"]


def test_multifd_packets_are_shown() -> None:
    packets = [
        InitialPacket(1),
        PrivatePacket(4, "pc.ram", (0x2000,), memory(0x2000, counter=1, iv=3, stream=1)),
        SharedPacket(5, "pc.ram", (0x1000, 0x2000, 0x9000), [PAGE] * 3),
        SharedPacket(6, sync=True),
        SharedPacket(7),
    ]
    entries = walk(packets_to_bytes(packets), MultifdWalker)
    assert texts(entries) == []
    names = [entry.record for entry in entries]
    assert names == ["initial packet", "memory", "shared pages", "sync", "empty packet"]
    assert entries[1].fields["packet_num"] == 4
    assert entries[2].fields["offsets"] == "0x1000..0x3000 0x9000..0xa000"
    assert [entry.length for entry in entries] == [
        sum(map(len, encode_packet(packet))) for packet in packets
    ]


def test_an_initial_packet_without_a_uuid_and_a_capture_without_one_are_told_apart() -> None:
    packet = SharedPacket(6, sync=True)
    for packets, names in (
        ([InitialPacket(0), packet], ["initial packet", "sync"]),
        ([packet, packet], ["sync", "sync"]),
    ):
        data = packets_to_bytes(packets)
        assert [entry.record for entry in walk(data, MultifdWalker)] == names


def test_the_return_path_is_shown_with_messages_of_qemu_between() -> None:
    mbmd = Mbmd.abort_token(mb_counter=0, iv_counter=1, mac=bytes(range(16)))
    ours = [SessionStarted(), AbortToken(mbmd), Failed("why"), Committed(bytes(32))]
    data = b"".join(map(encode_return, ours)) + bytes.fromhex("0002000400000007")
    entries = walk(data, ReturnPathWalker)
    assert texts(entries) == []
    assert [entry.record for entry in entries] == [
        "SESSION_STARTED",
        "ABORT_TOKEN",
        "FAILED",
        "COMMITTED",
        "QEMU return-path message 2",
    ]
    assert entries[1].mbmd is not None
    assert entries[1].mbmd["mac"] == bytes(range(16))
    assert (entries[2].fields["reason"], entries[3].fields["digest"]) == ("why", bytes(32))


# What is wrong between records.


@pytest.mark.parametrize(
    ("records", "text"),
    [
        (changed(2, iv_counter=2), "IV_COUNTER 2 of stream 0: the IVs up to 2 are used"),
        (changed(4, iv_counter=7), "IV_COUNTER 7 of stream 0: the IVs up to 7 are used"),
        (changed(5, iv_counter=3), "IV_COUNTER 3 of stream 1: the IVs up to 3 are used"),
        (changed(0, mb_counter=1), "MB_COUNTER 1, expected 0"),
        (changed(1, mb_counter=1), "MB_COUNTER 1, expected 0"),
        (changed(2, mb_counter=2), "MB_COUNTER 2, expected 1"),
        (changed(3, mb_counter=1), "MB_COUNTER 1, expected 0"),
        (changed(5, mb_counter=0), "MB_COUNTER 0, expected 1"),
        (changed(8, mb_counter=2), "MB_COUNTER 2, expected 1"),
        (changed(5, mig_epoch=1), "epoch 1 inside epoch 2"),
        (changed(4, mig_epoch=1), "epoch 1 after epoch 1"),
        (changed(3, migs_index=2), "stream 2, and the immutable state names 2 forward streams"),
        (changed(10, type_specific=struct.pack("<Q", 8)), "TOTAL_MB 8, and 9 bundles were seen"),
        ([*good_stream()[:3], *good_stream()[4:]], "TOTAL_MB 5, and 4 bundles were seen"),
        ([*good_stream()[:2], good_stream()[0]], "a second immutable state"),
        ([good_stream()[2], good_stream()[0]], "the immutable state comes after other bundles"),
        ([*good_stream()[:9], *good_stream()[8:]], "a second TD state"),
        ([*good_stream()[:8], *good_stream()[9:]], "vCPU state before the TD state"),
        ([*good_stream()[:10], *good_stream()[9:]], "the state of vCPU 0 a second time"),
        ([*good_stream(), good_stream()[1]], "EPOCH_TOKEN after the start token"),
    ],
)
def test_what_does_not_follow_is_told(records: list[Record], text: str) -> None:
    found = texts(walk(to_bytes(records)))
    assert any(one.startswith(text) for one in found), found


def test_a_capture_from_the_middle_misses_nothing() -> None:
    for first in range(len(good_stream())):
        records = good_stream()[first:]
        if not isinstance(records[0], Bundle | Footer):
            assert texts(walk(to_bytes(records))) == []


def test_offsets_are_compared_with_gpas_across_the_hole_below_4_gib() -> None:
    above = 1 << 32
    good = [
        MemoryRecord(0x2000, "pc.ram", memory(0x2000, counter=1, iv=1)),
        MemoryRecord(0x80000000, "pc.ram", memory(above, counter=2, iv=3)),
        MemoryRecord(0x80001000, "pc.ram", memory(above + 4096, counter=3, iv=5)),
        MemoryRecord(0x7000, "other", memory(0x2000, counter=4, iv=7)),
    ]
    assert texts(walk(to_bytes(good))) == []
    wrong = [replace(good[0], offset=0x3000), good[1], replace(good[2], offset=0x80002000)]
    assert texts(walk(to_bytes(wrong))) == [
        "offset 0x3000 of the block stands for GPA 0x2000",
        "offset 0x80002000 of the block stands for GPA 0x100001000",
    ]
    packet = PrivatePacket(1, "pc.ram", (0x2000, 0x4000), memory(0x2000, 2, counter=1, iv=1))
    found = texts(walk(packets_to_bytes([packet]), MultifdWalker))
    assert found == ["offset 0x4000 of the block stands for GPA 0x3000"]


@pytest.mark.parametrize(
    ("counters", "epochs", "found"),
    [
        ((5, 7, 1), (1, 1, 2), []),  # begins again with an epoch, and goes on elsewhere meanwhile
        ((5, 5), (1, 1), ["MB_COUNTER 5 after 5 in one epoch"]),
        ((5, 4), (1, 1), ["MB_COUNTER 4 after 5 in one epoch"]),
        ((1, 2), (2, 1), ["epoch 1 after epoch 2"]),
    ],
)
def test_of_several_files_only_the_order_within_each_is_judged(
    counters: tuple[int, ...], epochs: tuple[int, ...], found: list[str]
) -> None:
    packets = [
        PrivatePacket(0, "pc.ram", (0x2000,), memory(0x2000, counter=one, iv=10 * at, epoch=epoch))
        for at, (one, epoch) in enumerate(zip(counters, epochs, strict=True), 1)
    ]
    judge = Judge(alone=False, totals=Totals())
    walker = MultifdWalker(Reader(io.BytesIO(packets_to_bytes(packets))), judge)
    assert texts(walker.entries()) == found


def test_the_end_section_can_be_given_up_by_an_abort_and_by_no_other_message() -> None:
    begun = good_stream()[:9]
    records = [*begun, SourceAbort("why"), good_stream()[1]]
    entries = walk(to_bytes(records))
    assert [entry.record for entry in entries[-2:]] == ["SOURCE_ABORT", "epoch token"]
    assert not entries[-2].problems
    entries = walk(to_bytes(begun) + to_bytes([every_record()[0]]))
    assert texts(entries) == ["HELLO inside the end section"]


# What is wrong in a record, and where reading goes on.

MEMORY_AT = len(to_bytes(good_stream()[:2]))
HEADER_AT = MEMORY_AT + 8 + 7


@pytest.mark.parametrize(
    ("at", "layout", "value", "field"),
    [
        (MEMORY_AT + 9, ">B", 0x07, "block name"),
        (HEADER_AT, "<H", 2, "flags"),
        (HEADER_AT + 4 + 4, "<H", 600, "migs_index"),
        (HEADER_AT + 4 + 6, "<B", 99, "bundle_type"),
        (HEADER_AT + 4 + 7, "<B", 1, "reserved"),
        (HEADER_AT + 4 + 24, "<H", 3, "num_gpas"),
        (HEADER_AT + 52 + 4 * 4096 + 8, "<Q", 0x3008 | 1 << 52, "reserved"),
    ],
)
def test_after_a_wrong_field_reading_goes_on(at: int, layout: str, value: int, field: str) -> None:
    entries = walk(patched(to_bytes(good_stream()), at, layout, value))
    assert len(entries) == len(good_stream())
    assert field in entries[2].problems[0].text
    assert not entries[3].problems


@pytest.mark.parametrize(
    ("at", "layout", "value", "text"),
    [
        (MEMORY_AT, ">B", 0x33, "no record begins with 0x33"),
        (MEMORY_AT, ">Q", 0x2001, "RAM flags 0x1 of no known record"),
        (HEADER_AT + 2, "<H", 513, "513 buffers, and a bundle has at most 512"),
        (HEADER_AT + 4, "<H", 47, "an MBMD of 47 bytes"),
    ],
)
def test_where_a_length_cannot_be_trusted_reading_ends(
    at: int, layout: str, value: int, text: str
) -> None:
    entries = walk(patched(to_bytes(good_stream()), at, layout, value))
    assert len(entries) == 3
    assert entries[2].problems[-1].text.startswith(text)
    assert entries[2].problems[-1].text.endswith("what follows cannot be decoded")
    assert MEMORY_AT <= entries[2].problems[-1].offset <= at + 6


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, 0, "no packet begins with magic 0x0, version 1"),
        (12, 513, "room for 513 offsets"),
        (16, 129, "129 pages in a packet with room for 128 offsets"),
    ],
)
def test_a_packet_whose_length_cannot_be_trusted_ends_reading(
    at: int, value: int, text: str
) -> None:
    first = packets_to_bytes([InitialPacket(0)])
    data = first + patched(packets_to_bytes([SharedPacket(1, sync=True)]), at, ">I", value)
    entries = walk(data, MultifdWalker)
    assert len(entries) == 2
    assert text in entries[1].problems[-1].text


def test_compressed_pages_are_passed_over_by_their_length() -> None:
    packet = SharedPacket(1, "pc.ram", (0,), [PAGE])
    squeezed = patched(packets_to_bytes([packet])[: 1344 + 99], 20, ">I", 99)
    data = patched(squeezed, 8, ">I", 0x2) + packets_to_bytes([SharedPacket(2, sync=True)])
    entries = walk(data, MultifdWalker)
    assert [entry.record for entry in entries] == ["shared pages", "sync"]
    assert "zlib" in entries[0].problems[0].text


def test_the_end_of_a_file_inside_a_record_is_told() -> None:
    data = to_bytes(good_stream())
    ends = {len(to_bytes(good_stream()[:count])) for count in range(20)}
    for length in [*range(200), *range(200, len(data), 997)]:
        found = texts(walk(data[:length]))
        assert bool(found) == (length not in ends), length
        assert all("the file ends inside this record" in one for one in found)


# Whole files.


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def seen(*paths: Path) -> Summary:
    summary = Summary()
    for _ in inspect(paths, summary):
        pass
    return summary


def two_channels(folder: Path, total: int = 9) -> list[Path]:
    """The good stream with the memory of each MIG stream on a channel of its own."""
    records = good_stream()
    main = [record for record in records if not isinstance(record, MemoryRecord)]
    main[main.index(token(9, 12, START))] = token(total, 12, START)
    files = [write(folder, "main", to_bytes(main))]
    for channel in (0, 1):
        packets = [
            PrivatePacket(number, "pc.ram", offsets_of(record.bundle), record.bundle)
            for number, record in enumerate(records)
            if isinstance(record, MemoryRecord) and record.bundle.mbmd.migs_index == channel
        ]
        data = packets_to_bytes([InitialPacket(channel), *packets])
        files.append(write(folder, f"channel-{channel}", data))
    return files


def offsets_of(bundle: Bundle) -> tuple[int, ...]:
    first = int.from_bytes(bundle.gpa_list[:8], "little") & 0xFFFFFFFFFF000
    return tuple(first + 4096 * index for index in range(len(bundle.pages)))


def test_channels_are_judged_together(tmp_path: Path) -> None:
    summary = seen(*two_channels(tmp_path))
    assert (summary.problems, summary.bundles, summary.pages) == (0, 10, 8)
    wrong = seen(*two_channels(tmp_path, total=8))
    assert wrong.errors == [
        (None, None, "the start token counts 8 bundles, and 9 are in these files")
    ]


def test_the_framing_of_a_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    hello = every_record()[0]
    cases = (
        (to_bytes([hello]), Framing.RECORDS),
        (encode_return(hello), Framing.RETURN_PATH),
        (bytes.fromhex("0002000400000007"), Framing.RETURN_PATH),
        (packets_to_bytes(every_packet()), Framing.MULTIFD),
        (to_bytes(good_stream()), Framing.RECORDS),
    )
    for number, (data, framing) in enumerate(cases):
        path = write(tmp_path, str(number), data)
        assert {file.framing for file, _ in inspect([path], Summary())} == {framing}


def test_an_aborted_stream_misses_no_start_token(tmp_path: Path) -> None:
    cut = good_stream()[:3]
    assert seen(write(tmp_path, "cut", to_bytes(cut))).errors == [
        (None, None, "the stream has no start token: the migration did not come to its end")
    ]
    ended = [*cut, SourceAbort("the operator cancelled")]
    assert seen(write(tmp_path, "ended", to_bytes(ended))).problems == 0


def test_a_file_that_cannot_be_opened_is_told_before_anything_is_read(tmp_path: Path) -> None:
    good = write(tmp_path, "good", to_bytes(good_stream()))
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match="cannot read"):
            inspect([good, wrong], Summary())


def test_memory_stays_constant_on_a_big_file(tmp_path: Path) -> None:
    """40 bundles of 2 MiB, of which each has a problem: 80 MiB in a few."""
    record = to_bytes([MemoryRecord(0x2000, "pc.ram", memory(0x2000, 512, counter=1, iv=1))])
    path = tmp_path / "big"
    with path.open("wb") as file:
        for _ in range(40):
            file.write(record)
    tracemalloc.start()
    summary = seen(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (summary.records, summary.problems) == (40, 2 * 39)
    assert peak < 4 << 20


def test_a_summary_keeps_some_problems_and_counts_all(tmp_path: Path) -> None:
    mark = to_bytes([EndOfPass()])
    path = write(tmp_path, "many", patched(mark, 0, ">Q", 0x1010) * 5000)
    summary = seen(path)
    assert (summary.problems, len(summary.errors)) == (5000, 100)


# Garbage.

WALKERS = (RecordWalker, MultifdWalker, ReturnPathWalker)


def check_garbage(data: bytes) -> None:
    for kind in WALKERS:
        entries = walk(data, kind)
        at = 0
        for entry in entries:
            assert entry.offset == at
            assert entry.length or entry.problems
            at += entry.length
        assert at <= len(data)
        # Whatever was not read to its end has a problem that says so.
        assert at == len(data) or entries[-1].problems


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_never_crash(data: bytes) -> None:
    check_garbage(data)
    check_garbage(b"\x11\x22\x33\x44\0\0\0\1" + data)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_streams_never_crash(data: st.DataObject) -> None:
    whole: Callable[[], bytes] = data.draw(
        st.sampled_from(
            [
                lambda: to_bytes(good_stream()),
                lambda: packets_to_bytes(every_packet()[:2] + every_packet()[3:]),
                lambda: to_bytes(every_record()),
            ]
        )
    )
    wire = bytearray(whole())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wire) - 1))
        wire[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    check_garbage(bytes(wire))


def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(to_bytes(good_stream()),))
    writer.start()
    summary = seen(fifo)
    writer.join()
    assert (summary.records, summary.problems) == (13, 0)
