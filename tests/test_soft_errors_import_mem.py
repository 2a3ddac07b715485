"""Every check of TDH.IMPORT.MEM: operands, MBMD, RESUME, and each entry in each phase.

Profile "tdx-1.5.01"; expected statuses are those of specs/error_rows.csv.  The sender has the
session key, so every MAC is right unless the row is about a MAC.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import legal_calls as legal
import numpy as np
import pytest
from error_rows import (
    FATAL_BIT,
    ROWS,
    Case,
    assert_same,
    cases_of,
    code_of,
    judge,
    orders_of,
    run_both,
)
from soft_scene import (
    NOWHERE,
    PAGE,
    SHARED,
    Spoil,
    bit,
    both,
    field,
    free_page,
    held,
    interrupted,
    link_held,
    mbmd,
    mbmd_raw,
    not_interrupted,
    other_leaf,
    owned_page,
    reg,
    spoil,
    uninitialized,
    wrong_mac,
)

from tdxmig_model.backend.soft.host import Host
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.wire.gpa_list import GpaEntry, GpaOperation
from tdxmig_model.wire.mbmd import BundleType

NOP, MIGRATE, CANCEL, REMIGRATE = GpaOperation
NEW, RESUMED = legal.import_mem, legal.import_mem_resume
LONG, LONG_RESUMED = legal.import_mem_512, legal.import_mem_512_resume
STREAM = "tdcs.links[1].migsc"
BEGUN = {f"{STREAM}.interrupted*"}
SMALL_MBMD = reg("r8", lambda old: old & (1 << 52) - 1 | 47 << 52)
NOTHING = spoil()(lambda scene: None)


def operand_checks(scene, label):
    """Checks 2 to 11, which NEW and RESUME share."""
    rows = [
        ("2", held("mig_lock")),
        ("3", bit("r10", 16)),
        ("3", bit("r10", 62)),
        ("4", reg("r10", lambda old: old | 2)),
        ("5", link_held(1)),
        ("6", held("sept_lock")),
        ("7a", bit("rcx", 1)),
        ("7b", bit("rcx", 52)),
        ("7c", bit("rcx", 11)),
        ("7d", reg("rcx", lambda old: old & ~0xF_FFFF_FFFF_F000 | NOWHERE)),
        ("8", bit("r9", 0)),
        ("8", reg("r9", NOWHERE)),
        ("9", bit("r11", 4)),
        ("10b", bit("r13", 4)),
        ("10b", reg("r13", NOWHERE)),
        ("11a", SMALL_MBMD),
        ("11b", bit("r8", 6)),
    ]
    return [
        Case(f"10.13-{row}", scene, what, label=f"{label}{number}", apart={"10.13-5"})
        for number, (row, what) in enumerate(rows)
    ]


OPENED = {f"{STREAM}.iv_counter"}
OPERANDS = [
    *operand_checks(NEW, ""),
    *operand_checks(RESUMED, "RESUME "),
    Case("10.13-10", LONG, bit("r12", 4)),
    Case("10.13-10b", LONG, bit("r13", 4), label="512"),
    Case("10.13-10", LONG_RESUMED, reg("r12", NOWHERE), label="RESUME"),
    Case("10.13-N1", NEW, bit("rcx", 3)),
    *(
        Case("10.13-N2", NEW, what, label=label)
        for what, label in (
            (mbmd(mig_version=1), "version"),
            (mbmd_raw(0, b"\x31"), "size"),
            (mbmd(migs_index=1), "stream"),
            (mbmd(bundle_type=BundleType.EPOCH_TOKEN), "type"),
            (mbmd_raw(7, b"\1"), "reserved"),
            (mbmd_raw(26, b"\1"), "reserved of the type"),
            (mbmd(mig_epoch=0), "older epoch"),
            (mbmd(mig_epoch=2), "newer epoch"),
            (mbmd(type_specific=bytes([4, 0, 0, 0, 0, 0, 0, 0])), "one entry more"),
            (mbmd(type_specific=bytes([2, 0, 0, 0, 0, 0, 0, 0])), "one entry less"),
        )
    ),
    Case("10.13-N2", legal.import_mem_post, mbmd(mig_epoch=1), label="out of order"),
    Case("10.13-N3", NEW, mbmd(mb_counter=0), label="older"),
    Case("10.13-N3", NEW, mbmd(mb_counter=2), label="newer"),
    Case("10.13-N3b", legal.import_mem_post, both(field("mig_epoch", 0), mbmd(mig_epoch=0))),
    Case("10.13-N4", NEW, wrong_mac, OPENED),
    Case("10.13-N4", legal.import_mem_post, wrong_mac, OPENED, label="out of order"),
]

RESUME = [
    Case("10.13-R1", RESUMED, uninitialized()),
    Case("10.13-R2", RESUMED, not_interrupted, apart={"10.13-R3"}),
    Case("10.13-R3", RESUMED, other_leaf(Leaf.IMPORT_STATE_VP), BEGUN),
    Case("10.13-R4", RESUMED, reg("rcx", lambda old: old ^ 3 << 3), BEGUN),
    Case("10.13-R5", RESUMED, spoil("r9")(lambda s: s.registers.update(r9=s.buffers.gpas)), BEGUN),
    Case("10.13-R6", RESUMED, reg("r11", lambda old: old + PAGE), BEGUN),
    Case("10.13-R7", LONG_RESUMED, reg("r12", lambda old: old + PAGE), BEGUN),
    Case("10.13-R7", RESUMED, reg("r12", 0), BEGUN, label="unused"),
    Case("10.13-R8", RESUMED, reg("r13", (1 << 64) - 1), BEGUN),
    Case("10.13-R9", RESUMED, field("mig_epoch", 2), BEGUN),
]
CASES = [*OPERANDS, *RESUME]


@pytest.mark.parametrize("case", cases_of(CASES))
def test_check(case):
    judge(case)


@pytest.mark.parametrize(("earlier", "later"), orders_of(CASES))
def test_the_earlier_check_decides(earlier, later):
    run_both(earlier, later)


def test_out_of_order_bundles_have_no_counter():
    scene = legal.import_mem_post()
    mbmd(mb_counter=77).apply(scene)
    assert scene.attempt().status == 0


@pytest.mark.parametrize("row", ["10.13-N2", "10.13-N3", "10.13-N4"])
def test_a_new_call_with_a_bad_mbmd_destroys_a_resumption(row):
    """The stream and IV_COUNTER are taken before anything of the MBMD is known."""
    scene = RESUMED()
    right = dict(scene.registers)
    case = next(case for case in OPERANDS if case.row == row and case.scene is NEW)
    scene.registers.update(r10=0, rcx=scene.registers["rcx"] & ~(511 << 3))
    case.spoil.apply(scene)
    if row == "10.13-N4":
        # The counter that the stream expects by now.
        scene.change_mbmd(mb_counter=2)
    assert scene.attempt().status == case.code
    assert scene.host.seamcall(Leaf.IMPORT_MEM, **right).rax == code_of("10.13-R2")


# --- entries -------------------------------------------------------------------------------------

MAPPED, PENDING, FREE, FREE_TOO = 0, 0x1000, 0x2000, 0x3000
"""In order; out of order GPA 0 and 0x1000 are mapped."""


def of(operation, gpa, **more):
    return GpaEntry(gpa, operation, **more).to_int()


class Entry(NamedTuple):
    """A list whose last entry is wrong; `done` is what the entries before it change."""

    row: str
    entries: tuple
    spoil: Spoil = NOTHING
    done: frozenset = frozenset()
    phases: str = "in post live"
    label: str = ""
    spoil_out: Spoil | None = None


def wrong_page_mac(index=0):
    """One bit of a page MAC."""

    def apply(scene):
        scene.memory.bytes[scene.buffers.macs_low + 16 * index] ^= 1

    return Spoil(frozenset({"page mac"}), apply)


def buffer(value):
    def apply(scene):
        scene.memory.page_words(scene.buffers.list)[0] = np.uint64(
            value(scene) if callable(value) else value
        )

    return Spoil(frozenset({"buffer"}), apply)


def new_page(value):
    def apply(scene):
        scene.memory.page_words(scene.buffers.new_pages)[0] = np.uint64(
            value(scene) if callable(value) else value
        )

    return Spoil(frozenset({"new page"}), apply)


@spoil("new page lock")
def new_page_locked(scene):
    page = int(scene.memory.page_words(scene.buffers.new_pages)[0])
    assert scene.memory.try_lock(page, Mode.SHARED)


@spoil("page lock")
def page_locked(scene):
    assert scene.memory.try_lock(scene.td.page_hpas[MAPPED], Mode.SHARED)


@spoil("entry lock")
def entry_locked(scene):
    scene.lock_entry(FREE)


@spoil("buffer", "new page")
def in_place_without_buffer(scene):
    buffer(1 << 63).apply(scene)
    scene.registers["r13"] = (1 << 64) - 1


def in_place(bits):
    """The buffer is a free page with the bundle's page in it, and more bits in its word."""

    def apply(scene):
        page, memory = free_page(scene), scene.memory
        memory.page(page)[:] = memory.page(scene.buffers.buffers)
        buffer(page | bits).apply(scene)
        new_page(1 << 63).apply(scene)

    return Spoil(frozenset({"buffer", "new page"}), apply)


