"""Are the known defects of QEMU's TDX migration code absent here?

Each test is named after the number of a defect in specs/seed.toml, which says what holds here.
"""

from __future__ import annotations

import struct
import threading
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_play import OK, REFUSED, exported, gpas, immutable, listed, play, td_state, with_bundle
from test_engine import exporting, paused, source
from test_engine_destination import destination, importing, in_end_section, memory
from test_multifd import InitialPacket, patched, private, refuses
from test_multifd import to_bytes as packets_to_bytes
from test_session import SESSION, migrate
from test_wire import memory_bundle, start_token, to_bytes

from tdxmig_model.backend.soft.backend import soft_destination
from tdxmig_model.backend.soft.sept import LOCK_BIT
from tdxmig_model.engine import PreCopy, RamBlock
from tdxmig_model.engine.commands import (
    Command,
    ExportAbort,
    ExportMem,
    ExportRestore,
    ExportStateImmutable,
    ExportStateVp,
    Result,
)
from tdxmig_model.engine.packets import record_of
from tdxmig_model.engine.steps import ALL_CAPABILITIES
from tdxmig_model.errors import BackendError, PeerError, UsageError, WireError
from tdxmig_model.session import DestinationSession, SessionOptions
from tdxmig_model.trace import TraceWriter, read_trace
from tdxmig_model.transport import Faults, memory_pair
from tdxmig_model.wire import (
    AbortToken,
    Bundle,
    EndSection,
    EpochRecord,
    GpaOperation,
    Hello,
    Mbmd,
    MemoryRecord,
    MigrationHeader,
    MultifdParser,
    PrivatePacket,
    RecordParser,
    ReturnPathParser,
    SharedPacket,
    SourceAbort,
    StartSection,
    encode,
    encode_packet,
    encode_return,
    iov_num,
)
from tdxmig_model.wire.gpa_list import GpaStatus

MEMORY = to_bytes([MemoryRecord(0x2000, "pc.ram", memory_bundle())])
HEADER_AT = 8 + 7
MBMD_AT = HEADER_AT + 4
STATE = to_bytes([StartSection(immutable(1))])


def refused(data: bytes) -> WireError:
    with pytest.raises(WireError) as caught:
        list(RecordParser().records(data))
    return caught.value


# --- the load path -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 6, 47, 49, 4097, 0xFFFF])
def test_qf_l1_the_length_of_an_mbmd_is_never_used_as_a_length(size: int) -> None:
    """Refused as soon as the 48 bytes are there: nothing that it asks for is waited for."""
    head = patched(MEMORY, MBMD_AT, "<H", size)[: MBMD_AT + 48]
    error = refused(head)
    assert (error.field, error.value, error.offset) == ("size", size, MBMD_AT)
    packet = patched(packets_to_bytes([private(1)]), 1344, "<H", size)
    assert refuses(packet).field == "size"


@pytest.mark.parametrize("count", [513, 0x7FFF, 0xFFFF])
def test_qf_l2_the_number_of_buffers_is_bounded_before_any_is_read(count: int) -> None:
    for wire, at in ((MEMORY, HEADER_AT), (STATE, 1)):
        head = patched(wire, at + 2, "<H", count)[: at + 52]
        tracemalloc.start()
        error = refused(head)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (error.field, error.value) == ("buf_list_num", count)
        assert peak < 1 << 16


def test_qf_l3_lists_have_the_size_of_the_bounded_number_of_pages() -> None:
    """512 pages are read, with lists of 4 and 8 KiB; one more never gets as far as its lists."""
    record = MemoryRecord(0x2000, "pc.ram", memory_bundle(512))
    (parsed,) = RecordParser().records(to_bytes([record]))
    assert isinstance(parsed, MemoryRecord)
    assert (len(parsed.bundle.gpa_list), len(parsed.bundle.macs)) == (4096, 8192)
    one_more = patched(to_bytes([record]), HEADER_AT + 2, "<H", 513)
    assert refused(one_more).field == "buf_list_num"


