"""The encoding of one finite instance: a term for each element of each map, bit vectors throughout.

Quantifiers and counts are written out.  Integers are signed bit vectors wide enough that no sum
wraps, so the encoding is exact for runs of up to the stated number of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from tdxmig_model.expr import (
    Add,
    Bound,
    Choice,
    Constant,
    Count,
    EnumType,
    ForAll,
    IndexType,
    Instance,
    Literal,
    MapVariable,
    Node,
    State,
    Step,
    System,
    Value,
    subterms,
)
from tdxmig_model.expr.finite import finite_conditions
from tdxmig_model.expr.types import BoolType, Type
from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.encode import Encoder, Environment, Reader, View, reads
from tdxmig_model.smt.z3api import Model, Term

Cells = dict[str, list[Term]]
"""The terms of a state: one for a scalar, one for each element of a map, row by row."""


class Finite(Encoder):
    """One system in one finite instance."""

    def __init__(self, system: System, instance: Instance, width: int) -> None:
        super().__init__(system)
        self.instance = instance
        self.width = width
        self.keys = {
            v.name: list(product(*(range(instance.bounded(k)) for k in v.indexes)))
            for v in system.variables
            if isinstance(v, MapVariable)
        }

    # Values.

    def number(self, value: int) -> Term:
        return z.bits_value(value, self.width)

    def member(self, kind: EnumType, position: int) -> Term:
        return z.bits_value(position, _enum_width(kind))

    def constant(self, constant: Constant) -> Term:
        return self.number(self.instance.constant(constant))

    def size(self, index: IndexType) -> Term:
        return self.number(self.instance.bounded(index))

    def literal_of(self, kind: Type, value: int | bool) -> Term:
        """A Python value of a type as a literal."""
        if isinstance(kind, BoolType):
            return z.boolean(bool(value))
        if isinstance(kind, EnumType):
            return self.member(kind, int(value))
        return self.number(int(value))

    def unknown(self, name: str, kind: Type) -> Term:
        """An unknown of a type."""
        if isinstance(kind, BoolType):
            return z.bool_const(name)
        width = _enum_width(kind) if isinstance(kind, EnumType) else self.width
        return z.bits_const(name, width)

    def in_range(self, kind: Type, value: Term) -> Term:
        """What the type of a parameter or of an enum variable says of its value."""
        if isinstance(kind, EnumType):
            low, high = self.member(kind, 0), self.member(kind, len(kind.members) - 1)
        elif isinstance(kind, IndexType):
            low, high = self.number(0), self.number(self.instance.bounded(kind) - 1)
        else:
            return z.TRUE
        return z.both([z.at_most(low, value), z.at_most(value, high)])

    # States.

    def unknown_state(self, stem: str) -> Cells:
        """A state of unknowns."""
        cells: Cells = {}
        for v in self.system.variables:
            if isinstance(v, MapVariable):
                named = [f"{stem} {v.name}{list(k)}" for k in self.keys[v.name]]
                cells[v.name] = [self.unknown(n, v.kind) for n in named]
            else:
                cells[v.name] = [self.unknown(f"{stem} {v.name}", v.kind)]
        return cells

    def initial_cells(self) -> Cells:
        """The initial state, as literals."""
        cells: Cells = {}
        for v in self.system.variables:
            value = self.literal(v.init)
            cells[v.name] = [value] * (len(self.keys[v.name]) if v.name in self.keys else 1)
        return cells

    def view(self, cells: Cells) -> View:
        """A state of cells as a view."""
        view = View({}, {})
        for v in self.system.variables:
            if isinstance(v, MapVariable):
                view.maps[v.name] = self._reader(v, cells[v.name])
            else:
                view.scalars[v.name] = cells[v.name][0]
        return view

    def _reader(self, variable: MapVariable, cells: Sequence[Term]) -> Reader:
        keys = self.keys[variable.name]
        outside = self.literal(variable.init)

        def read(at: Sequence[Term]) -> Term:
            known = tuple(z.value_of(k) for k in at)
            if None not in known:
                return cells[keys.index(known)] if known in keys else outside  # type: ignore[arg-type]
            result = outside
            for key, cell in zip(reversed(keys), reversed(cells), strict=True):
                hit = z.both([z.equal(k, self.number(n)) for k, n in zip(at, key, strict=True)])
                result = z.choose(hit, cell, result)
            return result

        return read

    def parameters(self, step: Step, stem: str) -> tuple[dict[str, Term], list[Term]]:
        """An unknown value in the range of its type for each parameter."""
        env = {p.name: self.unknown(f"{stem} {step.name} {p.name}", p.kind) for p in step.params}
        return env, [self.in_range(p.kind, env[p.name]) for p in step.params]

    def fires(self, step: Step, view: View, env: Environment) -> Term:
        """The guard; and nothing outside the instance is read or written (see `expr.finite`)."""
        conditions = finite_conditions(step, self.instance, {})
        return z.both([self.term(c.formula, view, env) for c in conditions])

    def written(self, step: Step, view: View, env: Environment) -> Cells:
        """The new value of every cell of the variables that a step writes."""
        after = self.after(step, view, env)
        cells: Cells = {}
        for name in sorted(step.writes()):
            if name in self.keys:
                reader = after.maps[name]
                cells[name] = [reader([self.number(n) for n in k]) for k in self.keys[name]]
            else:
                cells[name] = [after.scalars[name]]
        return cells

    def state_of(self, model: Model, cells: Cells) -> State:
        """The values of a state's cells, as the interpreter has them."""
        state: State = []
        for v in self.system.variables:
            values = [model.value(c) for c in cells[v.name]]
            state.append(values if isinstance(v, MapVariable) else values[0])
        return state

    def values_of(self, model: Model, step: Step, env: Mapping[str, Term]) -> dict[str, Value]:
        """The values of a step's parameters."""
        return {p.name: model.value(env[p.name]) for p in step.params}

    # Quantifiers and counts.

    def quantified(self, node: ForAll, view: View, env: Environment) -> Term:
        return z.both(
            [self.term(node.body, view, {**env, **c}) for c in self._elements(node.bound)]
        )

    def counted(self, node: Count, view: View, env: Environment) -> Term:
        total, known = self.number(0), 0
        for choice in self._elements((node.bound,)):
            holds = self.term(node.predicate, view, {**env, **choice})
            if z.is_true(holds):
                known += 1
            elif not z.is_false(holds):
                total = z.add(total, z.choose(holds, self.number(1), self.number(0)))
        return z.add(total, self.number(known)) if known else total

    def _elements(self, bound: Sequence[Bound]) -> list[dict[str, Term]]:
        ranges = [range(self.instance.bounded(b.kind)) for b in bound]
        return [
            {b.name: self.number(n) for b, n in zip(bound, numbers, strict=True)}
            for numbers in product(*ranges)
        ]


