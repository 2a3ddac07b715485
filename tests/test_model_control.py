"""Is control state imported whole, by the import alone, and from one authentic bundle?"""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tdxmig_model.expr import System
from tdxmig_model.model import control as c
from tdxmig_model.model.control_properties import CONTROL
from tdxmig_model.model.words import HARDENED, TDX_1_5_01, without
from tdxmig_model.smt.induction import prove
from tdxmig_model.story import Story
from tdxmig_model.verify import Report, every, mutants, verify

SPECS = Path(__file__).resolve().parent.parent / "specs"
CLAIMED = ("P20", "P21", "P22", "P23", "P25")
VIOLATED = ("P21", "P22", "P23")
"""What the published module does not keep; P20 and P25 it does."""

# Guard deletions by their numbers in the threat model, with the property that falls.
NUMBERED = {
    4: ("import_state_immutable_field", "no_write_mask", "P22"),
    6: ("import_state_immutable_report", "mbmd_mac", "P25"),
    7: ("import_state_immutable_end", "mbmd_mac", "P20"),
    8: ("import_state_immutable_field", "attributes_valid", "P23"),
    46: ("mng_init", "op_state", "P20"),
    66: ("import_state_immutable_field", "no_write_mask", "P23"),
}
ELSEWHERE = {
    1: "test_without_its_own_op_state_the_import_can_be_entered",
    2: "test_a_failing_mng_init_that_leaves_nothing_is_not_enough",
    3: "test_parser_lemmas: list_size_at_least_header",
    5: "test_parser_lemmas: no_write_mask, field_fits",
    64: "test_parser_lemmas: tail_zeroed",
    65: "test_what_is_not_imported_must_be_computed",
}
"""Those that delete no conjunct of a row: an update, a row, or a check of the list parser."""

OTHERS = {
    ("mng_init", "op_state", "P21"),
    ("mng_init", "op_state", "P23"),
    ("control_mig_stream_create", "op_state", "P21"),
    ("import_state_immutable_end", "required_fields", "P22"),
    ("import_state_immutable_end", "required_fields", "P23"),
}

# Deletions that break nothing, and why.
EQUIVALENT = {
    ("mng_init", "tdr_lock"): "the import has its own OP_STATE while it runs",
    ("control_mig_stream_create", "tdr_lock"): "the same",
    ("control_set_migration_key", "tdr_lock"): "the key is for the next session",
    ("import_state_immutable_new", "op_state"): "a NEW that begins again takes a whole bundle",
    ("import_state_immutable_new", "tdr_lock"): "the same",
    ("import_state_immutable_new", "min_migs"): "streams are not of this model's properties",
    ("import_state_immutable_new", "mig_dec_key_set"): "keys are not of this model's properties",
    ("import_state_immutable_field", "importable"): "a written computed field is computed again",
    ("import_state_immutable_field", "as_exported"): "no bundle has write masks",
    ("import_state_immutable_skip", "importable"): "a computed field that is skipped is computed",
    ("import_state_immutable_resume", "op_state"): "interrupted and not in START_IMPORT is nothing",
    ("import_state_immutable_end", "no_parse_error"): "what the fields hold does not depend on it",
    ("import_state_immutable_end", "num_vcpus"): "nothing clears it while the import lasts",
    ("import_state_immutable_report", "parse_error"): "a report without an error says nothing",
    ("import_state_immutable_fail", "unfinished"): "a failure leads to no property's states",
    ("import_state_immutable_fail", "op_state"): "the same",
}


@cache
def judged(profile: str) -> Report:
    return verify(CONTROL, profile)


def story(profile: str, identifier: str) -> Story:
    (row,) = [r for r in judged(profile).rows if r.identifier == identifier]
    assert row.verdict == "violated"
    assert row.story is not None
    return row.story


def steps_of(told: Story) -> list[str]:
    return [event.step for event in told.events]


# --- verdicts -------------------------------------------------------------------------------------


def test_hardened_keeps_every_property_for_any_number_of_fields() -> None:
    report = judged(HARDENED)
    assert report.holds
    assert report.dead_steps == ()
    assert {r.identifier: r.verdict for r in report.rows if r.level != "lemma"} == dict.fromkeys(
        CLAIMED, "proved"
    )
    assert {r.verdict for r in report.goals} == {"reachable"}


@pytest.mark.parametrize("seed", range(5))
def test_the_proof_does_not_depend_on_the_seed(seed: int) -> None:
    assert not prove(CONTROL.under(HARDENED), seed=seed).failed
    published = prove(CONTROL.under(TDX_1_5_01), seed=seed)
    assert all(published.proves(name) for name in set(CLAIMED) - set(VIOLATED))


def test_the_published_module_keeps_the_rest() -> None:
    report = judged(TDX_1_5_01)
    assert {r.identifier for r in report.rows if r.verdict == "violated"} == set(VIOLATED)
    assert {r.verdict for r in report.rows if r.identifier not in VIOLATED} == {"proved"}
    assert {r.verdict for r in report.goals} == {"reachable"}
    assert report.dead_steps == ()


@pytest.mark.parametrize(
    ("repair", "lost"), [("R2", {"P22", "P23"}), ("R3", {"P21"})], ids=["R2", "R3"]
)
def test_each_repair_removes_its_counterexamples(repair: str, lost: set[str]) -> None:
    report = judged(without(repair))
    assert {r.identifier for r in report.rows if r.verdict == "violated"} == lost


