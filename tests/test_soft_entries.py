"""Leaves on one Secure EPT entry: what RCX and RDX say, whole tables, and locks that are met."""

from dataclasses import replace

import legal_calls as legal
import numpy as np
import pytest
from error_rows import CODES, OPERANDS, table
from sept_pages import entry_state, inject
from soft_calls import assert_nothing_is_locked, load, unblock
from soft_pair import CANCEL, Pair
from td_places import td_in

from tdxmig_model.backend.soft.call import Point, Registers
from tdxmig_model.backend.soft.leaves_run import EXIT_EPT_VIOLATION
from tdxmig_model.backend.soft.op_state import GuestLeaf, Leaf, OpState
from tdxmig_model.backend.soft.schedulers import LeafCall, Threads, explore
from tdxmig_model.backend.soft.sept import LOCK_BIT, SeptState
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import GpaEntry, GpaStatus

S = SeptState
V = "tdx-1.5.01"
STATES = table("sept_state.csv")
WRONG_STATE = CODES["TDX_EPT_ENTRY_STATE_INCORRECT"] | OPERANDS["RCX"]
ALREADY = CODES["TDX_GPA_RANGE_ALREADY_BLOCKED"] | OPERANDS["RCX"]
BUSY = CODES["TDX_OPERAND_BUSY"] | OPERANDS["RCX"]
SUPPRESS_VE, WRITE_BACK, LEAF, HPA = 1 << 63, 6 << 3, 3 << 6, ((1 << 52) - 1) & ~0xFFF


def shown(word, row, level=0):
    """RCX and RDX by the published table: what the VMM is told of an entry in this state."""
    if row["state"] == "FREE":
        entry = SUPPRESS_VE
    elif row["ps_leaf"] == "1":
        entry = word & (7 | 7 << 3 | LEAF | HPA | SUPPRESS_VE)
    else:
        entry = word & 7
    return entry, level | int(row["public_state"]) << 8


ENTRY_LEAVES = {
    Leaf.MEM_SEPT_ADD: 1,
    Leaf.MEM_PAGE_AUG: 0,
    Leaf.MEM_RANGE_BLOCK: 0,
    Leaf.MEM_RANGE_UNBLOCK: 0,
    Leaf.MEM_PAGE_REMOVE: 0,
    Leaf.EXPORT_UNBLOCKW: 0,
}
"""Leaves on one entry, and its level."""


def call(place, leaf, gpa, level=0, **more):
    operands = {"rcx": gpa | level, "rdx": place.td.tdr, "r8": place.free_page(), **more}
    registers = Registers(**operands)
    place.call(leaf, registers)
    return registers


def details(registers):
    return registers.rcx, registers.rdx


def with_entry(leaf, state, level):
    """A TD where the leaf is allowed without TLB tracking, an entry in this state, its word."""
    place = td_in(OpState.LIVE_EXPORT)
    if leaf in (Leaf.MEM_RANGE_UNBLOCK, Leaf.MEM_PAGE_REMOVE):
        place.require(Leaf.EXPORT_PAUSE, rcx=place.td.tdr)
    gpa = 0 if level else PAGE_SIZE
    inject(place, gpa, state, level)
    return place, gpa, place.host.memory.words[place.tdcs.sept.walk(gpa, level)[0]]


@pytest.mark.parametrize("row", STATES, ids=lambda row: row["state"])
@pytest.mark.parametrize("leaf", ENTRY_LEAVES)
def test_a_leaf_that_refuses_an_entry_shows_it(leaf, row):
    level = ENTRY_LEAVES[leaf]
    place, gpa, word = with_entry(leaf, S[row["state"]], level)
    left = call(place, leaf, gpa, level)
    if left.rax in (WRONG_STATE, ALREADY):
        assert details(left) == shown(word, row, level)
        return
    assert left.rax == 0
    assert details(left) == (word & HPA if leaf is Leaf.MEM_PAGE_REMOVE else 0, 0)


@pytest.mark.parametrize("row", STATES, ids=lambda row: row["state"])
def test_page_add_shows_an_entry_that_is_not_free(row):
    place = td_in(OpState.INITIALIZED)
    inject(place, PAGE_SIZE, S[row["state"]])
    word = place.host.memory.words[place.tdcs.sept.slot(PAGE_SIZE)]
    left = call(place, Leaf.MEM_PAGE_ADD, PAGE_SIZE, r9=place.buffers.buffers)
    free = row["state"] == "FREE"
    assert left.rax == (0 if free else WRONG_STATE)
    assert details(left) == ((0, 0) if free else shown(word, row))


