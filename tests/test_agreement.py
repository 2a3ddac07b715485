"""Do the interpreter, compiled code, the search's code and z3 see one system in every model?"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from agreement import Witnesses, agree, as_lists, random_parameters
from expectations import MODELS, instance_of, load
from random_models import random_state
from reference import Frozen, Reference
from small_instances import entry_of, small

from tdxmig_model.errors import Refused
from tdxmig_model.explore.successors import FlatState, Successors
from tdxmig_model.expr import Instance, Interpreter, MapVariable, System, initial_state
from tdxmig_model.machine import SIDES, LifecycleMachine, event_name
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.words import PROFILES, TDX_1_5_01

CASES = [(model, profile) for model in MODELS for profile in PROFILES]
# The largest models have twice as many states, which take longer than the rest together.
LARGE = [(model, TDX_1_5_01) for model in ("leaf", "order", "memory", "calls")]
STATES = [pytest.param(*c, marks=[pytest.mark.slow] if c in LARGE else []) for c in CASES]


def flat(state: Frozen) -> FlatState:
    return tuple(x for value in state for x in (value if isinstance(value, tuple) else (value,)))


def unflat(system: System, instance: Instance, state: FlatState) -> list[Any]:
    """A state of the search, as the interpreter has it."""
    found: list[Any] = []
    place = 0
    for variable in system.variables:
        if not isinstance(variable, MapVariable):
            found.append(state[place])
            place += 1
            continue
        length = 1
        for kind in variable.indexes:
            length *= instance.bounded(kind)
        found.append(list(state[place : place + length]))
        place += length
    assert place == len(state)
    return found


def expanded(successors: Successors) -> tuple[list[FlatState], set[Any], int]:
    """States in the order of discovery, edges, and how many steps were clipped."""
    order = [successors.initial]
    seen = {successors.initial: 0}
    edges: set[Any] = set()
    clipped = source = 0
    while source < len(order):
        labels, targets, ends = [], [], []
        clipped += successors.expand(source, source + 1, order, seen, labels, targets, ends)
        for label, target in zip(labels, targets, strict=True):
            edges.add((order[source], str(successors.labels[label]), order[target]))
        source += 1
    return order, edges, clipped


# --- random states --------------------------------------------------------------------------------


def four_each(system: System) -> Instance:
    return Instance.small(system, {kind.name: 4 for kind in system.indexes()})


@pytest.mark.parametrize(("model", "profile"), CASES)
def test_compiled_code_agrees_in_random_states(model: str, profile: str) -> None:
    system = MODELS[model].under(profile)
    seen = agree(system, four_each(system), 40, 1)
    assert seen[False] > 20
    assert seen[True] > 20


@pytest.mark.parametrize(("model", "profile"), CASES)
def test_z3_agrees_in_random_states(model: str, profile: str) -> None:
    system = MODELS[model].under(profile)
    instance = four_each(system)
    witnesses = Witnesses(system, instance, around=8)
    chance = random.Random(7)
    for row in system.steps:
        for _ in range(12):
            state = random_state(system, instance, chance)
            witnesses.agree(state, row, random_parameters(row, instance, chance), z3=True)


# --- reachable states -----------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "profile"), STATES)
def test_the_search_takes_the_steps_of_the_interpreter(model: str, profile: str) -> None:
    system, instance, limits = small(model, profile)
    reference = Reference(system, instance, limits)
    order, edges, clipped = expanded(Successors(system, instance, limits))
    assert set(order) == {flat(state) for state in reference.distance}
    assert edges == {(flat(a), label, flat(b)) for a, label, b in reference.edges}
    assert clipped == reference.clipped
    assert len(order) > 100


@pytest.mark.parametrize(("model", "profile"), STATES)
def test_compiled_code_agrees_in_all_reachable_states(model: str, profile: str) -> None:
    system, instance, limits = small(model, profile)
    order, edges, clipped = expanded(Successors(system, instance, limits))
    witnesses = Witnesses(system, instance)
    taken = sum(witnesses.agree_on_all(unflat(system, instance, s), z3=False) for s in order)
    assert len(edges) <= taken <= len(edges) + clipped


def agree_on_some(entry: dict[str, Any], parts: int, *, z3: bool) -> None:
    """Compare in states that lie evenly among all that a search finds."""
    system, instance, limits = instance_of(entry)
    order, _, _ = expanded(Successors(system, instance, limits))
    witnesses = Witnesses(system, instance, around=max(limits.values(), default=0))
    chosen = order[:: max(1, len(order) // parts)]
    taken = 0
    for state in chosen:
        taken += witnesses.agree_on_all(unflat(system, instance, state), z3=z3)
    assert taken > len(chosen) // 2


@pytest.mark.parametrize(("model", "profile"), CASES)
def test_z3_agrees_in_a_sample_of_reachable_states(model: str, profile: str) -> None:
    agree_on_some(entry_of(model, profile), 40, z3=True)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "profile"), CASES)
def test_z3_agrees_in_all_reachable_states_or_in_2000(model: str, profile: str) -> None:
    agree_on_some(entry_of(model, profile), 2000, z3=True)


@pytest.mark.slow
@pytest.mark.parametrize("entry", load()["searches"], ids=lambda e: f"{e['model']}-{e['profile']}")
def test_they_agree_in_a_sample_of_the_expected_states(entry: dict[str, Any]) -> None:
    """The instances of specs/expect.json have states in which nearly every row can be taken."""
    agree_on_some(entry, 200, z3=True)


# --- the lifecycle machine ------------------------------------------------------------------------

RECORDS = 4
"""How many records the network carries at most; the machine itself knows no bound."""


def lifecycle_states(interpreter: Interpreter) -> list[Any]:
    """Every state of both sides that few records lead to, found with the interpreter alone."""
    system = interpreter.system
    sent = interpreter.slots["sent"]
    order = [initial_state(system, interpreter.instance)]
    seen = {repr(order[0])}
    for state in order:
        for row in system.steps:
            for params in interpreter.choices(row):
                if not interpreter.enabled(row, state, params):
                    continue
                after = interpreter.apply(row, state, params)
                if after[sent] <= RECORDS and repr(after) not in seen:
                    seen.add(repr(after))
                    order.append(after)
    return order


def put_into(machine: LifecycleMachine, state: list[Any]) -> None:
    """Set the monitor's state, and the state of the library's model with it."""
    for slot, value in enumerate(state):
        held = machine.monitor.state[slot]
        if isinstance(held, np.ndarray):
            held[:] = value
        else:
            machine.monitor.state[slot] = value.copy() if hasattr(value, "copy") else value
    machine._machine.set_state(machine.phase, model=machine)


def followed(system: System, state: list[Any]) -> list[Any]:
    """What a machine follows of a state: everything but ghosts."""
    pairs = zip(system.variables, as_lists(state), strict=True)
    return [value for variable, value in pairs if not variable.ghost]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("side", SIDES)
def test_the_machine_agrees_in_all_reachable_states(side: str, profile: str) -> None:
    system = LIFECYCLE.under(profile)
    interpreter = Interpreter(system, Instance({"Message": None, "Epoch": None, "Vcpu": 1}))
    machine = LifecycleMachine(side, lambda _event, _params: None, vcpus=1, profile=profile)
    fired = set()
    states = lifecycle_states(interpreter)
    for state in states:
        for row in system.of_actor(side):
            for params in interpreter.choices(row):
                put_into(machine, state)
                event = event_name(side, row.name)
                if not interpreter.enabled(row, state, params):
                    with pytest.raises(Refused):
                        machine.fire(event, **params)
                    wanted = state
                else:
                    machine.fire(event, **params)
                    wanted = interpreter.apply(row, state, params)
                    fired.add(row.name)
                assert followed(system, machine.monitor.state) == followed(system, wanted)
                assert machine.state == machine.phase  # type: ignore[attr-defined]
    assert len(states) > 1000
    assert fired == {row.name for row in system.of_actor(side)}
