"""Breadth-first search over the states of a finite instance.

Integers have no bound of their own: `expr.finite` says which steps a finite instance clips.  What
is not found within the sizes and ceilings is *exhausted* for these, never proved for all.
"""

from __future__ import annotations

import gc
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.explore.successors import FlatState, Label, Successors
from tdxmig_model.expr import Goal, Instance, Node, System, Value, not_

CHUNK = 4096
"""How many states are expanded between two looks at the limit and at what was found."""


@dataclass(frozen=True, slots=True)
class TraceStep:
    """One step of a trace; parameters by name, an enum member as its position."""

    step: str
    params: Mapping[str, Value]

    def __str__(self) -> str:
        return str(Label(self.step, self.params))


Trace = tuple[TraceStep, ...]


def moves_of(trace: Trace) -> list[tuple[str, Mapping[str, Value]]]:
    """The trace as moves that can be replayed."""
    return [(s.step, s.params) for s in trace]


@dataclass(frozen=True, slots=True)
class Exploration:
    """What a search saw.

    `transitions` counts pairs of a state and an enabled step with its parameters.  `depth` is the
    distance of the farthest state.  `trace` is a shortest way to `bad`, None if there is none.
    `violations` and `reached` are shortest ways to a broken invariant and to a goal, by name.
    `clipped` counts the steps not taken because they would leave the instance.  `truncated` says
    that the limit or the depth ended the search: then `dead_steps`, `deadlocks` and `digest` speak
    of a part only.
    """

    states: int
    transitions: int
    depth: int
    digest: str
    trace: Trace | None
    dead_steps: tuple[str, ...]
    truncated: bool
    clipped: int = 0
    deadlocks: int = 0
    violations: Mapping[str, Trace] = field(default_factory=dict)
    reached: Mapping[str, Trace] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def states_per_s(self) -> int:
        """Distinct states per second, code generation included and digest excluded."""
        return round(self.states / self.seconds) if self.seconds else 0


def explore(
    system: System,
    instance: Instance,
    *,
    bad: Node | None = None,
    goals: Mapping[str, Node] | Iterable[Goal] | None = None,
    invariants: Mapping[str, Node] | None = None,
    limit: int | None = None,
    depth: int | None = None,
    ceiling: int | Mapping[str, int] | None = None,
    digest: bool = True,
) -> Exploration:
    """Visit every reachable state, or stop at a first state that is `bad`.

    `limit` (states) and `depth` (steps from the initial state) end the search early.  `ceiling` is
    the largest magnitude of integer variables that are no positions: one for all, or by name.  A
    broken invariant and a goal that is met do not stop the search.
    """
    started = time.perf_counter()
    search = _Search(Successors(system, instance, ceiling))
    wanted = goals if isinstance(goals, Mapping) else {g.identifier: g.formula for g in goals or ()}
    properties = dict(invariants or {})
    if bad is not None:
        properties[_BAD] = not_(bad)
    # The collector would look at every state again and again, and there are no cycles.
    collecting = gc.isenabled()
    gc.disable()
    try:
        truncated = search.run(properties, wanted, limit, depth)
        seconds = time.perf_counter() - started
        return search.result(truncated, seconds, digest=digest)
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Graph:
    """The reachable states of an instance by number, in the order of discovery.

    `edges[state]` are pairs of a step's name and the state that it leads to.  `holds` are, for each
    formula, the states that satisfy it.  `truncated` says that the limit ended the search, and
    `clipped` that some step would have left the instance.
    """

    states: int
    edges: tuple[tuple[tuple[str, int], ...], ...]
    holds: Mapping[str, frozenset[int]]
    truncated: bool
    clipped: bool
    _trace: Callable[[int], Trace] = field(repr=False)

    def trace(self, state: int) -> Trace:
        """A shortest way to a state."""
        return self._trace(state)


def graph(
    system: System,
    instance: Instance,
    formulas: Mapping[str, Node],
    *,
    limit: int,
    ceiling: int | Mapping[str, int] | None = None,
) -> Graph:
    """Every reachable state with its transitions, and which states satisfy each formula."""
    search = _Search(Successors(system, instance, ceiling))
    truncated = search.run({}, {}, limit, None)
    labels, targets, ends = map(_joined, (search.labels, search.targets, search.ends))
    names = [label.step for label in search.successors.labels]
    edges = []
    start = 0
    for end in ends.tolist():
        part = zip(labels[start:end].tolist(), targets[start:end].tolist(), strict=True)
        edges.append(tuple((names[label], target) for label, target in part))
        start = end
    edges += [()] * (len(search.order) - len(edges))
    held = {name: search.successors.satisfying(f, search.order) for name, f in formulas.items()}
    return Graph(
        len(search.order),
        tuple(edges),
        held,
        truncated,
        search.clipped > 0,
        lambda state: search._trace(state, labels, targets, ends),
    )


_BAD = "the bad state"