def test_a_real_entry_is_shown_with_its_memory_type_and_without_its_lock():
    place = td_in(OpState.RUNNABLE)
    hpa = place.td.page_hpas[0]
    place.host.memory.words[place.tdcs.sept.slot(0)] |= LOCK_BIT
    left = call(place, Leaf.MEM_PAGE_AUG, 0)
    assert left.rax == BUSY
    assert details(left) == (hpa | SUPPRESS_VE | WRITE_BACK | LEAF | 7, 4 << 8)
    left = call(place, Leaf.MEM_SEPT_ADD, 0, 1)
    assert left.rax == WRONG_STATE
    assert details(left) == (7, 1 | 132 << 8)
    left = call(place, Leaf.MEM_PAGE_AUG, 1 << 40)
    assert left.rax == CODES["TDX_EPT_WALK_FAILED"] | OPERANDS["RCX"]
    assert details(left) == (SUPPRESS_VE, 3)


@pytest.mark.parametrize("leaf", ENTRY_LEAVES)
def test_only_unblockw_does_not_show_a_locked_entry(leaf):
    level = ENTRY_LEAVES[leaf]
    place, gpa, word = with_entry(leaf, S.BLOCKEDW, level)
    place.host.memory.words[place.tdcs.sept.walk(gpa, level)[0]] |= LOCK_BIT
    left = call(place, leaf, gpa, level)
    assert left.rax == BUSY
    row = STATES[S.BLOCKEDW]
    assert details(left) == ((0, 0) if leaf is Leaf.EXPORT_UNBLOCKW else shown(word, row, level))


@pytest.mark.parametrize("leaf", [*ENTRY_LEAVES, Leaf.MEM_PAGE_ADD])
@pytest.mark.parametrize(
    "wrong", [{"rdx": 8}, {"rdx": 1 << 51}, {"rcx": 1 << 60}, {"rcx": 7}, {"rcx": 1 << 47}]
)
def test_other_failures_leave_nothing_in_rcx_and_rdx(leaf, wrong):
    place = td_in(OpState.INITIALIZED)
    if leaf is Leaf.EXPORT_UNBLOCKW:
        place = td_in(OpState.LIVE_EXPORT)
    left = call(place, leaf, 0, ENTRY_LEAVES.get(leaf, 0), **wrong)
    assert left.rax & ~0xFFFF_FFFF == CODES["TDX_OPERAND_INVALID"]
    assert details(left) == (0, 0)


# --- whole tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_blocked_table_keeps_the_guest_and_every_leaf_from_its_pages(level):
    place = td_in(OpState.RUNNABLE)
    tdr, backend = place.td.tdr, place.backend
    backend.execute(c.VpEnter(0, 3))
    assert call(place, Leaf.MEM_RANGE_BLOCK, 0, level).rax == 0
    assert entry_state(place, 0, level) is S.NL_BLOCKED
    again = call(place, Leaf.MEM_RANGE_BLOCK, 0, level)
    assert again.rax == ALREADY
    assert details(again) == (0, level | 129 << 8)
    assert call(place, Leaf.MEM_PAGE_AUG, 9 * PAGE_SIZE).rax & ~1 == CODES["TDX_EPT_WALK_FAILED"]
    early = call(place, Leaf.MEM_RANGE_UNBLOCK, 0, level)
    assert early.rax == CODES["TDX_TLB_TRACKING_NOT_DONE"] | OPERANDS["SEPT_TREE"]
    assert details(early) == (0, 0)
    place.require(Leaf.MEM_TRACK, rcx=tdr)
    assert backend.execute(c.VpEnter(0, 3)).exit.reason == "ept_violation"
    assert call(place, Leaf.MEM_RANGE_UNBLOCK, 0, level).rax == 0
    assert entry_state(place, 0, level) is S.NL_MAPPED
    assert backend.execute(c.VpEnter(0, 3)).exit.reason == "budget"
    place.backend.close()
    assert tdr not in place.host.module.tdrs


def test_sept_add_leaves_a_table_that_may_be_there():
    """RDX bit 0 allows it; bit 63 of R8 is ignored, all ones is no page."""
    place = td_in(OpState.RUNNABLE)
    page, before = place.free_page(), place.host.memory.words[place.tdcs.sept.walk(0, 1)[0]]
    there = call(place, Leaf.MEM_SEPT_ADD, 0, 1, rdx=place.td.tdr | 1, r8=page)
    assert (there.rax, there.rcx, there.rdx) == (0, 0, 0)
    assert place.host.memory.words[place.tdcs.sept.walk(0, 1)[0]] == before
    assert place.host.memory.page_type[page >> 12] == 0
    no_page = call(place, Leaf.MEM_SEPT_ADD, 0, 1, rdx=place.td.tdr | 1, r8=(1 << 64) - 1)
    assert no_page.rax == CODES["TDX_OPERAND_INVALID"] | OPERANDS["R8"]
    flagged = call(place, Leaf.MEM_SEPT_ADD, 1 << 21, 1, rdx=place.td.tdr | 1, r8=page | 1 << 63)
    assert flagged.rax == 0
    assert entry_state(place, 1 << 21, 1) is S.NL_MAPPED


