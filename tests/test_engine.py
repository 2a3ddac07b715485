"""Does the source engine do what each lifecycle event needs, and lose no page on the way?"""

from __future__ import annotations

import numpy as np
import pytest
from engine_play import (
    BUSY,
    OK,
    REFUSED,
    abort_token,
    epoch_token,
    exported,
    gpas,
    immutable,
    listed,
    page_bytes,
    play,
    start_token,
    td_state,
    vcpu_state,
    with_bundle,
)

from tdxmig_model.engine import RamBlock, Result, SourceEngine
from tdxmig_model.engine.commands import (
    ExportAbort,
    ExportBlockw,
    ExportMem,
    ExportRestore,
    ExportUnblockw,
)
from tdxmig_model.engine.steps import ALL_CAPABILITIES, BUSY_ATTEMPTS
from tdxmig_model.errors import BackendError, PeerError, UsageError
from tdxmig_model.wire import (
    AbortToken,
    Capability,
    Committed,
    EndSection,
    Failed,
    Footer,
    GpaOperation,
    Hello,
    Mbmd,
    MemoryRecord,
    RecordParser,
    SessionStarted,
    SourceAbort,
    encode,
)
from tdxmig_model.wire.gpa_list import GpaStatus, entries_from_bytes, entry_operations

SESSION = bytes(range(16))


def source(
    agreed: Capability | None = ALL_CAPABILITIES, *, pages: int = 1000, ram: RamBlock | None = None
) -> SourceEngine:
    """A source whose session has been answered with these capabilities, or not at all."""
    engine = SourceEngine(SESSION, pages=pages, vcpus=2, streams=2, ram=ram)
    play(engine.setup())
    if agreed is not None:
        engine.receive(Hello(SESSION, agreed, pages, 2, 2))
    return engine


def exporting(agreed: Capability | None = ALL_CAPABILITIES) -> SourceEngine:
    engine = source(agreed)
    play(engine.export_immutable(), with_bundle(immutable(2)))
    return engine


def paused(agreed: Capability | None = ALL_CAPABILITIES) -> SourceEngine:
    engine = exporting(agreed)
    play(engine.pause(), OK)
    return engine


def handed_over(agreed: Capability | None = ALL_CAPABILITIES) -> SourceEngine:
    engine = paused(agreed)
    play(engine.export_td_state(), with_bundle(td_state()))
    play(engine.finish_epochs(), with_bundle(start_token()))
    return engine


# --- memory --------------------------------------------------------------------------------------


def test_a_live_batch_is_blocked_tracked_exported_and_sent() -> None:
    batch = gpas(7, 8, 300)
    played = play(exporting().export_memory(batch, 1), listed(0, 0, 0), OK, exported())
    assert played.order == ["export_blockw", "mem_track", "export_mem", "MemoryRecord"]
    blockw, _, export = played.commands
    assert isinstance(blockw, ExportBlockw)
    assert isinstance(export, ExportMem)
    assert blockw.gpas.tolist() == export.gpas.tolist() == batch.tolist()
    assert (export.stream, export.operation) == (1, GpaOperation.MIGRATE)
    record = played.records[0]
    assert (record.offset, record.block, record.cancel) == (0x7000, "pc.ram", False)
    assert played.value.sent.tolist() == batch.tolist()
    assert played.value.unsent.size == 0


def test_a_paused_batch_is_exported_without_blocking() -> None:
    played = play(paused().export_memory(gpas(1, 2)), exported())
    assert played.order == ["export_mem", "MemoryRecord"]


def test_entries_that_the_module_refused_come_back_and_the_bundle_still_leaves() -> None:
    statuses = [0, GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY, 0, GpaStatus.SEPT_WALK_FAILED]
    played = play(paused().export_memory(gpas(1, 2, 3, 4)), exported(statuses))
    assert played.value.sent.tolist() == gpas(1, 3).tolist()
    assert played.value.unsent.tolist() == gpas(2, 4).tolist()
    assert played.value.statuses.tolist() == [3, 2]
    assert len(played.records) == 1  # the destination counts every bundle


