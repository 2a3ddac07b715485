"""Bulk steps as NumPy operations: one row for many distinct values of one parameter at once.

`bulk_plan` says which rows these are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.compile.bulk_plan import Plan, accumulation, make_plan
from tdxmig_model.compile.writer import ATOM, Writer, define, identifier, lookup_table
from tdxmig_model.errors import ModelError, Refused, Unmet, UsageError
from tdxmig_model.expr import (
    Add,
    And,
    Assign,
    BoolType,
    Choice,
    Equal,
    IndexType,
    Instance,
    Less,
    Lookup,
    MapVariable,
    Member,
    Node,
    Not,
    Or,
    Parameter,
    Read,
    Step,
    Variable,
    subterms,
)

Indices = NDArray[np.integer[Any]]


class ArrayWriter(Writer):
    """Print terms that differ from index to index as NumPy expressions over all given indexes."""

    def __init__(self, instance: Instance, slots: Mapping[str, int], made: Plan) -> None:
        super().__init__(instance, slots)
        self.made = made
        self.columns: dict[str, str] = {}
        self.tables: dict[str, NDArray[Any]] = {}

    def parameter(self, node: Parameter) -> str:
        return "indices" if node == self.made.index else super().parameter(node)

    def element(self, node: Read) -> str:
        text = super().element(node)
        if not self.made.per_entry(node):
            return text
        return self.columns.setdefault(text, f"column_{len(self.columns)}")

    def take_columns(self) -> list[str]:
        """The lines that read the columns that the text so far uses; each is read once."""
        lines = [f"    {name} = {text}" for text, name in self.columns.items()]
        self.columns.clear()
        return lines

    def _table(self, values: Sequence[int | bool]) -> str:
        name = f"table_{len(self.tables)}"
        self.tables[name] = np.array(values)
        return name

    def _write(self, node: Node) -> tuple[str, int]:
        if not self.made.per_entry(node):
            return super()._write(node)
        match node:
            case Parameter() | Read():
                return super()._write(node)
            case Add():
                return f"{self.at(node.term, ATOM)} + {self.at(node.amount, ATOM)}", 0
            case Equal():
                return f"{self.at(node.left, ATOM)} == {self.at(node.right, ATOM)}", 0
            case Less():
                return f"{self.at(node.left, ATOM)} < {self.at(node.right, ATOM)}", 0
            case Not():
                return f"~{self.at(node.body, ATOM)}", 0
            case And():
                return " & ".join(self.at(p, ATOM) for p in node.parts), 0
            case Or():
                return " | ".join(self.at(p, ATOM) for p in node.parts), 0
            case Member():
                kind = node.term.type
                size = 2 if isinstance(kind, BoolType) else len(getattr(kind, "members", ()))
                wanted = {int(m.value) for m in node.members}
                table = self._table([i in wanted for i in range(size)])
                return f"{table}.take({self.text(node.term)})", ATOM
            case Lookup():
                table = self._table(lookup_table(node))
                return f"{table}.take({self.text(node.term)})", ATOM
            case Choice():
                parts = ", ".join(self.text(c) for c in node.children())
                return f"where({parts})", ATOM
            case _:
                raise ModelError(f"no array expression is known for {type(node).__name__}")


class Bulk:
    """A row for many distinct indexes at once.  Maps written or read at the index must be arrays.

    `guard_mask(state, indices, *others)` and `apply(state, indices, *others)` take the other
    parameters by position or by name.  Both raise Refused for an index that is given twice and
    UsageError for one that is outside.
    """

    def __init__(
        self,
        made: Plan,
        source: str,
        space: Mapping[str, Any],
        size: int | None,
        arrays: Sequence[tuple[int, str]],
        unmet: Callable[..., list[Unmet]],
    ) -> None:
        self.row = made.row
        self.index = made.index
        self.source = source
        self._mask = space["guard_mask"]
        self._change = space["apply"]
        self._size = size
        self._arrays = tuple(arrays)
        self._unmet = unmet

    def guard_mask(
        self, state: Sequence[Any], indices: Indices, *others: int, **named: int
    ) -> NDArray[np.bool_]:
        """For each index, whether the guard holds in this state."""
        mask: NDArray[np.bool_] = self._mask(state, self._checked(state, indices), *others, **named)
        return mask

    def apply(self, state: list[Any], indices: Indices, *others: int, **named: int) -> None:
        """Take the step for every index, or raise Refused for the first that does not allow it."""
        checked = self._checked(state, indices)
        if not len(checked):
            return
        mask = self._mask(state, checked, *others, **named)
        if not mask.all():
            first = int(checked[int(np.argmin(mask))])
            raise self._refusal(state, first, others, named)
        self._change(state, checked, *others, **named)

    def apply_checked(self, state: list[Any], indices: Indices, *others: int, **named: int) -> None:
        """As `apply`, for int64 indexes whose guard mask was just seen to hold everywhere."""
        if len(indices):
            self._change(state, indices, *others, **named)

    def _checked(self, state: Sequence[Any], indices: Indices) -> NDArray[np.int64]:
        given = np.asarray(indices)
        if given.ndim != 1 or (len(given) and given.dtype.kind not in "iu"):
            raise UsageError(
                f"{self.row.name}: indexes are a one-dimensional integer array, "
                f"got {given.dtype} with shape {given.shape}"
            )
        for slot, name in self._arrays:
            if not isinstance(state[slot], np.ndarray):
                raise UsageError(
                    f"{self.row.name} over {self.index}: {name} is a {type(state[slot]).__name__}, "
                    "a bulk step needs a NumPy array"
                )
        checked = given.astype(np.int64, copy=False)
        if not len(checked):
            return checked
        low, high = int(checked.min()), int(checked.max())
        if low < 0 or (self._size is not None and high >= self._size):
            raise UsageError(
                f"{self.row.name}: {self.index} = {low if low < 0 else high} is no "
                f"{self.index.kind.name} (size {self._size})"
            )
        if len(checked) > 1 and not (checked[1:] > checked[:-1]).all():
            ordered = np.sort(checked)
            twice = ordered[1:][ordered[1:] == ordered[:-1]]
            if len(twice):
                raise self._twice(int(twice[0]))
        return checked

    def _twice(self, index: int) -> Refused:
        text = f"each {self.index} once"
        unmet = Unmet("distinct_indices", text, {self.index.name: index})
        why = "An entry of a bundle changes its page, so that a second one meets another state."
        return Refused(self.row.name, {}, [unmet], why=why)

    def _refusal(
        self, state: Sequence[Any], first: int, others: Sequence[int], named: Mapping[str, int]
    ) -> Refused:
        rest = iter(others)
        values = {
            p.name: first
            if p == self.index
            else named[identifier(p.name)]
            if identifier(p.name) in named
            else next(rest)
            for p in self.row.params
        }
        unmet = self._unmet(self.row.name, state, *values.values())
        return Refused(self.row.name, values, unmet, why=self.row.why)


def make_bulk(
    row: Step,
    parameter: str,
    instance: Instance,
    slots: Mapping[str, int],
    title: str,
    unmet: Callable[..., list[Unmet]],
    *,
    ghosts: bool,
) -> Bulk:
    """Generate the bulk step of a row that `bulk_refusal` does not refuse."""
    made = make_plan(row, parameter, ghosts=ghosts)
    if isinstance(made, str):
        raise ModelError(made)
    writer = ArrayWriter(instance, slots, made)
    others = [identifier(p.name) for p in row.params if p != made.index]
    signature = ", ".join(["state", "indices", *others])
    lines = [*_mask_lines(writer, signature), "", "", *_change_lines(writer, signature)]
    source = "\n".join(lines)
    known = {
        "where": np.where,
        "ones": np.ones,
        "zeros": np.zeros,
        "bool_": np.bool_,
        **writer.tables,
    }
    read = [n for w in row.when for n in subterms(w.formula)]
    read += [n for a in made.updates for n in subterms(a.value)]
    maps = {n.map.name for n in read if isinstance(n, Read) and made.per_entry(n)}
    maps |= {a.target.name for a in made.updates if made.per_entry_update(a)}
    arrays = sorted((slots[name], name) for name in maps)
    kind = made.index.kind
    assert isinstance(kind, IndexType)
    return Bulk(made, source, define(source, title, known), instance.size(kind), arrays, unmet)


def _mask_lines(writer: ArrayWriter, signature: str) -> list[str]:
    """What holds for all indexes or none comes first; the rest is a conjunction of columns."""
    lines = [f"def guard_mask({signature}):"]
    columns = []
    for wanted in writer.made.row.when:
        text = writer.text(wanted.formula)
        comment = f"  # {wanted.label}: {wanted.formula}"
        if writer.made.per_entry(wanted.formula):
            columns.append((text, comment))
        else:
            lines.append(f"    if not ({text}):{comment}")
            lines.append("        return zeros(len(indices), bool_)")
    lines += writer.take_columns()
    if not columns:
        return [*lines, "    return ones(len(indices), bool_)"]
    for position, (text, comment) in enumerate(columns):
        lines.append(f"    held {'&=' if position else '='} {text}{comment}")
    return [*lines, "    return held"]


def _change_lines(writer: ArrayWriter, signature: str) -> list[str]:
    """All reads, then all writes."""
    made = writer.made
    values: list[str] = []
    writes: list[str] = []
    for assign in made.updates:
        column = (
            writer.scalar(assign.target)
            if isinstance(assign.target, Variable)
            else writer.column(assign.target)
        )
        here = column
        if isinstance(assign.target, MapVariable) and assign.keys:
            place = writer.offset(assign.target, assign.keys)
            if not writer.surely_all_inside(assign.target, assign.keys):
                values.append(f"    place_{len(values)} = {place}")
                place = f"place_{len(values) - 1}"
            here = f"{column}[{place}]"
        name = f"new_{len(values)}"
        values.append(f"    {name} = {_change(writer, assign, here)}  # {assign}")
        writes.append(f"    {f'{column}[:]' if assign.bound else here} = {name}")
    lines = [f"def apply({signature}):", *writer.take_columns(), *values, *writes]
    return lines if values else [*lines, "    pass"]


def _change(writer: ArrayWriter, assign: Assign, here: str) -> str:
    """The new value, or array of new values, of one update."""
    made = writer.made
    added = accumulation(made, assign)
    plain = bool if isinstance(assign.target.kind, BoolType) else int
    if added is not None:
        text = writer.text(added)
        if isinstance(assign.value, Or):
            some = f"({text}).any()" if made.per_entry(added) else f"({text})"
            return f"bool({here} or {some})"
        total = f"int(({text}).sum())" if made.per_entry(added) else f"({text}) * len(indices)"
        return f"int({here}) + {total}"
    text = writer.text(assign.value)
    if assign.bound:
        return f"[{text}{writer.loops(assign.bound)}]"
    if made.per_entry_update(assign):
        return text
    if made.per_entry(assign.value):
        return f"{plain.__name__}(({text})[-1])"
    return f"{plain.__name__}({text})"
