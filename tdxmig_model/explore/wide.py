"""Breadth-first search a layer at a time, for millions of states: to find a run, not to count.

A layer is a matrix (`columns`).  Of a state that was seen, 64 bits of a hash are kept, the state
that it was found from, and the step: the states of earlier layers are not.  Two states with equal
hashes would be taken for one, so a search that finds nothing has *not* seen all states for sure; a
run that is found is replayed by whoever uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.explore.columns import Bytes, Columns, Places
from tdxmig_model.explore.search import Trace, TraceStep
from tdxmig_model.explore.successors import Branch, FlatWriter, Label, conditions_tree
from tdxmig_model.expr import Instance, System
from tdxmig_model.expr.finite import TRUE, FiniteStep

Hashes = NDArray[np.uint64]

CHUNK = 1 << 16
"""How many states are expanded at once."""

SPREAD = np.uint64(0x9E3779B97F4A7C15)
"""An odd factor whose product has all bits of a hash in its highest ones (Fibonacci hashing)."""


class HashSet:
    """A set of 64-bit hashes that are not 0, with open addressing."""

    def __init__(self) -> None:
        self._slots: Hashes = np.zeros(1 << 16, np.uint64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Add different hashes; which of them are new."""
        while 2 * (self._size + len(hashes)) > len(self._slots):
            old = self._slots[self._slots != 0]
            self._slots = np.zeros(2 * len(self._slots), np.uint64)
            self._insert(old)
        new = self._insert(hashes)
        self._size += int(new.sum())
        return new

    def _insert(self, hashes: Hashes) -> NDArray[np.bool_]:
        new = np.zeros(len(hashes), bool)
        bits = len(self._slots).bit_length() - 1
        last = np.uint64(len(self._slots) - 1)
        places = (hashes * SPREAD) >> np.uint64(64 - bits)
        waiting = np.arange(len(hashes))
        while len(waiting):
            wanted, at = hashes[waiting], places[waiting]
            there = self._slots[at]
            empty = there == 0
            self._slots[at[empty]] = wanted[empty]
            won = self._slots[at] == wanted
            new[waiting[won & empty]] = True
            waiting = waiting[~won]
            places[waiting] = (places[waiting] + np.uint64(1)) & last
        return new


@dataclass(frozen=True, slots=True)
class Layer:
    """States found at one distance: a column each, and how they were found.

    They are numbered from `start`; a state that the search began with has a parent below 0.
    """

    matrix: Bytes
    hashes: Hashes
    parents: Places
    labels: NDArray[np.int16]
    start: int = 0

    @property
    def size(self) -> int:
        """How many states it has."""
        return len(self.hashes)

    def only(self, chosen: Places) -> Layer:
        """Some of its states."""
        return Layer(
            np.ascontiguousarray(self.matrix[:, chosen]),
            self.hashes[chosen],
            self.parents[chosen],
            self.labels[chosen],
        )


