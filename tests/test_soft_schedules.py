"""Whoever runs next: do locks, counters and bundles hold under every schedule?"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from soft_calls import (
    assert_nothing_is_locked,
    block,
    export,
    exported,
    load,
    on_td,
    statuses,
    switches,
    unblock,
)
from soft_pair import CANCEL, Pair

from tdxmig_model.backend.soft.call import NO_PAGE, Point, Registers
from tdxmig_model.backend.soft.gpa_entries import INVALID_BIT
from tdxmig_model.backend.soft.guest import GuestImage, Program
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.schedulers import (
    LeafCall,
    Scripted,
    Seeded,
    Straight,
    Threads,
    explore,
)
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.backend.soft.snapshot import Snapshot
from tdxmig_model.backend.soft.status import LOW_32, Operand, Status, with_operand
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import GpaStatus, entry_statuses

SUCCESS, BUSY = int(Status.TDX_SUCCESS), Status.TDX_OPERAND_BUSY
COMMIT_POINTS = {Point.ENTRY, Point.HELD}
"""Where memory leaves touch what they share; before it they only take locks."""


def busy(operand):
    return with_operand(BUSY, operand)


@pytest.fixture
def pair():
    pair = Pair(12, streams=3, guest=GuestImage(Program.SEQUENTIAL, PAGE_SIZE, 1))
    pair.start()
    return pair


@pytest.fixture
def paused(pair):
    pair.pause()
    return pair


# --- seeded --------------------------------------------------------------------------------------


def test_two_streams_export_under_any_seed(paused):
    """Bundles of interleaved and interrupted leaves are whole, counted, and of different IVs."""
    module = paused.source_host.module
    halves = np.array_split(paused.gpas, 2)
    calls = [export(paused, half, stream=n, lp=n) for n, half in enumerate(halves)]
    history = Seeded(module, 3).run(calls)
    assert switches(history) > 5
    assert history.final == [SUCCESS, SUCCESS]
    interrupted = [attempts[:-1] for attempts in history.statuses]
    assert any(interrupted)
    assert {s for some in interrupted for s in some} <= {Status.TDX_INTERRUPTED_RESUMABLE}
    seen = paused.source.observe()
    assert seen["total_mb_count"] == 3
    assert seen["next_mb_counter"] == [2, 1, 0]
    assert seen["iv_counter"] == [1 + 1 + 6, 1 + 6, 0]
    paused.assert_counts()
    assert_nothing_is_locked(module)
    for stream, half in enumerate(halves):
        bundle = exported(paused, len(half), stream=stream)
        assert not paused.on_destination(c.ImportMem(stream, bundle)).statuses.any()
    paused.states()
    paused.start_token()
    paused.assert_equal()
    assert len(set(paused.iv_pairs)) == len(paused.iv_pairs)


def crowd(pair):
    """Calls of four logical processors that get in each other's way."""
    return [
        export(pair, pair.gpas[:5], stream=0, lp=0),
        export(pair, pair.gpas[3:9], stream=1, lp=1),
        unblock(pair, pair.gpas[4], lp=2, retries=1),
        on_td(pair, Leaf.EXPORT_TRACK, lp=3),
        on_td(pair, Leaf.MEM_TRACK, lp=2),
        block(pair, pair.gpas[2:6], lp=3),
    ]


def test_a_seed_gives_one_history_and_its_choices_give_it_again(pair):
    pair.block(pair.gpas)
    module = pair.source_host.module
    snapshot = Snapshot(module)
    first = Seeded(module, 11).run(crowd(pair))
    outcome = pair.source.observe(), pair.source.page_states(pair.gpas).tolist()
    again = []
    for scheduler in (Seeded(module, 11), Scripted(module, first.choices)):
        snapshot.restore()
        again.append(scheduler.run(crowd(pair)))
        assert (pair.source.observe(), pair.source.page_states(pair.gpas).tolist()) == outcome
    assert again == [first, first]
    snapshot.restore()
    other = Seeded(module, 12).run(crowd(pair))
    assert other.events != first.events


def counts(profile, attempts):
    """Does a bundle with these attempts count?  Published: once complete; repaired: once begun."""
    begun = any(status == Status.TDX_INTERRUPTED_RESUMABLE for status in attempts)
    return attempts[-1] & ~LOW_32 == SUCCESS or (profile == "hardened" and begun)


