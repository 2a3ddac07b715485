"""Do the leaves, called, obey the published permissions: OP_STATE by OP_STATE, entry by entry?

Every leaf that the software module has is called in each of the 11 OP_STATEs, and every page leaf
on a page in each of the 16 Secure EPT entry states.  What is refused is compared, cell by cell,
with specs/op_state.csv, specs/op_state_other.csv and specs/sept_state.csv.
"""

import numpy as np
import pytest
from error_rows import CODES, OPERANDS, table
from sept_pages import (
    entry_state,
    inject,
    page_initialized,
    page_on_destination,
    page_on_source,
    sept_words,
)
from soft_pair import Forger
from soft_state import changes, snapshot
from td_places import OPERANDS_OF, list_of, td_in, vcpu_of

from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.guest import EptViolation
from tdxmig_model.backend.soft.leaves_servtd import MIG_VERSION
from tdxmig_model.backend.soft.module import _GUEST_LEAVES, _LEAVES
from tdxmig_model.backend.soft.op_state import PUBLISHED_STATES, GuestLeaf, Leaf, OpState
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.backend.soft.state import VcpuState
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.gpa_list import GpaOperation, GpaStatus

MIGRATE, CANCEL, REMIGRATE = GpaOperation.MIGRATE, GpaOperation.CANCEL, GpaOperation.REMIGRATE
WRONG_STATE = CODES["TDX_OP_STATE_INCORRECT"]
FATAL_SUCCESS = 1 << 61
OP_STATE_ROWS = {int(row["leaf_number"]): row for row in table("op_state.csv")}
OTHER_ROWS = {int(row["leaf_number"]): row for row in table("op_state_other.csv")}
ALL_BITS = (1 << 64) - 1
S = SeptState

NOT_IMPLEMENTED = {
    "TDH.MEM.PAGE.RELOCATE": "moves a page within one host; migration does not use it",
    "TDH.MEM.PAGE.DEMOTE": "only 4 KiB pages exist here, as migration requires",
    "TDH.MEM.PAGE.PROMOTE": "only 4 KiB pages exist here, as migration requires",
    "TDH.MR.EXTEND": "measures page content into MRTD, which no check of migration looks at",
    "TDH.MNG.RD": "field access of the host; the backend's `observe` shows the same fields",
    "TDH.MNG.WR": "field access of the host; no field that migration uses is writable by it",
    "TDH.VP.RD": "field access of the host; a migratable TD is no debug TD and shows little",
    "TDH.VP.WR": "field access of the host; a migratable TD is no debug TD and takes little",
    "TDH.MEM.RD": "debug TDs only, and a migratable TD is none",
    "TDH.MEM.WR": "debug TDs only, and a migratable TD is none",
    "TDH.MEM.SEPT.RD": "shows an entry to the host and changes nothing",
    "TDH.MEM.SEPT.REMOVE": "tables stay until the TD is taken down",
    "TDG.MEM.PAGE.ATTR.RD": "attributes are those of L2 virtual machines, which are not migratable",
    "TDG.MEM.PAGE.ATTR.WR": "attributes are those of L2 virtual machines, which are not migratable",
}
"""Leaves of the published tables that the module does not have."""


def published_names():
    columns = [name for name in table("sept_state.csv")[0] if "CALL_" in name]
    return {
        *(row["leaf_name"] for row in OP_STATE_ROWS.values()),
        *(row["leaf_name"] for row in OTHER_ROWS.values()),
        *(name.split("_", 2)[2] for name in columns),
    }


def test_what_is_not_implemented_is_this_list():
    here = {f"TDH.{leaf.name.replace('_', '.')}" for leaf in _LEAVES}
    here |= {f"TDG.{leaf.name.replace('_', '.')}" for leaf in _GUEST_LEAVES}
    assert published_names() - here == set(NOT_IMPLEMENTED)


def test_a_leaf_that_is_not_there_is_no_leaf():
    host = td_in(OpState.RUNNABLE).host
    no_leaf = CODES["TDX_OPERAND_INVALID"] | OPERANDS["RAX"]
    for number, row in OP_STATE_ROWS.items():
        if row["leaf_name"] in NOT_IMPLEMENTED:
            assert host.module.call(number, Registers()) == no_leaf


