"""Terms over many states at once: a matrix, one row for each cell, one column for each state.

Every cell is one byte.  What a term reads outside of a map has some value here: the conditions of a
finite step (`expr.finite`) come in an order in which such a value is never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.compile.writer import lookup_table
from tdxmig_model.errors import ModelError
from tdxmig_model.explore.successors import FlatWriter
from tdxmig_model.expr import (
    Add,
    And,
    Assign,
    Choice,
    Count,
    CountBelow,
    Equal,
    ForAll,
    Less,
    Literal,
    Lookup,
    MapVariable,
    Member,
    Node,
    Not,
    Or,
    Read,
    Variable,
)
from tdxmig_model.expr.finite import simplify, unrolled
from tdxmig_model.expr.types import BoolType

Bytes = NDArray[np.int8]
Places = NDArray[np.int64]
Values = Any
"""One value for each chosen state: an array, or one value that all of them have."""

FEW = 3
"""Up to so many members are compared one by one."""


class Columns:
    """The terms of some of the states of a matrix: of all, or of those at `chosen`."""

    def __init__(self, writer: FlatWriter, matrix: Bytes, chosen: Places | None = None) -> None:
        self.writer = writer
        self.matrix = matrix
        self.chosen = chosen
        self._cells: dict[int, Bytes] = {}

    @property
    def size(self) -> int:
        """How many states are chosen."""
        return int(self.matrix.shape[1]) if self.chosen is None else len(self.chosen)

    def places(self) -> Places:
        """The positions of the chosen states in the matrix."""
        return np.arange(self.matrix.shape[1]) if self.chosen is None else self.chosen

    def among(self, holds: NDArray[np.bool_]) -> Columns:
        """Those of the chosen states for which a condition holds."""
        kept = np.flatnonzero(holds)
        return self if len(kept) == self.size else self.at(kept)

    def at(self, which: Places) -> Columns:
        """Those of the chosen states with these positions among them."""
        return Columns(self.writer, self.matrix, self.places()[which])

    def cell(self, number: int) -> Bytes:
        """The values of one cell."""
        found = self._cells.get(number)
        if found is None:
            row = self.matrix[number]
            found = self._cells[number] = row if self.chosen is None else row[self.chosen]
        return found

    def moving(self, cells: Places) -> Bytes:
        """For each chosen state the value of a cell of its own."""
        return self.matrix[cells, self.places()]

    def holds(self, formula: Node) -> NDArray[np.bool_]:
        """For each chosen state, whether a formula holds."""
        return np.broadcast_to(self.value(formula), self.size)

    def written(self, assign: Assign) -> list[tuple[int | Places, Values]]:
        """The cells that an update writes, each with its new value.

        A cell that depends on the state is an array with one number for each chosen state.
        """
        target, start = assign.target, self.writer.base[assign.target.name]
        if isinstance(target, Variable):
            return [(start, self.value(assign.value))]
        if assign.bound:
            new = unrolled(assign.bound, assign.value, self.writer.instance)
            return [(start + offset, self.value(value)) for offset, value in enumerate(new)]
        return [(self._place(target, assign.keys), self.value(assign.value))]

    def _place(self, target: MapVariable, keys: Sequence[Node]) -> int | Places:
        try:
            known = self.writer.position(target, keys)
        except IndexError:
            return self.writer.base[target.name]  # the value is never used
        if known is not None:
            return known
        sizes = [self.writer.instance.bounded(k) for k in target.indexes]
        flat: Any = 0
        for key, size in zip(keys, sizes, strict=True):
            flat = flat * size + np.clip(self.value(key), 0, size - 1).astype(np.int64)
        return self.writer.base[target.name] + np.broadcast_to(flat, self.size)

    def value(self, node: Node) -> Values:
        """The value of a term."""
        match node:
            case Literal():
                return node.value
            case Variable():
                return _typed(self.cell(self.writer.base[node.name]), node)
            case Read():
                place = self._place(node.map, node.keys)
                if isinstance(place, int):
                    inside = min(max(place, 0), self.writer.width - 1)
                    return _typed(self.cell(inside), node)
                return _typed(self.moving(place), node)
            case Add():
                return np.add(self.value(node.term), self.value(node.amount), dtype=np.int8)
            case Equal():
                return np.equal(self.value(node.left), self.value(node.right))
            case Less():
                return np.less(self.value(node.left), self.value(node.right))
            case Not():
                return np.logical_not(self.value(node.body))
            case And():
                return self._joined(np.logical_and, node.parts, True)
            case Or():
                return self._joined(np.logical_or, node.parts, False)
            case Choice():
                return np.where(*(self.value(child) for child in node.children()))
            case Member():
                return self._member(node)
            case Lookup():
                return np.array(lookup_table(node)).take(self.value(node.term))
            case ForAll():
                parts = tuple(unrolled(node.bound, node.body, self.writer.instance))
                return self.value(simplify(And(parts), self.writer.instance))
            case CountBelow():
                return self.value(node.as_count())
            case Count():
                parts = tuple(unrolled((node.bound,), node.predicate, self.writer.instance))
                return sum((np.asarray(self.value(p)).astype(np.int8) for p in parts), np.int8(0))
            case _:
                raise ModelError(f"no array expression is known for {type(node).__name__}")

    def _joined(self, join: Any, parts: Sequence[Node], empty: bool) -> Values:
        result: Values = empty
        for number, part in enumerate(parts):
            result = join(result, self.value(part)) if number else self.value(part)
        return result

    def _member(self, node: Member) -> Values:
        value = self.value(node.term)
        if len(node.members) <= FEW:
            found: Values = False
            for member in node.members:
                found = np.logical_or(found, np.equal(value, member.value))
            return found
        wanted = np.array([int(m.value) for m in node.members])
        table = np.zeros(int(wanted.max()) + 1, bool)
        table[wanted] = True
        return table.take(value, mode="clip") & np.less_equal(value, len(table) - 1)


def _typed(cells: Bytes, node: Node) -> Values:
    return cells.view(np.bool_) if isinstance(node.type, BoolType) else cells
