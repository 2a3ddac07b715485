"""How far a state is from a formula if nothing that was true ever became false.

The delete relaxation of planning: every cell of a flat state holds a set of values, a step adds
values and removes none, and a condition holds if some choice from the sets makes it hold.  A set is
one integer, a bit for each value, so that one layer of the relaxation is one generated function.

Every run is also a run of the relaxation: a formula that the relaxation does not reach, the model
does not reach either, within the same instance and ceilings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

from tdxmig_model.compile.writer import define
from tdxmig_model.errors import ModelError
from tdxmig_model.explore.successors import FlatState, FlatWriter
from tdxmig_model.expr import (
    Add,
    And,
    Assign,
    Choice,
    Constant,
    Count,
    CountBelow,
    Equal,
    ForAll,
    Instance,
    Interpreter,
    Less,
    Literal,
    Lookup,
    MapVariable,
    Member,
    Node,
    Not,
    Or,
    Read,
    System,
    Value,
    Variable,
    subterms,
)
from tdxmig_model.expr.finite import (
    FALSE,
    FiniteStep,
    ceilings,
    finite_step,
    ground,
    simplify,
    unrolled,
)
from tdxmig_model.expr.types import Type, is_integer

Row = tuple[list[str], list[str]]
"""Conditions of a ground step, and the statements that add what it writes."""


class Masks:
    """Print the sets of values of terms as Python expressions over the sets `c0`, `c1`, ...

    An integer n is the bit n + `zero`; a truth value and an enum member is the bit of its position.
    Sets of terms that are no cells are worked out first, in `temporaries`.
    """

    def __init__(self, writer: FlatWriter, largest: int) -> None:
        self.writer = writer
        self.instance = writer.instance
        self.zero = 2 * largest + 2
        self.everything = (1 << (2 * self.zero + 1)) - 1
        self.temporaries: list[str] = []
        self._known: dict[tuple[str, Node], str] = {}

    def bit(self, value: int | bool, kind: Type) -> int:
        """The set of one value.  ModelError for an integer that is above every ceiling."""
        place = int(value) + (self.zero if is_integer(kind) else 0)
        if place < 0 or (is_integer(kind) and place > 2 * self.zero):
            raise ModelError(f"the relaxation has no room for {value}")
        return 1 << place

    def values(self, node: Node) -> str:
        """The set of values that a term can have."""
        return self._once("values", node, self._values)

    def can(self, node: Node, wanted: bool) -> str:
        """A condition: the formula can have this truth value."""
        return self._once(str(wanted), node, lambda n: self._can(n, wanted))

    def places(self, target: MapVariable, keys: Sequence[Node]) -> Iterator[tuple[int, str]]:
        """The cells that an element can be, each with the condition that it is that one."""
        sizes = [self.instance.bounded(k) for k in target.indexes]
        choices = [self._choices(k, n) for k, n in zip(keys, sizes, strict=True)]
        for chosen in product(*choices):
            flat = 0
            for (value, _), size in zip(chosen, sizes, strict=True):
                flat = flat * size + value
            conditions = " and ".join(c for _, c in chosen if c)
            yield self.writer.base[target.name] + flat, conditions

    def _choices(self, key: Node, size: int) -> list[tuple[int, str]]:
        if isinstance(key, Literal):
            return [(int(key.value), "")] if 0 <= int(key.value) < size else []
        among = self.values(key)
        return [(n, f"{among} & {1 << (n + self.zero)}") for n in range(size)]

    def _once(self, what: str, node: Node, write: Callable[[Node], str]) -> str:
        known = self._known.get((what, node))
        if known is None:
            known = self._known[what, node] = write(node)
        return known

    def _named(self, text: str) -> str:
        name = f"t{len(self.temporaries)}"
        self.temporaries.append(f"{name} = {text}")
        return name

    def _union(self, parts: Sequence[tuple[str, str]]) -> str:
        """The union of sets, each with a condition."""
        return self._named(" | ".join(f"({s} if {c} else 0)" for s, c in parts) or "0")

    def _values(self, node: Node) -> str:
        match node:
            case Literal():
                return str(self.bit(node.value, node.kind))
            case Variable():
                return f"c{self.writer.base[node.name]}"
            case Read():
                cells = list(self.places(node.map, node.keys))
                if len(cells) == 1 and not cells[0][1]:
                    return f"c{cells[0][0]}"
                return self._union([(f"c{cell}", condition) for cell, condition in cells])
            case Add():
                return self._sum(node)
            case Choice():
                return self._union(
                    [
                        (self.values(node.then), self.can(node.condition, True)),
                        (self.values(node.otherwise), self.can(node.condition, False)),
                    ]
                )
            case Lookup():
                among = self.values(node.term)
                listed = sum(self.bit(a.value, a.kind) for a, _ in node.table)
                moved = [
                    (str(self.bit(b.value, b.kind)), f"{among} & {self.bit(a.value, a.kind)}")
                    for a, b in node.table
                ]
                return self._union([*moved, (f"{among} & {~listed}", "True")])
            case CountBelow():
                return self.values(node.as_count())
            case Count():
                return self._count(node)
            case _:
                sides = [("1", self.can(node, False)), ("2", self.can(node, True))]
                return self._union(sides)

    def _sum(self, node: Add) -> str:
        term = self.values(node.term)
        amounts = sorted(set(_amounts(node.amount)))
        if len(amounts) == 1:
            return self._named(self._shifted(term, amounts[0]))
        chosen = self.values(node.amount)
        return self._union(
            [(self._shifted(term, n), f"{chosen} & {1 << (n + self.zero)}") for n in amounts]
        )

    def _shifted(self, term: str, amount: int) -> str:
        if amount < 0:
            return f"{term} >> {-amount}"
        return f"{term} << {amount} & {self.everything}"

    def _count(self, node: Count) -> str:
        parts = list(unrolled((node.bound,), node.predicate, self.instance))
        least = self._named(" + ".join(f"(0 if {self.can(p, False)} else 1)" for p in parts) or "0")
        most = self._named(" + ".join(f"(1 if {self.can(p, True)} else 0)" for p in parts) or "0")
        return self._named(
            f"((1 << {most} - {least} + 1) - 1) << {least} + {self.zero} & {self.everything}"
        )

    def _can(self, node: Node, wanted: bool) -> str:
        match node:
            case Literal():
                return str(bool(node.value) == wanted)
            case Not():
                return self.can(node.body, not wanted)
            case And() | Or():
                word = "and" if isinstance(node, And) == wanted else "or"
                parts = [self.can(p, wanted) for p in node.parts]
                return f"({f' {word} '.join(parts)})" if parts else str(word == "and")
            case ForAll():
                bodies = tuple(unrolled(node.bound, node.body, self.instance))
                return self.can(simplify(And(bodies), self.instance), wanted)
            case Equal():
                left, right = self.values(node.left), self.values(node.right)
                if wanted:
                    return f"({left} & {right})"
                return f"({left} != {right} or {left} & ({left} - 1))"
            case Less():
                left, right = self.values(node.left), self.values(node.right)
                if wanted:
                    return f"({right} >= 2 * ({left} & -{left}) > 0)"
                return f"({left} >= ({right} & -{right}) > 0)"
            case Member():
                members = sum({self.bit(m.value, m.kind) for m in node.members})
                return f"({self.values(node.term)} & {members if wanted else ~members})"
            case _:
                return f"({self.values(node)} & {2 if wanted else 1})"


def _amounts(node: Node) -> Iterator[int]:
    if isinstance(node, Choice):
        yield from _amounts(node.then)
        yield from _amounts(node.otherwise)
    elif isinstance(node, Literal):
        yield int(node.value)


class Distance:
    """The distance of flat states of an instance from a formula, in layers of the relaxation.

    That of a conjunction is the sum of its parts' distances, that of a disjunction the least.
    """

    def __init__(
        self,
        system: System,
        writer: FlatWriter,
        ceiling: int | Mapping[str, int],
        wanted: Node,
    ) -> None:
        instance = writer.instance
        limits = ceilings(system, instance, ceiling)
        self._limits = limits
        self._writer = writer
        self._masks = Masks(writer, _largest(system, instance, limits, wanted))
        rows = list(self._rows(system, instance))
        self._leaves: list[str] = []
        self._goal = self._tree(simplify(wanted, instance), True)
        self._shifts = [self._masks.zero if is_integer(k) else 0 for k in _kinds(writer)]
        title = f"{system.name} model, relaxed"
        self._layer: Callable[[list[int]], tuple[list[int], int]] = define(
            self._source(rows), title, {}
        )["layer"]

    def of(self, state: FlatState) -> int | None:
        """Layers until the formula can hold; None if it never can."""
        return self._from([1 << (v + n) for v, n in zip(state, self._shifts, strict=True)])

    def of_sets(self, values: Sequence[Sequence[Value]]) -> int | None:
        """The same from the states in which each cell has one of its values."""
        pairs = zip(values, self._shifts, strict=True)
        return self._from([sum(1 << (v + n) for v in among) for among, n in pairs])

    def _from(self, cells: list[int]) -> int | None:
        first: dict[int, int] = {}
        met, layer = 0, 0
        while True:
            grown, now = self._layer(cells)
            if now != met:
                for leaf in range(len(self._leaves)):
                    if (now & ~met) >> leaf & 1:
                        first[leaf] = layer
                met = now
                distance = _measured(self._goal, first)
                if distance is not None:
                    return distance
            if grown == cells:
                return None
            cells = grown
            layer += 1

    # --- the generated function -------------------------------------------------------------------

    def _tree(self, node: Node, wanted: bool) -> Goal:
        """The formula as conjunctions and disjunctions of leaves."""
        match node:
            case Not():
                return self._tree(node.body, not wanted)
            case And() | Or():
                kind = sum if isinstance(node, And) == wanted else min
                return kind, [self._tree(p, wanted) for p in node.parts]
            case ForAll():
                parts = unrolled(node.bound, node.body, self._writer.instance)
                return sum if wanted else min, [self._tree(p, wanted) for p in parts]
            case _:
                self._leaves.append(self._masks.can(node, wanted))
                return len(self._leaves) - 1

    def _rows(self, system: System, instance: Instance) -> Iterator[Row]:
        chooser = Interpreter(system, instance)
        for row in system.steps:
            finite = finite_step(row, instance, self._limits)
            for params in chooser.choices(row):
                step = ground(finite, params, instance)
                if not step.conditions or step.conditions[-1].formula != FALSE:
                    yield self._row(step)

    def _row(self, step: FiniteStep) -> Row:
        conditions = [self._masks.can(c.formula, True) for c in step.conditions]
        return conditions, [line for assign in step.updates for line in self._added(assign)]

    def _added(self, assign: Assign) -> Iterator[str]:
        target = assign.target
        allowed = ""
        limit = self._limits.get(target.name)
        if is_integer(target.kind) and limit is not None:
            inside = ((1 << (2 * limit + 1)) - 1) << (self._masks.zero - limit)
            allowed = f" & {inside}"
        start = self._writer.base[target.name]
        if assign.bound:
            values = unrolled(assign.bound, assign.value, self._writer.instance)
            for offset, value in enumerate(values):
                yield f"n{start + offset} |= {self._masks.values(value)}{allowed}"
            return
        new = f"{self._masks.values(assign.value)}{allowed}"
        cells = [(start, "")]
        if isinstance(target, MapVariable):
            cells = list(self._masks.places(target, assign.keys))
        for cell, condition in cells:
            yield f"{f'if {condition}: ' if condition else ''}n{cell} |= {new}"

    def _source(self, rows: Sequence[Row]) -> str:
        cells = range(self._writer.width)
        met = [f"({1 << n} if {leaf} else 0)" for n, leaf in enumerate(self._leaves)]
        lines = [
            "def layer(cells):",
            f"    {', '.join(f'c{i}' for i in cells)}, = cells",
            *(f"    {line}" for line in self._masks.temporaries),
            f"    met = {' | '.join(met) or '0'}",
            f"    {', '.join(f'n{i}' for i in cells)}, = cells",
            *_nested(rows, 1),
            f"    return [{', '.join(f'n{i}' for i in cells)}], met",
        ]
        return "\n".join(lines)


Goal = int | tuple[Callable[[list[int]], int], list["Goal"]]
"""A leaf by its number, or how the distances of parts are joined."""


def _measured(goal: Goal, first: Mapping[int, int]) -> int | None:
    if isinstance(goal, int):
        return first.get(goal)
    join, parts = goal
    known = [d for d in (_measured(p, first) for p in parts) if d is not None]
    if join is sum:
        return sum(known) if len(known) == len(parts) else None
    return min(known, default=None)


def _nested(rows: Sequence[Row], depth: int) -> Iterator[str]:
    """Conditions that several steps begin with are tested once."""
    indent = "    " * depth
    later: dict[str, list[Row]] = {}
    for conditions, added in rows:
        if conditions:
            later.setdefault(conditions[0], []).append((conditions[1:], added))
        else:
            yield from (indent + line for line in added)
    for condition, inner in later.items():
        yield f"{indent}if {condition}:"
        yield f"{indent}    pass"
        yield from _nested(inner, depth + 1)


def _kinds(writer: FlatWriter) -> list[Type]:
    """The type of each cell of a flat state."""
    ends = [*writer.base.values(), writer.width][1:]
    kinds: list[Type] = []
    for variable, end in zip(writer.system.variables, ends, strict=True):
        kinds += [variable.kind] * (end - len(kinds))
    return kinds


def _largest(system: System, instance: Instance, limits: Mapping[str, int], wanted: Node) -> int:
    """The largest magnitude of a number that is written anywhere, and of every ceiling."""
    terms = [wanted]
    for step in system.steps:
        terms += [n.formula for n in step.when]
        terms += [t for a in step.then for t in (*a.keys, a.value)]
    found = [*limits.values(), *(instance.bounded(k) for k in system.indexes())]
    found += [abs(int(v.init.value)) for v in system.variables]
    for node in (n for t in terms for n in subterms(t)):
        if isinstance(node, Literal):
            found.append(abs(int(node.value)))
        elif isinstance(node, Constant):
            found.append(abs(instance.constant(node)))
    return max(found, default=0)