def test_every_leaf_of_the_table_that_is_here_is_called():
    assert set(OPERANDS_OF) == {leaf for leaf in _LEAVES if int(leaf) in OP_STATE_ROWS}


# --- OP_STATE ------------------------------------------------------------------------------------


def allowed(leaf, state):
    return OP_STATE_ROWS[leaf][state.name] == "1"


@pytest.mark.parametrize("profile", ["tdx-1.5.01", "hardened"])
@pytest.mark.parametrize("state", PUBLISHED_STATES)
def test_what_an_op_state_does_not_allow_is_refused_and_changes_nothing(state, profile):
    place = td_in(state, profile)
    vcpu_of(place)
    for leaf in OPERANDS_OF:
        if not allowed(leaf, state):
            registers = OPERANDS_OF[leaf](place)
            before = snapshot(place.host.module)
            assert place.call(leaf, registers) == WRONG_STATE, leaf.name
            assert not changes(before, snapshot(place.host.module)), leaf.name


NOT_ASSOCIATED = {
    (Leaf.VP_FLUSH, OpState.UNINITIALIZED): "TDX_VCPU_NOT_ASSOCIATED",
    (Leaf.VP_FLUSH, OpState.MEMORY_IMPORT): "TDX_VCPU_NOT_ASSOCIATED",
    (Leaf.VP_FLUSH, OpState.FAILED_IMPORT): "TDX_VCPU_NOT_ASSOCIATED",
}
"""VP.FLUSH gets past OP_STATE where no vCPU can be associated, and says so."""
ALLOWED_CELLS = [
    pytest.param(leaf, state, id=f"{leaf.name} {state.name}")
    for leaf in OPERANDS_OF
    for state in PUBLISHED_STATES
    if allowed(leaf, state)
]


@pytest.mark.parametrize(("leaf", "state"), ALLOWED_CELLS)
def test_what_an_op_state_allows_succeeds(leaf, state):
    place = td_in(state, "tdx-1.5.01")
    registers = OPERANDS_OF[leaf](place)
    status = place.call(leaf, registers)
    if (leaf, state) in NOT_ASSOCIATED:
        assert status == CODES[NOT_ASSOCIATED[leaf, state]]
    elif leaf is Leaf.IMPORT_ABORT:
        assert status == FATAL_SUCCESS
    elif leaf is Leaf.VP_ENTER:
        assert status == 1  # the exit reason: external interrupt
    else:
        assert hex(status) == "0x0"


def test_what_hardened_allows_is_the_same():
    """One cell of each leaf, the first that is allowed."""
    for leaf in OPERANDS_OF:
        state = next(state for state in PUBLISHED_STATES if allowed(leaf, state))
        place = td_in(state, "hardened")
        assert place.call(leaf, OPERANDS_OF[leaf](place)) != WRONG_STATE, leaf.name


# --- guests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["tdx-1.5.01", "hardened"])
@pytest.mark.parametrize("state", PUBLISHED_STATES)
def test_a_guest_acts_only_where_its_td_may_run(state, profile):
    """Level 1 has a table, not a page, so that the leaf's own answer is PAGE_SIZE_MISMATCH."""
    place = td_in(state, profile)
    module, vcpu = place.host.module, vcpu_of(place)
    module.tdvps[vcpu].state = VcpuState.READY
    before = snapshot(module)
    status = module.tdcall(GuestLeaf.MEM_PAGE_ACCEPT, Registers(rcx=1), vcpu)
    runs = allowed(Leaf.VP_ENTER, state)
    assert status == (CODES["TDX_PAGE_SIZE_MISMATCH"] | 1 if runs else WRONG_STATE)
    assert not changes(before, snapshot(module))