class _Search:
    """The states in the order of discovery, and every transition as (label, target)."""

    def __init__(self, successors: Successors) -> None:
        self.successors = successors
        initial = successors.initial
        self.order: list[FlatState] = [initial]
        self.seen: dict[FlatState, int] = {initial: 0}
        self.ends: list[_Ints] = []
        self.labels: list[_Ints] = []
        self.targets: list[_Ints] = []
        self.transitions = 0
        self.inspect: Callable[..., None] | None = None
        self.inspected = 0
        self.levels = [0]
        self.clipped = 0
        self.broken: dict[str, int] = {}
        self.met: dict[str, int] = {}

    def run(
        self,
        invariants: Mapping[str, Node],
        goals: Mapping[str, Node],
        limit: int | None,
        depth: int | None,
    ) -> bool:
        """Search; whether it ended before every state was expanded."""
        if invariants or goals:
            self.inspect = self.successors.inspector(invariants, goals)
        expanded = 0
        while expanded < len(self.order):
            if depth is not None and len(self.levels) > depth:
                self._look()
                return True
            level_end = len(self.order)
            while expanded < level_end:
                self._look()
                full = limit is not None and len(self.order) >= limit
                if full or _BAD in self.broken:
                    return True
                stop = min(level_end, expanded + CHUNK)
                self._expand(expanded, stop)
                expanded = stop
            self.levels.append(level_end)
        return False

    def _look(self) -> None:
        """Judge the states that were found since the last look."""
        size = len(self.order)
        if self.inspect is not None:
            self.inspect(self.inspected, size, self.order, self.broken, self.met)
        self.inspected = size

    def _expand(self, first: int, last: int) -> None:
        labels: list[int] = []
        targets: list[int] = []
        ends: list[int] = []
        self.clipped += self.successors.expand(
            first, last, self.order, self.seen, labels, targets, ends
        )
        self.labels.append(np.array(labels, np.int32))
        self.targets.append(np.array(targets, np.int32))
        self.ends.append(np.array(ends, np.int64) + self.transitions)
        self.transitions += len(labels)

    # --- what was seen ----------------------------------------------------------------------------

    def result(self, truncated: bool, seconds: float, *, digest: bool) -> Exploration:
        """The exploration so far."""
        labels, targets, ends = map(_joined, (self.labels, self.targets, self.ends))
        used = set(np.unique(labels).tolist())
        alive = {self.successors.labels[label].step for label in used}
        traces = {
            name: self._trace(place, labels, targets, ends) for name, place in self.broken.items()
        }
        return Exploration(
            states=len(self.order),
            transitions=self.transitions,
            depth=bisect_right(self.levels, len(self.order) - 1) - 1,
            digest=self._digest(labels, targets, ends) if digest else "",
            trace=traces.pop(_BAD, None),
            dead_steps=tuple(s.name for s in self.successors.system.steps if s.name not in alive),
            truncated=truncated,
            clipped=self.clipped,
            deadlocks=int((np.diff(ends, prepend=0) == 0).sum()),
            violations=traces,
            reached={
                name: self._trace(place, labels, targets, ends) for name, place in self.met.items()
            },
            seconds=seconds,
        )

    def _trace(self, place: int, labels: _Ints, targets: _Ints, ends: _Ints) -> Trace:
        """The way on which the search found a state, which is a shortest one."""
        steps = []
        while place:
            edge = int(np.argmax(targets == place))
            label = self.successors.labels[int(labels[edge])]
            steps.append(TraceStep(label.step, label.params))
            place = int(np.searchsorted(ends, edge, side="right"))
        return tuple(reversed(steps))

    def _digest(self, labels: _Ints, targets: _Ints, ends: _Ints) -> str:
        """sha256 over the labels, the sorted states and the sorted (state, label, state).

        A state in a transition is its rank among the sorted ones.  The order of the rows, and of
        discovery, does not matter; that of the variables does.
        """
        try:
            states: _Ints = np.array(self.order, np.int32)
        except OverflowError:
            states = np.array(self.order, np.int64)
        # Moved above zero and big-endian, so that bytes sort as the numbers do.
        width = 2 if np.abs(states).max(initial=0) < 2**15 else 8
        moved = states + 2**15 if width == 2 else states.astype(np.int64) + 2**62
        rows = np.ascontiguousarray(moved.astype(f">u{width}"))
        order = np.argsort(rows.view(f"S{rows.strides[0]}").ravel(), kind="stable")
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        names = sorted(
            range(len(self.successors.labels)), key=lambda k: str(self.successors.labels[k])
        )
        label_rank = np.empty(len(names), np.int64)
        label_rank[names] = np.arange(len(names))
        sources = rank[np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))]
        edges = np.stack([sources, label_rank[labels], rank[targets]], axis=1)
        edges = edges[np.lexsort((edges[:, 2], edges[:, 1], edges[:, 0]))]
        digest = sha256("\n".join(str(self.successors.labels[k]) for k in names).encode())
        digest.update(rows[order].tobytes())
        digest.update(edges.astype("<i8").tobytes())
        return digest.hexdigest()


_Ints = NDArray[np.integer[Any]]


def _joined(parts: list[_Ints]) -> _Ints:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