@pytest.mark.parametrize("profile", ["hardened", "tdx-1.5.01"])
def test_counts_under_many_seeds(profile):
    """MIG_COUNT and DIRTY_COUNT stay exact, every lock is given back, every call ends."""
    pair = Pair(12, streams=3, profile=profile, pending_pages=3)
    pair.start()
    pair.block(pair.gpas)
    module = pair.source_host.module
    snapshot = Snapshot(module)
    outcomes, refused = set(), set()
    for seed in range(60):
        snapshot.restore()
        before = pair.source.observe()["total_mb_count"]
        history = Seeded(module, seed).run(crowd(pair))
        pair.assert_counts()
        assert_nothing_is_locked(module)
        outcomes.add(tuple(history.final))
        attempts = itertools.chain(*history.statuses)
        refused.update(status for status in attempts if status & ~LOW_32 == BUSY)
        counted = sum(counts(profile, history.statuses[call]) for call in (0, 1, 3))
        assert pair.source.observe()["total_mb_count"] == before + counted
    assert len(outcomes) > 5
    assert {busy(Operand.OP_STATE), busy(Operand.RCX)} <= refused


def test_points_say_where_a_leaf_can_be_left(paused):
    module = paused.source_host.module
    halves = np.array_split(paused.gpas, 2)
    calls = [export(paused, half, stream=n, lp=n) for n, half in enumerate(halves)]
    history = Seeded(module, 1, points={Point.HELD}, interrupt_rate=0).run(calls)
    pairs = itertools.pairwise(history.events)
    left = {one.point for one, two in pairs if one.lp != two.lp}
    assert left <= {Point.HELD, None}
    assert history.final == [SUCCESS, SUCCESS]


def test_misuse_of_a_scheduler(paused):
    module = paused.source_host.module
    with pytest.raises(UsageError, match="logical processor 9"):
        Straight(module).run([on_td(paused, Leaf.MEM_TRACK, lp=9)])
    calls = [on_td(paused, Leaf.MEM_TRACK, lp=lp) for lp in (0, 1)]
    with pytest.raises(UsageError, match="decision 0 is 2"):
        Scripted(module, [2]).run(calls)
    assert_nothing_is_locked(module)
    steps = module.start(Leaf.MEM_TRACK, replace(calls[0].operands))
    next(steps)
    next(steps)
    with pytest.raises(UsageError, match="in progress"):
        Snapshot(module)
    steps.close()
    buffers = paused.source_host.stream_buffers(0)
    stopped = paused.source_host.seamcall(
        Leaf.EXPORT_STATE_VP,
        interrupt=lambda: True,
        rcx=paused.source.td.vcpus[0],
        r8=buffers.mbmd_register,
        r9=buffers.page_list(16),
    )
    assert stopped.rax == Status.TDX_INTERRUPTED_RESUMABLE
    with pytest.raises(UsageError, match="resume it"):
        Snapshot(module)


# --- every interleaving --------------------------------------------------------------------------


def test_export_and_unblocking_in_every_interleaving(pair):
    """All 4543 orders of one EXPORT.MEM entry and one UNBLOCKW of the same page."""
    page = pair.gpas[:1]
    pair.block(page)
    module = pair.source_host.module
    outcomes = set()
    count = 0
    for history in explore(
        module,
        lambda: [replace(export(pair, page), interruptible=False), unblock(pair, page[0], lp=1)],
    ):
        count += 1
        pair.assert_counts()
        assert_nothing_is_locked(module)
        seen = pair.source.observe()
        assert seen["total_mb_count"] == 2  # the bundle counts, whatever became of its entry
        state = SeptState(pair.source.page_states(page)[0])
        outcomes.add((*history.final, *statuses(pair, 1), state))
    assert count == 4543
    free, wrong = GpaStatus.SUCCESS, GpaStatus.SEPT_ENTRY_STATE_INCORRECT
    assert outcomes == {
        (0, 0, free, SeptState.EXPORTED_DIRTY),  # exported, then unblocked
        (1, 0, wrong, SeptState.MAPPED),  # unblocked, so it cannot be exported live
        (0, busy(Operand.RCX), free, SeptState.EXPORTED_BLOCKEDW),  # the export held the entry
        (1, 0, GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY, SeptState.MAPPED),  # the unblocking did
    }