@pytest.mark.parametrize("state", [OpState.PAUSED_EXPORT, OpState.POST_IMPORT])
def test_a_pending_page_stays_pending_while_its_td_may_not_run(state):
    place = td_in(state)
    inject(place, 0, S.PENDING)
    module, registers = place.host.module, Registers(rcx=0)
    status = module.tdcall(GuestLeaf.MEM_PAGE_ACCEPT, registers, place.td.vcpus[0])
    assert status == WRONG_STATE
    assert entry_state(place, 0) is S.PENDING


# --- service TDs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("state", PUBLISHED_STATES)
@pytest.mark.parametrize("leaf", [GuestLeaf.SERVTD_RD, GuestLeaf.SERVTD_WR])
def test_the_target_of_a_service_td(leaf, state):
    place = td_in(state)
    host, tdr = place.host, place.host.module.tdrs[place.td.tdr]
    registers = Registers(rcx=place.td.binding_handle, rdx=MIG_VERSION, r9=ALL_BITS)
    registers.r10, registers.r11, registers.r12, registers.r13 = tdr.uuid
    before = snapshot(host.module)
    status = host.module.tdcall(leaf, registers, host._migration_td.vcpus[0])
    if OTHER_ROWS[leaf][state.name] == "1":
        assert hex(status) == "0x0"
    else:
        assert status == WRONG_STATE
    assert not changes(before, snapshot(host.module))


@pytest.mark.parametrize("state", PUBLISHED_STATES)
def test_a_service_td_that_is_bound(state):
    """The TD in this OP_STATE is the service TD, and a fresh TD the target."""
    place = td_in(state)
    target = place.host._new_td(1)
    registers = Registers(rcx=target.tdr, rdx=place.td.tdr)
    before = snapshot(place.host.module)
    status = place.call(Leaf.SERVTD_BIND, registers)
    if OTHER_ROWS[Leaf.SERVTD_BIND][state.name] == "1":
        assert hex(status) == "0x0"
    else:
        assert status == WRONG_STATE
        assert not changes(before, snapshot(place.host.module))


# --- Secure EPT ----------------------------------------------------------------------------------

SEPT_ROWS = {SeptState(int(row["index"])): row for row in table("sept_state.csv")}
REFUSED = CODES["TDX_EPT_ENTRY_STATE_INCORRECT"] | OPERANDS["RCX"]
NON_LEAF = {S.NL_MAPPED, S.NL_BLOCKED}
NOT_IMPLEMENTED_FORMS = {
    "TDH.MEM.SEPT.ADD version 1": "adds tables of L2 virtual machines, which are not migratable",
    "TDH.MEM.PAGE.AUG level 1": "only 4 KiB pages exist here, as migration requires",
    "TDG.MEM.PAGE.ACCEPT of a 2 MiB page": "only 4 KiB pages exist here, as migration requires",
    "TDG.SERVTD.RD of CPUID values": "no check of migration reads them by it; they are skipped",
    "5-level Secure EPT": "TDs here have 48-bit guest physical addresses and no more memory",
    "TDX_OPERAND_BUSY_HOST_PRIORITY": "how long a guest waits for the host has no meaning here",
}
"""Forms and statuses that leaves of this module have in the published one and not here."""


def test_forms_that_are_not_implemented_are_refused():
    place = td_in(OpState.RUNNABLE)
    tdr, page = place.td.tdr, place.free_page()
    invalid = CODES["TDX_OPERAND_INVALID"]
    table_call = Registers(rcx=1 << 21 | 1, rdx=tdr, r8=page)
    assert place.call(Leaf.MEM_SEPT_ADD | 1 << 16, table_call) == invalid | OPERANDS["RAX"]
    for level, leaf in ((1, Leaf.MEM_PAGE_AUG), (4, Leaf.MEM_SEPT_ADD), (4, Leaf.MEM_RANGE_BLOCK)):
        registers = Registers(rcx=level, rdx=tdr, r8=page)
        assert place.call(leaf, registers) == invalid | OPERANDS["RCX"], leaf.name