def test_qf_l4_an_end_or_a_zero_length_in_the_chain_is_not_waited_for(tmp_path: Path) -> None:
    """In the chain the peer sends a zero length, or nothing: an error at once, or after a time."""
    chain = to_bytes([EndSection(), td_state(link=True)])
    parser = RecordParser()
    assert len(list(parser.records(chain))) == 2
    assert parser.next_record() is None
    with pytest.raises(WireError, match="ends inside the end section"):
        parser.end_of_stream()
    assert refused(chain + bytes(52)).field == "size"
    begun = time.monotonic()
    outcome = silent_source(tmp_path, timeout=0.3)
    assert time.monotonic() - begun < 5
    assert "sent nothing for 0.3 s" in outcome.cause


def silent_source(folder: Path, timeout: float) -> Any:
    """A destination whose source says HELLO and then nothing."""
    ours, theirs = memory_pair()
    hello = Hello(SESSION, ALL_CAPABILITIES, 4, 1, 1)
    ours.send(encode(hello))
    backend = soft_destination(4, vcpus=1)
    with TraceWriter(folder / "destination.ndjson", "destination", SESSION) as trace:
        session = DestinationSession(
            backend,
            theirs,
            trace,
            pages=4,
            vcpus=1,
            options=SessionOptions(peer_timeout=timeout),
        )
        thread = threading.Thread(target=session.run, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    return session.outcome


def test_qf_l5_a_record_that_is_cut_short_never_reaches_the_module() -> None:
    for wire in (MEMORY, STATE):
        for length in [*range(1, 100), *range(100, len(wire), 13)]:
            parser = RecordParser()
            assert list(parser.records(wire[:length])) == []
            with pytest.raises(WireError, match="ends inside a record"):
                parser.end_of_stream()
    packet = packets_to_bytes([InitialPacket(0), private(1)])
    for length in range(65, len(packet), 7):
        channel = MultifdParser()
        assert list(channel.records(packet[:length])) == [InitialPacket(0)]
        with pytest.raises(WireError, match="ends inside a record"):
            channel.end_of_stream()


def test_qf_l6_the_type_is_that_of_the_bundle_itself() -> None:
    two = MEMORY + patched(to_bytes([EpochRecord(start_token())]), 12, "<H", 6)
    parser = RecordParser()
    records = parser.records(two)
    assert isinstance(next(records), MemoryRecord)
    with pytest.raises(WireError) as caught:
        next(records)
    assert (caught.value.field, caught.value.value) == ("size", 6)
    for number in (3, 15, 17, 34, 255):
        assert refused(patched(MEMORY, MBMD_AT + 6, "<B", number)).field == "bundle_type"


def test_qf_l7_an_abort_token_reaches_the_module_of_the_source() -> None:
    mbmd = Mbmd.abort_token(mb_counter=0, iv_counter=1, mac=bytes(range(16)))
    (message,) = ReturnPathParser().records(encode_return(AbortToken(mbmd)))
    engine = paused()
    play(engine.finish_epochs(), with_bundle(start_token()))
    assert engine.receive(message) == "abort_with_token"
    taken = play(engine.abort_with_token(), OK)
    assert taken.commands == [ExportAbort(mbmd.pack())]
    # On the forward path it has no place, and the error says what it was.
    error = refused(b"\x09" + bytes(4) + mbmd.pack())
    assert (error.field, error.value) == ("bundle_type", "ABORT_TOKEN")


def token_record(epoch: int = 1) -> EpochRecord:
    return EpochRecord(Bundle.of(Mbmd.epoch_token(total_mb=2, mig_epoch=epoch, iv_counter=2)))


@pytest.mark.parametrize(
    ("engine", "record"),
    [
        (destination, token_record()),
        (destination, memory(1)),
        (destination, EndSection()),
        (destination, td_state(link=True)),
        (importing, StartSection(immutable(2))),
        (importing, td_state(link=True)),
        (importing, start_token()),
        (in_end_section, memory(1)),
        (in_end_section, token_record()),
        (in_end_section, EndSection()),
        (in_end_section, td_state(link=True)),
        (in_end_section, StartSection(immutable(2))),
    ],
)
def test_qf_l8_a_record_in_another_place_is_refused(engine: Callable[[], Any], record: Any) -> None:
    with pytest.raises(PeerError):
        engine().accept(record)


def test_qf_l8_a_chain_has_an_end_and_a_token_has_no_successor() -> None:
    token = to_bytes([start_token()])
    assert refused(b"\x0a" + patched(token, 0, "<H", 1)).field == "flags"
    engine = in_end_section()
    for vcpu in range(2):
        state = Bundle.of(
            Mbmd.vcpu_state(vp_index=vcpu, mb_counter=2, mig_epoch=1, iv_counter=6),
            [bytes(4096)],
            another_follows=True,
        )
        engine.accept(state)
        play(engine.import_vcpu_state(state), OK)
        with pytest.raises(PeerError, match="twice"):
            play(engine.import_vcpu_state(state))


def test_qf_l9_the_numbers_of_a_bundle_are_compared() -> None:
    state_without_pages = patched(STATE, 3, "<H", 0)
    token_with_pages = patched(to_bytes([EpochRecord(start_token())]), 10, "<H", 1)
    other_count = patched(MEMORY, MBMD_AT + 24, "<H", 2)
    for wire, field in (
        (state_without_pages, "buf_list_num"),
        (token_with_pages, "buf_list_num"),
        (other_count, "num_gpas"),
    ):
        assert refused(wire).field == field
    assert refuses(patched(packets_to_bytes([private(2)]), 1344 + 24, "<H", 1)).field == "num_gpas"


@pytest.mark.parametrize("stream", [2, 510])
def test_qf_l10_a_stream_that_is_not_there_is_refused_before_any_command(stream: int) -> None:
    engine = importing()
    record = memory(1, stream=stream)
    assert engine.accept(record) == "import_memory"
    with pytest.raises(PeerError, match=f"on stream {stream}; there are 2 streams"):
        play(engine.import_memory(record))
    assert refused(patched(MEMORY, MBMD_AT + 4, "<H", 511)).field == "migs_index"


def test_qf_l12_no_list_of_more_than_512_entries_gets_to_a_backend() -> None:
    with pytest.raises(UsageError, match="takes 1 to 512"):
        play(source().export_memory(gpas(*range(513))))
    error = refused(patched(MEMORY, HEADER_AT + 2, "<H", 513))
    assert (error.field, error.bound) == ("buf_list_num", "0 to 512")


# --- the save path -------------------------------------------------------------------------------


def test_qf_s1_a_refused_page_is_known_to_be_unsent_and_stays_to_be_sent() -> None:
    engine, pages = paused(), gpas(1, 2, 3)
    precopy = PreCopy(pages)
    precopy.next_epoch()
    batch = precopy.next_batch()
    assert batch is not None
    busy = GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY
    outcome = play(engine.export_memory(batch), exported([0, busy, 0])).value
    precopy.sent(batch, outcome.unsent)
    assert (outcome.unsent.tolist(), outcome.statuses.tolist()) == ([0x2000], [busy])
    assert (precopy.done, precopy.later) == (False, 1)
    precopy.next_epoch()
    again = precopy.next_batch()
    assert again is not None
    assert again.tolist() == [0x2000]


def test_qf_s1_a_page_that_stays_refused_ends_the_migration_and_is_not_lost(
    tmp_path: Path,
) -> None:
    """A page whose Secure EPT entry stays locked: the TD is not handed over without it."""
    page = 0x3000

    def prepare(ours: Any, _theirs: Any) -> None:
        backend = ours.backend
        execute, slot = backend.execute, backend._tdcs.sept.slot(page)

        def holding(command: Command) -> Result:
            if isinstance(command, ExportAbort):
                backend.host.memory.words[slot] &= ~LOCK_BIT
            result: Result = execute(command)
            if isinstance(command, ExportStateImmutable):
                backend.host.memory.words[slot] |= LOCK_BIT
            return result

        backend.execute = holding

    done = migrate(tmp_path, prepare=prepare)
    assert done.runnable == (True, False)
    assert "NO_PROGRESS (0x0000000000000000): 1 pages refuse" in done.source.outcome.cause


def test_qf_s2_up_to_512_pages_are_one_call_and_one_bundle() -> None:
    played = play(paused().export_memory(gpas(*range(512))), exported())
    assert [type(one) for one in played.commands] == [ExportMem]
    assert [len(record.bundle.pages) for record in played.records] == [512]


@pytest.mark.parametrize("count", [513, 65536, 65537, 1 << 32])
def test_qf_s3_a_count_that_does_not_fit_is_not_cut_off(count: int) -> None:
    with pytest.raises(WireError) as caught:
        MigrationHeader(0, count).pack()
    assert (caught.value.field, caught.value.value) == ("buf_list_num", count)


def test_qf_s4_what_a_backend_gives_is_compared_before_it_is_sent() -> None:
    bundle = memory_bundle()
    for wrong in (
        replace(bundle, header=MigrationHeader(0, 2)),
        replace(bundle, mbmd=replace(bundle.mbmd, size=4096)),
        replace(bundle, mbmd=replace(bundle.mbmd, type_specific=struct.pack("<Q", 2))),
        replace(bundle, pages=[bytes(4096)] * 2),
        replace(bundle, macs=bytes(32)),
    ):
        with pytest.raises(WireError):
            encode(MemoryRecord(0x2000, "pc.ram", wrong))
    state = immutable(1)
    with pytest.raises(WireError):
        encode(StartSection(replace(state, header=MigrationHeader(0, len(state.pages) + 1))))


def test_qf_s5_each_vcpu_is_named_also_after_an_abort(tmp_path: Path) -> None:
    """No counter of somebody else says which vCPU is next."""
    engine = paused()
    for vcpu in (1, 0, 1):
        played = play(engine.export_vcpu_state(vcpu), with_bundle(td_state_as_vcpu(vcpu)))
        assert played.commands == [ExportStateVp(vcpu, 0)]
    first = migrate(tmp_path, stop=("source", "finish_epochs"))
    assert first.runnable == (True, False)
    (tmp_path / "again").mkdir()
    ours: Any = first.source.backend
    second = migrate(tmp_path / "again", ours=ours)
    assert second.runnable == (False, True)
    assert [name for name in names(second.traces[0]) if name == "export_state_vp"] == [
        "export_state_vp"
    ] * 2


def td_state_as_vcpu(vcpu: int) -> Bundle:
    mbmd = Mbmd.vcpu_state(vp_index=vcpu, mb_counter=2, mig_epoch=1, iv_counter=6)
    return Bundle.of(mbmd, [bytes(4096)])


def names(trace: Path) -> list[str]:
    """The leaf steps and events of a trace, in order."""
    return [record.step for record in read_trace(trace)]


def test_qf_s6_an_export_of_nothing_or_of_the_first_page_is_aborted_as_any_other() -> None:
    nothing = play(exporting().abort("why"), OK)
    assert nothing.commands == [ExportAbort(None)]
    engine = exporting()
    play(engine.export_memory(gpas(0)), listed(0), OK, exported())
    first_page = play(engine.abort("why"), OK, listed(0))
    assert [type(one) for one in first_page.commands] == [ExportAbort, ExportRestore]


def test_qf_s7_a_chain_that_cannot_be_finished_is_ended_by_its_sender() -> None:
    """The destination reads whole bundles, then why there are no more, and gives the import up."""
    engine, sent = paused(), []
    sent += play(engine.export_td_state(), with_bundle(td_state())).records
    with pytest.raises(BackendError):
        play(engine.export_vcpu_state(0), REFUSED)
    sent += play(engine.abort("vCPU 0 cannot be exported"), OK).records
    parser = RecordParser()
    parsed = list(parser.records(to_bytes(sent)))
    parser.end_of_stream()
    assert [type(record) for record in parsed] == [EndSection, Bundle, SourceAbort]
    receiver = importing()
    assert [receiver.accept(record) for record in parsed] == [None, "import_td_state", "abort"]


def test_qf_s9_a_cancel_goes_on_the_stream_that_it_is_given() -> None:
    engine = paused()
    played = play(engine.cancel_page(gpas(1, 2), stream=1), exported())
    (command,) = played.commands
    assert (command.stream, command.operation) == (1, GpaOperation.CANCEL)
    assert played.records[0].bundle.mbmd.migs_index == 1


# --- setup and teardown --------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["setup", "export_immutable", "start_epoch", "export_td_state"])
def test_qf_t1_a_failure_at_any_place_releases_the_connection(tmp_path: Path, event: str) -> None:
    """What the stream device holds is that of backend/kvm; the engine's own is the connection."""
    done = migrate(tmp_path, stop=("source", event))
    for side in (done.source, done.destination):
        with pytest.raises(PeerError, match="closed"):
            side.transport.send([b"x"])


def test_qf_t2_a_second_session_finds_nothing_of_the_first(tmp_path: Path) -> None:
    first = migrate(tmp_path, stop=("source", "pause"))
    ours: Any = first.source.backend
    (tmp_path / "again").mkdir()
    second = migrate(tmp_path / "again", ours=ours)
    assert second.runnable == (False, True)
    second.assert_accepted()


@pytest.mark.parametrize("cut", [46, 9_000, 100_000])
def test_qf_t5_the_end_of_an_import_is_asked_for_only_after_it_succeeded(
    tmp_path: Path, cut: int
) -> None:
    done = migrate(tmp_path, forward=Faults(cut_at=cut))
    assert done.runnable == (True, False)
    steps = names(done.traces[1])
    assert not {"import_end", "import_commit"} & set(steps)
    assert ("import_abort" in steps) == ("import_state_immutable" in steps)
    assert "import_end" in names(migrate(tmp_path).traces[1])


# --- multifd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [47, 49])
def test_qf_m3_the_size_field_is_looked_at_although_it_is_always_48(size: int) -> None:
    packet = private(1)
    wrong = replace(
        packet, bundle=replace(packet.bundle, mbmd=replace(packet.bundle.mbmd, size=size))
    )
    with pytest.raises(WireError):
        encode_packet(wrong)
    assert refuses(patched(packets_to_bytes([packet]), 1344, "<H", size)).field == "size"


@pytest.mark.parametrize("count", [256, 257, 512])
def test_qf_m4_the_second_mac_page_travels(count: int) -> None:
    packet = private(count, slots=512)
    buffers = encode_packet(packet)
    assert b"".join(buffers[3 : 3 + -(-count // 256)]) == packet.bundle.macs
    parser = MultifdParser(512)
    wire = packets_to_bytes([InitialPacket(0), packet])
    assert list(parser.records(wire))[1] == packet


def test_qf_m5_offsets_are_compared_with_gpas() -> None:
    engine = importing()
    record = memory(1, offset=0x3000)
    assert engine.accept(record) == "import_memory"
    with pytest.raises(PeerError, match="offset 0x3000"):
        play(engine.import_memory(record))
    packet = private(3)
    assert record_of(packet, RamBlock()).offset == 0x2000
    with pytest.raises(PeerError, match="packet 9 says offset 0x4000"):
        record_of(replace(packet, offsets=packet.offsets[::-1]), RamBlock())
    error = refuses(packets_to_bytes([private(3, slots=512)]))
    assert (error.field, error.value) == ("pages_alloc", 512)


def test_qf_m6_too_many_pages_are_an_error_and_not_a_zero() -> None:
    assert iov_num(512) == 516
    for count in (0, 513):
        with pytest.raises(UsageError, match=f"not {count}"):
            iov_num(count)


@pytest.mark.parametrize("flags", [0x2, 0x4, 0x6, 0xA, 0xC, 0xE])
def test_qf_m8_what_is_private_and_what_is_compressed_cannot_be_mixed(flags: int) -> None:
    """A packet is one kind as a whole, in the type of the record and in its flags."""
    for packet in (private(2), SharedPacket(1, "pc.ram", (0,), [bytes(4096)])):
        error = refuses(patched(packets_to_bytes([packet]), 8, ">I", flags))
        assert error.field == "flags"
    pages = [bytes(4096)]
    with pytest.raises(WireError):
        encode_packet(PrivatePacket(1, "pc.ram", (0,), Bundle.of(private(1).bundle.mbmd, pages)))


def test_qf_m9_the_numbers_of_streams_are_compared_before_anything_is_imported() -> None:
    with pytest.raises(PeerError, match="3 forward streams and the destination has room for 2"):
        destination(None).accept(Hello(SESSION, ALL_CAPABILITIES, 4, 2, 3))
    engine = destination(None)
    engine.accept(StartSection(immutable(3)))
    with pytest.raises(PeerError, match="the source has 3 forward streams and this side 2"):
        play(engine.import_immutable(immutable(3)))


def test_qf_m10_compressed_pages_are_refused_by_name() -> None:
    wire = packets_to_bytes([private(1)])
    for flags, name in ((0x2, "zlib"), (0x4, "zstd")):
        assert name in str(refuses(patched(wire, 8, ">I", flags)).value)
