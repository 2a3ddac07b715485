"""Runs of a finite instance: what a counterexample is, checked step by step by the interpreter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import (
    ForAll,
    Instance,
    Interpreter,
    MapVariable,
    Node,
    Or,
    State,
    System,
    Value,
    Variable,
    initial_state,
)
from tdxmig_model.expr.types import Type

Move = tuple[str, Mapping[str, Value]]
"""A step and the values of its parameters."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run from the initial state: one state more than moves."""

    instance: Instance
    moves: tuple[Move, ...]
    states: tuple[State, ...]

    @property
    def depth(self) -> int:
        """How many steps it takes."""
        return len(self.moves)


def replay(
    system: System, instance: Instance, moves: Sequence[Move], ends_in: Node | None = None
) -> Run:
    """Take the moves on the interpreter; ModelError if one is not enabled or the end is another.

    `ends_in` is a formula that the last state must satisfy.
    """
    interpreter = Interpreter(system, instance)
    state = initial_state(system, instance)
    states = [state]
    for number, (name, values) in enumerate(moves, 1):
        step = system.step(name)
        try:
            for need in step.when:
                if not interpreter.value(need.formula, state, values):
                    raise ModelError(
                        f"the trace does not replay: step {number}, {name}, needs {need.label}"
                    )
            state = interpreter.apply(step, state, values)
        except IndexError as error:
            raise ModelError(
                f"the trace does not replay: step {number}, {name}, leaves the instance"
            ) from error
        states.append(state)
    if ends_in is not None and not interpreter.value(ends_in, state, {}):
        raise ModelError(f"the trace replays but does not end in a state with {ends_in}")
    return Run(instance, tuple((n, dict(v)) for n, v in moves), tuple(states))


def shortened(system: System, run: Run, ends_in: Node) -> Run:
    """A run with some of the moves that still ends as wanted: leaving out one or two more fails."""
    interpreter = Interpreter(system, run.instance)
    moves = list(run.moves)
    states = list(run.states)
    again = True
    while again:
        again = False
        for gone in _one_or_two(len(moves)):
            kept = [m for n, m in enumerate(moves) if n not in gone]
            tail = _taken(interpreter, states[gone[0]], kept[gone[0] :])
            if tail is not None and interpreter.value(ends_in, tail[-1], {}):
                moves, states = kept, states[: gone[0]] + tail
                again = True
                break
    return Run(run.instance, tuple(moves), tuple(states))


def _one_or_two(length: int) -> Iterator[tuple[int, ...]]:
    """The places to leave out, later ones first: they are quickly seen to be needed."""
    yield from ((n,) for n in reversed(range(length)))
    yield from ((n, m) for n in reversed(range(length)) for m in range(n + 1, length))


def _taken(interpreter: Interpreter, state: State, moves: Sequence[Move]) -> list[State] | None:
    """The states of the moves from a state on; None if one of them is not enabled."""
    states = [state]
    try:
        for name, values in moves:
            step = interpreter.system.step(name)
            if not interpreter.enabled(step, states[-1], values):
                return None
            states.append(interpreter.apply(step, states[-1], values))
    except IndexError:
        return None
    return states


def cells_of(
    instance: Instance, variable: Variable | MapVariable, value: object
) -> list[tuple[str, Type, Value]]:
    """Name, type and value of each element of a variable of a finite instance."""
    if isinstance(variable, Variable):
        assert isinstance(value, int)
        return [(variable.name, variable.kind, value)]
    keys = product(*(range(instance.bounded(k)) for k in variable.indexes))
    assert isinstance(value, list)
    return [
        (f"{variable.name}[{', '.join(map(str, key))}]", variable.kind, cell)
        for key, cell in zip(keys, value, strict=True)
    ]


def failing_element(
    system: System, instance: Instance, formula: Node, state: State
) -> dict[str, int]:
    """The first elements for which a quantified formula is false in a state."""
    interpreter = Interpreter(system, instance)
    match formula:
        case ForAll():
            ranges = [range(instance.bounded(b.kind)) for b in formula.bound]
            for numbers in product(*ranges):
                chosen = {b.name: n for b, n in zip(formula.bound, numbers, strict=True)}
                try:
                    holds = interpreter.value(formula.body, state, chosen)
                except IndexError:
                    continue
                if not holds:
                    return chosen
        case Or():
            for part in formula.parts:
                found = failing_element(system, instance, part, state)
                if found:
                    return found
    return {}