def outcome(place, leaf, state, registers, gpa, level=0):
    """The state of the entry after the call, or None if it was refused and nothing changed."""
    before = snapshot(place.host.module)
    status = place.call(leaf, registers)
    if not status:
        return entry_state(place, gpa, level)
    blocked = (S.NL_BLOCKED, S.BLOCKED, S.PENDING_BLOCKED)
    already = leaf is Leaf.MEM_RANGE_BLOCK and state in blocked
    expected = CODES["TDX_GPA_RANGE_ALREADY_BLOCKED"] | OPERANDS["RCX"] if already else REFUSED
    assert hex(status) == hex(expected)
    assert not changes(before, snapshot(place.host.module))
    return None


def by_page_leaf(leaf):
    """A leaf of one entry; RANGE.UNBLOCK and PAGE.REMOVE where no TLB tracking is asked for.

    Tables are at level 1: the one above the page, blocked by RANGE.BLOCK if it is to be.
    """

    def call(state):
        level = int(state in NON_LEAF and leaf in WITH_LEVELS)
        place, gpa = page_on_source(S.MAPPED if level else state)
        gpa &= ~0x1F_FFFF if level else -1
        if level and state is S.NL_BLOCKED:
            place.require(Leaf.MEM_RANGE_BLOCK, rcx=gpa | level, rdx=place.td.tdr)
        if leaf in (Leaf.MEM_PAGE_REMOVE, Leaf.MEM_RANGE_UNBLOCK):
            place.require(Leaf.EXPORT_PAUSE, rcx=place.td.tdr)
        registers = Registers(rcx=gpa | level, rdx=place.td.tdr, r8=place.free_page())
        assert entry_state(place, gpa, level) is state
        return outcome(place, leaf, state, registers, gpa, level)

    return call


WITH_LEVELS = (Leaf.MEM_RANGE_BLOCK, Leaf.MEM_RANGE_UNBLOCK, Leaf.MEM_PAGE_REMOVE)


def by_page_add(state):
    place, gpa = page_initialized(state)
    place.host.memory.zero_page(place.buffers.buffers)
    registers = Registers(rcx=gpa, rdx=place.td.tdr, r8=place.free_page(), r9=place.buffers.buffers)
    return outcome(place, Leaf.MEM_PAGE_ADD, state, registers, gpa)


def by_sept_add(state):
    """The entry at level 1; every state but two is injected there."""
    place, gpa = page_on_source(S.MAPPED)
    if state is not S.NL_MAPPED:
        gpa = 1 << 21
        if state is not S.FREE:
            inject(place, gpa, state, level=1)
    existing = int(state is S.NL_MAPPED)  # RDX bit 0: a table that is there is no error
    handle = place.td.tdr | existing
    registers = Registers(rcx=gpa & ~0x1F_FFFF | 1, rdx=handle, r8=place.free_page())
    return outcome(place, Leaf.MEM_SEPT_ADD, state, registers, gpa & ~0x1F_FFFF, level=1)


def by_list_leaf(leaf, operations=(MIGRATE,)):
    """A leaf with a GPA list: accepted if one of the operations is, for EXPORT.MEM in pause too."""

    def call(state):
        after = [try_list(leaf, state, operation) for operation in operations]
        return next((found for found in after if found is not None), None)

    return call


def try_list(leaf, state, operation):
    place, gpa = page_on_source(state)
    if leaf is Leaf.EXPORT_RESTORE:
        place.require(Leaf.EXPORT_ABORT, rcx=place.td.tdr)
    if leaf is Leaf.EXPORT_MEM:
        place.require(Leaf.EXPORT_PAUSE, rcx=place.td.tdr)
    registers = list_of([gpa])(place)
    words = place.host.memory.page_words(place.buffers.gpas)
    words[0] = np.uint64(gpa | operation << 52)
    words_before = sept_words(place)
    status = place.call(leaf, registers)
    if status == 0:
        return entry_state(place, gpa)
    assert status == 1
    assert int(words[0]) >> 56 & 0x1F == GpaStatus.SEPT_ENTRY_STATE_INCORRECT
    assert sept_words(place) == words_before
    return None


