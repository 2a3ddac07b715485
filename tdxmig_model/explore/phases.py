"""A search for long runs in which one actor takes all its steps before the others take theirs.

Where an actor reads nothing that the others write, each of their steps can wait until it has done
everything: every run is a run in this order, up to the order of steps that do not see each other.
So its states are found without theirs, and of all its states that look alike to the others and to
the formula one is enough.  The others then go on from each of these.

A further bound keeps it small: a *box*, the largest values that integers have in runs that are
known already, such as those to the witnesses of the properties.  A counterexample is seldom larger
than the runs that show that the model works.

This finds runs; a search that finds none claims nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tdxmig_model.explore.columns import Columns, Places
from tdxmig_model.explore.relaxed import Distance
from tdxmig_model.explore.search import Trace
from tdxmig_model.explore.wide import HashSet, Layer, Wide
from tdxmig_model.expr import INT, Instance, MapVariable, Node, State, Step, System
from tdxmig_model.expr.finite import ceilings, finite_conditions, simplify
from tdxmig_model.expr.types import is_integer
from tdxmig_model.smt.bounded import inside
from tdxmig_model.smt.encode import reads
from tdxmig_model.smt.finite import slice_for


@dataclass(frozen=True, slots=True)
class Phased:
    """What a search in phases saw: a run to the formula, if one was found, and how many states."""

    trace: Trace | None
    states: int


def box_of(system: System, runs: Iterable[Iterable[State]]) -> dict[str, int]:
    """The largest magnitude of each integer variable in some runs."""
    box: dict[str, int] = {}
    for state in (s for run in runs for s in run):
        for variable, value in zip(system.variables, state, strict=True):
            if variable.kind == INT:
                values = value if isinstance(value, list) else [value]
                largest = max((abs(int(v)) for v in values), default=0)
                box[variable.name] = max(box.get(variable.name, 0), largest)
    return box


def in_phases(
    system: System,
    instance: Instance,
    wanted: Node,
    *,
    ceiling: int,
    box: Mapping[str, int],
    slack: int,
    limit: int,
) -> Phased:
    """Search the part of the system that the formula depends on for a state that satisfies it.

    No integer grows larger than in the box, and `slack` percent of that.  `limit` is how many
    states are visited at most.
    """
    formula = inside(wanted, instance)
    part = slice_for(system, instance, [formula])
    limits = {
        name: min(most, _grown(box.get(name, most), slack))
        for name, most in ceilings(part, instance, ceiling).items()
    }
    search = _Search(part, instance, formula, limits)
    return search.run(limit)


def _grown(most: int, slack: int) -> int:
    return most + most * slack // 100


def _seen_by(steps: Iterable[Step], instance: Instance) -> frozenset[str]:
    """The variables that the conditions and the updates of some steps read."""
    found: set[str] = set()
    for step in steps:
        for condition in finite_conditions(step, instance, {}):
            found |= reads(condition.formula)
        for assign in step.then:
            found |= reads(assign.value).union(*(reads(k) for k in assign.keys))
    return frozenset(found)


def first_actor(system: System, instance: Instance) -> str:
    """The actor that sees least of what the others write."""

    def sees(actor: str) -> int:
        mine = [s for s in system.steps if s.actor == actor]
        written = {v for s in system.steps if s.actor != actor for v in s.writes()}
        own = {v for s in mine for v in s.writes()}
        return len((_seen_by(mine, instance) & written) - own)

    return min(dict.fromkeys(s.actor for s in system.steps), key=sees)


class _Search:
    """The first actor's states, layer by layer, and what the others make of each kind of them."""

    def __init__(
        self, part: System, instance: Instance, wanted: Node, limits: Mapping[str, int]
    ) -> None:
        first = first_actor(part, instance)
        before = [s for s in part.steps if s.actor == first]
        after = [s for s in part.steps if s.actor != first]
        self.alone = Wide(_only(part, before), instance, limits)
        self.others = Wide(_only(part, after), instance, limits)
        self.wanted = simplify(wanted, instance)
        self.relaxed = Distance(_only(part, after), self.others.writer, limits, wanted)
        self.kinds = HashSet()
        self.visible = self._cells(_seen_by(after, instance) | reads(wanted))
        self.modes = self._cells(
            {
                v.name
                for v in part.variables
                if not isinstance(v, MapVariable) and not is_integer(v.kind)
            }
        )

    def _cells(self, names: Iterable[str]) -> list[int]:
        writer = self.alone.writer
        starts = [*writer.base.values(), writer.width]
        ranges = {
            v.name: range(low, high)
            for v, low, high in zip(writer.system.variables, starts[:-1], starts[1:], strict=True)
        }
        return [cell for name in names for cell in ranges[name]]

    def run(self, limit: int) -> Phased:
        """Search until the formula is met, nothing is left, or there are too many states."""
        layer = self.alone.begin(self.alone.first())
        while layer.size:
            chosen = self._new_kinds(layer)
            roots = replace(layer.only(chosen), parents=-1 - (chosen + layer.start))
            found = self._go_on(roots, limit)
            states = self.alone.count + self.others.count
            if found is not None:
                return Phased(self._trace(found), states)
            if states >= limit:
                return Phased(None, states)
            layer = self.alone.expand(layer)
        return Phased(None, self.alone.count + self.others.count)

    def _go_on(self, roots: Layer, limit: int) -> int | None:
        """What the others do from some states; the number of a state that satisfies the formula."""
        layer = self.others.begin(roots)
        while layer.size:
            holds = Columns(self.others.writer, layer.matrix).holds(self.wanted)
            if holds.any():
                return layer.start + int(np.argmax(holds))
            if self.others.count + self.alone.count >= limit:
                return None
            layer = self.others.expand(layer)
        return None

    def _new_kinds(self, layer: Layer) -> Places:
        """One state of each kind that the others see for the first time and can do it from."""
        kinds, where = np.unique(self.alone.hashed(layer.matrix, self.visible), return_index=True)
        where = np.sort(where[self.kinds.add(kinds)])
        _, groups = np.unique(
            self.alone.hashed(layer.matrix[:, where], self.modes), return_inverse=True
        )
        kept = np.zeros(len(where), bool)
        for group in range(int(groups.max(initial=-1)) + 1):
            mine = groups == group
            kept[mine] = self._can(layer, where[mine])
        return where[kept]

    def _can(self, layer: Layer, where: Places) -> bool:
        """Whether the relaxation leads to the formula from all these states taken together."""
        values = [np.unique(row[where]).tolist() for row in layer.matrix]
        return self.relaxed.of_sets(values) is not None

    def _trace(self, found: int) -> Trace:
        after, origin = self.others.way(found)
        before, _ = self.alone.way(origin)
        return (*before, *after)


def _only(part: System, steps: Iterable[Step]) -> System:
    return replace(part, steps=tuple(steps), _by_name={})