@spoil("state")
def removed_by_the_host(scene):
    """By leaves: GPA 0 was removed after the in-order phase."""
    operands = {"rcx": MAPPED, "rdx": scene.td.tdr}
    scene.host.require(Leaf.MEM_RANGE_BLOCK, **operands)
    scene.host.require(Leaf.MEM_TRACK, rcx=scene.td.tdr)
    scene.host.require(Leaf.MEM_PAGE_REMOVE, **operands)


def blocked(scene):
    scene.inject_state(FREE, SeptState.BLOCKED)


MIGRATED = frozenset(
    {f"sept[{FREE:#x}]", "pamt[other].page_type", "pamt[other].owner", "pamt[other].bepoch"}
    | {"content[other]", "tdr.child_count"}
)
CANCELLED = frozenset(
    {"sept[0x0]", "content[0x0]", "tdr.child_count"}
    | {f"pamt[0x0].{column}" for column in ("page_type", "owner", "bepoch")}
)
MIGRATE_FREE = (of(MIGRATE, FREE),)
PENDING_FREE = (of(MIGRATE, FREE, pending=True),)
ENTRIES = [
    Entry("e2a", (of(NOP, 0),), wrong_page_mac()),
    Entry("e2b", (of(NOP, 0) | 1 << 54,)),
    Entry("e2b", (of(NOP, 0) | 1,), label="level"),
    Entry("e2c", (of(NOP, 0),)),
    Entry("e2c", (of(NOP, 1 << 47),), label="whatever the GPA"),
    Entry("e3", (of(MIGRATE, FREE) | 1 << 61,), label="reserved"),
    Entry("e3", (of(MIGRATE, FREE) | 2,), label="level"),
    Entry("e3", (of(MIGRATE, 1 << 47),), label="shared"),
    Entry("e4", (of(MIGRATE, 1 << 40),)),
    Entry("e5", MIGRATE_FREE, entry_locked),
    Entry("e6", MIGRATE_FREE, Spoil(frozenset({"state"}), blocked)),
    Entry("e6", (of(REMIGRATE, FREE),), Spoil(frozenset({"state"}), blocked), label="REMIGRATE"),
    Entry("e7", (of(REMIGRATE, MAPPED),), phases="post live", label="REMIGRATE"),
    Entry("e7", (of(CANCEL, MAPPED),), phases="post live", label="CANCEL"),
    Entry("e8", MIGRATE_FREE, buffer(1 << 63), label="none"),
    Entry("e8", MIGRATE_FREE, buffer(NOWHERE), label="beyond memory"),
    Entry("e8", MIGRATE_FREE, buffer(owned_page), label="of a TD"),
    Entry("e8", (of(REMIGRATE, MAPPED),), buffer(1 << 63), phases="in", label="REMIGRATE"),
    Entry("M1", (of(MIGRATE, MAPPED),), label="mapped"),
    Entry("M1", (of(MIGRATE, PENDING),), label="pending or mapped"),
    Entry("M2", (of(CANCEL, MAPPED), of(MIGRATE, MAPPED)), done=CANCELLED, phases="in"),
    Entry("M2", (of(MIGRATE, MAPPED),), removed_by_the_host, phases="post live"),
    Entry("M3", (of(MIGRATE, FREE, pending=True),), in_place_without_buffer),
    Entry("M3b", MIGRATE_FREE, new_page(8), label="misaligned"),
    Entry("M3b", MIGRATE_FREE, new_page(1 << 46), label="HKID"),
    Entry("M4", MIGRATE_FREE, in_place(8), label="misaligned"),
    Entry("M4", MIGRATE_FREE, in_place(1 << 53), label="beyond MAX_PA"),
    Entry("M4", PENDING_FREE, in_place(1 << 53 | 1 << 46), label="pending, with a HKID"),
    Entry("M4a", MIGRATE_FREE, new_page(SHARED)),
    Entry("M4b", MIGRATE_FREE, new_page_locked),
    Entry("M4c", MIGRATE_FREE, new_page(owned_page)),
    Entry("M5", MIGRATE_FREE, wrong_page_mac()),
    Entry("M5", (of(MIGRATE, FREE, pending=True),), wrong_page_mac(), label="pending"),
    Entry("r1", (of(REMIGRATE, FREE),), phases="in"),
    Entry("r2", (of(MIGRATE, FREE), of(REMIGRATE, FREE)), done=MIGRATED, phases="in"),
    Entry("r3", (of(REMIGRATE, MAPPED, pending=True),), phases="in"),
    Entry("r4", (of(REMIGRATE, MAPPED),), wrong_page_mac(), phases="in"),
    Entry("r4", (of(REMIGRATE, PENDING, pending=True),), wrong_page_mac(), phases="in"),
    Entry("c1", (of(CANCEL, FREE),), phases="in"),
    Entry("c2", (of(CANCEL, MAPPED),), wrong_page_mac(), phases="in"),
    Entry("c3", (of(CANCEL, MAPPED),), page_locked, phases="in"),
    Entry("c4", (of(MIGRATE, FREE), of(CANCEL, FREE)), done=MIGRATED, phases="in"),
]
ALL_PHASES = [
    pytest.param(one, phase, id=f"10.13-{one.row} {one.label} {phase}".replace("  ", " "))
    for one in ENTRIES
    for phase in one.phases.split()
]
PHASES: dict[str, Callable] = {
    "in": legal.in_order,
    "post": legal.out_of_order,
    "live": partial(legal.out_of_order, committed=True),
}


