"""In which states can a row be taken?  Asked of z3 with everything else free."""

from __future__ import annotations

from tdxmig_model.expr import (
    EnumType,
    IndexType,
    Instance,
    Literal,
    MapVariable,
    Node,
    Step,
    System,
    Variable,
    all_of,
    members,
    subterms,
)
from tdxmig_model.smt.finite import Finite, width_for
from tdxmig_model.smt.z3api import Answer, Solver

ROOM = 4
"""The size of every index: there is a place for the start epoch too."""
AROUND = 8
"""The largest absolute value that an integer of the free state can have for certain."""


class Guards:
    """The guards of a system in a small instance, over one state that need not be reachable."""

    def __init__(self, system: System) -> None:
        self.system = system
        instance = Instance.small(system, {k.name: ROOM for k in system.indexes()})
        width = width_for(system, instance, [], 1, around=AROUND)
        self.encoder = Finite(system, instance, width)
        cells = self.encoder.unknown_state("any")
        self.view = self.encoder.view(cells)
        self.ranges = [
            self.encoder.in_range(v.kind, cell) for v in system.variables for cell in cells[v.name]
        ]

    def of(self, row: Step) -> Guard:
        """The guard of one row, with any parameters."""
        return Guard(self, row)


class Guard:
    """One guard, which can be asked for the values that it allows."""

    def __init__(self, guards: Guards, row: Step) -> None:
        encoder = guards.encoder
        self._env, ranges = encoder.parameters(row, "any")
        self._guards = guards
        self._solver = Solver(quantified=False)
        self._solver.add(*guards.ranges, *ranges, encoder.fires(row, guards.view, self._env))

    def allows(self, formula: Node) -> bool:
        """Whether the row can be taken in some state with a formula."""
        self._solver.push()
        self._solver.add(self._guards.encoder.term(formula, self._guards.view, self._env))
        answer = self._solver.check()
        self._solver.pop()
        assert answer is not Answer.UNKNOWN
        return answer is Answer.SAT

    def names(self, term: Node, *given: Node) -> set[str]:
        """The values that an enum term can have where the row is taken, by name."""
        return {name for name, m in _members(term) if self.allows(all_of(term.eq(m), *given))}

    def pairs(self, one: Node, other: Node) -> set[tuple[str, str]]:
        """The pairs of values that two enum terms can have together."""
        found = set()
        for name in self.names(one):
            value = dict(_members(one))[name]
            found |= {(name, second) for second in self.names(other, one.eq(value))}
        return found


def _members(term: Node) -> list[tuple[str, Literal]]:
    assert isinstance(term.type, EnumType)
    return list(zip(term.type.members, members(term.type), strict=True))


def at_parameter(variable: Variable | MapVariable, row: Step) -> Node | None:
    """The scalar itself, or the element of a map that a parameter of the row chooses, if any."""
    if isinstance(variable, Variable):
        return variable
    (kind,) = variable.indexes
    chosen = [p for p in row.params if isinstance(p.kind, IndexType) and p.kind == kind]
    return variable[chosen[0]] if chosen else None


def values(system: System, variable: Variable | MapVariable) -> set[str]:
    """The values that an enum variable has at the start or that some row writes, by name."""
    written = [a.value for row in system.steps for a in row.then if a.target.name == variable.name]
    terms = [variable.init, *(n for value in written for n in subterms(value))]
    return {str(n) for n in terms if isinstance(n, Literal) and n.kind == variable.kind}