class Wide:
    """All layers of a search; `count` states were found so far, numbered in this order."""

    def __init__(
        self, system: System, instance: Instance, ceiling: int | Mapping[str, int] | None
    ) -> None:
        self.writer = FlatWriter(system, instance)
        self.labels: list[Label] = []
        self.root = conditions_tree(system, instance, ceiling, self.labels)
        # Odd keys, so that no difference of a cell is lost.
        chance = np.random.default_rng(1)
        self.keys: Hashes = chance.integers(0, 2**64, self.writer.width, np.uint64) | np.uint64(1)
        self.seen = HashSet()
        self.count = 0
        self._found: list[tuple[Places, NDArray[np.int16]]] = []

    def first(self) -> Layer:
        """The initial state."""
        matrix: Bytes = np.array([self.writer.initial], np.int8).T.copy()
        return Layer(matrix, self.hashed(matrix), np.array([-1]), np.array([-1], np.int16))

    def begin(self, states: Layer) -> Layer:
        """The first layer: those of the states that were not seen before."""
        _, where = np.unique(states.hashes, return_index=True)
        where.sort()
        return self._numbered(states.only(where[self.seen.add(states.hashes[where])]))

    def expand(self, layer: Layer) -> Layer:
        """The next layer: the successors that were not seen before."""
        firsts = range(0, layer.size, CHUNK)
        found = [part for first in firsts for part in self._expanded(layer, first)]
        return self._numbered(joined(found, self.writer.width))

    def way(self, number: int) -> tuple[Trace, int]:
        """How a state was found, and from which root: -1 - its parent."""
        parents = np.concatenate([parents for parents, _ in self._found])
        labels = np.concatenate([labels for _, labels in self._found])
        steps = []
        while parents[number] >= 0:
            label = self.labels[labels[number]]
            steps.append(TraceStep(label.step, label.params))
            number = int(parents[number])
        return tuple(reversed(steps)), -1 - int(parents[number])

    def _numbered(self, layer: Layer) -> Layer:
        numbered = replace(layer, start=self.count)
        self.count += layer.size
        self._found.append((layer.parents, layer.labels))
        return numbered

    def hashed(self, matrix: Bytes, cells: Iterable[int] | None = None) -> Hashes:
        """The hash of each state of a matrix, or of some cells of each."""
        total: Hashes = np.full(matrix.shape[1], 1, np.uint64)
        for cell in range(len(matrix)) if cells is None else cells:
            total += matrix[cell].astype(np.uint64) * self.keys[cell]
        return total

    def _expanded(self, layer: Layer, first: int) -> Iterator[Layer]:
        """The new successors of a chunk, the states of one step after those of another."""
        matrix = np.ascontiguousarray(layer.matrix[:, first : first + CHUNK])
        hashes = layer.hashes[first : first + CHUNK]
        taken = [
            (label, step, columns, self._hash_after(step, columns, hashes))
            for label, step, columns in self._taken(self.root, Columns(self.writer, matrix))
        ]
        if not taken:
            return
        after, where = np.unique(np.concatenate([t[-1] for t in taken]), return_index=True)
        where = np.sort(where[self.seen.add(after)])
        end = 0
        for label, step, columns, new in taken:
            start, end = end, end + len(new)
            low, high = np.searchsorted(where, [start, end])
            mine = where[low:high] - start
            if len(mine):
                matrix_after = self._after(step, columns.at(mine))
                parents = columns.places()[mine] + (layer.start + first)
                labels = np.full(len(mine), label, np.int16)
                yield Layer(matrix_after, new[mine], parents, labels)

    def _taken(self, branch: Branch, columns: Columns) -> Iterator[tuple[int, FiniteStep, Columns]]:
        for label, step in branch.taken:
            yield label, step, columns
        for (formula, _), child in branch.children.items():
            some = columns if formula == TRUE else columns.among(columns.holds(formula))
            if some.size:
                yield from self._taken(child, some)

    def _hash_after(self, step: FiniteStep, columns: Columns, hashes: Hashes) -> Hashes:
        total = hashes[columns.places()]
        for assign in step.updates:
            for cell, value in columns.written(assign):
                old = columns.cell(cell) if isinstance(cell, int) else columns.moving(cell)
                change = np.subtract(value, old, dtype=np.int8, casting="unsafe")
                total += change.astype(np.uint64) * self.keys[cell]
        return total

    def _after(self, step: FiniteStep, columns: Columns) -> Bytes:
        """The chosen states after a step."""
        matrix = np.ascontiguousarray(columns.matrix[:, columns.places()])
        here = np.arange(columns.size)
        for assign in step.updates:
            for cell, value in columns.written(assign):
                matrix[(cell, here) if isinstance(cell, np.ndarray) else cell] = value
        return matrix


def joined(layers: Sequence[Layer], width: int) -> Layer:
    """Several layers of states with `width` cells as one."""
    none = Layer(
        np.zeros((width, 0), np.int8),
        np.zeros(0, np.uint64),
        np.zeros(0, np.int64),
        np.zeros(0, np.int16),
    )
    layers = [none, *layers]
    return Layer(
        np.concatenate([x.matrix for x in layers], axis=1),
        np.concatenate([x.hashes for x in layers]),
        np.concatenate([x.parents for x in layers]),
        np.concatenate([x.labels for x in layers]),
    )