def by_import(state):
    """MEMORY_IMPORT: accepted if one of the three operations is."""
    after = []
    for operation in (MIGRATE, CANCEL, REMIGRATE):
        place, gpa = page_on_destination(state)
        forger = Forger(place.pair, 5000)
        bundle = forger.memory([gpa | operation << 52])
        words_before = sept_words(place)
        result = place.backend.execute(c.ImportMem(0, bundle))
        if result.status == 0:
            after.append(entry_state(place, gpa))
            continue
        code = CODES["TDX_EPT_ENTRY_STATE_INCORRECT"] | OPERANDS["GPA_LIST_ENTRY"]
        assert hex(result.status) == hex(code | 1 << 61)
        assert sept_words(place) == words_before
    return after[0] if after else None


def by_accept(state):
    """TDG.MEM.PAGE.ACCEPT; what it does not accept stays as it is."""
    place, gpa = page_on_source(state)
    words_before, registers = sept_words(place), Registers(rcx=gpa)
    try:
        status = place.host.module.tdcall(GuestLeaf.MEM_PAGE_ACCEPT, registers, place.td.vcpus[0])
    except EptViolation:
        status = None
    if status == 0:
        return entry_state(place, gpa)
    answers = [None, CODES["TDX_PAGE_ALREADY_ACCEPTED"], CODES["TDX_PAGE_SIZE_MISMATCH"]]
    assert status in answers
    assert sept_words(place) == words_before
    return None


