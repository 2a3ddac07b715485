"""Is the service TD of a TD the one that it was bound to, for any number of service TDs?"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tdxmig_model.expr import Interpreter, initial_state, slots
from tdxmig_model.model.bindings import BINDINGS, BOUND
from tdxmig_model.model.words import HARDENED, OP_STATE, PROFILES
from tdxmig_model.smt.induction import prove
from tdxmig_model.verify import every, mutants, small_instance, verify

SPECS = Path(__file__).resolve().parent.parent / "specs"


@pytest.mark.parametrize("profile", PROFILES)
def test_everything_is_proved_and_says_something(profile: str) -> None:
    report = verify(BINDINGS, profile)
    assert {r.identifier: r.verdict for r in report.rows if r.verdict != "proved"} == {}
    assert {r.verdict for r in report.goals} == {"reachable"}
    assert report.dead_steps == ()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_proof_does_not_depend_on_the_seed(seed: int) -> None:
    assert prove(BINDINGS.under(HARDENED), seed=seed).failed == {}


def test_each_listed_guard_forbids_a_run() -> None:
    found = mutants(BINDINGS, HARDENED)
    assert len(found) == 7
    assert {(m.step, m.label) for m in found if m.outcome != "killed"} == set()
    assert all(m.broken == m.target for m in found)


def test_every_guard_is_judged() -> None:
    found = mutants(BINDINGS, HARDENED, every(BINDINGS, HARDENED))
    assert {m.outcome for m in found} == {"killed", "equivalent"}


def table(name: str) -> dict[str, dict[str, str]]:
    with (SPECS / name).open(newline="") as opened:
        return {row["leaf_name"]: row for row in csv.DictReader(opened)}


@pytest.mark.parametrize(
    ("file", "leaf", "step"),
    [
        ("op_state.csv", "TDH.SERVTD.BIND", "bind_service_td"),
        ("op_state.csv", "TDH.SERVTD.PREBIND", "prebind_service_td"),
        ("op_state_other.csv", "TDG.SERVTD.WR", "write_bound_key"),
    ],
)
def test_a_leaf_is_allowed_where_the_published_table_allows_it(
    file: str, leaf: str, step: str
) -> None:
    row = table(file)[leaf]
    part = BINDINGS.under(HARDENED)
    instance = small_instance(part)
    interpreter = Interpreter(part, instance)
    place = slots(part)["bindings_op_state"]
    allowed = part.step(step).needs("op_state").formula
    for number, name in enumerate(OP_STATE.members):
        state = initial_state(part, instance)
        state[place] = number
        assert interpreter.value(allowed, state, {}) == (row[name] == "1"), name


def test_a_td_is_bound_before_it_runs_or_never() -> None:
    guard = BINDINGS.step("bind_service_td").needs("first_time").formula
    part = BINDINGS.under(HARDENED)
    instance = small_instance(part)
    state = initial_state(part, instance)
    at = slots(part)
    for name in OP_STATE.members:
        state[at["bindings_op_state"]] = OP_STATE.position(name)
        first = name in ("UNINITIALIZED", "INITIALIZED")
        assert bool(Interpreter(part, instance).value(guard, state, {})) == first
    state[at["binding_state"]] = BOUND.value
    assert Interpreter(part, instance).value(guard, state, {})