def test_entries_that_became_nop_count_as_unsent_even_if_the_backend_says_nothing() -> None:
    played = play(paused().export_memory(gpas(1, 2)), exported([0, 4], told=False))
    assert played.value.sent.tolist() == gpas(1).tolist()
    assert played.value.unsent.tolist() == gpas(2).tolist()


def test_statuses_win_over_a_list_that_looks_fine() -> None:
    def answer(command: ExportMem) -> Result:
        fine = exported()(command)
        return Result(0, "TDX_SUCCESS", fine.bundle, np.array([0, 5], dtype=np.uint8))

    played = play(paused().export_memory(gpas(1, 2)), answer)
    assert played.value.unsent.tolist() == gpas(2).tolist()


def test_pages_blocked_in_vain_are_made_writable_again() -> None:
    played = play(
        exporting().export_memory(gpas(1, 2, 3)),
        listed(0, 0, 0),
        OK,
        exported([0, GpaStatus.TLB_TRACKING_NOT_DONE, GpaStatus.TLB_TRACKING_NOT_DONE]),
        OK,
        REFUSED,  # a refusal leaves the page to the guest's next write; nothing is lost
    )
    assert played.commands[3:] == [ExportUnblockw(0x2000), ExportUnblockw(0x3000)]
    assert played.value.unsent.tolist() == gpas(2, 3).tolist()


def test_pages_that_cannot_be_blocked_are_not_exported_live() -> None:
    played = play(
        exporting().export_memory(gpas(1, 2, 3)),
        listed(0, GpaStatus.SEPT_ENTRY_STATE_INCORRECT, 0),
        OK,
        exported(),
    )
    assert played.commands[2].gpas.tolist() == gpas(1, 3).tolist()  # type: ignore[union-attr]
    assert played.value.unsent.tolist() == gpas(2).tolist()
    assert played.value.statuses.tolist() == [GpaStatus.SEPT_ENTRY_STATE_INCORRECT]


def test_a_batch_of_which_nothing_can_be_blocked_makes_no_bundle() -> None:
    played = play(exporting().export_memory(gpas(1, 2)), listed(4, 3))
    assert played.order == ["export_blockw"]
    assert played.value.unsent.tolist() == gpas(1, 2).tolist()


def test_the_block_name_is_sent_once() -> None:
    engine = paused()
    first, second = (
        play(engine.export_memory(gpas(number)), exported()).records[0] for number in (1, 2)
    )
    assert (first.same_block, second.same_block) == (False, True)
    parser = RecordParser()
    parsed = list(parser.records(b"".join(encode(first) + encode(second))))
    offsets = [record.offset for record in parsed if isinstance(record, MemoryRecord)]
    assert offsets == [0x1000, 0x2000]


def test_offsets_skip_the_hole_below_4_gib() -> None:
    ram = RamBlock(below_4g=0xC0000000)
    for gpa, offset in ((0xBFFFF000, 0xBFFFF000), (1 << 32, 0xC0000000), (0x100005000, 0xC0005000)):
        assert ram.offset(gpa) == offset
        assert ram.gpa(offset) == gpa
    engine = source(ram=ram)
    play(engine.pause(), OK)
    played = play(engine.export_memory(gpas(1 << 20)), exported())
    assert played.records[0].offset == 0xC0000000


def test_a_batch_has_the_size_that_was_agreed() -> None:
    for agreed, most in ((ALL_CAPABILITIES, 512), (ALL_CAPABILITIES & ~Capability.BATCH, 1)):
        engine = paused(agreed)
        assert engine.max_batch == most
        for size in (0, most + 1):
            with pytest.raises(UsageError, match="batch"):
                play(engine.export_memory(gpas(*range(size))))
    assert paused(None).max_batch == 1
    assert play(paused().export_memory(gpas(*range(512))), exported()).value.sent.size == 512


def test_a_gpa_that_is_no_page_is_refused() -> None:
    for gpa in (0x1001, 1 << 52):
        with pytest.raises(UsageError, match="GPA"):
            play(paused().export_memory(np.array([gpa], dtype=np.uint64)))