def test_tracking_and_export_in_every_interleaving(pair):
    """A token never splits a bundle: one of the two is BUSY, or they come one after the other."""
    page = pair.gpas[:1]
    pair.block(page)
    module = pair.source_host.module
    outcomes, epochs = set(), set()
    for history in explore(
        module,
        lambda: [
            replace(export(pair, page, stream=1), interruptible=False),
            on_td(pair, Leaf.EXPORT_TRACK, lp=1),
        ],
    ):
        pair.assert_counts()
        assert_nothing_is_locked(module)
        seen = pair.source.observe()
        done = sum(status == SUCCESS for status in history.final)
        assert seen["total_mb_count"] == 1 + done
        assert seen["mig_epoch"] == int(history.final[1] == SUCCESS)
        outcomes.add(tuple(history.final))
        if history.final == [SUCCESS, SUCCESS]:
            epochs.add(exported(pair, 1, stream=1).mbmd.mig_epoch)
    assert outcomes == {
        (SUCCESS, SUCCESS),
        (SUCCESS, busy(Operand.OP_STATE)),
        (busy(Operand.OP_STATE), SUCCESS),
    }
    assert epochs == {0, 1}


def test_two_streams_in_every_interleaving_of_their_entries(paused):
    """All orders of two bundles that share a page: it goes into one of them, exactly once."""
    one, shared, two = paused.gpas[:3].tolist()
    module = paused.source_host.module
    winners, count = set(), 0
    for history in explore(
        module,
        lambda: [
            replace(export(paused, [shared, one], stream=0), interruptible=False),
            replace(export(paused, [shared, two], stream=1, lp=1), interruptible=False),
        ],
        points=COMMIT_POINTS,
    ):
        count += 1
        assert_nothing_is_locked(module)
        paused.assert_counts()
        seen = paused.source.observe()
        assert (seen["total_mb_count"], seen["mig_count"], seen["dirty_count"]) == (3, 3, 0)
        assert seen["iv_counter"] == [1 + 3, 3, 0]
        found = statuses(paused, 2, stream=0), statuses(paused, 2, stream=1)
        assert [history.final[0], history.final[1]] == [bool(found[0][0]), bool(found[1][0])]
        winners.add((found[0][0], found[1][0]))
        assert found[0][1] == found[1][1] == GpaStatus.SUCCESS
    # Fewer than the 252 orders of ten steps: who finds the entry locked does not stop at it.
    assert count == 192
    held, wrong = GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY, GpaStatus.SEPT_ENTRY_STATE_INCORRECT
    assert winners == {(0, held), (0, wrong), (held, 0), (wrong, 0)}


def test_an_interrupted_bundle_in_every_interleaving_and_interruption(paused):
    """Interrupted or not after each entry, resumed at once; a second stream in between."""
    first, second = paused.gpas[:3], paused.gpas[3:4]
    module = paused.source_host.module
    attempts, bundles = set(), set()
    for history in explore(
        module,
        lambda: [
            export(paused, first, stream=0),
            export(paused, second, stream=1, lp=1),
        ],
        points={Point.ENTRY},
    ):
        assert history.final == [SUCCESS, SUCCESS]
        attempts.add(len(history.statuses[0]))
        seen = paused.source.observe()
        assert (seen["total_mb_count"], seen["mig_count"]) == (3, 4)
        bundle = exported(paused, 3)
        bundles.add((bundle.mbmd.pack(), bundle.gpa_list, bundle.macs, *map(bytes, bundle.pages)))
    assert attempts == {1, 2, 3}
    assert len(bundles) == 1


