"""Every check of TDH.EXPORT.MEM: status, operand, order, entry statuses, and what changes.

Profile "tdx-1.5.01"; expected statuses are those of specs/error_rows.csv.
"""

import legal_calls as legal
import pytest
from error_rows import ROWS, Case, cases_of, judge, orders_of, run, run_both
from soft_scene import (
    NOWHERE,
    Spoil,
    bit,
    both,
    entry,
    field,
    held,
    interrupted,
    link_held,
    list_entry,
    not_interrupted,
    other_leaf,
    reg,
    spoil,
    uninitialized,
)

from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.wire.gpa_list import GpaStatus

NEW, RESUMED = legal.export_mem, legal.export_mem_resume
LONG, LONG_RESUMED = legal.export_mem_512, legal.export_mem_512_resume
STREAM = "tdcs.links[1].migsc"
BEGUN = {f"{STREAM}.interrupted*"}
SMALL_MBMD = reg("r8", lambda old: old & (1 << 52) - 1 | 47 << 52)
ENTRY = 1
"""The list entry that is spoiled; the one before it is done already."""


def list_hpa(hpa):
    return reg("rcx", lambda old: old & ~0xF_FFFF_FFFF_F000 | hpa)


def operand_checks(scene, label):
    """Checks 2 to 11, which NEW and RESUME share."""
    rows = [
        ("2", held("mig_lock")),
        ("3", bit("r10", 16)),
        ("3", bit("r10", 62)),
        ("4", reg("r10", lambda old: old | 2)),
        ("5", link_held(1)),
        ("6", held("sept_lock")),
        ("7a", bit("rcx", 0)),
        ("7b", bit("rcx", 54)),
        ("7c", bit("rcx", 11)),
        ("7d", list_hpa(NOWHERE)),
        ("8", bit("r9", 0)),
        ("8", reg("r9", NOWHERE)),
        ("9", bit("r11", 4)),
        ("9", reg("r11", NOWHERE)),
        ("11a", SMALL_MBMD),
        ("11b", bit("r8", 6)),
    ]
    return [
        Case(f"10.5-{row}", scene, what, label=f"{label}{number}", apart={"10.5-5"} - {row})
        for number, (row, what) in enumerate(rows)
    ]


OPERANDS = [
    *operand_checks(NEW, ""),
    *operand_checks(RESUMED, "RESUME "),
    # Not a bit of the second MAC list is looked at where no entry needs it.
    Case("10.5-10", LONG, bit("r12", 4)),
    Case("10.5-11a", LONG, SMALL_MBMD, label="512"),
    Case("10.5-10", LONG_RESUMED, reg("r12", NOWHERE), label="RESUME"),
    Case("10.5-N1", NEW, bit("rcx", 3)),
]

RESUME = [
    Case("10.5-R1", RESUMED, uninitialized()),
    Case("10.5-R2", RESUMED, not_interrupted, apart={"10.5-R3"}),
    Case("10.5-R3", RESUMED, other_leaf(Leaf.EXPORT_STATE_VP), BEGUN),
    Case("10.5-R4", RESUMED, reg("rcx", lambda old: old ^ 3 << 3), BEGUN, label="first entry"),
    Case("10.5-R4", RESUMED, reg("rcx", lambda old: old ^ 1 << 55), BEGUN, label="last entry"),
    Case("10.5-R5", RESUMED, spoil("r9")(lambda s: s.registers.update(r9=s.buffers.gpas)), BEGUN),
    Case("10.5-R6", RESUMED, reg("r11", lambda old: old + 4096), BEGUN),
    Case("10.5-R7", LONG_RESUMED, reg("r12", lambda old: old + 4096), BEGUN),
    Case("10.5-R7", RESUMED, reg("r12", 0), BEGUN, label="unused"),
    Case("10.5-R8", RESUMED, field("mig_epoch", 1), BEGUN),
]

# --- entries -------------------------------------------------------------------------------------