def _enum_width(kind: EnumType) -> int:
    """Bits of an enum, with a sign bit that is never set."""
    return len(kind.members).bit_length() + 1


def width_for(
    system: System, instance: Instance, formulas: Sequence[Node], steps: int, around: int = 0
) -> int:
    """Bits that hold every integer of a run: the largest start value, and growth by additions.

    `around` is the largest absolute value that an unknown state may hold.
    """
    terms = list(formulas)
    for step in system.steps:
        terms += [n.formula for n in step.when]
        terms += [t for a in step.then for t in (*a.keys, a.value)]
    largest = max(
        around,
        *(instance.bounded(k) for k in system.indexes()),
        *(abs(int(v.init.value)) for v in system.variables),
        *(_largest(t, instance) for t in terms),
    )
    growth = max((_growth(t) for t in terms), default=0)
    return (largest + growth * (steps + 1)).bit_length() + 1


def _largest(term: Node, instance: Instance) -> int:
    """The largest absolute value that a literal or constant of a term has."""
    found = 0
    for node in subterms(term):
        if isinstance(node, Literal):
            found = max(found, abs(int(node.value)))
        elif isinstance(node, Constant):
            found = max(found, abs(instance.constant(node)))
    return found


def _growth(term: Node) -> int:
    """How much all additions of a term together can add."""
    amounts = [n.amount for n in subterms(term) if isinstance(n, Add)]
    return sum(max(abs(int(leaf.value)) for leaf in _leaves(a)) for a in amounts)


def _leaves(amount: Node) -> list[Literal]:
    if isinstance(amount, Choice):
        return _leaves(amount.then) + _leaves(amount.otherwise)
    return [amount] if isinstance(amount, Literal) else []


def slice_for(system: System, instance: Instance, formulas: Sequence[Node]) -> System:
    """The part of a system that some formulas depend on.

    Variables that the formulas read, directly or through updates and conditions of the steps that
    write such variables, are kept with all their steps.  The other steps change nothing of these
    variables, so every run of the slice is a run of the system, step for step, and conversely.
    """
    conditions = {
        s.name: frozenset().union(*(reads(c.formula) for c in finite_conditions(s, instance, {})))
        for s in system.steps
    }
    wanted: frozenset[str] = frozenset().union(*(reads(f) for f in formulas))
    while True:
        grown = set(wanted)
        for step in system.steps:
            if not step.writes() & wanted:
                continue
            grown |= conditions[step.name]
            for assign in step.then:
                if assign.target.name in wanted:
                    grown |= reads(assign.value).union(*(reads(k) for k in assign.keys))
        if grown == wanted:
            return _restricted(system, wanted)
        wanted = frozenset(grown)


def _restricted(system: System, wanted: frozenset[str]) -> System:
    steps = tuple(
        replace(s, then=tuple(a for a in s.then if a.target.name in wanted))
        for s in system.steps
        if s.writes() & wanted
    )
    variables = tuple(v for v in system.variables if v.name in wanted)
    return replace(
        system,
        variables=variables,
        steps=steps,
        properties=(),
        goals=(),
        base=None,
        _by_name={},
    )