def test_a_backend_that_exports_other_pages_is_caught() -> None:
    def answer(command: ExportMem) -> Result:
        return exported()(ExportMem(0, gpas(9), GpaOperation.MIGRATE))

    with pytest.raises(BackendError, match="other pages"):
        play(paused().export_memory(gpas(1)), answer)


def test_a_backend_with_the_wrong_number_of_statuses_is_caught() -> None:
    with pytest.raises(BackendError, match="3 entry statuses for 2 pages"):
        play(exporting().export_memory(gpas(1, 2)), listed(0, 0, 0))


def test_memory_after_the_start_token_needs_post_copy() -> None:
    played = play(handed_over().export_memory(gpas(1)), exported())
    assert played.order == ["export_mem", "MemoryRecord"]
    with pytest.raises(UsageError, match="POST_COPY"):
        play(handed_over(ALL_CAPABILITIES & ~Capability.POST_COPY).export_memory(gpas(1)))


# --- cancel --------------------------------------------------------------------------------------


def test_a_clean_page_is_cancelled_at_once_and_a_written_one_is_blocked_first() -> None:
    engine = exporting()
    play(engine.export_memory(gpas(1, 2)), listed(0, 0), OK, exported())
    play(engine.unblock_page(0x2000), OK)

    played = play(engine.cancel_page(gpas(1, 2)), listed(0), OK, exported())
    assert played.order == ["export_blockw", "mem_track", "export_mem", "MemoryRecord"]
    assert played.commands[0].gpas.tolist() == gpas(2).tolist()  # type: ignore[union-attr]
    assert played.commands[2].operation is GpaOperation.CANCEL  # type: ignore[union-attr]
    record = played.records[0]
    assert record.cancel
    assert set(entry_operations(entries_from_bytes(record.bundle.gpa_list))) == {2}
    assert b"".join(encode(record))

    # A cancelled page is out of the session: an abort has nothing to restore.
    assert play(engine.abort(), OK).order == ["export_abort", "SourceAbort"]


def test_a_cancel_that_the_module_refuses_is_reported_and_sent_as_a_cancel_record() -> None:
    engine = paused()
    play(engine.export_memory(gpas(1)), exported())
    played = play(engine.cancel_page(0x1000), exported([4]))
    assert played.value.unsent.tolist() == gpas(1).tolist()
    assert b"".join(encode(played.records[0]))


def test_cancel_is_not_sent_to_a_destination_that_does_not_know_it() -> None:
    with pytest.raises(UsageError, match="CANCEL"):
        play(paused(ALL_CAPABILITIES & ~Capability.CANCEL).cancel_page(gpas(1)))


# --- state and the end section -------------------------------------------------------------------


def test_the_end_section_is_laid_out_as_qemu_reads_it() -> None:
    engine = paused()
    records = [
        *play(engine.export_td_state(), with_bundle(td_state())).records,
        *play(engine.export_vcpu_state(vcpu=0), with_bundle(vcpu_state(0))).records,
        *play(engine.export_vcpu_state(vcpu=1, stream=1), with_bundle(vcpu_state(1))).records,
        *play(engine.finish_epochs(), with_bundle(start_token())).records,
    ]
    stream = b"".join(buffer for record in records for buffer in encode(record))
    td, vcpu, token = td_state().mbmd.pack(), vcpu_state(0).mbmd.pack(), start_token().mbmd.pack()
    expected = (
        b"\x0a"
        + (b"\x01\0\x02\0" + td + b"".join(page_bytes(2)))
        + (b"\x01\0\x05\0" + vcpu + b"".join(page_bytes(5)))
        + (b"\x01\0\x05\0" + vcpu_state(1).mbmd.pack() + b"".join(page_bytes(5)))
        + (b"\0\0\0\0" + token)
        + b"\x7e"
    )
    assert stream == expected
    parser = RecordParser()
    parsed = [type(record) for record in parser.records(stream)]
    assert parsed[0] is EndSection
    assert parsed[-1] is Footer
    assert parser.at_boundary