def outcome_of(one, phase):
    """(status, OP_STATE, does the bundle count): what severity A, B or S makes of it."""
    row = ROWS[f"10.13-{one.row}"]
    code, before = code_of(f"10.13-{one.row}") & ~FATAL_BIT, OP_STATES[phase]
    if row["severity"] == "S":
        return 0, before, True
    if row["severity"] == "B" and phase != "in":
        return 1, before, True
    if phase == "live":
        return code, OpState.RUNNABLE, False
    return code | FATAL_BIT, OpState.FAILED_IMPORT, False


OP_STATES = {
    "in": OpState.MEMORY_IMPORT,
    "post": OpState.POST_IMPORT,
    "live": OpState.LIVE_IMPORT,
}


def provoked(one, phase):
    scene = PHASES[phase](*one.entries)
    one.spoil.apply(scene)
    return scene, scene.attempt()


@pytest.mark.parametrize(("one", "phase"), ALL_PHASES)
def test_entry(one, phase, monkeypatch):
    if one.row == "e4":
        monkeypatch.setattr(Host, "add_tables", no_far_tables(Host.add_tables))
    scene, outcome = provoked(one, phase)
    status, op_state, counted = outcome_of(one, phase)
    assert hex(outcome.status) == hex(status)
    assert scene.tdcs.op_state is op_state
    changed = {f"{STREAM}.iv_counter", f"{STREAM}.expected_mb_counter", *one.done}
    changed |= {"tdcs.total_mb_count"} if counted else {"tdcs.op_state"}
    if one.row == "r4" and not one.entries[-1] & 4:
        # The page is decrypted in place before the tag is known; the TD cannot run any more.
        changed.add("content[0x0]")
    assert_same(outcome.changed, changed)
    bad = len(one.entries) - 1
    word = scene.word(bad)
    assert str(word >> 56 & 0x1F) == ROWS[f"10.13-{one.row}"]["entry_status"]
    assert word >> 52 & 3 == NOP
    assert outcome.registers.rcx >> 3 & 511 == (len(one.entries) if counted else bad)
    if one.row != "M3":
        assert int(scene.memory.page_words(scene.buffers.new_pages)[bad]) >> 63 == 1
    kept = {name: getattr(outcome.registers, name) for name in scene.registers if name != "rcx"}
    assert kept.items() <= scene.registers.items()
    assert outcome.written <= {"gpas", "new_pages"}


