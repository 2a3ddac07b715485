"""The projection of a system onto one enum variable: which step leads from which member to which.

The `transitions` machines and the diagrams are both made from it, so neither can show an edge that
the other does not have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import (
    BOOL,
    And,
    EnumType,
    Equal,
    Literal,
    Member,
    Need,
    Node,
    Not,
    Or,
    Step,
    System,
    Variable,
    all_of,
    any_of,
    not_,
    subterms,
)

TRUE = Literal(True, BOOL)
FALSE = Literal(False, BOOL)


@dataclass(frozen=True, slots=True)
class Edge:
    """A step that can be taken in `origin`; `target` is None where the step stays there."""

    step: Step
    origin: str
    target: str | None
    guard: tuple[Need, ...]
    """The conjuncts that are left when the member is known."""


def edges(system: System, variable: Variable, actor: str) -> list[Edge]:
    """Every edge of one actor's steps over the members of an enum variable, in row order.

    A step is at a member unless one of its conjuncts is false there whatever the other variables
    are.  A step that neither speaks of the variable nor changes it has no edges.
    """
    kind = variable.kind
    if not isinstance(kind, EnumType):
        raise ModelError(f"{variable.name} is a {kind.name}; only an enum has edges to draw")
    found: list[Edge] = []
    for step in system.of_actor(actor):
        target = _target(step, variable)
        if target is None and not any(variable in subterms(n.formula) for n in step.when):
            continue
        for position, name in enumerate(kind.members):
            known = Literal(position, kind)
            left = [replace(n, formula=at(n.formula, variable, known)) for n in step.when]
            if not any(n.formula == FALSE for n in left):
                guard = tuple(n for n in left if n.formula != TRUE)
                found.append(Edge(step, name, target, guard))
    return found


def at(formula: Node, variable: Variable, known: Literal) -> Node:
    """What is left of a formula when a variable has a known value: TRUE, FALSE or less than before.

    Only what formulas are made of is looked into; a term that computes with the variable stays.
    """
    match formula:
        case Equal(left=left, right=right):
            sides = [known if side == variable else side for side in (left, right)]
            if all(isinstance(side, Literal) for side in sides):
                return Literal(sides[0] == sides[1], BOOL)
            return formula
        case Member(term=term, members=members) if term == variable:
            return Literal(known in members, BOOL)
        case Not(body=body):
            inner = at(body, variable, known)
            return Literal(not inner.value, BOOL) if isinstance(inner, Literal) else not_(inner)
        case And(parts=parts):
            return _joined([at(p, variable, known) for p in parts], TRUE)
        case Or(parts=parts):
            return _joined([at(p, variable, known) for p in parts], FALSE)
        case _:
            return formula


def _joined(parts: list[Node], neutral: Literal) -> Node:
    """The parts of a conjunction (neutral TRUE) or disjunction (neutral FALSE), less the known."""
    left = [p for p in parts if p != neutral]
    if any(isinstance(p, Literal) for p in left):
        return FALSE if neutral == TRUE else TRUE
    if not left:
        return neutral
    return all_of(*left) if neutral == TRUE else any_of(*left)


def _target(step: Step, variable: Variable) -> str | None:
    for assign in step.then:
        if assign.target == variable:
            if not isinstance(assign.value, Literal):
                raise ModelError(f"step {step.name} gives {variable.name} a computed value")
            return str(assign.value)
    return None
