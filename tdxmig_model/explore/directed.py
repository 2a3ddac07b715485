"""Directed search for a run to a formula: best-first, by distance and by novelty.

It finds long runs that a breadth-first search of as many states does not come near.  What orders
the states is computed from the model alone: the distance in the delete relaxation (`relaxed`), and
whether a state has something new, as in best-first width search (Lipovetzky and Geffner, 2017): a
value of a cell (novelty 1), or values of two cells (novelty 2), that no earlier state at the same
distance had.

Two queues take turns, one with distance first and one with novelty first: the one hurries, the
other does not stay where distance misleads.  A run that is found need not be a shortest one.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

from tdxmig_model.explore.relaxed import Distance
from tdxmig_model.explore.search import Trace, TraceStep
from tdxmig_model.explore.successors import FlatState, Successors
from tdxmig_model.expr import Instance, Node, System, Value
from tdxmig_model.smt.bounded import inside
from tdxmig_model.smt.finite import slice_for


@dataclass(frozen=True, slots=True)
class Directed:
    """What a directed search saw.

    `trace` is a run to the formula, None if none was found.  `states` counts those that were
    visited, of the part of the system that the formula depends on.  `exhausted` says that these are
    all: nothing was pruned, clipped or left for the limit.
    """

    trace: Trace | None
    states: int
    exhausted: bool


def directed(
    system: System, instance: Instance, wanted: Node, *, ceiling: int, limit: int
) -> Directed:
    """Search the part of the system that the formula depends on for a state that satisfies it.

    `ceiling` is the largest magnitude of integers that are no positions; `limit` is how many states
    are visited at most, so that the answer does not depend on the machine.
    """
    formula = inside(wanted, instance)
    part = slice_for(system, instance, [formula])
    search = _Search(part, instance, formula, ceiling)
    # The collector would look at every state again and again, and there are no cycles.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return search.run(limit)
    finally:
        if collecting:
            gc.enable()


class _Novelty:
    """What the states at each distance have had, as sets of facts: a bit for a cell and its value.

    Two facts were seen together if the second is among those that were seen with the first.
    """

    def __init__(self) -> None:
        self._bits: dict[tuple[int, Value], int] = {}
        self._alone: dict[int, int] = {}
        self._together: dict[tuple[int, int], int] = {}

    def fact(self, cell: int, value: Value) -> int:
        """The set of one fact."""
        return self._bits.setdefault((cell, value), 1 << len(self._bits))

    def of(self, distance: int, facts: int, changed: list[int] | None) -> int:
        """1, 2, or 3 for nothing new; and note what the state has.

        `changed` are its facts that a state at this distance with all others did not have.
        """
        alone = self._alone.get(distance, 0)
        self._alone[distance] = alone | facts
        new = False
        for fact in _members(facts) if changed is None else changed:
            together = self._together.get((distance, fact), 0)
            if facts & ~together:
                self._together[distance, fact] = together | facts
                new = True
        return 1 if facts & ~alone else 2 if new else 3


def _members(facts: int) -> Iterator[int]:
    while facts:
        lowest = facts & -facts
        yield lowest
        facts ^= lowest


class _Search:
    """The states in the order of discovery, each with how it was found and what it has."""

    def __init__(self, part: System, instance: Instance, wanted: Node, ceiling: int) -> None:
        self.successors = Successors(part, instance, ceiling)
        self.distance = Distance(part, self.successors.writer, ceiling, wanted)
        self.reached = self.successors.inspector({}, {"wanted": wanted})
        self.novelty = _Novelty()
        self.order: list[FlatState] = []
        self.seen: dict[FlatState, int] = {}
        self.found_by: list[tuple[int, int]] = []
        self.depths: list[int] = []
        self.facts: list[int] = []
        self.distances: list[int | None] = []
        self.queues: tuple[_Queue, _Queue] = ([], [])
        self.expanded: set[int] = set()
        self.cut = 0
        self._start()

    def _start(self) -> None:
        state = self.successors.initial
        self.order.append(state)
        self.seen[state] = 0
        self.found_by.append((-1, -1))
        self.depths.append(0)
        self.facts.append(sum(self.novelty.fact(c, v) for c, v in enumerate(state)))
        self._enter(0, None)

    def run(self, limit: int) -> Directed:
        """Expand states until the formula is met, none is left, or there are too many."""
        looked, turn = 0, 0
        while True:
            met: dict[str, int] = {}
            self.reached(looked, len(self.order), self.order, {}, met)
            looked = len(self.order)
            if met:
                return Directed(self._trace(met["wanted"]), looked, exhausted=False)
            place = self._next(turn)
            if place is None:
                return Directed(None, looked, exhausted=not self.cut)
            if looked >= limit:
                return Directed(None, looked, exhausted=False)
            self._expand(place)
            turn = 1 - turn

    def _next(self, turn: int) -> int | None:
        """The best state of a queue that was not expanded yet; both queues hold the same states."""
        queue = self.queues[turn]
        while queue:
            place = heappop(queue)[-1]
            if place not in self.expanded:
                self.expanded.add(place)
                return place
        return None

    def _expand(self, place: int) -> None:
        labels: list[int] = []
        targets: list[int] = []
        size = len(self.order)
        self.cut += self.successors.expand(
            place, place + 1, self.order, self.seen, labels, targets, []
        )
        by = dict(zip(reversed(targets), reversed(labels), strict=True))
        before = self.order[place]
        for number in range(size, len(self.order)):
            facts = self.facts[place]
            changed = []
            pairs = zip(before, self.order[number], strict=True)
            for cell, (old, new) in enumerate(pairs):
                if old != new:
                    fact = self.novelty.fact(cell, new)
                    facts ^= self.novelty.fact(cell, old) | fact
                    changed.append(fact)
            self.found_by.append((place, by[number]))
            self.depths.append(self.depths[place] + 1)
            self.facts.append(facts)
            self._enter(number, changed)

    def _enter(self, number: int, changed: list[int] | None) -> None:
        """Measure a new state and put it in both queues, unless it can never reach the formula."""
        distance = self.distance.of(self.order[number])
        self.distances.append(distance)
        if distance is None:
            self.cut += 1
            return
        before = self.found_by[number][0]
        if before < 0 or self.distances[before] != distance:
            changed = None
        novelty = self.novelty.of(distance, self.facts[number], changed)
        depth = self.depths[number]
        heappush(self.queues[0], (distance, novelty, depth, number))
        heappush(self.queues[1], (novelty, distance, depth, number))

    def _trace(self, place: int) -> Trace:
        steps = []
        while place:
            place, number = self.found_by[place]
            label = self.successors.labels[number]
            steps.append(TraceStep(label.step, label.params))
        return tuple(reversed(steps))


_Queue = list[tuple[int, int, int, int]]
