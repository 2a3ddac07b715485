"""An independent search: the interpreter alone, for which a position outside a map is an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tdxmig_model.explore.successors import Label
from tdxmig_model.expr import Instance, Interpreter, System, initial_state
from tdxmig_model.expr.finite import ceilings

Frozen = tuple[Any, ...]
Edge = tuple[Frozen, str, Frozen]


def frozen(state: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(v) if isinstance(v, list) else v for v in state)


def thawed(state: tuple[Any, ...]) -> list[Any]:
    return [list(v) if isinstance(v, tuple) else v for v in state]


def within(system: System, limits: Mapping[str, int], state: list[Any]) -> bool:
    for slot, variable in enumerate(system.variables):
        if variable.name in limits:
            values = state[slot] if isinstance(state[slot], list) else [state[slot]]
            if any(abs(v) > limits[variable.name] for v in values):
                return False
    return True


class Reference:
    """States by level, transitions and clipped steps, found with the interpreter alone."""

    def __init__(self, system: System, instance: Instance, ceiling: Any = None) -> None:
        self.system = system
        self.interpreter = Interpreter(system, instance)
        self.limits = ceilings(system, instance, ceiling)
        self.transitions = self.clipped = 0
        self.distance = {frozen(initial_state(system, instance)): 0}
        self.taken: set[str] = set()
        self.edges: set[Edge] = set()
        frontier = list(self.distance)
        depth = 0
        while frontier:
            depth += 1
            reached = []
            for state in frontier:
                for label, after in self.successors(thawed(state)):
                    self.taken.add(label.step)
                    self.edges.add((state, str(label), frozen(after)))
                    self.transitions += 1
                    if frozen(after) not in self.distance:
                        self.distance[frozen(after)] = depth
                        reached.append(frozen(after))
            frontier = reached

    def successors(self, state: list[Any]) -> Iterator[tuple[Label, list[Any]]]:
        for row in self.system.steps:
            for params in self.interpreter.choices(row):
                try:
                    if not self.interpreter.enabled(row, state, params):
                        continue
                    after = self.interpreter.apply(row, state, params)
                except IndexError:
                    self.clipped += 1
                    continue
                if within(self.system, self.limits, after):
                    yield Label(row.name, params), after
                else:
                    self.clipped += 1