def test_guest_writes_and_live_export_in_every_interleaving(pair):
    """The exported copy is the last version, or the page is dirty and known to be."""
    page = np.array([PAGE_SIZE], dtype=np.uint64)
    pair.run(0, 2)
    pair.on_source(c.ExportBlockw(page))
    pair.on_source(c.MemTrack())
    module, vcpu = pair.source_host.module, pair.source.td.vcpus[0]
    before = pair.source.read_page(PAGE_SIZE)
    outcomes = set()

    def prepare():
        module.processors[1].timer = 2
        pair.source._tdvps(0).assoc_lp = 1
        enter = LeafCall(Leaf.VP_ENTER, Registers(rcx=vcpu), lp=1)
        mapped = unblock(pair, PAGE_SIZE, lp=1)
        return [replace(export(pair, page), interruptible=False), enter, mapped, enter]

    for history in explore(module, prepare, points={*COMMIT_POINTS, Point.GUEST}):
        pair.assert_counts()
        assert_nothing_is_locked(module)
        written = pair.source.read_page(PAGE_SIZE) != before
        state = SeptState(pair.source.page_states(page)[0])
        outcomes.add((statuses(pair, 1)[0], history.final[2], written, state))
    for status, _, written, state in outcomes:
        assert not (written and status == 0 and state is SeptState.EXPORTED_BLOCKEDW)
    assert (0, SUCCESS, True, SeptState.EXPORTED_DIRTY) in outcomes
    assert (0, busy(Operand.RCX), False, SeptState.EXPORTED_BLOCKEDW) in outcomes


def test_two_streams_in_every_interleaving_of_all_steps(paused):
    """Every lock is a step: 12870 orders of one entry each."""
    module = paused.source_host.module
    count = 0
    for history in explore(
        module,
        lambda: [
            export(paused, paused.gpas[:1], stream=0),
            export(paused, paused.gpas[1:2], stream=1, lp=1),
        ],
        points=set(Point) - {Point.RELEASE},
    ):
        count += 1
        assert history.final == [SUCCESS, SUCCESS]
        assert paused.source.observe()["total_mb_count"] == 3
    assert count == 12870


# --- locks, leaf by leaf -------------------------------------------------------------------------


def conflicts(module, prepare):
    """Final statuses over all interleavings."""
    found = set()
    for history in explore(module, prepare, points={Point.LOCK, Point.ENTRY, Point.RELEASE}):
        assert_nothing_is_locked(module)
        found.add(tuple(history.final))
    return found


def test_same_stream_in_every_interleaving(paused):
    """One of two EXPORT.MEM of a stream has it; the other finds it busy, or comes after it."""
    found = conflicts(
        paused.source_host.module,
        lambda: [
            replace(export(paused, paused.gpas[:1]), interruptible=False),
            replace(export(paused, paused.gpas[:1]), interruptible=False, lp=1),
        ],
    )
    migsc, late = busy(Operand.MIGSC), 1
    # After the first the list holds its outcome, so the second finds an exported page.
    assert found == {(0, migsc), (migsc, 0), (0, late), (late, 0)}


@pytest.mark.parametrize(
    ("leaf", "operands", "operand"),
    [
        (Leaf.EXPORT_TRACK, {}, Operand.OP_STATE),
        (Leaf.EXPORT_ABORT, {"r8": 0}, Operand.OP_STATE),
        (Leaf.EXPORT_PAUSE, {}, Operand.RCX),
    ],
)
def test_leaves_that_exclude_a_memory_export(pair, leaf, operands, operand):
    pair.block(pair.gpas[:1])
    found = conflicts(
        pair.source_host.module,
        lambda: [
            replace(export(pair, pair.gpas[:1], stream=1), interruptible=False),
            on_td(pair, leaf, lp=1, **operands),
        ],
    )
    contended = {code for codes in found for code in codes if code & ~LOW_32 == BUSY}
    # EXPORT.MEM has the TD in RDX: if PAUSE was first, that is what it blames.
    first = Operand.RDX if operand is Operand.RCX else operand
    assert contended == {busy(operand), busy(first)}
    assert not any(all(code & ~LOW_32 == BUSY for code in codes) for codes in found)


# --- import --------------------------------------------------------------------------------------


def arrived(pair, splits):
    """Bundles of these pages, by stream, on their way to a destination that has the tables."""
    bundles = [pair.export(gpas, stream=n) for n, gpas in enumerate(splits)]
    pair.destination_host.add_tables(pair.destination.td, pair.gpas)
    return bundles


