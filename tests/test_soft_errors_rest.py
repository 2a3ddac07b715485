"""Checks that need a module set up by its caller, and orders of checks that nothing else pins.

Profile "tdx-1.5.01"; expected statuses are those of specs/error_rows.csv.
"""

import legal_calls as legal
import pytest
from error_rows import ROWS, Case, cases_of, code_of, judge
from soft_scene import (
    NOWHERE,
    RESUME,
    Spoil,
    always,
    interrupted,
    list_entry,
    owned_page,
    spoil,
)
from test_soft_errors_export import AS_IT_IS, BEGUN, FIRST_USE, SESSION_START, SMALL_MBMD, STARTED

from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.memory import BEPOCH_MIG_FLAG
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.status import Status
from tdxmig_model.wire.gpa_list import GpaEntry, GpaOperation
from tdxmig_model.wire.mbmd import Mbmd

MAPPED, FREE = 0x0, 0x2000
IMMUTABLE = {*SESSION_START, "tdcs.export_count"}


# --- state bundles of more pages -----------------------------------------------------------------


def filling(legal_call, size):
    """The same call in a module whose exports fill `size` bytes of each metadata page."""

    def scene():
        made = legal_call()
        made.module.list_size = size
        return made

    return scene


SHORT = {
    "10.2-P2": filling(legal.immutable, 304),
    "10.8-P2": filling(legal.state_td, 144),
    "10.9-P2": filling(legal.state_vp, 1024),
}
TD_TWO_PAGES = filling(legal.state_td, 256)


def of_processor(name):
    """A flag of the logical processor that makes the call."""

    def apply(scene):
        setattr(scene.module.processors[scene.lp], name, True)

    return Spoil(frozenset({name}), apply)


CASES = [
    Case("10.12-1", legal.import_immutable, of_processor("limits_cpuid")),
    Case("10.21-3", legal.vp_enter, of_processor("tsc_behind")),
    Case("10.2-P2", SHORT["10.2-P2"], AS_IT_IS, IMMUTABLE, {"pages"}),
    Case("10.8-P2", SHORT["10.8-P2"], AS_IT_IS, STARTED, {"pages"}),
    Case("10.8-P2", SHORT["10.8-P2"], SMALL_MBMD, STARTED, {"pages"}, "before the MBMD"),
    Case("10.8-P3", TD_TWO_PAGES, interrupted, {*STARTED, *BEGUN}, {"pages"}),
    Case("10.8-P1", TD_TWO_PAGES, list_entry(1, NOWHERE), STARTED, {"pages"}, "second"),
    Case("10.9-P2", SHORT["10.9-P2"], AS_IT_IS, FIRST_USE, {"pages"}),
]


@pytest.mark.parametrize("case", cases_of(CASES))
def test_check(case):
    judge(case)


def pages_of(scene):
    """How many pages the call writes where its list is long enough."""
    scene.registers["r9"] = scene.buffers.page_list(64)
    registers = scene.host.seamcall(scene.leaf, **scene.registers)
    assert registers.rax == Status.TDX_SUCCESS
    return registers.rdx


@pytest.mark.parametrize("row", SHORT)
def test_a_list_that_is_long_enough_takes_the_same_state(row):
    short = SHORT[row]().registers["r9"] >> 55
    assert pages_of(SHORT[row]()) > short + 1


def test_an_interrupted_td_state_is_resumed():
    whole, halves = TD_TWO_PAGES(), TD_TWO_PAGES()
    whole.attempt()
    first = halves.host.seamcall(halves.leaf, interrupt=always, **halves.registers)
    assert (first.rax, first.rdx) == (Status.TDX_INTERRUPTED_RESUMABLE, 1)
    halves.registers["r10"] |= RESUME
    second = halves.host.seamcall(halves.leaf, **halves.registers)
    assert (second.rax, second.rdx) == (Status.TDX_SUCCESS, 2)
    mbmds = [Mbmd.unpack(scene.buffers.read_mbmd()) for scene in (whole, halves)]
    assert mbmds[0] == mbmds[1]


# --- orders in IMPORT.MEM ------------------------------------------------------------------------


def of(operation, gpa):
    return GpaEntry(gpa, operation).to_int()


@spoil("page lock")
def page_locked(scene):
    assert scene.memory.try_lock(scene.td.page_hpas[MAPPED], Mode.SHARED)


@spoil("epoch")
def imported_in_this_epoch(scene):
    """Injected: the page came with the present epoch."""
    hpa = scene.td.page_hpas[MAPPED]
    scene.memory.bepoch[hpa >> 12] |= scene.tdcs.mig_epoch


@spoil("new page")
def owned_and_locked(scene):
    """The new page is one of the TD, and another logical processor holds it."""
    page = owned_page(scene)
    scene.memory.page_words(scene.buffers.new_pages)[0] = page
    assert scene.memory.try_lock(page, Mode.SHARED)


@pytest.mark.parametrize(
    ("entry", "spoils", "row"),
    [
        (of(GpaOperation.CANCEL, MAPPED), [page_locked, imported_in_this_epoch], "10.13-c3"),
        (of(GpaOperation.CANCEL, MAPPED), [imported_in_this_epoch], "10.13-c4"),
        (of(GpaOperation.MIGRATE, FREE), [owned_and_locked], "10.13-M4b"),
    ],
    ids=["lock before epoch", "epoch", "lock before page type"],
)
def test_a_page_is_locked_before_it_is_judged(entry, spoils, row):
    """The PAMT entry of a page is read under its lock (tdh_import_mem.c, CANCEL and MIGRATE)."""
    scene = legal.in_order(entry)
    for one in spoils:
        one.apply(scene)
    assert hex(scene.status()) == hex(code_of(row))
    assert str(scene.word(0) >> 56 & 0x1F) == ROWS[row]["entry_status"]


# --- counts and epochs ---------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [False, True])
def test_import_count_is_counted_once(committed):
    """IMPORT.COMMIT counts the import; IMPORT.END counts it where there was no commit."""
    scene = legal.import_end()
    before = scene.tdcs.import_count
    if committed:
        scene.host.require(Leaf.IMPORT_COMMIT, rcx=scene.td.tdr)
        assert scene.tdcs.import_count == before + 1
    assert scene.status() == Status.TDX_SUCCESS
    assert scene.tdcs.import_count == before + 1


@pytest.mark.parametrize("td_epoch", [7, BEPOCH_MIG_FLAG | 7])
def test_a_migration_epoch_is_never_tracked(td_epoch):
    """Of a BEPOCH with bit 63 set TLB tracking says nothing, whatever TD_EPOCH is."""
    tdcs = legal.mem_track().tdcs
    tdcs.td_epoch, tdcs.refcount = td_epoch, [0, 0]
    for epoch in (0, 5, 6, 7):
        assert tdcs.tlb_tracked(epoch) is (epoch < td_epoch)
        assert not tdcs.tlb_tracked(BEPOCH_MIG_FLAG | epoch)