PAGE_LEAVES = {
    "TDH.MEM.PAGE.ADD": by_page_add,
    "TDH.MEM.SEPT.ADD": by_sept_add,
    "TDH.MEM.PAGE.AUG": by_page_leaf(Leaf.MEM_PAGE_AUG),
    "TDH.MEM.RANGE.BLOCK": by_page_leaf(Leaf.MEM_RANGE_BLOCK),
    "TDH.MEM.PAGE.REMOVE": by_page_leaf(Leaf.MEM_PAGE_REMOVE),
    "TDH.MEM.RANGE.UNBLOCK": by_page_leaf(Leaf.MEM_RANGE_UNBLOCK),
    "TDH.EXPORT.BLOCKW": by_list_leaf(Leaf.EXPORT_BLOCKW),
    "TDH.EXPORT.RESTORE": by_list_leaf(Leaf.EXPORT_RESTORE),
    "TDH.EXPORT.MEM": by_list_leaf(Leaf.EXPORT_MEM, (MIGRATE, CANCEL)),
    "TDH.EXPORT.UNBLOCKW": by_page_leaf(Leaf.EXPORT_UNBLOCKW),
    "TDH.IMPORT.MEM": by_import,
    "TDG.MEM.PAGE.ACCEPT": by_accept,
}
AFTER = {
    "TDH.MEM.PAGE.ADD": {S.FREE: S.MAPPED},
    "TDH.MEM.SEPT.ADD": {S.FREE: S.NL_MAPPED, S.NL_MAPPED: S.NL_MAPPED},
    "TDH.MEM.PAGE.AUG": {S.FREE: S.PENDING, S.REMOVED: S.PENDING},
    "TDH.MEM.RANGE.BLOCK": {
        S.NL_MAPPED: S.NL_BLOCKED,
        S.MAPPED: S.BLOCKED,
        S.BLOCKEDW: S.BLOCKED,
        S.PENDING: S.PENDING_BLOCKED,
        S.PENDING_BLOCKEDW: S.PENDING_BLOCKED,
    },
    "TDH.MEM.PAGE.REMOVE": dict.fromkeys(
        (S.MAPPED, S.BLOCKED, S.BLOCKEDW, S.PENDING, S.PENDING_BLOCKED, S.PENDING_BLOCKEDW),
        S.FREE,
    ),
    "TDH.MEM.RANGE.UNBLOCK": {
        S.NL_BLOCKED: S.NL_MAPPED,
        S.BLOCKED: S.MAPPED,
        S.PENDING_BLOCKED: S.PENDING,
    },
    "TDH.EXPORT.BLOCKW": {
        S.MAPPED: S.BLOCKEDW,
        S.EXPORTED_DIRTY: S.EXPORTED_DIRTY_BLOCKEDW,
        S.PENDING: S.PENDING_BLOCKEDW,
        S.PENDING_EXPORTED_DIRTY: S.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    },
    "TDH.EXPORT.UNBLOCKW": {
        S.BLOCKEDW: S.MAPPED,
        S.EXPORTED_BLOCKEDW: S.EXPORTED_DIRTY,
        S.EXPORTED_DIRTY_BLOCKEDW: S.EXPORTED_DIRTY,
        S.PENDING_BLOCKEDW: S.PENDING,
        S.PENDING_EXPORTED_BLOCKEDW: S.PENDING_EXPORTED_DIRTY,
        S.PENDING_EXPORTED_DIRTY_BLOCKEDW: S.PENDING_EXPORTED_DIRTY,
    },
    "TDH.EXPORT.RESTORE": {
        S.EXPORTED_BLOCKEDW: S.MAPPED,
        S.EXPORTED_DIRTY: S.MAPPED,
        S.EXPORTED_DIRTY_BLOCKEDW: S.MAPPED,
        S.PENDING_EXPORTED_BLOCKEDW: S.PENDING,
        S.PENDING_EXPORTED_DIRTY: S.PENDING,
        S.PENDING_EXPORTED_DIRTY_BLOCKEDW: S.PENDING,
    },
    "TDH.EXPORT.MEM": {
        S.MAPPED: S.EXPORTED_BLOCKEDW,
        S.BLOCKEDW: S.EXPORTED_BLOCKEDW,
        S.EXPORTED_BLOCKEDW: S.MAPPED,  # CANCEL; a clean page is not exported again in order
        S.EXPORTED_DIRTY: S.EXPORTED_BLOCKEDW,
        S.EXPORTED_DIRTY_BLOCKEDW: S.EXPORTED_BLOCKEDW,
        S.PENDING: S.PENDING_EXPORTED_BLOCKEDW,
        S.PENDING_BLOCKEDW: S.PENDING_EXPORTED_BLOCKEDW,
        S.PENDING_EXPORTED_BLOCKEDW: S.PENDING,
        S.PENDING_EXPORTED_DIRTY: S.PENDING_EXPORTED_BLOCKEDW,
        S.PENDING_EXPORTED_DIRTY_BLOCKEDW: S.PENDING_EXPORTED_BLOCKEDW,
    },
    # MIGRATE where there is nothing; CANCEL where there is a page.
    "TDH.IMPORT.MEM": {
        S.FREE: S.MAPPED,
        S.REMOVED: S.MAPPED,
        S.MAPPED: S.REMOVED,
        S.PENDING: S.REMOVED,
    },
    "TDG.MEM.PAGE.ACCEPT": {S.PENDING: S.MAPPED, S.PENDING_EXPORTED_DIRTY: S.EXPORTED_DIRTY},
}
"""The published transitions of Secure EPT entries."""


def sept_columns():
    columns = [name for name in table("sept_state.csv")[0] if "CALL_" in name]
    return {name.split("_", 2)[2]: name for name in columns}


def test_every_page_leaf_that_is_here_is_called():
    assert set(sept_columns()) - set(NOT_IMPLEMENTED) == set(PAGE_LEAVES)


@pytest.mark.parametrize("state", SeptState, ids=lambda state: state.name)
@pytest.mark.parametrize("leaf", PAGE_LEAVES)
def test_what_an_entry_state_allows(leaf, state):
    published = SEPT_ROWS[state][sept_columns()[leaf]] == "1"
    after = PAGE_LEAVES[leaf](state)
    assert (after is not None) == published
    assert after == AFTER[leaf].get(state)


@pytest.mark.parametrize("state", set(SeptState) - NON_LEAF, ids=lambda state: state.name)
def test_states_are_reached_by_leaves_where_they_can_be(state):
    """Nothing is injected on the source but the two states of tables."""
    place, gpa = page_on_source(state)
    assert entry_state(place, gpa) is state
    assert place.tdcs.op_state is OpState.LIVE_EXPORT