def test_two_streams_import_under_any_seed(paused):
    halves = np.array_split(paused.gpas, 2)
    bundles = arrived(paused, halves)
    module = paused.destination_host.module
    pages = paused.destination_host.take_private_pages(12)
    snapshot = Snapshot(module)
    for seed in range(10):
        snapshot.restore()
        calls = [
            load(paused, bundle, pages[6 * n : 6 * n + 6], stream=n, lp=n)
            for n, bundle in enumerate(bundles)
        ]
        history = Seeded(module, seed).run(calls)
        assert history.final == [SUCCESS, SUCCESS]
        assert switches(history) > 5
        assert_nothing_is_locked(module)
        seen = paused.destination.observe()
        assert seen["total_mb_count"] == 3
        assert seen["expected_mb_counter"] == [2, 1, 0]
        assert paused.source.memory_digest() == paused.destination.memory_digest()
    paused.states()
    paused.start_token()


def test_entries_of_concurrent_imports_are_locked_one_by_one(paused):
    """After the start token one page is in two bundles: one imports it, the other's is skipped."""
    paused.states()
    paused.start_token()
    shared, other = paused.gpas[:2].tolist()
    bundles = [paused.export([shared], stream=0), paused.export([shared, other], stream=1)]
    paused.destination_host.add_tables(paused.destination.td, paused.gpas)
    module = paused.destination_host.module
    pages = paused.destination_host.take_private_pages(3)
    found, count = set(), 0
    for history in explore(
        module,
        lambda: [
            replace(load(paused, bundles[0], pages[:1], stream=0), interruptible=False),
            replace(load(paused, bundles[1], pages[1:], stream=1, lp=1), interruptible=False),
        ],
        points=COMMIT_POINTS,
    ):
        count += 1
        assert_nothing_is_locked(module)
        assert paused.state(paused.destination) == "POST_IMPORT"
        lists = [paused.destination_host.stream_buffers(n).entries(1 + n) for n in (0, 1)]
        entries = [entry_statuses(entries).tolist() for entries in lists]
        found.add((entries[0][0], entries[1][0]))
        assert history.final == [int(entries[0][0] != 0), int(entries[1][0] != 0)]
        assert entries[1][1] == GpaStatus.SUCCESS
        for gpa in (shared, other):
            assert paused.destination.read_page(gpa) == paused.source.read_page(gpa)
    assert count == 44
    held, wrong = GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY, GpaStatus.SEPT_ENTRY_STATE_INCORRECT
    assert found == {(0, held), (0, wrong), (held, 0), (wrong, 0)}


def test_a_new_page_offered_to_two_imports_is_taken_once(paused):
    """Two bundles, one free page: the one that is late is told that the page is not free."""
    paused.states()
    paused.start_token()
    bundles = [paused.export(paused.gpas[n : n + 1], stream=n) for n in (0, 1)]
    paused.destination_host.add_tables(paused.destination.td, paused.gpas)
    page = paused.destination_host.take_private_pages(1)
    module = paused.destination_host.module
    owned = module.tdrs[paused.destination.td.tdr].child_count
    for history in explore(
        module,
        lambda: [
            replace(load(paused, bundle, page, stream=n, lp=n), interruptible=False)
            for n, bundle in enumerate(bundles)
        ],
        points=COMMIT_POINTS,
    ):
        assert sorted(history.final) == [0, 1]
        assert module.tdrs[paused.destination.td.tdr].child_count == owned + 1
        lists = [paused.destination_host.stream_buffers(n) for n in (0, 1)]
        late = history.final.index(1)
        assert entry_statuses(lists[late].entries(1)) == [GpaStatus.NEW_PAGE_NOT_AVAILABLE]
        again = paused.destination_host.memory.page_words(lists[late].new_pages)[0]
        assert int(again) == page[0] | INVALID_BIT


def test_import_commit_waits_for_imports(paused):
    paused.states()
    paused.start_token()
    bundle = paused.export(paused.gpas[:1])
    paused.destination_host.add_tables(paused.destination.td, paused.gpas)
    pages = paused.destination_host.take_private_pages(1)
    found = conflicts(
        paused.destination_host.module,
        lambda: [
            replace(load(paused, bundle, pages), interruptible=False),
            on_td(paused, Leaf.IMPORT_COMMIT, lp=1, side="destination"),
        ],
    )
    assert found == {(0, 0), (0, busy(Operand.RCX)), (busy(Operand.RDX), 0)}