def no_far_tables(add_tables):
    """A VMM that makes no tables above 1 GiB, so that a walk there fails."""

    def add(host, td, gpas):
        add_tables(host, td, gpas[gpas < np.uint64(1 << 30)])

    return add


def test_an_interruption_between_entries():
    scene = NEW()
    interrupted.apply(scene)
    outcome = scene.attempt()
    assert outcome.status == code_of("10.13-i")
    assert outcome.registers.rcx >> 3 & 511 == 1
    counters = {f"{STREAM}.iv_counter", f"{STREAM}.expected_mb_counter"}
    page = {name.replace("0x2000", "0x1000") for name in MIGRATED}
    assert_same(outcome.changed, counters | BEGUN | page)


# What of two things wrong with one entry decides, in the order of the checks.
PAIRS = [
    ("in", of(NOP, 0) | 1 << 54, wrong_page_mac(), "e2a"),
    ("in", of(MIGRATE, FREE) | 1 << 61, entry_locked, "e3"),
    ("post", of(MIGRATE, FREE), (entry_locked, Spoil(frozenset(), blocked)), "e5"),
    ("post", of(REMIGRATE, FREE), Spoil(frozenset(), blocked), "e6"),
    ("post", of(REMIGRATE, MAPPED), buffer(1 << 63), "e7"),
    ("in", of(MIGRATE, MAPPED), buffer(1 << 63), "e8"),
    ("in", of(MIGRATE, MAPPED), new_page(8), "M1"),
    ("post", of(MIGRATE, MAPPED), (removed_by_the_host, new_page(8)), "M2"),
    ("in", of(MIGRATE, FREE), (new_page(8 | 1 << 46), wrong_page_mac()), "M3b"),
    ("in", of(MIGRATE, FREE), (new_page(owned_page), wrong_page_mac()), "M4c"),
    ("in", of(MIGRATE, FREE), (new_page_locked, wrong_page_mac()), "M4b"),
    ("in", of(REMIGRATE, FREE), wrong_page_mac(), "r1"),
    ("in", of(REMIGRATE, MAPPED, pending=True), wrong_page_mac(), "r3"),
    ("in", of(CANCEL, FREE), wrong_page_mac(), "c1"),
    ("in", of(CANCEL, MAPPED), (page_locked, wrong_page_mac()), "c2"),
]