@pytest.mark.parametrize("level", [1, 2])
def test_page_remove_takes_no_table(level):
    place = td_in(OpState.RUNNABLE)
    left = call(place, Leaf.MEM_PAGE_REMOVE, 0, level)
    assert left.rax == WRONG_STATE
    assert details(left) == (7, level | 132 << 8)


# --- locks ---------------------------------------------------------------------------------------


def outcomes(module, prepare):
    """The final statuses of two calls in every interleaving."""
    found = set()
    for history in explore(module, prepare):
        assert_nothing_is_locked(module)
        found.add(tuple(history.final))
    return found


def page_leaf(side, leaf, gpa, lp, **more):
    operands = Registers(rcx=int(gpa), rdx=side.td.tdr, **more)
    return LeafCall(leaf, operands, lp=lp, interruptible=False)


def test_two_unblockings_of_a_page_meet_its_lock():
    pair = Pair(4, profile=V)
    pair.start()
    pair.block(pair.gpas[:1])
    found = outcomes(
        pair.source_host.module, lambda: [unblock(pair, pair.gpas[0], lp=lp) for lp in (0, 1)]
    )
    assert found == {(0, WRONG_STATE), (WRONG_STATE, 0), (0, BUSY), (BUSY, 0)}


def accept(pair, gpa, lp=0):
    """TDG.MEM.PAGE.ACCEPT by the first vCPU of the source."""
    vcpu = pair.source.td.vcpus[0]
    return LeafCall(GuestLeaf.MEM_PAGE_ACCEPT, Registers(rcx=int(gpa)), lp=lp, vcpu=vcpu)


def test_a_guest_that_accepts_a_page_and_a_host_that_blocks_it_meet():
    """The guest holds no lock but that of the entry."""
    pair = Pair(4, profile=V, pending_pages=1)
    gpa = int(pair.gpas[3])
    found = outcomes(
        pair.source_host.module,
        lambda: [accept(pair, gpa), page_leaf(pair.source, Leaf.MEM_RANGE_BLOCK, gpa, 1)],
    )
    blocked_before = EXIT_EPT_VIOLATION
    assert found == {(0, 0), (blocked_before, 0), (BUSY, 0), (0, BUSY)}


def test_a_guest_that_accepts_a_page_and_a_host_that_unblocks_it_meet():
    pair = Pair(4, profile=V, pending_pages=1)
    gpa = int(pair.gpas[3])
    pair.source_host.require(Leaf.MEM_RANGE_BLOCK, rcx=gpa, rdx=pair.source.td.tdr)
    pair.source_host.require(Leaf.MEM_TRACK, rcx=pair.source.td.tdr)
    found = outcomes(
        pair.source_host.module,
        lambda: [accept(pair, gpa), page_leaf(pair.source, Leaf.MEM_RANGE_UNBLOCK, gpa, 1)],
    )
    assert found == {(0, 0), (EXIT_EPT_VIOLATION, 0), (BUSY, 0), (EXIT_EPT_VIOLATION, BUSY)}


def test_two_tables_for_one_place_meet():
    pair = Pair(4, profile=V)
    pages = pair.source_host.take_private_pages(2)
    found = outcomes(
        pair.source_host.module,
        lambda: [
            page_leaf(pair.source, Leaf.MEM_SEPT_ADD, 1 << 21 | 1, lp, r8=pages[lp])
            for lp in (0, 1)
        ],
    )
    assert found == {(0, WRONG_STATE), (WRONG_STATE, 0), (0, BUSY), (BUSY, 0)}


def aug(pair, gpa, page, lp):
    return page_leaf(pair.source, Leaf.MEM_PAGE_AUG, gpa, lp, r8=page)


def test_two_pages_for_one_place_meet_the_entry():
    pair, gpa = Pair(4, profile=V), 9 * PAGE_SIZE
    pages = pair.source_host.take_private_pages(2)
    found = outcomes(
        pair.source_host.module, lambda: [aug(pair, gpa, pages[lp], lp) for lp in (0, 1)]
    )
    assert found == {(0, WRONG_STATE), (WRONG_STATE, 0), (0, BUSY), (BUSY, 0)}


