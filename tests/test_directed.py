"""Does the directed search find long runs, and does it claim no more than it saw?"""

from __future__ import annotations

import pytest
from toy_handover import DONE, SAFE, SIZES, copied, dirty_count, phase

from tdxmig_model.explore import directed, explore
from tdxmig_model.explore.relaxed import Distance
from tdxmig_model.explore.successors import FlatWriter
from tdxmig_model.expr import (
    BOOL,
    INT,
    Instance,
    Interpreter,
    Node,
    System,
    all_of,
    index,
    initial_state,
    mapping,
    need,
    not_,
    param,
    scalar,
    step,
)
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.model.words import HARDENED, TDX_1_5_01
from tdxmig_model.smt.bounded import inside
from tdxmig_model.smt.finite import slice_for
from tdxmig_model.smt.runs import replay, shortened
from tdxmig_model.verify import removed_by
from tdxmig_model.verify.judge import ceiling, direct, small_instance

DIGIT = index("Digit")
on = mapping("on", (DIGIT,), BOOL, False, "host")
level = scalar("level", INT, 0, "host")
noise = mapping("noise", (DIGIT,), BOOL, False, "host")
d = param("d", DIGIT)


def _step(name, params, when, then):
    return step(name, "host", params, when=when, then=then, why="toy", cite="none")


def chain(length: int) -> tuple[System, Instance, Node]:
    """A chain of levels, each of which needs its digit; digits of the noise can always change."""
    steps = (
        _step("set", (d,), (need("at", level.eq(d)),), (on[d].to(True),)),
        _step("climb", (d,), (need("at", level.eq(d)), need("on", on[d])), (level.to(level + 1),)),
        _step("flip", (d,), (need("off", not_(noise[d])),), (noise[d].to(True),)),
        _step("flop", (d,), (need("on", noise[d]),), (noise[d].to(False),)),
    )
    # The goal reads the noise, so that slicing cannot remove it.
    goal = all_of(level.eq(length), not_(noise[0]))
    system = System("chain", (on, level, noise), steps)
    return system, Instance({"Digit": length}), goal


def found(system, instance, goal, limit=20_000, top=2):
    return directed(system, instance, goal, ceiling=top, limit=limit)


def replayed(system, instance, result, goal):
    return replay(system, instance, [(s.step, s.params) for s in result.trace], goal)


def test_a_goal_of_the_initial_state_needs_no_step():
    result = found(SAFE, Instance(SIZES), dirty_count.eq(0))
    assert (result.trace, result.states) == ((), 1)


def test_a_run_of_the_toy_replays_and_is_made_a_shortest_one():
    goal = all_of(phase.eq(DONE), copied[0, 1])
    result = found(SAFE, Instance(SIZES), goal)
    run = shortened(SAFE, replayed(SAFE, Instance(SIZES), result, goal), goal)
    shortest = explore(SAFE, Instance(SIZES), bad=goal, ceiling=2)
    assert run.depth == len(shortest.trace) == 6
    assert Interpreter(SAFE, run.instance).value(goal, run.states[-1], {})


def test_a_goal_behind_a_long_chain_is_found_where_breadth_first_search_is_not_near():
    system, instance, goal = chain(14)
    limit = 5_000
    broad = explore(system, instance, goals={"goal": goal}, limit=limit, ceiling=14)
    assert broad.truncated
    assert not broad.reached
    result = found(system, instance, goal, limit, top=14)
    run = shortened(system, replayed(system, instance, result, goal), goal)
    assert run.depth == 28
    assert {name for name, _ in run.moves} == {"set", "climb"}


def test_shortening_drops_detours_of_one_and_two_steps():
    system, instance, goal = chain(2)
    moves = [("flip", {"d": 0}), ("set", {"d": 0}), ("flip", {"d": 1}), ("climb", {"d": 0})]
    moves += [("flop", {"d": 0}), ("set", {"d": 1}), ("climb", {"d": 1})]
    run = shortened(system, replay(system, instance, moves, goal), goal)
    assert [name for name, _ in run.moves] == ["set", "climb", "set", "climb"]
    assert replay(system, instance, run.moves, goal).states == run.states