def test_each_event_of_the_session_start_runs_its_leaf_and_sends_its_record() -> None:
    engine = source()
    assert play(engine.export_immutable(), with_bundle(immutable(2))).order == [
        "export_state_immutable",
        "StartSection",
    ]
    played = play(engine.start_epoch(), with_bundle(epoch_token()))
    assert played.order == ["export_track", "EpochRecord"]
    assert play(paused().finish_epochs(), with_bundle(start_token())).order == [
        "export_track_start",
        "Bundle",
        "Footer",
    ]
    assert play(engine.cleanup()).order == []


def test_a_missing_or_wrong_bundle_is_the_backends_fault() -> None:
    with pytest.raises(BackendError, match="gave no bundle, not IMMUTABLE_TD_STATE"):
        play(source().export_immutable(), OK)
    with pytest.raises(BackendError, match="gave MUTABLE_TD_STATE, not EPOCH_TOKEN"):
        play(exporting().start_epoch(), with_bundle(td_state()))
    with pytest.raises(BackendError, match="no start token"):
        play(paused().finish_epochs(), with_bundle(epoch_token()))


def test_a_busy_module_is_asked_again_but_not_for_ever() -> None:
    played = play(exporting().pause(), BUSY, BUSY, OK)
    assert played.order == ["export_pause"] * 3
    with pytest.raises(BackendError, match="TDX_OPERAND_BUSY"):
        play(exporting().pause(), *[BUSY] * BUSY_ATTEMPTS)


def test_a_refusal_is_not_repeated() -> None:
    engine = exporting()
    with pytest.raises(BackendError, match="export_pause failed with TDX_OP_STATE_INCORRECT"):
        play(engine.pause(), REFUSED)
    assert not engine.paused


# --- abort ---------------------------------------------------------------------------------------


def test_abort_takes_every_exported_page_out_of_the_session() -> None:
    engine = paused()
    for first in (0, 512):
        play(engine.export_memory(gpas(*range(first, first + 512))), exported())
    play(engine.export_memory(gpas(40000, 3)), exported())

    restored: list[int] = []

    def restore(command: ExportRestore) -> Result:
        assert command.gpas.size <= 512
        restored.extend(command.gpas.tolist())
        return listed(*[0] * command.gpas.size)

    played = play(engine.abort("enough"), OK, restore, restore, restore)
    assert played.order[0] == "export_abort"
    assert played.commands[0] == ExportAbort(None)
    assert restored == gpas(*range(1024), 40000).tolist()
    assert played.records == [SourceAbort("enough")]  # last: the connection may be gone
    assert played.value.size == 0


def test_pages_that_cannot_be_restored_are_reported() -> None:
    engine = paused()
    play(engine.export_memory(gpas(1, 2, 3)), exported())
    busy = GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY
    played = play(engine.abort(), OK, listed(0, busy, 4), listed(busy), listed(0))
    assert played.value.tolist() == gpas(3).tolist()
    assert played.commands[-1].gpas.tolist() == gpas(2).tolist()  # type: ignore[union-attr]


def test_pages_of_a_batch_that_failed_midway_are_restored_or_made_writable() -> None:
    engine = exporting()
    with pytest.raises(BackendError):
        play(engine.export_memory(gpas(1, 2)), listed(0, 0), OK, REFUSED)
    played = play(engine.abort(), OK, listed(0, 4), OK)
    assert played.commands[-1] == ExportUnblockw(0x2000)
    assert played.value.size == 0


def test_abort_before_the_export_began_only_tells_the_destination() -> None:
    assert play(source().abort("never mind")).records == [SourceAbort("never mind")]
    assert play(source(None).abort()).order == []


def test_abort_is_not_told_to_a_destination_that_does_not_listen() -> None:
    assert play(exporting(None).abort(), OK).order == ["export_abort"]


