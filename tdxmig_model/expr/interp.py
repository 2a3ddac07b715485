"""The meaning of the language: a small interpreter over a flat state.

Every faster twin (compiled Python, NumPy columns, z3, TLA+, Promela) is tested against this file.

A state is a list with one slot per variable, in the order of `System.variables`.  A scalar is an
int or a
bool, an enum value is the member's position.  A map is one flat sequence (row-major over its
indexes), or a
`Sparse` dict where the instance gives an index no size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from tdxmig_model.errors import ModelError
from tdxmig_model.expr.counts import Count, CountBelow
from tdxmig_model.expr.nodes import (
    Add,
    And,
    Bound,
    Choice,
    Constant,
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
    Parameter,
    Read,
    Size,
    Variable,
)
from tdxmig_model.expr.system import Step, System
from tdxmig_model.expr.types import BoolType, EnumType, IndexType, Type

Value = int | bool
State = list[Any]
"""One slot per variable: an int or bool, or a sequence for a map."""


class Sparse(dict[int, Value]):
    """A map over an index without a size: elements never written have the initial value."""

    def __init__(self, initial: Value, items: Mapping[int, Value] | None = None) -> None:
        super().__init__(items or {})
        self.initial = initial

    def __missing__(self, key: int) -> Value:
        return self.initial

    def copy(self) -> Sparse:
        return Sparse(self.initial, self)


@dataclass(frozen=True)
class Instance:
    """Sizes of the indexes and values of the constants of one finite (or run-time) instance.

    An index with size None is unbounded: its maps are sparse, it cannot be enumerated.  Constants
    that are
    not listed have their run-time value; `Instance.small` takes the small ones.
    """

    sizes: Mapping[str, int | None] = field(default_factory=dict)
    constants: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def small(system: System, sizes: Mapping[str, int | None]) -> Instance:
        """An instance with the small value of every constant."""
        return Instance(sizes, {c.name: c.small for c in system.constants()})

    def size(self, index: IndexType) -> int | None:
        """The number of elements, None for unbounded."""
        if index.name not in self.sizes:
            raise ModelError(
                f"this instance gives no size to {index.name}; it has {dict(self.sizes)}"
            )
        return self.sizes[index.name]

    def bounded(self, index: IndexType) -> int:
        """The number of elements of an index that must be finite here."""
        size = self.size(index)
        if size is None:
            raise ModelError(f"{index.name} has no size in this instance and cannot be enumerated")
        return size

    def constant(self, constant: Constant) -> int:
        """The value of a named constant."""
        return self.constants.get(constant.name, constant.value)

    def domain(self, kind: Type) -> range:
        """All values of a parameter's type."""
        match kind:
            case BoolType():
                return range(2)
            case EnumType():
                return range(len(kind.members))
            case IndexType():
                return range(self.bounded(kind))
            case _:
                raise ModelError(f"{kind.name} has no finite domain")


def initial_state(system: System, instance: Instance) -> State:
    """The initial state of an instance."""
    state: State = []
    for variable in system.variables:
        value = variable.init.value
        if isinstance(variable, MapVariable):
            sizes = [instance.size(k) for k in variable.indexes]
            if any(s is None for s in sizes):
                state.append(Sparse(value))
            else:
                total = 1
                for s in sizes:
                    total *= int(s or 0)
                state.append([value] * total)
        else:
            state.append(value)
    return state


def slots(system: System) -> dict[str, int]:
    """Position of each variable in a state."""
    return {v.name: i for i, v in enumerate(system.variables)}