def test_a_goal_that_the_relaxation_refutes_is_not_found_and_nothing_is_called_exhausted():
    result = found(SAFE, Instance(SIZES), dirty_count.eq(7))
    assert (result.trace, result.states, result.exhausted) == (None, 1, False)


def test_an_unreachable_goal_ends_within_its_limit_without_a_claim():
    system, instance, _ = chain(8)
    never = all_of(level.eq(8), not_(on[0]), not_(noise[0]))
    result = found(system, instance, never, limit=500, top=8)
    assert result.trace is None
    assert not result.exhausted
    assert 500 <= result.states < 600


def test_all_states_are_called_all_only_if_none_was_pruned_or_clipped():
    tick = scalar("tick", BOOL, False, "host")
    tock = scalar("tock", BOOL, False, "host")
    steps = (
        _step("tick", (), (need("off", not_(tick)),), (tick.to(True), tock.to(False))),
        _step("tock", (), (need("on", tick),), (tick.to(False), tock.to(True))),
    )
    system = System("clock", (tick, tock), steps)
    both = found(system, Instance({}), all_of(tick, tock))
    assert (both.trace, both.states, both.exhausted) == (None, 3, True)
    up = _step("up", (), (need("low", level.lt(9)),), (level.to(level + 1),))
    clipped = found(System("stairs", (level,), (up,)), Instance({}), level.eq(5), top=4)
    assert (clipped.trace, clipped.exhausted) == (None, False)


def test_the_search_is_deterministic():
    system, instance, goal = chain(9)
    assert found(system, instance, goal, top=9) == found(system, instance, goal, top=9)


def test_a_state_on_a_run_to_the_goal_has_a_distance():
    """What the relaxation calls unreachable would be pruned."""
    goal = all_of(phase.eq(DONE), copied[0, 1], copied[1, 0])
    instance = Instance(SIZES)
    trace = explore(SAFE, instance, bad=goal, ceiling=2).trace
    run = replay(SAFE, instance, [(s.step, s.params) for s in trace], goal)
    distance = Distance(SAFE, FlatWriter(SAFE, instance), 2, goal)
    measured = [distance.of(_flat(state)) for state in run.states]
    assert None not in measured
    assert measured[-1] == 0
    assert 0 not in measured[:-1]


def _flat(state):
    return tuple(v for slot in state for v in (slot if isinstance(slot, list) else [slot]))


def test_the_slice_of_a_superposed_system_is_a_system():
    part = MEMORY.under(HARDENED)
    instance = small_instance(part)
    sliced = slice_for(part, instance, [inside(part.property("P18").witness, instance)])
    assert sliced.base is None
    assert len(sliced.variables) < len(part.variables)
    assert initial_state(sliced, instance)


@pytest.mark.parametrize("name", ["P13", "P17", "P18"])
def test_the_witnesses_that_need_long_runs_are_found(name):
    part = MEMORY.under(HARDENED)
    instance = small_instance(part)
    wanted = inside(part.property(name).witness, instance)
    run = direct(part, instance, wanted, 5_000)
    assert run is not None
    assert replay(part, instance, run.moves, wanted).depth == run.depth


@pytest.mark.parametrize(
    "guard",
    [
        ("export_abort_with_token", "abort_token"),
        ("export_abort", "op_state"),
        ("export_pause", "no_vcpu_inside"),
    ],
)
def test_the_guards_of_the_single_owner_forbid_a_run_that_is_found(guard):
    mutant = LEAF.under(HARDENED).without(*guard)
    instance = small_instance(mutant)
    wanted = inside(not_(mutant.property("P1").formula), instance)
    run = direct(mutant, instance, wanted, 5_000)
    assert run is not None
    assert guard[0] in [name for name, _ in run.moves]
    assert ceiling(instance) == 6


def test_a_counterexample_is_told_by_the_repair_that_removes_it():
    """A page that counts as exported, in a bundle that does not count."""
    part = MEMORY.under(TDX_1_5_01)
    instance = small_instance(part)
    claimed = part.property("P15")
    run = direct(part, instance, inside(not_(claimed.formula), instance), 5_000)
    assert run is not None
    assert removed_by(MEMORY, run, claimed) == ("R1", "R14")