def test_in_place_import_under_a_seed(paused):
    """R13 all ones, two streams: migration buffers in the TDMR become the TD's pages."""
    halves = np.array_split(paused.gpas, 2)
    bundles = arrived(paused, halves)
    host = paused.destination_host
    calls = []
    for stream, bundle in enumerate(bundles):
        pages = host.take_private_pages(6)
        call = load(paused, bundle, pages, stream=stream, lp=stream)
        for hpa, content in zip(pages, bundle.pages, strict=True):
            host.memory.bytes[hpa : hpa + PAGE_SIZE] = content
        host.memory.page_words(host.stream_buffers(stream).list)[:6] = pages
        calls.append(replace(call, operands=replace(call.operands, r13=NO_PAGE)))
    history = Seeded(host.module, 5).run(calls)
    assert history.final == [SUCCESS, SUCCESS]
    assert paused.source.memory_digest() == paused.destination.memory_digest()


# --- threads -------------------------------------------------------------------------------------


def test_threads_export_streams_at_once(paused):
    """Three real threads: bundles interleave, nothing is lost, the destination takes them."""
    module = paused.source_host.module
    thirds = np.array_split(paused.gpas, 3)
    snapshot = Snapshot(module)
    for _ in range(100):
        snapshot.restore()
        history = Threads(module).run(
            [export(paused, gpas, stream=n, lp=n) for n, gpas in enumerate(thirds)]
        )
        assert history.final == [SUCCESS] * 3
        if switches(history) > 3:
            break
    else:
        raise AssertionError("one thread after the other, a hundred times")
    assert_nothing_is_locked(module)
    paused.assert_counts()
    for stream, gpas in enumerate(thirds):
        bundle = exported(paused, len(gpas), stream=stream)
        assert not paused.on_destination(c.ImportMem(stream, bundle)).statuses.any()
    paused.states()
    paused.start_token()
    paused.assert_equal()


def test_threads_meet_real_locks(paused):
    """BUSY is what a thread sees while another one is inside; with retries all get through."""
    module = paused.source_host.module
    calls = [export(paused, paused.gpas[n : n + 1], stream=0, lp=n) for n in range(3)]
    held = module.start(Leaf.EXPORT_MEM, replace(calls[0].operands), lp=3)
    for point in held:
        if point is Point.HELD:
            break
    threads = Threads(module)
    history = threads.run([*calls[:2], on_td(paused, Leaf.EXPORT_TRACK, lp=2)])
    assert history.final == [busy(Operand.MIGSC), busy(Operand.MIGSC), busy(Operand.OP_STATE)]
    for _ in held:
        pass
    tracks = [replace(on_td(paused, Leaf.MEM_TRACK, lp=n), retries=1000) for n in range(4)]
    before = paused.source.observe()["td_epoch"]
    assert threads.run(tracks * 5).final == [SUCCESS] * 20
    assert paused.source.observe()["td_epoch"] == before + 20
    assert_nothing_is_locked(module)


def test_threads_have_a_processor_each(paused):
    module = paused.source_host.module
    threads = Threads(module)
    registers = on_td(paused, Leaf.MEM_TRACK).operands
    steps = threads._steps(module.start(Leaf.MEM_TRACK, registers), 0)
    next(steps)
    with pytest.raises(UsageError, match="logical processor 0"):
        threads.call(Leaf.MEM_TRACK, replace(registers), lp=0)
    with pytest.raises(UsageError, match="logical processor 0"):
        threads.run([on_td(paused, Leaf.MEM_TRACK)])
    assert threads.call(Leaf.MEM_TRACK, replace(registers), lp=1) == SUCCESS
    steps.close()
    assert threads.call(Leaf.MEM_TRACK, replace(registers), lp=0) == SUCCESS
    assert_nothing_is_locked(module)


def test_straight_is_the_order_of_the_calls(pair):
    pair.block(pair.gpas)
    calls = [export(pair, pair.gpas), on_td(pair, Leaf.EXPORT_TRACK)]
    history = Straight(pair.source_host.module).run(calls)
    assert history.final == [SUCCESS, SUCCESS]
    assert switches(history) == 0
    assert str(history.events[-1]) == "lp 0, call 1: TDX_SUCCESS"
    cancel = export(pair, pair.gpas[:2], operation=CANCEL)
    assert Straight(pair.source_host.module).run([cancel]).final == [SUCCESS]
    pair.assert_counts()
