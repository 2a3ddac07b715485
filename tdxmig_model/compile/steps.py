"""The steps of a system as plain Python functions over a flat state.

The state is that of the interpreter: a list with one slot per variable, a map being a flat list, a
NumPy array or a `Sparse`.  A guard reads; an apply changes the list it is given, and reads
everything before it writes anything.  A computed key outside its index is an IndexError, as in the
interpreter.  Neither checks that a parameter is inside its domain, which `Compiled.outside` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from tdxmig_model.compile.bulk import Bulk, make_bulk
from tdxmig_model.compile.bulk_plan import bulk_refusal
from tdxmig_model.compile.writer import Function, Writer, define, identifier, may_be_numpy
from tdxmig_model.errors import ModelError, Unmet
from tdxmig_model.expr import (
    Assign,
    BoolType,
    Bound,
    Constant,
    Count,
    EnumType,
    ForAll,
    IndexType,
    Instance,
    Need,
    Node,
    Parameter,
    Read,
    Size,
    Step,
    System,
    Value,
    Variable,
    show,
    slots,
    subterms,
)


@dataclass(frozen=True, slots=True)
class Conjunct:
    """One labelled conjunct of a guard: `holds(state, *params)`, and what it reads by name."""

    label: str
    text: str
    holds: Callable[..., bool]
    values: Callable[..., dict[str, object]]


class CompiledStep:
    """One row as Python: `guard`, `apply`, and the conjuncts for explaining a refusal."""

    def __init__(self, row: Step, writer: Writer, name: str, ghosts: bool) -> None:
        self.row = row
        self._writer = writer
        self._name = name
        parameters = ["state", *(identifier(p.name) for p in row.params)]
        if len(set(parameters)) != len(parameters):
            raise ModelError(f"step {row.name} has two parameters of one name: {parameters}")
        self._signature = ", ".join(parameters)
        updates = [a for a in row.then if ghosts or not a.target.ghost]
        self.source = "\n".join([*self._guard_lines(), "", "", *self._apply_lines(updates)])
        space = define(self.source, name, {"fill": fill, "no_fill": no_fill})
        self.guard: Callable[..., bool] = space["guard"]
        self.apply: Callable[..., None] = space["apply"]

    def _guard_lines(self) -> list[str]:
        lines = [f"def guard({self._signature}):"]
        if not self.row.when:
            return [*lines, "    return True"]
        lines.append("    return True if (")
        for position, wanted in enumerate(self.row.when):
            word = "and " if position else ""
            text = self._writer.at(wanted.formula, 3)
            lines.append(f"        {word}{text}  # {wanted.label}: {wanted.formula}")
        return [*lines, "    ) else False"]

    def _apply_lines(self, updates: Sequence[Assign]) -> list[str]:
        """All reads, then all writes.

        A local holds what a write could disturb, and every read of a map: where one fails, nothing
        has been written.  Elements are written before scalars for the same reason.
        """
        written = {a.target.name for a in updates} if len(updates) > 1 else set()
        updates = sorted(updates, key=lambda a: isinstance(a.target, Variable))
        early: dict[str, str] = {}
        late = []

        def settled(text: str, terms: Sequence[Node], *, sure: bool = True) -> str:
            if not written or (sure and not any(may_fail(t) or reads(t) & written for t in terms)):
                return text
            return early.setdefault(text, f"before_{len(early)}")

        for assign in updates:
            value = settled(self._value(assign), [assign.value])
            comment = f"  # {assign}"
            if isinstance(assign.target, Variable):
                late.append(f"    {self._writer.scalar(assign.target)} = {value}{comment}")
            elif assign.bound:
                if self._unsized(assign):
                    early[f"no_fill({assign.target.name!r})"] = f"before_{len(early)}"
                column = self._writer.column(assign.target)
                late.append(f"    fill({column}, {value}){comment}")
            else:
                offset = self._writer.offset(assign.target, assign.keys)
                sure = self._writer.surely_all_inside(assign.target, assign.keys)
                offset = settled(offset, assign.keys, sure=sure)
                column = self._writer.column(assign.target)
                late.append(f"    {column}[{offset}] = {value}{comment}")
        lines = [f"def apply({self._signature}):"]
        lines += [f"    {name} = {text}" for text, name in early.items()]
        return [*lines, *(late or ["    pass"])]

    def _value(self, assign: Assign) -> str:
        """The new value; for a scalar never a NumPy one, for a whole map a list of all elements."""
        text = self._writer.text(assign.value)
        if assign.bound:
            if self._unsized(assign) or not any(
                isinstance(n, Bound) for n in subterms(assign.value)
            ):
                return text
            return f"[{text}{self._writer.loops(assign.bound)}]"
        if isinstance(assign.target, Variable) and may_be_numpy(assign.value):
            return f"bool({text})" if isinstance(assign.target.kind, BoolType) else f"int({text})"
        return text

    def _unsized(self, assign: Assign) -> bool:
        return any(self._writer.instance.size(b.kind) is None for b in assign.bound)

    @cached_property
    def conjuncts(self) -> tuple[Conjunct, ...]:
        """The guard conjunct by conjunct."""
        return tuple(self._conjunct(wanted) for wanted in self.row.when)

    def _conjunct(self, wanted: Need) -> Conjunct:
        shown = {str(n): n for n in visible(wanted.formula)}
        lines = [
            f"def holds({self._signature}):",
            f"    return True if {self._writer.at(wanted.formula, 1)} else False",
            "",
            "",
            f"def values({self._signature}):",
            "    return {",
            *(
                f"        {text!r}: show(kinds[{k}], {self._writer.text(node)}),"
                for k, (text, node) in enumerate(shown.items())
            ),
            "    }",
        ]
        known = {"show": shown_value, "kinds": [n.type for n in shown.values()]}
        space = define("\n".join(lines), f"{self._name}: {wanted.label}", known)
        return Conjunct(wanted.label, str(wanted.formula), space["holds"], space["values"])


class Compiled:
    """The steps of one system in one instance; each is compiled when it is first asked for.

    With `ghosts` false the updates of ghosts are left out; their slots keep the initial value.
    """

    def __init__(self, system: System, instance: Instance, *, ghosts: bool = True) -> None:
        self.system = system
        self.instance = instance
        self.ghosts = ghosts
        self.slots = slots(system)
        self._writer = Writer(instance, self.slots)
        self._steps: dict[str, CompiledStep] = {}
        self._bulks: dict[tuple[str, str], Bulk] = {}

    def step(self, name: str) -> CompiledStep:
        """One compiled row; ModelError if there is none of that name."""
        if name not in self._steps:
            row = self.system.step(name)
            title = f"{self.system.name} model, step {name}"
            self._steps[name] = CompiledStep(row, self._writer, title, self.ghosts)
        return self._steps[name]

    def guard(self, name: str) -> Callable[..., bool]:
        """`guard(state, *params) -> bool`."""
        return self.step(name).guard

    def apply(self, name: str) -> Callable[..., None]:
        """`apply(state, *params) -> None`, in place, all updates over the state before."""
        return self.step(name).apply

    def conjuncts(self, name: str) -> tuple[Conjunct, ...]:
        """The conjuncts of the guard, in order."""
        return self.step(name).conjuncts

    def values(
        self, name: str, label: str, state: Sequence[Any], *params: Value
    ) -> dict[str, object]:
        """What one conjunct reads, by the text of the term, shown as text."""
        self.system.step(name).needs(label)
        conjunct = next(c for c in self.conjuncts(name) if c.label == label)
        return conjunct.values(state, *params)

    def unmet(self, name: str, state: Sequence[Any], *params: Value) -> list[Unmet]:
        """Every conjunct that does not hold, with its text and the values it reads."""
        return [
            Unmet(c.label, c.text, c.values(state, *params))
            for c in self.conjuncts(name)
            if not c.holds(state, *params)
        ]

    def source(self, name: str) -> str:
        """The generated Python of a step."""
        return self.step(name).source

    def outside(self, name: str, *params: Value) -> str | None:
        """Which parameter is outside its domain, as text; None if all are inside."""
        row = self.system.step(name)
        if len(params) != len(row.params):
            return f"step {name} takes {len(row.params)} parameters, got {len(params)}"
        for wanted, value in zip(row.params, params, strict=True):
            size = _domain_size(wanted, self.instance)
            if value < 0 or (size is not None and value >= size):
                bound = "0 or more" if size is None else f"0 to {size - 1}"
                return f"{wanted.name} = {value} is no {wanted.kind.name} ({bound})"
        return None

    def term(self, node: Node, params: Sequence[Parameter] = ()) -> Function:
        """Any term or formula, properties included, as a function `(state, *params) -> value`."""
        signature = ", ".join(["state", *(identifier(p.name) for p in params)])
        source = f"def term({signature}):\n    return {self._writer.text(node)}"
        function: Function = define(source, f"{self.system.name} model, term", {})["term"]
        return function

    def bulk_refusal(self, name: str, parameter: str) -> str | None:
        """Why the step cannot be taken for many values of the parameter at once; None if it can."""
        row = self.system.step(name)
        return bulk_refusal(row, parameter, ghosts=self.ghosts)

    def bulk(self, name: str, parameter: str) -> Bulk:
        """The step for many values of a parameter at once; ModelError says why if it is none."""
        key = name, parameter
        if key not in self._bulks:
            row = self.system.step(name)
            reason = self.bulk_refusal(name, parameter)
            if reason is not None:
                raise ModelError(f"step {name} is not a bulk step over {parameter}: {reason}")
            title = f"{self.system.name} model, bulk step {name} over {parameter}"
            self._bulks[key] = make_bulk(
                row, parameter, self.instance, self.slots, title, self.unmet, ghosts=self.ghosts
            )
        return self._bulks[key]


def _domain_size(parameter: Parameter, instance: Instance) -> int | None:
    kind = parameter.kind
    if isinstance(kind, IndexType):
        return instance.size(kind)
    return len(kind.members) if isinstance(kind, EnumType) else 2


def reads(node: Node) -> set[str]:
    """Names of the variables that a term reads."""
    names = {n.name for n in subterms(node) if isinstance(n, Variable)}
    return names | {n.map.name for n in subterms(node) if isinstance(n, Read)}


def may_fail(node: Node) -> bool:
    """Whether evaluating the term can meet a position outside a map, or an index without a size."""
    return any(isinstance(n, Read | Count | Size) for n in subterms(node))


def visible(node: Node) -> list[Node]:
    """The terms whose values explain a formula: what it reads outside its quantifiers."""
    if isinstance(node, Count | Variable | Parameter | Constant):
        return [node]
    if isinstance(node, ForAll):
        return []
    own = [node] if isinstance(node, Read) and not _is_bound(node) else []
    return own + [found for child in node.children() for found in visible(child)]


def _is_bound(node: Node) -> bool:
    return any(isinstance(n, Bound) for n in subterms(node))


def shown_value(kind: Any, value: Any) -> str:
    """A value as text, NumPy scalars included."""
    return show(kind, bool(value) if isinstance(kind, BoolType) else int(value))


def fill(column: Any, values: Value | list[Value]) -> None:
    """Replace every element of a list or array, in place, by its own value or by one for all."""
    if isinstance(column, list) and not isinstance(values, list):
        column[:] = [values] * len(column)
    else:
        column[:] = values


def no_fill(name: str) -> NoReturn:
    """What generated code calls where it would have to fill a map without a size."""
    raise ModelError(f"{name} has no size here and cannot be filled")
