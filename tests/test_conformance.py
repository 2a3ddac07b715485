"""Model and software module agree: the same calls, accepted or refused, and the same state after.

Model and module were written apart from the same facts.  Here every call is tried on both, along a
good migration, in all short runs from its milestones and in random walks.
"""

import dataclasses

import pytest
from conformance_runs import Tally, every_run, try_all, walk

from tdxmig_model.conformance import Call, Disagreement, contract
from tdxmig_model.conformance.contract import FEW, Contract, distinguishes, refusals
from tdxmig_model.conformance.labels import NO_CALL, OF_ROW, STATUSES
from tdxmig_model.conformance.migration import (
    MIGRATION,
    MILESTONES,
    PUBLISHED_SCENES,
    SCENES,
    at,
    begin,
    go_on,
    scene,
    scenes,
)
from tdxmig_model.errors import ModelError
from tdxmig_model.expr import Instance, System
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.smt.runs import replay

PROFILES = ("tdx-1.5.01", "hardened")
ALL_LABELS = {need.label for step in MEMORY.steps for need in step.when}


def rows_of(profile):
    return {step.name for step in MEMORY.under(profile).steps}


# --- all short runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_every_short_run_agrees(profile):
    """From each milestone every call, and after each accepted one every call again."""
    tally = Tally()
    twin = begin(profile)
    for call in MIGRATION:
        tally.note(call, twin.attempt(call))
    for milestone in MILESTONES:
        every_run(at(milestone, profile), 1, tally)
    for name in scenes(profile):
        try_all(scene(name, profile), tally)
    taken = {row for kind, row, *_ in tally if kind == "accepted"}
    assert taken == rows_of(profile)
    seen = {label for kind, _, *labels in tally if kind == "refused" for label in labels}
    known = {need.label for step in MEMORY.under(profile).steps for need in step.when}
    beyond = {"min_migs", "epoch_overflow", "token_counter", "num_migrated_vcpus"}
    assert known - NO_CALL - seen <= beyond
    assert tally.of_kind("accepted") > 2000
    assert tally.of_kind("refused") > 30_000
    assert tally.of_kind("narrower") < tally.of_kind("accepted") / 50
    assert {"export_mem_failed_entry", "import_failure", "vp_exit"} <= tally.effects


@pytest.mark.parametrize("profile", PROFILES)
def test_every_run_of_three_calls_from_the_start_agrees(profile):
    tally = Tally()
    states = every_run(begin(profile), 3, tally)
    assert len(states) > 60
    assert tally["accepted", "export_state_immutable"] > 5


@pytest.mark.slow
@pytest.mark.parametrize("milestone", MILESTONES)
@pytest.mark.parametrize("profile", PROFILES)
def test_every_longer_run_agrees(profile, milestone):
    assert len(every_run(at(milestone, profile), 3, Tally())) > 50


# --- random walks --------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_random_walks_agree(profile):
    tally = Tally()
    for seed, milestone in enumerate(MILESTONES):
        walk(at(milestone, profile), seed, 6, tally)
    assert tally.of_kind("accepted") > 600
    assert tally.of_kind("refused") > 10_000
    assert len({row for kind, row, *_ in tally if kind == "accepted"}) > 35


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("profile", PROFILES)
def test_long_random_walks_agree(profile, seed):
    for number, milestone in enumerate(MILESTONES):
        walk(at(milestone, profile), 1000 * seed + number, 40, Tally())


# --- the scaffolding -----------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_the_migration_is_a_run_of_the_model_alone(profile):
    """Up to the page that is not accepted, which the interpreter's initial state does not have."""
    part = MEMORY.under(profile)
    sizes = {"Page": 2, "Vcpu": 1, "Stream": 3, "Entry": 3, "Message": 12, "Epoch": 8}
    instance = Instance(sizes, {c.name: 7 for c in part.constants()})
    moves = [(call.rows[0], call.values) for call in MIGRATION[:18]]
    assert replay(part, instance, moves).depth == 18


@pytest.mark.parametrize("profile", PROFILES)
def test_every_scene_is_played(profile):
    for name in scenes(profile):
        twin = scene(name, profile)
        assert twin.differences() == {}, name
    assert set(scenes(profile)) == set(SCENES) | (
        set(PUBLISHED_SCENES) if profile != "hardened" else set()
    )


def test_going_back_is_going_back():
    """A pair that was put back says the same to every call; a vCPU stays in the guest."""
    twin = at("a vCPU inside", "hardened")
    first, second = Tally(), Tally()
    try_all(twin, first)
    try_all(twin, second)
    assert first == second
    assert len(twin.source.inside) == 1
    assert twin.differences() == {}


def test_a_good_migration_that_is_refused_is_an_error():
    with pytest.raises(ModelError, match="does not go on: export_pause is refused"):
        go_on(begin("hardened"), Call(("export_pause",), {}))


def test_every_label_has_a_status_or_a_reason():
    assert set(STATUSES) | NO_CALL == ALL_LABELS
    assert not set(STATUSES) & NO_CALL
    assert all(MEMORY.step(row).needs(label) for row, label in OF_ROW)


# --- what would be noticed -----------------------------------------------------------------------

