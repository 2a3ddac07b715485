"""Compare compiled code, and z3's encoding, with the interpreter: step by step, state by state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from random_models import random_state

from tdxmig_model.compile import Compiled
from tdxmig_model.expr import BOOL, Instance, Interpreter, Step, System
from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.finite import Finite, width_for


def random_parameters(row: Step, instance: Instance, chance: random.Random) -> dict[str, Any]:
    choices = {p.name: chance.choice(instance.domain(p.kind)) for p in row.params}
    return {
        p.name: bool(choices[p.name]) if p.kind == BOOL else choices[p.name] for p in row.params
    }


def copied(state: list[Any]) -> list[Any]:
    return [v.copy() if hasattr(v, "copy") else v for v in state]


def as_arrays(state: list[Any]) -> list[Any]:
    return [np.array(v) if isinstance(v, list) else v for v in state]


def as_lists(state: list[Any]) -> list[Any]:
    return [v.tolist() if isinstance(v, np.ndarray) else v for v in state]


def outcome(function: Any, *arguments: Any) -> Any:
    """The value, or the kind of exception: a read outside a map is one in both."""
    try:
        return function(*arguments)
    except IndexError:
        return IndexError


def agree(system: System, instance: Instance, rounds: int, seed: int) -> dict[bool, int]:
    """Compare every step of a system with the interpreter in random states."""
    chance = random.Random(seed)
    interpreter = Interpreter(system, instance)
    compiled = Compiled(system, instance)
    seen = {True: 0, False: 0}
    for row in system.steps:
        for _ in range(rounds):
            state = random_state(system, instance, chance)
            params = random_parameters(row, instance, chance)
            values = tuple(params.values())
            expected = outcome(interpreter.enabled, row, state, params)
            for layout in (copied(state), as_arrays(state)):
                held = outcome(compiled.guard(row.name), layout, *values)
                assert held is expected, (row.name, state, params)
            if expected is IndexError:
                continue
            seen[expected] += 1
            unmet = outcome(compiled.unmet, row.name, state, *values)
            if unmet is not IndexError:
                wanted = [
                    n.label for n in row.when if not interpreter.value(n.formula, state, params)
                ]
                assert [u.label for u in unmet] == wanted
            after = outcome(interpreter.apply, row, state, params)
            for layout in (copied(state), as_arrays(state)):
                result = outcome(compiled.apply(row.name), layout, *values)
                if after is IndexError:
                    assert result is IndexError
                    assert as_lists(layout) == state
                    continue
                assert as_lists(layout) == after, (row.name, state, params)
                assert all(type(v) in (int, bool, list, np.ndarray) for v in layout)
    return seen


OUTSIDE = "outside"


class Witnesses:
    """The interpreter, compiled code and z3, which are asked the same of one state."""

    def __init__(self, system: System, instance: Instance, *, around: int = 0) -> None:
        self.system = system
        self.interpreter = Interpreter(system, instance)
        self.compiled = Compiled(system, instance)
        self.encoder = Finite(system, instance, width_for(system, instance, [], 2, around=around))

    def choices(self) -> Iterator[tuple[Step, dict[str, Any]]]:
        """Every step with every choice of its parameters."""
        for row in self.system.steps:
            for params in self.interpreter.choices(row):
                yield row, dict(params)

    def after(self, row: Step, state: list[Any], params: Mapping[str, Any]) -> Any:
        """The interpreter's next state; None if the step is not enabled, OUTSIDE if it leaves the
        instance.
        """
        held = outcome(self.interpreter.enabled, row, state, params)
        if held is True:
            held = outcome(self.interpreter.apply, row, state, params)
        return OUTSIDE if held is IndexError else held or None

    def by_code(self, row: Step, state: list[Any], params: Mapping[str, Any]) -> Any:
        """The same of compiled code, which leaves the state alone where it leaves the instance."""
        values = tuple(params.values())
        held = outcome(self.compiled.guard(row.name), state, *values)
        if held is False:
            return None
        found = copied(state)
        if held is IndexError or outcome(self.compiled.apply(row.name), found, *values) is not None:
            assert found == state, (row.name, params, state)
            return OUTSIDE
        return found

    def by_z3(self, row: Step, state: list[Any], params: Mapping[str, Any]) -> list[Any] | None:
        """The same of z3, which only has to work out terms without unknowns."""
        pairs = list(zip(self.system.variables, state, strict=True))
        cells = {
            v.name: [
                self.encoder.literal_of(v.kind, x) for x in (x if isinstance(x, list) else [x])
            ]
            for v, x in pairs
        }
        view = self.encoder.view(cells)
        env = {p.name: self.encoder.literal_of(p.kind, params[p.name]) for p in row.params}
        if not z.evaluated(self.encoder.fires(row, view, env)):
            return None
        written = self.encoder.written(row, view, env)
        found: list[Any] = []
        for v, x in pairs:
            new = [z.evaluated(t) for t in written[v.name]] if v.name in written else None
            found.append(x if new is None else new if isinstance(x, list) else new[0])
        return found

    def agree(self, state: list[Any], row: Step, params: Mapping[str, Any], *, z3: bool) -> bool:
        """Compare them on one step in one state; whether it can be taken there."""
        wanted = self.after(row, state, params)
        said = row.name, params, state
        assert self.by_code(row, state, params) == wanted, said
        inside = None if wanted is OUTSIDE else wanted
        assert not z3 or self.by_z3(row, state, params) == inside, said
        return inside is not None

    def agree_on_all(self, state: list[Any], *, z3: bool) -> int:
        """Compare them on every step in one state; how many can be taken there."""
        return sum(self.agree(state, row, params, z3=z3) for row, params in self.choices())