def test_one_page_for_two_places_meets_the_page():
    pair, gpa = Pair(4, profile=V), 9 * PAGE_SIZE
    page = pair.source_host.take_private_pages(1)[0]
    taken = CODES["TDX_OPERAND_BUSY"] | OPERANDS["R8"]
    used = CODES["TDX_PAGE_METADATA_INCORRECT"] | OPERANDS["R8"]
    found = outcomes(
        pair.source_host.module,
        lambda: [aug(pair, gpa + lp * PAGE_SIZE, page, lp) for lp in (0, 1)],
    )
    assert found == {(0, used), (used, 0), (0, taken), (taken, 0)}


def test_page_remove_holds_the_page_that_it_frees():
    """The page is offered to PAGE.AUG at once: in use, locked by the removal, or free."""
    pair = Pair(4, profile=V)
    gpa, td = int(pair.gpas[1]), pair.source.td
    hpa, busy = td.page_hpas[int(gpa)], CODES["TDX_OPERAND_BUSY"]
    used = CODES["TDX_PAGE_METADATA_INCORRECT"] | OPERANDS["R8"]
    pair.source_host.require(Leaf.MEM_RANGE_BLOCK, rcx=gpa, rdx=td.tdr)
    pair.source_host.require(Leaf.MEM_TRACK, rcx=td.tdr)
    found = outcomes(
        pair.source_host.module,
        lambda: [
            page_leaf(pair.source, Leaf.MEM_PAGE_REMOVE, gpa, 0),
            page_leaf(pair.source, Leaf.MEM_PAGE_AUG, 9 * PAGE_SIZE, 1, r8=hpa),
        ],
    )
    met = {(0, busy | OPERANDS["R8"]), (busy | OPERANDS["RCX"], used)}
    assert found == {(0, 0), (0, used), *met}


def test_a_page_being_imported_is_locked():
    """IMPORT.MEM and PAGE.AUG meet at the page that both want to have."""
    pair = Pair(4, profile=V)
    pair.start()
    pair.pause()
    pair.move(pair.gpas[:2])
    pair.states()
    pair.start_token()
    bundle = pair.export(pair.gpas[2:3])
    host = pair.destination_host
    page = host.take_private_pages(1)[0]
    pair.on_destination(c.ImportCommit())
    statuses = set()

    def prepare():
        return [
            replace(load(pair, bundle, [page]), interruptible=False),
            page_leaf(pair.destination, Leaf.MEM_PAGE_AUG, pair.gpas[3], 1, r8=page),
        ]

    for history in explore(host.module, prepare, points={Point.HELD, Point.LOCK}):
        assert_nothing_is_locked(host.module)
        word = int(host.stream_buffers(0).entries(1)[0])
        statuses.add((*history.final, word >> 56 & 0x1F))
    busy = CODES["TDX_OPERAND_BUSY"] | OPERANDS["R8"]
    used = CODES["TDX_PAGE_METADATA_INCORRECT"] | OPERANDS["R8"]
    gone = GpaStatus.NEW_PAGE_NOT_AVAILABLE
    assert statuses == {(0, used, 0), (0, busy, 0), (1, 0, gone)}


def test_a_page_being_cancelled_is_locked():
    """IMPORT.MEM with CANCEL and PAGE.RECLAIM meet at the page; in order that ends the import."""
    scene = legal.in_order(GpaEntry(0, CANCEL).to_int())
    page, word = scene.td.page_hpas[0], scene.word(0)

    def prepare():
        scene.memory.page_words(scene.buffers.gpas)[0] = np.uint64(word)
        reclaim = LeafCall(Leaf.PHYMEM_PAGE_RECLAIM, Registers(rcx=page), lp=1)
        operands = Registers(**scene.registers)
        return [LeafCall(scene.leaf, operands, interruptible=False), reclaim]

    found = outcomes(scene.module, prepare)
    ended = CODES["TDX_OPERAND_BUSY"] | OPERANDS["GPA_LIST_ENTRY"] | 1 << 61
    living = CODES["TDX_LIFECYCLE_STATE_INCORRECT"]
    free = CODES["TDX_PAGE_METADATA_INCORRECT"] | OPERANDS["RCX"]
    assert found == {(0, living), (0, free), (0, BUSY), (ended, living)}


def test_threads_run_guest_calls_too():
    pair = Pair(4, profile=V, pending_pages=1)
    history = Threads(pair.source_host.module).run([accept(pair, pair.gpas[3])])
    assert history.final == [0]