ALL_PAGES = {"sept[0x0]", "sept[0x1000]", "sept[0x2000]", "sept[0x3000]"}
ENDED = {"sept[0x0]", "tdcs.mig_count", f"{STREAM}.iv_counter"}
"""A leaf error at entry 1: the entry before it is committed, the bundle is not counted."""
COUNTED = {"tdcs.mig_count", f"{STREAM}.iv_counter"} | {
    f"{STREAM}.next_mb_counter",
    "tdcs.total_mb_count",
}
WENT_ON = COUNTED | ALL_PAGES - {"sept[0x1000]"}
"""Entry 1 alone is not exported."""
WRITTEN = {"mbmd", "pages", "macs_low"}


def ending(row, what, label=""):
    return Case(f"10.5-{row}", NEW, what, ENDED, WRITTEN | {"gpas"}, label)


def going_on(row, what, label="", scene=NEW, changed=WENT_ON):
    return Case(f"10.5-{row}", scene, what, changed, WRITTEN | {"gpas", "list"}, label)


def state(wanted):
    """Injected: entry 1's page is in this state."""
    apply = spoil("state 1")(lambda scene: scene.inject_state(0x1000, wanted)).apply
    return Spoil(frozenset({"state 1"}), apply)


def more(word):
    return entry(ENTRY, lambda old: old | word)


CANCELLED = entry(ENTRY, lambda old: old ^ 3 << 52)


@spoil("state 1")
def exported(scene):
    """By a leaf, on the other stream: entry 1's page is exported and clean."""
    saved = scene.memory.page_words(scene.buffers.gpas).copy()
    scene.pair.export(scene.pair.gpas[1:2], stream=1)
    scene.memory.page_words(scene.buffers.gpas)[:] = saved


@spoil("state 1")
def unblocked(scene):
    """By a leaf: entry 1's page may be written again."""
    scene.host.require(Leaf.EXPORT_UNBLOCKW, rcx=0x1000, rdx=scene.td.tdr)


ENTRIES = [
    ending("e1", entry(ENTRY, 1 << 54)),
    going_on("e1s", entry(ENTRY, 0)),
    ending("e2", more(1 << 61), "reserved"),
    ending("e2", more(1), "level"),
    ending("e2", more(1 << 47), "shared"),
    going_on("e3", more(1 << 40)),
    going_on("e4", spoil("lock 1")(lambda scene: scene.lock_entry(0x1000))),
    going_on("e5", state(SeptState.BLOCKED), changed=WENT_ON),
    going_on("e6a", CANCELLED),
    going_on("e6b", exported),
    going_on("e6c", unblocked, scene=legal.export_mem_live),
    Case(
        "10.5-e6d",
        legal.export_mem_live,
        both(
            field("bw_epoch", lambda scene: scene.tdcs.td_epoch),
            *(entry(other, 0) for other in (0, 2, 3)),
        ),
        {f"{STREAM}.iv_counter", f"{STREAM}.next_mb_counter", "tdcs.total_mb_count"},
        {"mbmd", "macs_low", "gpas", "list"},
    ),
    going_on(
        "e6e",
        CANCELLED,
        scene=legal.export_mem_post,
        changed=COUNTED | {"sept[0x2000]", "sept[0x3000]"},
    ),
    Case("10.5-e8", NEW, list_entry(ENTRY, 1 << 63), WENT_ON, WRITTEN | {"gpas"}),
    Case(
        "10.5-e11",
        NEW,
        list_entry(ENTRY, NOWHERE),
        ENDED | {"sept[0x1000]"},
        WRITTEN,
        "after the commit",
    ),
    Case("10.5-e13", NEW, interrupted, ENDED | BEGUN, WRITTEN),
]
CASES = [*OPERANDS, *RESUME, *ENTRIES]


@pytest.mark.parametrize("case", cases_of(CASES))
def test_check(case):
    judge(case)