def test_abort_with_token_gives_the_token_to_the_module_and_restores() -> None:
    engine = paused()
    play(engine.export_memory(gpas(1)), exported())
    play(engine.finish_epochs(), with_bundle(start_token()))
    token = abort_token().mbmd
    assert engine.receive(AbortToken(token)) == "abort_with_token"
    played = play(engine.abort_with_token(), OK, listed(0))
    assert played.order == ["export_abort_with_token", "export_restore"]
    assert played.commands[0] == ExportAbort(token.pack())


def test_without_a_valid_token_the_td_stays_where_it_is() -> None:
    with pytest.raises(PeerError, match="no abort token"):
        play(handed_over().abort_with_token())
    with pytest.raises(PeerError, match="stays in POST_EXPORT"):
        play(handed_over().abort_with_token(bytes(48)), REFUSED)


# --- what the destination says -------------------------------------------------------------------


def test_the_destination_has_to_report_the_start_before_it_is_confirmed() -> None:
    engine = exporting()
    with pytest.raises(PeerError, match="SESSION_STARTED"):
        play(engine.confirm_import())
    assert engine.receive(SessionStarted()) == "confirm_import"
    assert play(engine.confirm_import()).order == []
    with pytest.raises(PeerError, match="SESSION_STARTED after it had started"):
        engine.receive(SessionStarted())


def test_the_good_end_is_told_once() -> None:
    engine = handed_over()
    assert engine.receive(Committed(bytes(32))) == "cleanup"
    assert engine.committed == Committed(bytes(32))
    for late in (Committed(), AbortToken(abort_token().mbmd), Failed("late")):
        with pytest.raises(PeerError, match="after it had committed"):
            engine.receive(late)


def test_what_the_destination_cannot_say_yet_is_refused() -> None:
    token = AbortToken(abort_token().mbmd)
    for message in (SessionStarted(), Committed(), token):
        with pytest.raises(PeerError, match="before the session began"):
            source().receive(message)
    with pytest.raises(PeerError, match="COMMITTED before it imported"):
        exporting().receive(Committed())
    engine = handed_over()
    engine.receive(token)
    for message in (Committed(), SessionStarted()):
        with pytest.raises(PeerError, match="after it had sent an abort token"):
            engine.receive(message)


def test_a_failure_asks_for_an_abort_and_after_the_start_token_for_patience() -> None:
    engine = exporting()
    assert engine.receive(Failed("disk full")) == "abort"
    assert engine.failure == "disk full"
    play(engine.abort(), OK)
    assert engine.receive(AbortToken(abort_token().mbmd)) is None  # nothing is left to do

    engine = handed_over()
    assert engine.receive(Failed("disk full")) is None
    assert engine.receive(AbortToken(abort_token().mbmd)) == "abort_with_token"

    engine = source(None)
    assert engine.receive(Failed("too small here")) == "abort"


def test_the_answer_has_to_fit_the_session_and_the_td() -> None:
    for hello, message in (
        (Hello(bytes(16), ALL_CAPABILITIES, 1000, 2, 2), "right destination"),
        (Hello(SESSION, ALL_CAPABILITIES, 999, 2, 2), "1000 private pages .* room for 999"),
        (Hello(SESSION, ALL_CAPABILITIES, 1000, 1, 2), "2 vCPUs"),
        (Hello(SESSION, ALL_CAPABILITIES, 1000, 2, 1), "2 forward streams"),
    ):
        with pytest.raises(PeerError, match=message):
            source(None).receive(hello)
    with pytest.raises(PeerError, match="HELLO"):
        source().receive(Hello(SESSION, ALL_CAPABILITIES, 1000, 2, 2))


def test_only_what_both_named_is_used() -> None:
    engine = source(Capability.BATCH | Capability(1 << 20))
    assert engine.agreed == Capability.BATCH


def test_an_mbmd_of_another_stream_keeps_its_stream_on_the_wire() -> None:
    played = play(paused().export_memory(gpas(1), 1), exported())
    record: MemoryRecord = played.records[0]
    parsed = RecordParser()
    parsed.feed(b"".join(encode(record)))
    back = parsed.next_record()
    assert isinstance(back, MemoryRecord)
    assert isinstance(back.bundle.mbmd, Mbmd)
    assert back.bundle.mbmd.migs_index == 1
