"""Why a conjunct is not inductive: a small state with the invariant, and a step out of it.

The query is finite (bit vectors, no quantifier): invariant before, step, conjunct broken after.
Sizes grow from 1.  As many elements as possible have their initial value, so that what is left to
read is what matters.  The state may be unreachable: then the invariant lacks a lemma that excludes
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import (
    EnumType,
    IndexType,
    Instance,
    Interpreter,
    State,
    Step,
    System,
    Value,
    show,
)
from tdxmig_model.expr.types import BoolType
from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.finite import Finite, width_for
from tdxmig_model.smt.induction import Conjunct, conjuncts
from tdxmig_model.smt.runs import cells_of, failing_element
from tdxmig_model.smt.z3api import Answer, Solver, Term

WORK = 20_000_000
"""z3 resource units for one size."""


@dataclass(frozen=True, slots=True)
class Induced:
    """A counterexample to induction: one step from a state that satisfies the invariant."""

    system: System
    instance: Instance
    step: Step
    values: Mapping[str, Value]
    before: State
    after: State
    broken: Conjunct
    confirmed: bool

    def text(self) -> str:
        """The state before, the step, what changed, and for which element the conjunct fails."""
        sizes = ", ".join(f"{n} {name}" for name, n in self.instance.sizes.items())
        values = ", ".join(f"{n} = {v}" for n, v in self.values.items())
        lines = [
            f"{self.step.name}({values}) breaks {self.broken.identifier}",
            f"  which says: {self.broken.formula}",
            f"  instance: {sizes}" + ("" if self.confirmed else "  [not confirmed: see below]"),
            "  before (everything else as in the initial state, or not read):",
            *(f"    {line}" for line in self._differences()),
            "  after:",
            *(f"    {line}" for line in self._changes()),
        ]
        element = failing_element(self.system, self.instance, self.broken.formula, self.after)
        if element:
            found = ", ".join(f"{n} = {v}" for n, v in element.items())
            lines.append(f"  it fails for {found}")
        if not self.confirmed:
            lines.append("  the interpreter disagrees: an element outside the instance is read")
        return "\n".join(lines)

    def _differences(self) -> list[str]:
        lines = []
        for variable, value in zip(self.system.variables, self.before, strict=True):
            for name, kind, cell in cells_of(self.instance, variable, value):
                if cell != variable.init.value:
                    lines.append(f"{name} = {show(kind, cell)}")
        return lines or ["(the initial state)"]

    def _changes(self) -> list[str]:
        lines = []
        pairs = zip(self.system.variables, self.before, self.after, strict=True)
        for variable, old, new in pairs:
            olds = cells_of(self.instance, variable, old)
            news = cells_of(self.instance, variable, new)
            for (name, kind, was), (_, _, now) in zip(olds, news, strict=True):
                if was != now:
                    lines.append(f"{name} = {show(kind, was)} -> {show(kind, now)}")
        return lines


class _Query:
    """One step of one instance from an arbitrary state."""

    def __init__(
        self, system: System, instance: Instance, step: Step, assumed: Sequence[Conjunct], seed: int
    ) -> None:
        formulas = [c.formula for c in assumed]
        self.around = 2 + max(
            [instance.bounded(k) for k in system.indexes()]
            + [instance.constant(c) for c in system.constants()]
        )
        width = width_for(system, instance, formulas, 2, self.around)
        self.encoder = Finite(system, instance, width)
        self.step = step
        self.system = system
        self.cells = self.encoder.unknown_state("before")
        self.view = self.encoder.view(self.cells)
        self.env, ranges = self.encoder.parameters(step, "parameter")
        self.solver = Solver(quantified=False, seed=seed)
        self.solver.add(*ranges, *self._typing())
        self.solver.add(*(self.encoder.term(f, self.view, {}) for f in formulas))
        self.solver.add(self.encoder.fires(step, self.view, self.env))
        self.new = self.cells | self.encoder.written(step, self.view, self.env)

    def _typing(self) -> list[Term]:
        """Enum and index values are elements; integers are small."""
        facts = []
        for variable in self.system.variables:
            kind = variable.kind
            for cell in self.cells[variable.name]:
                if isinstance(kind, EnumType) or (
                    isinstance(kind, IndexType) and int(variable.init.value) >= 0
                ):
                    facts.append(self.encoder.in_range(kind, cell))
                elif not isinstance(kind, BoolType):
                    low, high = (self.encoder.number(n) for n in (-self.around, self.around))
                    facts += [z.at_most(low, cell), z.at_most(cell, high)]
        return facts

    def breaks(self, conjunct: Conjunct) -> bool:
        """Restrict to steps after which the conjunct fails; whether there are any."""
        after = self.encoder.view(self.new)
        self.solver.add(z.negate(self.encoder.term(conjunct.formula, after, {})))
        return self.solver.check(rlimit=WORK) is Answer.SAT

    def simplified(self) -> tuple[dict[str, Value], State, State]:
        """A model with as many initial values as one pass over the elements can set."""
        model = self.solver.model()
        for variable in self.system.variables:
            initial = self.encoder.literal(variable.init)
            for cell in self.cells[variable.name]:
                wish = z.equal(cell, initial)
                if model.value(wish):
                    self.solver.add(wish)
                    continue
                self.solver.push()
                self.solver.add(wish)
                if self.solver.check(rlimit=WORK // 10) is Answer.SAT:
                    model = self.solver.model()
                else:
                    self.solver.pop()
        values = self.encoder.values_of(model, self.step, self.env)
        before = self.encoder.state_of(model, self.cells)
        return values, before, self.encoder.state_of(model, self.new)


def find(
    system: System,
    step: str,
    broken: str,
    *,
    sizes: Mapping[str, int] | None = None,
    without: frozenset[str] = frozenset(),
    seed: int = 0,
    largest: int = 4,
) -> Induced | None:
    """A counterexample to induction for one step and one conjunct of a system (of one profile).

    `broken` is a conjunct's identifier as the induction reports it, such as "P10.4".  `sizes` fixes
    the instance; otherwise all indexes have 1, 2, ... `largest` elements.  `without` names
    conjuncts that are not assumed.  None if no instance has one.
    """
    invariant = conjuncts(system)
    target = next((c for c in invariant if c.identifier == broken), None)
    if target is None:
        names = ", ".join(c.identifier for c in invariant)
        raise ModelError(f"no conjunct {broken} in the invariant of {system.name}; it has {names}")
    row = system.step(step)
    assumed = [c for c in invariant if c.identifier not in without]
    ladder = (
        [dict(sizes)]
        if sizes is not None
        else [{k.name: n for k in system.indexes()} for n in range(1, largest + 1)]
    )
    for choice in ladder:
        instance = Instance.small(system, choice)
        query = _Query(system, instance, row, assumed, seed)
        if query.breaks(target):
            values, before, after = query.simplified()
            confirmed = _confirm(system, instance, row, values, before, after, target)
            return Induced(system, instance, row, values, before, after, target, confirmed)
    return None


def _confirm(
    system: System,
    instance: Instance,
    step: Step,
    values: Mapping[str, Value],
    before: State,
    after: State,
    broken: Conjunct,
) -> bool:
    """Whether the interpreter takes the same step to a state in which the conjunct fails."""
    interpreter = Interpreter(system, instance)
    try:
        return (
            interpreter.enabled(step, before, values)
            and interpreter.apply(step, before, values) == after
            and bool(interpreter.value(broken.formula, before, {}))
            and not interpreter.value(broken.formula, after, {})
        )
    except IndexError:
        return False


def explain(system: System, failures: Mapping[str, Sequence[str]], **options: object) -> str:
    """One text for several failures: conjunct to the steps that do not keep it."""
    lines = []
    for conjunct, steps in failures.items():
        for step in steps:
            found = find(system, step, conjunct, **options)  # type: ignore[arg-type]
            lines.append(found.text() if found else f"{step}, {conjunct}: none in small instances")
    return "\n\n".join(lines)