class Interpreter:
    """Evaluate terms, guards and steps of one system in one instance."""

    def __init__(self, system: System, instance: Instance) -> None:
        self.system = system
        self.instance = instance
        self.slots = slots(system)

    def offset(self, variable: MapVariable, keys: Sequence[int]) -> int:
        """The flat position of one element.

        IndexError for a key outside its index: the position could be that of another element.  In
        an index without a size, which only the first one may be, no key is outside.
        """
        flat = 0
        for place, (key, kind) in enumerate(zip(keys, variable.indexes, strict=True)):
            size = self.instance.bounded(kind) if place else self.instance.size(kind)
            if size is not None and not 0 <= key < size:
                raise IndexError(f"{variable.name} has no element {key} of {kind.name}")
            flat = flat * (size or 0) + int(key)
        return flat

    def value(self, node: Node, state: Sequence[Any], env: Mapping[str, Value]) -> Value:
        """The value of a term in a state, with parameters and bound elements from `env`."""
        match node:
            case Literal():
                return node.value
            case Constant():
                return self.instance.constant(node)
            case Size():
                return self.instance.bounded(node.of)
            case Parameter() | Bound():
                return env[node.name]
            case Variable():
                return state[self.slots[node.name]]  # type: ignore[no-any-return]
            case Read():
                keys = [int(self.value(k, state, env)) for k in node.keys]
                elements = state[self.slots[node.map.name]]
                return elements[self.offset(node.map, keys)]  # type: ignore[no-any-return]
            case Add():
                return self.value(node.term, state, env) + self.value(node.amount, state, env)
            case Equal():
                return bool(self.value(node.left, state, env) == self.value(node.right, state, env))
            case Less():
                return bool(self.value(node.left, state, env) < self.value(node.right, state, env))
            case Member():
                return self.value(node.term, state, env) in [m.value for m in node.members]
            case Not():
                return not self.value(node.body, state, env)
            case And():
                return all(self.value(p, state, env) for p in node.parts)
            case Or():
                return any(self.value(p, state, env) for p in node.parts)
            case Choice():
                branch = node.then if self.value(node.condition, state, env) else node.otherwise
                return self.value(branch, state, env)
            case Lookup():
                found = self.value(node.term, state, env)
                return {a.value: b.value for a, b in node.table}.get(found, found)
            case ForAll():
                return all(
                    self.value(node.body, state, {**env, **choice})
                    for choice in self._choices(node.bound)
                )
            case Count():
                return sum(
                    bool(self.value(node.predicate, state, {**env, **choice}))
                    for choice in self._choices((node.bound,))
                )
            case CountBelow():
                return self.value(node.as_count(), state, env)
            case _:
                raise ModelError(f"the interpreter does not know {type(node).__name__}")

    def _choices(self, bound: Sequence[Bound]) -> Iterator[dict[str, Value]]:
        ranges = [range(self.instance.bounded(b.kind)) for b in bound]
        for values in product(*ranges):
            yield {b.name: v for b, v in zip(bound, values, strict=True)}

    def enabled(self, step: Step, state: Sequence[Any], env: Mapping[str, Value]) -> bool:
        """Whether every conjunct of the guard holds."""
        return all(self.value(n.formula, state, env) for n in step.when)

    def apply(self, step: Step, state: Sequence[Any], env: Mapping[str, Value]) -> State:
        """The state after the step: all updates at once, over the state before."""
        after = [
            list(v) if isinstance(v, list) else v.copy() if hasattr(v, "copy") else v for v in state
        ]
        for assign in step.then:
            slot = self.slots[assign.target.name]
            if isinstance(assign.target, Variable):
                after[slot] = self.value(assign.value, state, env)
            elif assign.bound:
                if isinstance(after[slot], Sparse):
                    raise ModelError(f"{assign.target.name} has no size here and cannot be filled")
                for choice in self._choices(assign.bound):
                    keys = [int(choice[b.name]) for b in assign.bound]
                    value = self.value(assign.value, state, {**env, **choice})
                    after[slot][self.offset(assign.target, keys)] = value
            else:
                keys = [int(self.value(k, state, env)) for k in assign.keys]
                after[slot][self.offset(assign.target, keys)] = self.value(assign.value, state, env)
        return after

    def choices(self, step: Step) -> Iterator[dict[str, Value]]:
        """Every assignment of values to the step's parameters."""
        ranges = [self.instance.domain(p.kind) for p in step.params]
        for values in product(*ranges):
            yield {
                p.name: bool(v) if isinstance(p.kind, BoolType) else v
                for p, v in zip(step.params, values, strict=True)
            }


def show(kind: Type, value: object) -> str:
    """A value as text: an enum member by name."""
    if isinstance(kind, EnumType) and isinstance(value, int):
        return kind.members[value]
    if isinstance(kind, BoolType):
        return "yes" if value else "no"
    return str(value)
