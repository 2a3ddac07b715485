"""Does the search visit exactly the states of the interpreter, and find shortest traces?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from random_models import VARIABLES, Terms
from reference import Reference, frozen, thawed

from tdxmig_model import cli
from tdxmig_model.errors import ModelError
from tdxmig_model.explore import explore
from tdxmig_model.expr import (
    BOOL,
    INT,
    Assign,
    Constant,
    Instance,
    Interpreter,
    Literal,
    Node,
    Step,
    System,
    all_of,
    any_of,
    choose,
    count,
    forall,
    implies,
    index,
    initial_state,
    mapping,
    need,
    not_,
    param,
    scalar,
    sort,
    step,
)
from tdxmig_model.expr.finite import ceilings
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.words import PROFILES


def compare(system: System, instance: Instance, ceiling: Any = None) -> Reference:
    wanted = Reference(system, instance, ceiling)
    found = explore(system, instance, ceiling=ceiling)
    assert found.states == len(wanted.distance)
    assert found.transitions == wanted.transitions
    assert found.depth == max(wanted.distance.values())
    assert found.clipped == wanted.clipped
    assert set(found.dead_steps) == {s.name for s in system.steps} - wanted.taken
    assert not found.truncated
    return wanted


# --- toys ---------------------------------------------------------------------------------------

SLOT = index("Slot")
BEE = sort("Bee")
ROOM = Constant("ROOM", value=99, small=2, least=1)

awake = mapping("awake", (BEE,), BOOL, False, "hive")
log = mapping("log", (SLOT,), INT, 0, "hive")
length = scalar("length", INT, 0, "hive")
honey = scalar("honey", INT, 0, "hive")
bee = param("bee", BEE)


def row(name: str, params: Any, when: list[Node], then: list[Assign]) -> Step:
    needs = [need(f"n{k}", formula) for k, formula in enumerate(when)]
    return step(name, "hive", params, when=needs, then=then, why="test", cite="none")


asleep = count("sleeping bees", BEE, lambda b: not_(awake[b]))
HIVE = System(
    "hive",
    (awake, log, length, honey),
    (
        row("wake", (bee,), [not_(awake[bee])], [awake[bee].to(True)]),
        row(
            "forage",
            (bee,),
            [awake[bee], honey.lt(ROOM)],
            [honey.to(honey + 1), log[length].to(honey + 1), length.to(length + 1)],
        ),
        row("eat", (), [honey.gt(0), asleep.eq(0)], [honey.to(honey - 1)]),
        row("night", (), [length.gt(0)], [awake.fill(lambda b: False)]),
        row("never", (), [honey.lt(0)], []),
    ),
)
SMALL = Instance.small(HIVE, {"Bee": 2, "Slot": 3})


def test_the_toy_has_the_states_of_the_interpreter() -> None:
    wanted = compare(HIVE, SMALL)
    assert wanted.clipped > 0


def test_the_numbers_of_the_toy_are_stable() -> None:
    found = explore(HIVE, SMALL)
    assert (found.states, found.transitions, found.depth, found.clipped) == (72, 178, 10, 32)
    assert found.dead_steps == ("never",)
    assert found.deadlocks == 0
    assert found.trace is None


def test_the_digest_does_not_depend_on_the_order_of_rows() -> None:
    first = explore(HIVE, SMALL)
    again = explore(replace(HIVE, steps=HIVE.steps[::-1], _by_name={}), SMALL)
    assert again.digest == first.digest
    assert len(first.digest) == 64
    other = explore(HIVE.without("forage", "n1"), SMALL)
    assert other.digest != first.digest


def test_wide_values_change_no_counts() -> None:
    jump = row("jump", (), [honey.lt(10**6)], [honey.to(10**6)])
    far = row("far", (), [honey.eq(10**6)], [honey.to(10**12)])
    system = System("jump", (honey,), (jump, far))
    found = explore(system, Instance({}))
    assert (found.states, found.transitions, found.depth, found.deadlocks) == (3, 2, 2, 1)
    assert found.digest != explore(System("jump", (honey,), (jump,)), Instance({})).digest


def random_system(seed: int) -> System:
    terms = Terms(seed, wander=True)
    return System("toy", VARIABLES, tuple(terms.step(f"s{k}") for k in range(8)))


@pytest.mark.parametrize("third", range(3))
def test_random_systems_have_the_states_of_the_interpreter(third: int) -> None:
    sizes = []
    clipped = 0
    for seed in range(third, 120, 3):
        system = random_system(seed)
        instance = Instance.small(system, {"Cell": 2, "Worker": 1})
        if explore(system, instance, ceiling=2, limit=130).truncated:
            continue
        wanted = compare(system, instance, 2)
        sizes.append(len(wanted.distance))
        clipped += wanted.clipped > 0
    assert sum(size > 10 for size in sizes) >= 3
    assert clipped >= 1


@pytest.mark.parametrize("profile", PROFILES)
def test_the_lifecycle_has_the_states_of_the_interpreter(profile: str) -> None:
    system = LIFECYCLE.under(profile)
    sizes = {"Vcpu": 1, "Message": 4, "Epoch": 4, "Page": 1, "Stream": 1}
    compare(system, Instance.small(system, sizes))


@pytest.mark.parametrize("profile", PROFILES)
def test_the_leaf_model_has_the_states_of_the_interpreter(profile: str) -> None:
    """Within five steps; its states as a whole are too many for the interpreter."""
    system = LEAF.under(profile)
    sizes = {"Vcpu": 1, "Message": 2, "Epoch": 4, "Page": 1, "Stream": 1}
    instance = Instance.small(system, sizes)
    found = explore(system, instance, ceiling=2, depth=5)
    interpreter = Reference.__new__(Reference)
    interpreter.system = system
    interpreter.interpreter = Interpreter(system, instance)
    interpreter.limits = ceilings(system, instance, 2)
    interpreter.clipped = 0
    seen = {frozen(initial_state(system, instance))}
    frontier = list(seen)
    transitions = 0
    for _ in range(5):
        reached = []
        for state in frontier:
            for _, after in interpreter.successors(thawed(state)):
                transitions += 1
                if frozen(after) not in seen:
                    seen.add(frozen(after))
                    reached.append(frozen(after))
        frontier = reached
    assert found.truncated
    assert found.states == len(seen) > 200
    assert found.transitions == transitions
    assert found.clipped == interpreter.clipped


# --- ceilings -----------------------------------------------------------------------------------


def test_a_position_is_limited_by_its_index_and_other_integers_by_the_caller() -> None:
    assert ceilings(HIVE, SMALL) == {"length": 3}
    assert ceilings(HIVE, SMALL, 7) == {"length": 3, "honey": 7, "log": 7}
    assert ceilings(HIVE, SMALL, {"honey": 1, "length": 2}) == {"length": 2, "honey": 1}
    with pytest.raises(ModelError, match="the hive model has no variable hony"):
        ceilings(HIVE, SMALL, {"hony": 1})


def test_a_ceiling_is_reached_and_not_passed() -> None:
    climb = row("climb", (), [], [honey.to(honey + 1)])
    sink = row("sink", (), [], [honey.to(honey - 2)])
    found = explore(System("stairs", (honey,), (climb, sink)), Instance({}), ceiling=4)
    assert found.states == 9
    assert found.clipped == 1 + 2


def test_integers_without_a_ceiling_are_bounded_by_the_limit_alone() -> None:
    climb = row("climb", (), [], [honey.to(honey + 1)])
    found = explore(System("stairs", (honey,), (climb,)), Instance({}), limit=100)
    assert found.truncated
    assert 100 <= found.states < 5000


# --- what is found ------------------------------------------------------------------------------


def replayed(system: System, instance: Instance, trace: Any) -> list[Any]:
    """The state after a trace, by the interpreter; every step must be enabled."""
    interpreter = Interpreter(system, instance)
    state = initial_state(system, instance)
    for taken in trace:
        assert interpreter.enabled(system.step(taken.step), state, taken.params)
        state = interpreter.apply(system.step(taken.step), state, taken.params)
    return state


def test_a_shortest_trace_leads_to_the_bad_state() -> None:
    bad = all_of(asleep.eq(0), honey.eq(2))
    found = explore(HIVE, SMALL, bad=bad)
    assert found.trace is not None
    assert found.truncated
    assert [str(s) for s in found.trace] == [
        "wake(bee=0)",
        "wake(bee=1)",
        "forage(bee=0)",
        "forage(bee=0)",
    ]
    state = replayed(HIVE, SMALL, found.trace)
    assert Interpreter(HIVE, SMALL).value(bad, state, {}) is True


def test_a_bad_initial_state_has_the_empty_trace() -> None:
    found = explore(HIVE, SMALL, bad=honey.eq(0))
    assert found.trace == ()
    assert explore(HIVE, SMALL, bad=honey.eq(0), depth=0).trace == ()


def test_a_bad_state_on_the_last_level_is_seen() -> None:
    bad = all_of(asleep.eq(0), honey.eq(2))
    assert explore(HIVE, SMALL, bad=bad, depth=3).trace is None
    assert len(explore(HIVE, SMALL, bad=bad, depth=4).trace or ()) == 4


def test_goals_and_broken_invariants_have_shortest_traces_and_do_not_stop() -> None:
    wanted = Reference(HIVE, SMALL)
    interpreter = Interpreter(HIVE, SMALL)
    goals = {"sweet": honey.eq(2), "full": length.eq(3), "none": honey.eq(5)}
    invariants = {
        "poor": honey.lt(2),
        "right": honey.le(ROOM),
        "rising": forall({"a": SLOT}, lambda a: implies(a.lt(length), log[a].gt(0))),
    }
    found = explore(HIVE, SMALL, goals=goals, invariants=invariants)
    assert found.states == len(wanted.distance)
    assert set(found.reached) == {"sweet", "full"}
    assert set(found.violations) == {"poor"}
    for name, trace in found.reached.items():
        state = replayed(HIVE, SMALL, trace)
        assert interpreter.value(goals[name], state, {}) is True
        nearest = min(
            d for s, d in wanted.distance.items() if interpreter.value(goals[name], list(s), {})
        )
        assert len(trace) == nearest


def test_depth_counts_steps_from_the_initial_state() -> None:
    levels = Reference(HIVE, SMALL).distance.values()
    for depth in range(12):
        found = explore(HIVE, SMALL, depth=depth)
        assert found.states == sum(d <= depth for d in levels)
        assert found.truncated == (depth <= 10)
        assert found.depth == min(depth, 10)


def test_a_property_that_reads_outside_is_an_error_and_a_goal_is_not_met() -> None:
    outside = log[length].eq(0)
    with pytest.raises(ModelError, match="beyond reads a map outside the sizes"):
        explore(HIVE, SMALL, invariants={"beyond": outside})
    guarded = any_of(length.ge(3), outside)
    assert not explore(HIVE, SMALL, invariants={"beyond": guarded}).violations
    assert not explore(HIVE, SMALL, goals={"beyond": log[length - 1].eq(9)}).reached


def test_counts_and_choices_in_values() -> None:
    most = scalar("most", INT, 0, "hive")
    tick = row(
        "tick",
        (bee,),
        [],
        [awake[bee].to(not_(awake[bee])), most.to(choose(awake[bee], asleep, 0))],
    )
    system = System("ticks", (awake, most), (tick,))
    compare(system, Instance({"Bee": 3}))


def test_a_parameter_of_truth_values_is_one() -> None:
    switch = param("switch", BOOL)
    on = scalar("on", BOOL, False, "hive")
    turn = row("turn", (switch,), [on.ne(switch)], [on.to(switch)])
    found = explore(System("switch", (on,), (turn,)), Instance({}), goals={"on": on})
    assert (found.states, found.transitions) == (2, 2)
    assert found.reached["on"][0].params == {"switch": True}


def test_literals_of_goals_are_formulas() -> None:
    assert explore(HIVE, SMALL, goals={"yes": Literal(True, BOOL)}).reached == {"yes": ()}


@pytest.mark.parametrize("profile", PROFILES)
def test_lifecycle_invariants_hold_and_goals_are_met(profile: str) -> None:
    system = LIFECYCLE.under(profile)
    sizes = {"Vcpu": 2, "Message": 6, "Epoch": 4, "Page": 1, "Stream": 1}
    instance = Instance.small(system, sizes)
    found = explore(
        system,
        instance,
        goals=system.goals,
        invariants={p.identifier: p.formula for p in system.properties},
    )
    assert not found.violations
    assert set(found.reached) == {g.identifier for g in system.goals}
    assert not found.dead_steps
    for goal in system.goals:
        state = replayed(system, instance, found.reached[goal.identifier])
        assert Interpreter(system, instance).value(goal.formula, state, {})


def test_it_is_fast() -> None:
    """A generous floor; the usual speed is several times as much."""
    system = LIFECYCLE.under("hardened")
    sizes = {"Vcpu": 2, "Message": 7, "Epoch": 4, "Page": 1, "Stream": 1}
    found = explore(system, Instance.small(system, sizes))
    assert found.transitions / found.seconds > 100_000


# --- the command --------------------------------------------------------------------------------


def test_the_command_prints_what_the_contract_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explore", "--json", "--messages", "5"]) == 0
    answer = json.loads(capsys.readouterr().out)
    system = LIFECYCLE.under("hardened")
    sizes = {"Vcpu": 1, "Message": 5, "Epoch": 4}
    found = explore(system, Instance.small(system, sizes), ceiling=3)
    assert answer["states"] == found.states
    assert answer["transitions"] == found.transitions
    assert answer["depth"] == found.depth
    assert answer["digest"] == found.digest
    assert answer["states_per_s"] > 0
    assert answer["violations"] == []
    assert answer["verdict"] == "exhausted"
    assert answer["sizes"] == {"Epoch": 4, "Message": 5, "Vcpu": 1}
    assert {r["goal"] for r in answer["reached"]} >= {"abort", "migrated"}


def test_the_default_sizes_reach_every_goal_of_the_lifecycle(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["explore"]) == 0
    out = capsys.readouterr().out
    assert "exhausted: " in out
    assert "not reached" not in out
    assert "never taken" not in out


def test_a_violation_is_exit_1_and_has_a_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = LIFECYCLE.without("finish_epochs", "every_vcpu")
    monkeypatch.setattr("tdxmig_model.model.systems.SYSTEMS", (broken,))
    assert cli.main(["explore", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["verdict"] == "violated"
    first = answer["violations"][0]
    assert first["trace"][-1]["step"] == "finish_epochs"
    assert cli.main(["explore"]) == 1
    assert "finish_epochs()" in capsys.readouterr().out


def test_limits_are_said_and_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explore", "leaf", "--limit", "500", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["verdict"] == "bounded"
    assert answer["truncated"] is True
    assert cli.main(["explore", "--depth", "2", "--ceiling", "1"]) == 0
    assert "bounded: " in capsys.readouterr().out
    assert cli.main(["explore", "--ceiling", "phase=3"]) == 2
    assert "has no integer variable phase" in capsys.readouterr().err
    assert cli.main(["explore", "--ceiling", "many"]) == 2
    assert "many is neither N nor NAME=N" in capsys.readouterr().err


@pytest.mark.parametrize("vcpus", [1, 2, 3])
def test_the_defaults_let_a_migration_of_any_size_complete(
    vcpus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explore", "--json", "--vcpus", str(vcpus)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert "migrated" in {goal["goal"] for goal in answer["reached"]}
    assert answer["warnings"] == []


@pytest.mark.parametrize("option", [["--messages", "4"], ["--ceiling", "3"]])
def test_sizes_in_which_no_migration_completes_are_warned_of(
    option: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = ["--vcpus", "2", *option]
    assert cli.main(["explore", *sizes]) == 0
    told = capsys.readouterr().out
    assert f"warning: {option[0]}" in told
    assert "warning: no migration completes" in told
    assert cli.main(["export", "promela", *sizes, "--out", str(tmp_path)]) == 0
    assert f"warning: {option[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--vcpus", "99999"], "99999"), (["--limit", "100000000000"], "--limit")],
)
def test_what_would_fill_the_memory_is_wrong_usage(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explore", *options]) == 2
    assert says in capsys.readouterr().err
