"""Are the models of calls, locks and guest pages what they claim, and is each guard needed?"""

from __future__ import annotations

import pytest

from tdxmig_model.expr import Interpreter, System
from tdxmig_model.model.calls import CALLS
from tdxmig_model.model.guest_pages import GUEST_PAGES
from tdxmig_model.model.import_locks import IMPORT_LOCKS
from tdxmig_model.model.locks import (
    LEAF,
    MIG_EXCLUSIVE,
    MIG_SHARED,
    OP_STATE_EXCLUSIVE,
    OP_STATE_SHARED,
    TDR_EXCLUSIVE,
    TDR_SHARED,
)
from tdxmig_model.model.locks_system import LOCKS
from tdxmig_model.model.words import HARDENED, TDX_1_5_01, without
from tdxmig_model.smt.induction import prove
from tdxmig_model.smt.runs import replay
from tdxmig_model.verify import Report, Row, listed, mutants, verify

SMALL_SYSTEMS = (IMPORT_LOCKS, CALLS, GUEST_PAGES)
SYSTEMS = (LOCKS, *SMALL_SYSTEMS)


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, System) else None


def bad_rows(report: Report) -> dict[str, Row]:
    return {r.identifier: r for r in (*report.rows, *report.goals) if not r.holds}


def last_steps(row: Row, number: int) -> list[str]:
    assert row.story is not None
    return [event.step for event in row.story.events][-number:]


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS, ids=name_of)
def test_everything_is_proved_with_the_repairs(system: System) -> None:
    report = verify(system, HARDENED)
    assert bad_rows(report) == {}
    assert {r.verdict for r in report.rows} == {"proved"}
    assert {r.verdict for r in report.goals} == {"reachable"}
    assert report.dead_steps == ()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize("system", SMALL_SYSTEMS, ids=name_of)
def test_the_seed_does_not_matter(system: System, seed: int) -> None:
    assert prove(system.under(HARDENED), seed=seed).failed == {}


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4))])
def test_the_seed_does_not_matter_to_the_locks(seed: int) -> None:
    assert prove(LOCKS.under(HARDENED), seed=seed).failed == {}


def test_the_locks_do_not_depend_on_the_profile() -> None:
    assert LOCKS.under(TDX_1_5_01).steps == LOCKS.under(HARDENED).steps


# Property, the profile with one repair less in which it fails, how the run ends there.
ENDINGS = {
    ("calls", "P40", "R1"): ["begin_memory", "read_word", "use_word", "fail_after_commit"],
    ("calls", "P41", "R3"): ["interrupt_call", "write_fields", "resume_call"],
    ("calls", "P41", "R4"): ["interrupt_call", "write_fields", "resume_call"],
    ("guest pages", "P48", "R8"): ["end_import_of_pages", "accept_without_page"],
    ("import locks", "L43", "R9"): ["fail_entry", "fail_entry"],
    ("import locks", "L45", "R9"): ["remove_page", "import_entry"],
}


@pytest.mark.parametrize(("name", "identifier", "repair"), ENDINGS)
def test_without_one_repair_a_property_fails(name: str, identifier: str, repair: str) -> None:
    system = next(s for s in SYSTEMS if s.name == name)
    (row,) = verify(system, without(repair), [identifier]).rows
    assert row.verdict == "violated"
    ending = ENDINGS[name, identifier, repair]
    assert last_steps(row, len(ending)) == ending


# Everything else of these models is proved under tdx-1.5.01 as well.
VIOLATED = {
    "calls": {"P40", "P41", "call_dependence"},
    "guest pages": {"P48"},
    "import locks": {"L43", "L44", "L45", "L46"},
}


@pytest.mark.parametrize("system", SMALL_SYSTEMS, ids=name_of)
def test_each_verdict_on_the_published_release(system: System) -> None:
    report = verify(system, TDX_1_5_01)
    bad = bad_rows(report)
    assert bad.keys() == VIOLATED[system.name]
    for row in bad.values():  # what a lemma is worth without its repairs is not asked
        assert row.verdict == ("unknown" if row.level == "lemma" else "violated")
    assert report.dead_steps == ()