@pytest.mark.parametrize(("phase", "word", "spoils", "row"), PAIRS)
def test_the_earlier_check_of_an_entry_decides(phase, word, spoils, row):
    scene = PHASES[phase](word)
    for one in spoils if type(spoils) is tuple else (spoils,):
        one.apply(scene)
    outcome = scene.attempt()
    expected, _, _ = outcome_of(Entry(row, (word,)), phase)
    assert hex(outcome.status) == hex(expected)
    assert str(scene.word(0) >> 56 & 0x1F) == ROWS[f"10.13-{row}"]["entry_status"]


@pytest.mark.parametrize(
    ("operations", "row"),
    [
        ((MIGRATE, REMIGRATE), "r2"),
        ((MIGRATE, CANCEL), "c4"),
    ],
)
def test_the_epoch_is_compared_before_and_after_other_checks(operations, row):
    """r2 comes before r3 and the tag; c4 comes after the tag and the PAMT lock."""
    first, second = operations
    scene = PHASES["in"](of(first, FREE), of(second, FREE, pending=second is REMIGRATE))
    wrong_page_mac(1).apply(scene)
    outcome = scene.attempt()
    decides = {"r2": "r2", "c4": "c2"}[row]
    assert hex(outcome.status) == hex(code_of(f"10.13-{decides}"))