# --- counterexamples of the published module ------------------------------------------------------


def test_mng_init_comes_between_an_interruption_and_resume() -> None:
    """CVE-2025-30513, INTEL-SA-01397 (digby, Google security-research, tdxploits)."""
    assert steps_of(story(TDX_1_5_01, "P21"))[-4:] == [
        "import_state_immutable_new",
        "import_state_immutable_interrupt",
        "mng_init",
        "import_state_immutable_resume",
    ]


def test_a_required_field_passes_under_a_write_mask_of_zero() -> None:
    """eddie (Google security-research, tdxploits): the bundle is of the attacker's own TD."""
    told = story(TDX_1_5_01, "P22")
    assert steps_of(told)[-5:] == [
        "import_state_immutable_new",
        "import_state_immutable_field",
        "import_state_immutable_field",
        "import_state_immutable_field",
        "import_state_immutable_end",
    ]
    events = told.text(400)
    assert "made_by OWN_KEY" in events
    assert "mask NONE" in events


def test_only_the_cleared_num_vcpus_keeps_the_fields_the_sources() -> None:
    """The cross check of NUM_VCPUS ends every import that MNG.INIT came into the middle of."""
    deletion = (("import_state_immutable_end", "num_vcpus"), "P20")
    (found,) = mutants(CONTROL, TDX_1_5_01, [deletion])
    assert (found.outcome, found.broken) == ("killed", "P20")
    assert found.run is not None
    names = [step for step, _ in found.run.moves]
    after = names[names.index("import_state_immutable_interrupt") :]
    assert after[:3] == [
        "import_state_immutable_interrupt",
        "mng_init",
        "import_state_immutable_resume",
    ]
    assert names[-1] == "import_state_immutable_end"


# --- guards ---------------------------------------------------------------------------------------


def test_every_listed_guard_is_needed() -> None:
    found = mutants(CONTROL, HARDENED)
    assert {(m.step, m.label, m.target) for m in found} == {*NUMBERED.values(), *OTHERS}
    assert {m.outcome for m in found} == {"killed"}
    for mutant in found:
        assert mutant.broken == mutant.target, (mutant.step, mutant.label)


def test_the_other_deletions_break_something_or_it_is_known_why_not() -> None:
    found = mutants(CONTROL, HARDENED, every(CONTROL, HARDENED))
    assert {m.outcome for m in found} == {"killed", "equivalent"}
    assert {(m.step, m.label) for m in found if m.outcome == "equivalent"} == EQUIVALENT.keys()


def without_update(step: str, variable: str) -> System:
    """The model without one update of one row."""
    row = CONTROL.step(step)
    kept = tuple(a for a in row.then if a.target.name != variable)
    assert kept != row.then
    steps = tuple(replace(s, then=kept) if s.name == step else s for s in CONTROL.steps)
    return replace(CONTROL, steps=steps, _by_name={})


def test_what_is_not_imported_must_be_computed() -> None:
    """A MNG.INIT that failed before a perfectly normal import leaves no field behind."""
    mutant = without_update("import_state_immutable_end", "control_field")
    report = verify(mutant, HARDENED, ["P20"], sizes={"Field": 5})
    (row,) = report.rows
    assert row.verdict == "violated"


def test_without_its_own_op_state_the_import_can_be_entered() -> None:
    mutant = without_update("import_state_immutable_new", "control_op_state")
    report = verify(mutant, HARDENED, ["P21"])
    (row,) = report.rows
    assert row.verdict == "violated"
    assert row.story is not None
    assert steps_of(row.story)[-2:] == ["mng_init", "import_state_immutable_resume"]


def test_a_failing_mng_init_that_leaves_nothing_is_not_enough() -> None:
    """Without START_IMPORT other leaves still change the TD while an import is unfinished."""
    mutant = without_update("import_state_immutable_new", "control_op_state")
    report = verify(mutant.without_step("mng_init"), HARDENED, ["P21"])
    (row,) = report.rows
    assert row.verdict == "violated"
    assert row.story is not None
    assert steps_of(row.story)[-2:] == [
        "control_mig_stream_create",
        "import_state_immutable_resume",
    ]


def test_the_numbered_deletions_are_all_somewhere() -> None:
    assert sorted({*NUMBERED, *ELSEWHERE}) == [*range(1, 9), 46, 64, 65, 66]
    for place in ELSEWHERE.values():
        assert place in globals() or place.startswith("test_parser_lemmas: ")


# --- facts ----------------------------------------------------------------------------------------


def test_the_numbers_of_fields_are_those_of_the_published_tables() -> None:
    with (SPECS / "fields.csv").open(newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["scope"] == "immutable"]
    written = dict.fromkeys(("MB", "MBO"), 0)
    for row in rows:
        if row["import_class"] in written:
            written[row["import_class"]] += int(row["fields"])
    assert c.NUM_REQUIRED.value == written["MB"]
    assert c.NUM_IMPORTED.value == written["MB"] + written["MBO"]


def test_num_vcpus_comes_before_attributes() -> None:
    with (SPECS / "fields.csv").open(newline="") as table:
        names = [row["name"] for row in csv.DictReader(table) if row["scope"] == "immutable"]
    assert names.index("NUM_VCPUS") < names.index("ATTRIBUTES")
    assert set(names[: names.index("NUM_VCPUS")]) == {"TD_UUID"}
    assert c.NUM_VCPUS < c.ATTRIBUTES
