"""Does the destination engine import what belongs there and refuse what a peer may not send?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_play import (
    FATAL,
    OK,
    REFUSED,
    abort_token,
    epoch_token,
    gpas,
    immutable,
    listed,
    memory_bundle,
    play,
    start_token,
    td_state,
    vcpu_state,
    with_bundle,
)

from tdxmig_model.engine import DestinationEngine, RamBlock
from tdxmig_model.engine.commands import ImportMem, ImportStateVp
from tdxmig_model.engine.steps import ALL_CAPABILITIES
from tdxmig_model.errors import BackendError, PeerError
from tdxmig_model.wire import (
    AbortToken,
    Bundle,
    Capability,
    Committed,
    EndOfPass,
    EndSection,
    EpochRecord,
    Failed,
    Footer,
    GpaOperation,
    Hello,
    InOrderDone,
    MemoryRecord,
    MigrationHeader,
    MultifdFlush,
    SessionStarted,
    SharedPage,
    SourceAbort,
    StartSection,
)

SESSION = bytes(range(16))


def hello(capabilities: Capability = ALL_CAPABILITIES, **sizes: int) -> Hello:
    counts = {"page_count": 4, "vcpu_count": 2, "streams": 2} | sizes
    return Hello(SESSION, capabilities, **counts)


def destination(
    capabilities: Capability | None = ALL_CAPABILITIES, *, ram: RamBlock | None = None
) -> DestinationEngine:
    """A destination for 10 pages, 2 vCPUs, 2 streams, greeted with 4 pages or not at all."""
    engine = DestinationEngine(pages=10, vcpus=2, streams=2, ram=ram)
    if capabilities is not None:
        assert engine.accept(hello(capabilities)) == "setup"
    play(engine.setup())
    return engine


def importing(capabilities: Capability | None = ALL_CAPABILITIES) -> DestinationEngine:
    engine = destination(capabilities)
    assert engine.accept(StartSection(immutable(2))) == "import_immutable"
    play(engine.import_immutable(immutable(2)), OK)
    return engine


def memory(*pages: int, offset: int | None = None, **changes: Any) -> MemoryRecord:
    column = gpas(*pages)
    at = int(column[0]) if offset is None else offset
    return MemoryRecord(at, "pc.ram", memory_bundle(column, **changes))


def in_end_section(capabilities: Capability = ALL_CAPABILITIES) -> DestinationEngine:
    engine = importing(capabilities)
    engine.accept(EndSection())
    engine.accept(td_state(link=True))
    play(engine.import_td_state(td_state(link=True)), OK)
    return engine


def with_vcpus(capabilities: Capability = ALL_CAPABILITIES) -> DestinationEngine:
    engine = in_end_section(capabilities)
    for vcpu in range(2):
        state = vcpu_state(vcpu, link=True)
        assert engine.accept(state) == "import_vcpu_state"
        play(engine.import_vcpu_state(state), OK)
    return engine


# --- the good run --------------------------------------------------------------------------------


def test_a_whole_migration_asks_for_the_events_in_order_and_answers() -> None:
    engine = DestinationEngine(pages=10, vcpus=1, streams=2)
    link = vcpu_state(0, link=True)
    answers: list[Any] = []
    for record, event, replies in (
        (hello(vcpu_count=1, page_count=2), "setup", 0),
        (StartSection(immutable(2)), "import_immutable", 1),
        (EpochRecord(epoch_token()), "import_epoch", 1),
        (memory(1, 2), "import_memory", 1),
        (EndSection(), None, 0),
        (td_state(link=True), "import_td_state", 1),
        (link, "import_vcpu_state", 1),
        (start_token(), "import_start_token", 1),
        (Footer(), None, 0),
    ):
        assert engine.accept(record) == event
        if event == "setup":
            answers += play(engine.setup()).records
        elif event is not None:
            subject = record.bundle if isinstance(record, StartSection | EpochRecord) else record
            answers += play(getattr(engine, event)(subject), *[OK] * replies).records
    answers += play(engine.commit(), OK).records
    answers += play(engine.end(bytes(32)), OK).records
    assert answers == [
        Hello(SESSION, ALL_CAPABILITIES, 10, 1, 2),
        SessionStarted(),
        InOrderDone(),
        Committed(bytes(32)),
    ]
    assert engine.start_token_imported
    assert engine.committed
    assert play(engine.cleanup()).order == []


def test_a_source_without_hello_is_served_and_gets_no_answer() -> None:
    engine = importing(None)
    assert play(engine.import_memory(memory(1)), listed(0)).records == []
    assert play(engine.end(), OK).records == []
    with pytest.raises(PeerError, match="BATCH"):
        play(engine.import_memory(memory(1, 2)))
    assert play(importing(None).abort("why"), with_bundle(abort_token())).records == []


def test_memory_is_imported_on_the_stream_of_its_mbmd() -> None:
    record = memory(3, stream=1)
    played = play(importing().import_memory(record), listed(0))
    command = played.commands[0]
    assert isinstance(command, ImportMem)
    assert (command.stream, command.bundle) == (1, record.bundle)


def test_the_outcome_tells_imported_cancelled_and_skipped_pages_apart() -> None:
    engine = importing()
    record = memory(1, 2, 3, statuses=[0, 4, 0])
    outcome = play(engine.import_memory(record), listed(0, 1, 0)).value
    assert outcome.imported.tolist() == gpas(1, 3).tolist()
    assert outcome.skipped.tolist() == gpas(2).tolist()
    assert outcome.statuses.tolist() == [1]
    assert engine.pages_imported == 2

    outcome = play(engine.import_memory(memory(1, operation=GpaOperation.CANCEL)), listed(0)).value
    assert outcome.cancelled.tolist() == gpas(1).tolist()
    assert engine.pages_imported == 1

    play(engine.import_memory(memory(3, operation=GpaOperation.REMIGRATE)), listed(0))
    assert engine.pages_imported == 1


# --- what may stand where ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [EpochRecord(epoch_token()), memory(1), EndSection(), Footer(), td_state(link=True)],
    ids=lambda record: type(record).__name__,
)
def test_nothing_but_hello_comes_before_the_immutable_state(record: Any) -> None:
    with pytest.raises(PeerError, match="before the immutable state"):
        destination().accept(record)


@pytest.mark.parametrize(
    "record",
    [StartSection(immutable(2)), hello(), Footer(), td_state(link=True), start_token()],
    ids=lambda record: type(record).__name__,
)
def test_what_cannot_follow_the_immutable_state(record: Any) -> None:
    with pytest.raises(PeerError, match="after the immutable state"):
        importing().accept(record)


@pytest.mark.parametrize(
    "record",
    [memory(1), EpochRecord(epoch_token()), EndSection(), Footer(), td_state(link=True), hello()],
    ids=lambda record: type(record).__name__,
)
def test_what_cannot_stand_in_the_end_section(record: Any) -> None:
    with pytest.raises(PeerError, match="inside the end section"):
        in_end_section().accept(record)


def test_vcpu_state_follows_the_td_state() -> None:
    engine = importing()
    engine.accept(EndSection())
    with pytest.raises(PeerError, match="before the TD state"):
        engine.accept(vcpu_state(0, link=True))


def test_the_chain_ends_with_the_start_token_and_with_nothing_else() -> None:
    with pytest.raises(PeerError, match="no other bundle follows"):
        in_end_section().accept(vcpu_state(0))
    chained = replace(start_token(), header=MigrationHeader(1, 0))
    with pytest.raises(PeerError, match="another bundle follows"):
        with_vcpus().accept(chained)
    with pytest.raises(PeerError, match="does not belong"):
        in_end_section().accept(memory(1).bundle)


def test_memory_after_the_end_section_needs_post_copy() -> None:
    for capabilities, allowed in (
        (ALL_CAPABILITIES, True),
        (ALL_CAPABILITIES & ~Capability.POST_COPY, False),
    ):
        engine = with_vcpus(capabilities)
        engine.accept(start_token())
        if allowed:
            assert engine.accept(memory(1)) == "import_memory"
        else:
            with pytest.raises(PeerError, match="POST_COPY is not agreed"):
                engine.accept(memory(1))


def test_nothing_follows_an_abort_of_the_source() -> None:
    engine = in_end_section()
    assert engine.accept(SourceAbort("changed my mind")) == "abort"
    assert engine.source_abort == "changed my mind"
    with pytest.raises(PeerError, match="after it had aborted"):
        engine.accept(vcpu_state(0, link=True))
    with pytest.raises(PeerError, match="SOURCE_ABORT"):
        importing(None).accept(SourceAbort(""))


# --- what records hold ---------------------------------------------------------------------------


def test_a_source_td_that_is_too_large_is_refused_and_can_be_told() -> None:
    for sizes in ({"page_count": 11}, {"vcpu_count": 3}, {"streams": 3}):
        engine = DestinationEngine(pages=10, vcpus=2, streams=2)
        with pytest.raises(PeerError, match="has room for"):
            engine.accept(hello(ALL_CAPABILITIES, **sizes))
        assert play(engine.abort("too large")).records == [Failed("too large")]


def test_the_streams_of_the_immutable_state_are_those_announced_and_no_more_than_ours() -> None:
    with pytest.raises(PeerError, match="names 1 forward streams, the HELLO 2"):
        play(destination().import_immutable(immutable(1)))
    with pytest.raises(PeerError, match="3 forward streams and this side 2"):
        play(destination(None).import_immutable(immutable(3)))


def test_the_offset_of_a_record_is_that_of_its_first_page() -> None:
    with pytest.raises(PeerError, match=r"offset 0x5000 .*begins with GPA 0x1000"):
        play(importing().import_memory(memory(1, 2, offset=0x5000)))

    engine = destination(ram=RamBlock(below_4g=0x80000000))
    record = memory(1 << 20, offset=0x80000000)
    assert play(engine.import_memory(record), listed(0)).value.imported.size == 1
    with pytest.raises(PeerError, match="offset"):
        play(engine.import_memory(memory(1 << 20)))


def test_memory_of_another_block_is_refused() -> None:
    record = replace(memory(1), block="pc.bios")
    with pytest.raises(PeerError, match="RAM block"):
        play(importing().import_memory(record))


def test_a_stream_that_was_not_announced_is_refused() -> None:
    engine = importing()
    with pytest.raises(PeerError, match="on stream 2; there are 2"):
        play(engine.import_memory(memory(1, stream=2)))
    with pytest.raises(PeerError, match="on stream 7"):
        play(engine.import_vcpu_state(vcpu_state(0, stream=7)))


def test_capabilities_that_were_not_agreed_are_not_accepted() -> None:
    cancel = memory(1, operation=GpaOperation.CANCEL)
    for missing, record in ((Capability.BATCH, memory(1, 2)), (Capability.CANCEL, cancel)):
        with pytest.raises(PeerError, match=str(missing.name)):
            play(importing(ALL_CAPABILITIES & ~missing).import_memory(record))


def test_more_pages_than_announced_are_refused_before_they_are_imported() -> None:
    engine = importing()
    play(engine.import_memory(memory(1, 2, 3)), listed(0, 0, 0))
    with pytest.raises(PeerError, match="5 different pages and announced 4"):
        play(engine.import_memory(memory(4, 5)))
    play(engine.import_memory(memory(1, 2, operation=GpaOperation.REMIGRATE)), listed(0, 0))


def test_each_vcpu_comes_once_and_within_the_announced_number() -> None:
    engine = in_end_section()
    played = play(engine.import_vcpu_state(vcpu_state(1, stream=1)), OK)
    assert played.commands == [ImportStateVp(played.commands[0].bundle, 1)]  # type: ignore[union-attr]
    assert played.value == 1
    with pytest.raises(PeerError, match="twice"):
        play(engine.import_vcpu_state(vcpu_state(1)))
    with pytest.raises(PeerError, match="vCPU 2 of 2"):
        play(engine.import_vcpu_state(vcpu_state(2)))


def test_tokens_are_taken_only_in_their_place() -> None:
    with pytest.raises(PeerError, match="start token outside the end section"):
        play(importing().import_epoch(start_token()))
    with pytest.raises(PeerError, match="not the start token"):
        play(with_vcpus().import_start_token(epoch_token()))


def test_the_wrong_type_never_reaches_the_module() -> None:
    engine = importing()
    wrong: Bundle = td_state()
    for event in ("import_immutable", "import_epoch", "import_vcpu_state", "import_start_token"):
        with pytest.raises(PeerError, match="MUTABLE_TD_STATE where"):
            play(getattr(engine, event)(wrong))
    with pytest.raises(PeerError, match="EPOCH_TOKEN where"):
        play(engine.import_td_state(start_token()))


def test_the_start_token_is_refused_while_something_announced_is_missing() -> None:
    with pytest.raises(PeerError, match="before the state of 2 vCPUs"):
        play(in_end_section().import_start_token(start_token()))
    with pytest.raises(PeerError, match="after 0 of 4 pages"):
        play(with_vcpus(ALL_CAPABILITIES & ~Capability.POST_COPY).import_start_token(start_token()))


def test_a_post_copy_does_not_end_before_the_last_page() -> None:
    engine = with_vcpus()
    engine.accept(start_token())
    play(engine.import_start_token(start_token()), OK)
    play(engine.commit(), OK)
    play(engine.import_memory(memory(1, 2, 3)), listed(0, 0, 0))
    with pytest.raises(PeerError, match="3 of 4 pages"):
        play(engine.end())
    assert not engine.memory_complete
    play(engine.import_memory(memory(4)), listed(0))
    assert play(engine.end(), OK).order == ["import_end", "Committed"]


def test_a_replayed_page_in_a_post_copy_bundle_does_not_hide_a_new_one() -> None:
    engine = with_vcpus()
    engine.accept(start_token())
    play(engine.import_start_token(start_token()), OK)
    play(engine.import_memory(memory(1, 2, 3)), listed(0, 0, 0))
    outcome = play(engine.import_memory(memory(3, 4)), listed(4, 0)).value
    assert outcome.imported.tolist() == gpas(4).tolist()
    assert engine.memory_complete


def test_pages_skipped_after_the_start_token_do_not_count() -> None:
    engine = with_vcpus()
    engine.accept(start_token())
    play(engine.import_start_token(start_token()), OK)
    for _ in range(3):  # replayed bundles are passed over by the module
        outcome = play(engine.import_memory(memory(1, 2)), listed(1, 4)).value
        assert outcome.skipped.size == 2
    assert engine.pages_imported == 0


# --- giving up -----------------------------------------------------------------------------------


def test_abort_makes_a_token_and_sends_it_with_the_reason() -> None:
    played = play(importing().abort("no memory"), with_bundle(abort_token(), 0x2000000000000000))
    assert played.order == ["Failed", "import_abort", "AbortToken"]
    assert played.records == [Failed("no memory"), AbortToken(abort_token().mbmd)]
    assert played.value == abort_token().mbmd.pack()


def test_there_is_no_token_before_the_module_has_a_session() -> None:
    played = play(destination().abort("no"))
    assert played.records == [Failed("no")]
    assert played.value is None


@pytest.mark.parametrize(("answer", "has_session"), [(REFUSED, False), (FATAL, True)])
def test_only_a_fatal_refusal_of_the_immutable_state_leaves_something_to_abort(
    answer: Any, has_session: bool
) -> None:
    engine = destination()
    with pytest.raises(BackendError, match="import_state_immutable"):
        play(engine.import_immutable(immutable(2)), answer)
    assert not engine.session_started
    played = play(engine.abort("x"), *[with_bundle(abort_token())] * has_session)
    assert ("import_abort" in played.order) is has_session


def test_a_failed_import_is_an_error_and_the_abort_token_can_still_be_made() -> None:
    engine = importing()
    with pytest.raises(BackendError, match="import_mem failed with TDX_INCORRECT_MBMD_MAC"):
        play(engine.import_memory(memory(1)), FATAL)
    assert engine.pages_imported == 0
    assert play(engine.abort("bad MAC"), with_bundle(abort_token())).value is not None


def test_a_source_that_aborted_gets_no_answer() -> None:
    engine = importing()
    engine.accept(SourceAbort("enough"))
    played = play(engine.abort("the source aborted"), with_bundle(abort_token()))
    assert played.order == ["import_abort"]


def test_statuses_of_another_length_are_the_backends_fault() -> None:
    with pytest.raises(BackendError, match="2 entry statuses for 1 pages"):
        play(importing().import_memory(memory(1)), listed(0, 0))


def test_shared_memory_is_not_passed_over() -> None:
    """A page that nobody imports would be missing in the TD, and nobody would know."""
    engine = DestinationEngine(pages=4, vcpus=1)
    engine.accept(StartSection(immutable()))
    assert engine.accept(MultifdFlush()) is None
    assert engine.accept(EndOfPass()) is None
    with pytest.raises(PeerError, match=r"shared memory \(offset 0x3000 of 'pc.ram'\)"):
        engine.accept(SharedPage(0x3000, "pc.ram", bytes(4096)))
