"""One generated function that computes all successors of a range of states.

A state is one flat tuple: scalars and the elements of maps, in the order of the variables.  Every
step is unrolled over its parameters; conditions that several of these begin with are tested once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from tdxmig_model.compile.writer import ADD, ATOM, CHOICE, NOT, Writer, define
from tdxmig_model.errors import ModelError
from tdxmig_model.expr import (
    And,
    Assign,
    Count,
    CountBelow,
    ForAll,
    IndexType,
    Instance,
    Interpreter,
    Literal,
    MapVariable,
    Node,
    Read,
    System,
    Value,
    Variable,
    initial_state,
    slots,
)
from tdxmig_model.expr.finite import (
    FALSE,
    TRUE,
    FiniteStep,
    ceilings,
    defined,
    finite_step,
    ground,
    simplify,
    unrolled,
)

FlatState = tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Label:
    """One step with one choice of its parameters."""

    step: str
    params: Mapping[str, Value]

    def __str__(self) -> str:
        chosen = ", ".join(f"{k}={int(v)}" for k, v in self.params.items())
        return f"{self.step}({chosen})"


class FlatWriter(Writer):
    """Print terms over the local variables that a flat state is unpacked into."""

    def __init__(self, system: System, instance: Instance) -> None:
        super().__init__(instance, slots(system))
        self.system = system
        self.base: dict[str, int] = {}
        self.initial: list[Value] = []
        for variable, value in zip(system.variables, initial_state(system, instance), strict=True):
            self.base[variable.name] = len(self.initial)
            self.initial += value if isinstance(value, list) else [value]
        self.width = len(self.initial)
        self.names = [f"v{i}" for i in range(self.width)]
        self._positions = Interpreter(system, instance)

    def scalar(self, variable: Variable) -> str:
        return self.names[self.base[variable.name]]

    def position(self, variable: MapVariable, keys: Sequence[Node]) -> int | None:
        """The position of an element in the flat state, if the keys are constant."""
        if not all(isinstance(k, Literal) for k in keys):
            return None
        values = [int(k.value) for k in keys if isinstance(k, Literal)]
        return self.base[variable.name] + self._positions.offset(variable, values)

    def key(self, key: Node, kind: IndexType) -> tuple[str, int]:
        """The expression for a key, unchecked: a condition of the step before it sees to that."""
        return self._write(key)

    def place(self, variable: MapVariable, keys: Sequence[Node]) -> str:
        """The expression for the position of an element in the flat state."""
        base = self.base[variable.name]
        return f"{base} + {self.offset(variable, keys)}" if base else self.offset(variable, keys)

    def element(self, node: Read) -> str:
        try:
            position = self.position(node.map, node.keys)
        except IndexError:
            return "never"  # evaluation does not come here, and the name is never looked up
        if position is None:
            return f"state[{self.place(node.map, node.keys)}]"
        return self.names[position]

    def _write(self, node: Node) -> tuple[str, int]:
        match node:
            case ForAll():
                parts = tuple(unrolled(node.bound, node.body, self.instance))
                return self._write(simplify(And(parts), self.instance))
            case CountBelow():
                return self._write(node.as_count())
            case Count():
                parts = tuple(unrolled((node.bound,), node.predicate, self.instance))
                certain = sum(p == TRUE for p in parts)
                terms = [self.at(p, ATOM) for p in parts if not isinstance(p, Literal)]
                if certain or not terms:
                    terms.append(str(certain))
                return " + ".join(terms), ADD if len(terms) > 1 else NOT
            case _:
                return super()._write(node)


@dataclass
class Branch:
    """A tree of conditions with the steps that are taken where they hold."""

    children: dict[tuple[Node, int | None], Branch] = field(default_factory=dict)
    taken: list[tuple[int, FiniteStep]] = field(default_factory=list)


def conditions_tree(
    system: System,
    instance: Instance,
    ceiling: int | Mapping[str, int] | None,
    labels: list[Label],
) -> Branch:
    """All steps of an instance by their conditions; `labels` gets one for each choice."""
    root = Branch()
    limits = ceilings(system, instance, ceiling)
    chooser = Interpreter(system, instance)
    for row in system.steps:
        finite = finite_step(row, instance, limits)
        for params in chooser.choices(row):
            _insert(root, len(labels), ground(finite, params, instance))
            labels.append(Label(row.name, params))
    return root


def _insert(root: Branch, label: int, step: FiniteStep) -> None:
    """A step that can neither be taken nor clipped is left out."""
    branch = root
    conditions = list(step.conditions)
    impossible = bool(conditions) and conditions[-1].formula == FALSE
    if impossible and not conditions[-1].clips:
        while conditions and not conditions[-1].clips:
            conditions.pop()
        if not conditions:
            return
    for wanted in conditions:
        key = wanted.formula, label if wanted.clips else None
        branch = branch.children.setdefault(key, Branch())
    if not impossible:
        branch.taken.append((label, step))


class Successors:
    """The labels of an instance, and the generated `expand` and `inspect`.

    `expand(first, last, order, seen, labels, targets, ends)` appends the successors of the states
    `order[first:last]` and returns how many steps were clipped.
    """

    def __init__(
        self,
        system: System,
        instance: Instance,
        ceiling: int | Mapping[str, int] | None,
    ) -> None:
        self.system = system
        self.instance = instance
        self.writer = FlatWriter(system, instance)
        self.labels: list[Label] = []
        root = conditions_tree(system, instance, ceiling, self.labels)
        self.source = self._source(root)
        title = f"{system.name} model, successors"
        self.expand: Callable[..., int] = define(self.source, title, {})["expand"]

    @property
    def initial(self) -> FlatState:
        """The initial state, flat."""
        return tuple(self.writer.initial)

    # --- the generated function -------------------------------------------------------------------

    def _source(self, root: Branch) -> str:
        names = ", ".join(self.writer.names)
        lines = [
            "def expand(first, last, order, seen, labels, targets, ends):",
            "    known = seen.setdefault",
            "    new, label, goal, end = order.append, labels.append, targets.append, ends.append",
            "    size, clipped = len(order), 0",
            "    for source in range(first, last):",
            "        state = order[source]",
            f"        {names}, = state",
            *self._branch(root, 2),
            "        end(len(labels))",
            "    return clipped",
        ]
        return "\n".join(lines)

    def _branch(self, branch: Branch, depth: int) -> Iterator[str]:
        indent = "    " * depth
        if not branch.taken and not branch.children:
            yield f"{indent}pass"
        for label, step in branch.taken:
            yield f"{indent}# {self.labels[label]}"
            yield from (indent + line for line in self._taken(label, step))
        for (formula, clipping), child in branch.children.items():
            if clipping is not None:
                if formula == FALSE:
                    yield f"{indent}clipped += 1"
                    continue
                yield f"{indent}if not {self.writer.at(formula, NOT)}:"
                yield f"{indent}    clipped += 1"
                yield f"{indent}else:"
            else:
                formulas = [formula]
                while not child.taken and len(child.children) == 1:
                    (only, clips), grandchild = next(iter(child.children.items()))
                    if clips is not None:
                        break
                    formulas.append(only)
                    child = grandchild
                conditions = " and ".join(self.writer.at(f, NOT) for f in formulas)
                yield f"{indent}if {conditions}:"
            yield from self._branch(child, depth + 1)

    def _taken(self, label: int, step: FiniteStep) -> Iterator[str]:
        after, moving = self._after(step.updates)
        if moving:
            yield f"after = [{', '.join(after)}]"
            yield from (f"after[{place}] = {value}" for place, value in moving)
            yield "target = tuple(after)"
        else:
            yield f"target = ({', '.join(after)},)"
        yield "found = known(target, size)"
        yield "if found == size:"
        yield "    new(target)"
        yield "    size += 1"
        yield f"label({label})"
        yield "goal(found)"

    def _after(self, updates: Sequence[Assign]) -> tuple[list[str], list[tuple[str, str]]]:
        """The new elements by position, and those whose position depends on the state."""
        after = list(self.writer.names)
        moving = []
        for assign in updates:
            target = assign.target
            if isinstance(target, Variable):
                after[self.writer.base[target.name]] = self.writer.at(assign.value, CHOICE)
            elif assign.bound:
                start = self.writer.base[target.name]
                for offset, value in enumerate(unrolled(assign.bound, assign.value, self.instance)):
                    after[start + offset] = self.writer.at(value, CHOICE)
            else:
                position = self.writer.position(target, assign.keys)
                value_text = self.writer.at(assign.value, CHOICE)
                if position is None:
                    moving.append((self.writer.place(target, assign.keys), value_text))
                else:
                    after[position] = value_text
        return after, moving

    # --- formulas over states ---------------------------------------------------------------------

    def inspector(
        self, invariants: Mapping[str, Node], goals: Mapping[str, Node]
    ) -> Callable[..., None]:
        """`inspect(first, last, order, broken, reached)`: note where each formula is first met.

        An invariant that reads outside a map is a ModelError; a goal that does is not reached.
        """
        lines = [
            "def inspect(first, last, order, broken, reached):",
            "    for source in range(first, last):",
            "        state = order[source]",
            f"        {', '.join(self.writer.names)}, = state",
        ]
        for name, formula in invariants.items():
            simple = simplify(formula, self.instance)
            inside = simplify(defined(formula, self.instance), self.instance)
            lines.append(f"        if {name!r} not in broken:")
            if inside != TRUE:
                lines.append(f"            if not {self.writer.at(inside, NOT)}:")
                lines.append(f"                outside({name!r})")
            lines.append(f"            if not {self.writer.at(simple, NOT)}:")
            lines.append(f"                broken[{name!r}] = source")
        for name, formula in goals.items():
            both = And((defined(formula, self.instance), formula))
            condition = self.writer.at(simplify(both, self.instance), NOT)
            lines.append(f"        if {name!r} not in reached and {condition}:")
            lines.append(f"            reached[{name!r}] = source")
        title = f"{self.system.name} model, properties"
        inspect: Callable[..., None] = define("\n".join(lines), title, {"outside": outside})[
            "inspect"
        ]
        return inspect

    def satisfying(self, formula: Node, order: Sequence[FlatState]) -> frozenset[int]:
        """The numbers of the states that satisfy a formula; one that reads outside does not."""
        both = And((defined(formula, self.instance), formula))
        condition = self.writer.at(simplify(both, self.instance), NOT)
        lines = [
            "def satisfying(order):",
            "    found = []",
            "    for source, state in enumerate(order):",
            f"        {', '.join(self.writer.names)}, = state",
            f"        if {condition}:",
            "            found.append(source)",
            "    return found",
        ]
        title = f"{self.system.name} model, a formula"
        chosen: Callable[..., list[int]] = define("\n".join(lines), title, {})["satisfying"]
        return frozenset(chosen(order))


def outside(name: str) -> NoReturn:
    """What generated code calls where a property reads outside a map."""
    raise ModelError(f"{name} reads a map outside the sizes of this instance")