DELETED = [
    ("export_track_start", "dirty_count"),
    ("export_mem_migrate", "tlb_tracked"),
    ("export_pause", "no_vcpu_inside"),
    ("export_state_vp", "not_exported_yet"),
    ("export_state_immutable_other", "mig_count"),
    ("import_track_start", "total_mb"),
    ("import_mem_remigrate", "not_in_this_epoch"),
    ("import_mem_migrate", "not_over_removed"),
    ("import_mem_cancel", "sept_state"),
    ("import_state_vp", "vcpu_state"),
    ("mem_track", "previous_epoch_left"),
    ("import_commit", "op_state"),
]


@pytest.mark.parametrize(("step", "label"), DELETED, ids=[f"{s}:{n}" for s, n in DELETED])
def test_a_deleted_guard_is_noticed(step, label):
    """The run that the contract check finds is one on which the mutant and the module differ."""
    run = distinguishes("hardened", step, label)
    assert run is not None
    mutant = MEMORY.under("hardened").without(step, label)
    twin = begin("hardened", mutant, vcpus=max([c.values.get("v", 0) for c in run]) + 1)
    for call in run[:-1]:
        go_on(twin, call)
    with pytest.raises(Disagreement, match="model accepts, backend refuses"):
        twin.attempt(run[-1])


def test_a_guard_that_no_module_checks_is_not_claimed():
    assert distinguishes("hardened", "import_track_start", "start_token", depth=0) is None


def test_what_the_contract_check_shows_along_the_migration():
    shown = refusals("hardened")
    part = MEMORY.under("hardened")
    assert len(shown) >= 60
    for (step, label), run in shown.items():
        assert part.step(step).needs(label)
        assert step in run[-1].rows
        assert label not in NO_CALL


def changed(system: System, step: str, variable: str) -> System:
    """The system in which a step does not update a variable."""
    row = system.step(step)
    less = dataclasses.replace(row, then=tuple(a for a in row.then if a.target.name != variable))
    steps = tuple(less if s.name == step else s for s in system.steps)
    return dataclasses.replace(system, steps=steps, _by_name={})


@pytest.mark.parametrize(
    ("step", "variable"),
    [
        ("export_mem_migrate", "source_mig_count"),
        ("export_blockw", "source_bw_epoch"),
        ("guest_write", "source_version"),
        ("import_mem_migrate", "destination_page_epoch"),
        ("import_mem_remigrate", "destination_version"),
        ("import_mem_end", "destination_total_mb_count"),
        ("export_track", "source_next_mb_counter"),
        ("import_state_vp", "destination_vcpu_imported"),
        ("import_mem_end", "destination_unfinished"),
    ],
)
def test_a_lost_effect_is_noticed(step, variable):
    mutant = changed(MEMORY.under("hardened"), step, variable)
    with pytest.raises(Disagreement):
        at("over", "hardened", mutant)


@pytest.mark.parametrize("profile", PROFILES)
def test_another_call_of_the_stream_ends_an_unfinished_import(profile):
    """In the model too, so that nothing of the bundle comes after it."""
    twin = at("import under way", profile)
    for row in ("export_pause", "export_state_td"):
        go_on(twin, Call((row,), {}))
    assert twin.get("destination_unfinished")[0]
    outcome = twin.attempt(Call(("import_state_td",), {"m": 2}))
    assert outcome.kind == "accepted"
    assert not twin.get("destination_unfinished")[0]
    again = twin.attempt(Call(("import_mem_migrate_pending",), {"stream": 0, "p": 1}))
    assert (again.kind, again.answer.word) == ("refused", "INVALID_RESUMPTION")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_key_that_was_written_during_an_import_survives_its_failure(profile):
    twin = at("live", profile)
    go_on(twin, Call(("destination_set_migration_key",), {}))
    go_on(twin, Call(("import_failure",), {}))
    assert twin.text("destination_op_state") == "FAILED_IMPORT"
    assert twin.get("destination_mig_dec_key_set")


def test_a_start_that_fails_uses_up_the_key():
    twin = begin("hardened")
    go_on(twin, Call(("destination_set_migration_key",), {}))
    go_on(twin, Call(("import_failure",), {}))
    assert not twin.get("destination_mig_dec_key_set")


def test_going_back_forgets_which_vcpus_came():
    twin = at("state", "hardened")
    call = Call(("import_state_vp",), {"stream": 1, "m": 7, "v": 0})
    back = twin.save()
    for _ in range(2):
        assert twin.attempt(call).kind == "accepted"
        back()


def test_another_reason_is_noticed(monkeypatch):
    monkeypatch.setitem(STATUSES, "dirty_count", frozenset({"OPERAND_BUSY"}))
    twin = at("paused", "hardened")
    for row, values in [("export_unblockw", {"p": 0})]:
        go_on(twin, Call((row,), values))
    with pytest.raises(Disagreement, match="status class"):
        twin.attempt(Call(("export_track_start",), {}))


def test_few_and_many_questions_have_the_same_answers(monkeypatch):
    monkeypatch.setattr(contract, "DEPTH", 0)
    guards = [("export_state_vp", "stream"), ("import_track", "token_counter")]
    one_by_one = Contract("hardened", len(guards))
    at_once = Contract("hardened", FEW + 1)
    assert [one_by_one("leaf", *g) for g in guards] == [True, False]
    assert [at_once("leaf", *g) for g in guards] == [True, False]