@pytest.mark.parametrize(("earlier", "later"), orders_of(OPERANDS + RESUME))
def test_the_earlier_check_decides(earlier, later):
    run_both(earlier, later)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        # Entry checks in order, two wrong with the same entry.
        ("e1", "e8"),
        ("e2", "e4"),
        ("e3", "e8"),
        ("e4", "e5"),
        ("e5", "e8"),
        ("e6a", "e8"),
        ("e6b", "e8"),
        ("e8", "e11"),
    ],
)
def test_the_earlier_check_of_an_entry_decides(earlier, later):
    if (earlier, later) == ("e8", "e11"):
        first = Case("10.5-e8", NEW, list_entry(ENTRY, 1 << 63 | NOWHERE))
        scene, _ = run(first)
    else:
        by_name = {case.row: case for case in ENTRIES}
        scene = run_both(by_name[f"10.5-{earlier}"], by_name[f"10.5-{later}"])
    assert entry_status(scene) == ROWS[f"10.5-{earlier}"]["entry_status"]


def entry_status(scene):
    return str(scene.word(ENTRY) >> 56 & 0x1F)


@pytest.mark.parametrize("case", cases_of(c for c in ENTRIES if ROWS[c.row]["entry_status"]))
def test_a_bad_entry_comes_back_as_nop_with_its_status(case):
    scene, outcome = run(case)
    word, wanted = scene.word(ENTRY), ROWS[case.row]
    assert entry_status(scene) == wanted["entry_status"]
    assert word >> 52 & 3 == 0
    ended = wanted["status"] != "TDX_SUCCESS"
    assert outcome.registers.rcx >> 3 & 511 == (ENTRY if ended else 4)
    if not ended:
        assert int(scene.memory.page_words(scene.buffers.list)[ENTRY]) >> 63 == 1
        failed = [index for index in range(4) if scene.word(index) >> 52 & 3 == 0]
        used = 1 + 1 + 4 - len(failed)
        assert outcome.registers.rdx == used


def test_a_page_of_unusable_buffer_is_committed_and_not_counted():
    """The published order: Secure EPT and counters first, then the buffer's address."""
    case = next(case for case in ENTRIES if case.row == "10.5-e11")
    scene, outcome = run(case)
    assert scene.tdcs.mig_count == 2
    assert scene.tdcs.total_mb_count == 1
    assert scene.word(ENTRY) == 0x1000 | 1 << 52
    assert outcome.registers.rcx >> 3 & 511 == ENTRY


@pytest.mark.parametrize("row", ["10.5-R2", "10.5-R3", "10.5-R4", "10.5-R8"])
def test_a_wrong_resume_destroys_the_interrupted_call(row):
    case = next(case for case in RESUME if case.row == row)
    scene, _ = run(case)
    right = RESUMED().registers
    assert scene.host.seamcall(Leaf.EXPORT_MEM, **right).rax == case.code


@pytest.mark.parametrize("operation", [1, 3])
def test_operation_on_input_is_migrate_or_remigrate_alike(operation):
    scene = legal.export_mem()
    entry(ENTRY, 0x1000 | operation << 52).apply(scene)
    assert scene.attempt().status == 0
    assert scene.word(ENTRY) == 0x1000 | 1 << 52


def test_a_dirty_page_can_be_cancelled_while_the_td_runs():
    """CANCEL asks neither for write blocking nor for TLB tracking."""
    pair = legal.at_source("LIVE_EXPORT")
    pair.block(pair.gpas)
    pair.export(pair.gpas)
    for gpa in pair.gpas.tolist():
        pair.on_source(legal.c.ExportUnblockw(gpa))
    result = pair.on_source(legal.c.ExportMem(0, pair.gpas, legal.CANCEL))
    assert result.statuses.tolist() == [GpaStatus.SUCCESS] * 4
    seen = pair.source.observe()
    assert (seen["mig_count"], seen["dirty_count"]) == (0, 0)
    assert pair.source.page_states(pair.gpas).tolist() == [SeptState.MAPPED] * 4