def test_the_published_counterexamples_are_the_shortest_ones() -> None:
    rows = {r.identifier: r for r in verify(CALLS, TDX_1_5_01, ["P40", "P41"]).rows}
    assert last_steps(rows["P40"], 1) == ["fail_after_commit"]
    assert rows["P41"].story is not None
    begun = rows["P41"].story.events[0]
    assert begun.parameters["leaf"] == "IMPORT_STATE_IMMUTABLE"
    (row,) = verify(GUEST_PAGES, TDX_1_5_01, ["P48"]).rows
    assert row.story is not None
    steps = [event.step for event in row.story.events]
    assert steps.index("cancel_guest_page") < steps.index("import_guest_cancel")


# --- deletions ------------------------------------------------------------------------------------


def all_killed(system: System, profile: str, deletions: object = None) -> None:
    found = mutants(system, profile, deletions)  # type: ignore[arg-type]
    assert {(m.step, m.label, m.target, m.outcome) for m in found if m.outcome != "killed"} == set()
    part = system.under(profile)
    for m in found:
        assert m.run is not None
        assert m.broken == m.target
        mutant = part.without(m.step, m.label)
        run = replay(mutant, m.run.instance, m.run.moves)
        broken = part.property(m.broken).formula
        assert not Interpreter(mutant, run.instance).value(broken, run.states[-1], {})


# RESUME compares the epoch, but with R1 no token is made while an EXPORT.MEM can be resumed.
REDUNDANT = {(("resume_call", "same_epoch"), "P41")}


@pytest.mark.parametrize("system", SMALL_SYSTEMS, ids=name_of)
def test_each_listed_guard_forbids_a_run(system: System) -> None:
    all_killed(system, HARDENED, [d for d in listed(system, HARDENED) if d not in REDUNDANT])


def test_the_epoch_of_a_resume_is_compared_twice_over() -> None:
    (deletion,) = REDUNDANT
    (found,) = mutants(CALLS, HARDENED, [deletion])
    assert found.outcome == "equivalent"
    profile = without("R1")
    mutant = CALLS.under(profile).without(*deletion[0])
    (row,) = verify(mutant, profile, ["P41"]).rows
    assert row.verdict == "violated"
    assert last_steps(row, 3) == ["interrupt_call", "next_epoch", "resume_call"]


def _lock_guards(*, long: bool) -> list[tuple[tuple[str, str], str]]:
    quick = {("add_to_total", "atomic"), ("take_op_state_exclusive", "no_shared_holder")}
    quick |= {("unblock_page", "entry_free")}
    return [(d, t) for d, t in listed(LOCKS, HARDENED) if (d in quick) != long]


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_each_lock_forbids_a_run(long: bool) -> None:
    all_killed(LOCKS, HARDENED, _lock_guards(long=long))


def test_an_exported_entry_is_not_exported_again_while_it_is_locked() -> None:
    """So that the look at its lock bit only tells BUSY from a wrong state."""
    (found,) = mutants(LOCKS, HARDENED, [(("lock_entry", "entry_free"), "P44")])
    assert found.outcome == "equivalent"


# --- the lock table -------------------------------------------------------------------------------


def test_each_leaf_takes_each_lock_in_one_way() -> None:
    every = set(LEAF.members)
    names = [{str(leaf) for leaf in part} for part in (TDR_SHARED, TDR_EXCLUSIVE)]
    assert names[0] | names[1] == every
    assert not names[0] & names[1]
    held = {str(leaf) for leaf in (*OP_STATE_SHARED, *OP_STATE_EXCLUSIVE)}
    assert held == names[0], "an exclusive TDR implies the OP_STATE lock"
    assert set(MIG_EXCLUSIVE) <= set(OP_STATE_EXCLUSIVE)
    assert set(MIG_SHARED) <= set(OP_STATE_SHARED)
