"""Which rows are bulk steps: may one row be taken for many values of one parameter at once?

That equals the single steps, in any order, only under these conditions:

* The parameter is of an ordered index.  The indexes that are given are distinct and inside it.
* What the step writes is read only where it writes it for this very index: `m[p]`, nothing else.
  So no entry sees what another entry changed.
* Everything else that is written is an added constant (or a choice of constants), a disjunction
  with itself, or a value that does not depend on what the step changes; of such a value the last
  index decides, as it does in single steps.
* No map is read at a computed position next to a condition on `m[p]`: single steps would not reach
  some of these reads, and arrays do them all.
"""

from __future__ import annotations

from dataclasses import dataclass

from tdxmig_model.expr import (
    Add,
    Assign,
    Bound,
    Constant,
    Count,
    ForAll,
    IndexType,
    Literal,
    Node,
    Or,
    Parameter,
    Read,
    Step,
    Variable,
    subterms,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a bulk step reads and writes, for one row and one of its parameters."""

    row: Step
    index: Parameter
    updates: tuple[Assign, ...]

    @property
    def written(self) -> frozenset[str]:
        """Names of the variables that the step changes."""
        return frozenset(a.target.name for a in self.updates)

    def per_entry(self, node: Node) -> bool:
        """Whether the value differs from index to index."""
        return any(n == self.index for n in subterms(node))

    def per_entry_update(self, assign: Assign) -> bool:
        """Whether each index writes an element of its own."""
        return self.index in assign.keys

    def disturbed(self, node: Node) -> str | None:
        """The name of a variable that another entry may have changed before this term reads it."""
        if isinstance(node, Variable):
            return node.name if node.name in self.written else None
        if isinstance(node, Read) and node.map.name in self.written:
            own = any(
                a.target == node.map and a.keys == node.keys and self.per_entry_update(a)
                for a in self.updates
            )
            if not own:
                return str(node)
        return next(filter(None, map(self.disturbed, node.children())), None)

    def unprotected(self, node: Node) -> str | None:
        """A read at a computed position inside a term that is evaluated for a whole array."""
        for term in subterms(node):
            if isinstance(term, Read):
                for key in term.keys:
                    if not isinstance(key, Parameter | Bound | Literal | Constant | Variable):
                        return str(term)
            if isinstance(term, Count | ForAll) and self.per_entry(term):
                return str(term)
        return None


def make_plan(row: Step, parameter: str, *, ghosts: bool) -> Plan | str:
    """The plan of a bulk step, or why there is none."""
    index = next((p for p in row.params if p.name == parameter), None)
    if index is None:
        return f"it has no parameter {parameter}"
    if not (isinstance(index.kind, IndexType) and index.kind.ordered):
        return f"{parameter} is a {index.kind.name}, not an element of an ordered index"
    updates = tuple(a for a in row.then if ghosts or not a.target.ghost)
    return Plan(row, index, updates)


def bulk_refusal(row: Step, parameter: str, *, ghosts: bool = True) -> str | None:
    """Why the row cannot be taken in bulk over the parameter; None if it can."""
    made = make_plan(row, parameter, ghosts=ghosts)
    if isinstance(made, str):
        return made
    for wanted in row.when:
        changed = made.disturbed(wanted.formula)
        if changed:
            return f"the conjunct {wanted.label} reads {changed}, which the step changes"
    array_seen = False
    for wanted in row.when:
        array_seen = array_seen or made.per_entry(wanted.formula)
        found = made.unprotected(wanted.formula) if array_seen else None
        if found:
            return f"the conjunct {wanted.label} reads {found} for every index"
    for assign in made.updates:
        reason = _update_refusal(made, assign)
        if reason:
            return reason
    return None


def _update_refusal(made: Plan, assign: Assign) -> str | None:
    what = f"the new value of {assign.target.name}"
    for key in assign.keys:
        changed = made.disturbed(key)
        if changed:
            return (
                f"the position written in {assign.target.name} is {changed}, which the step changes"
            )
        if made.per_entry(key) and key != made.index:
            return f"the position written in {assign.target.name} is computed from {made.index}"
    value = assign.value
    accumulated = accumulation(made, assign)
    if accumulated is not None:
        value = accumulated
    elif assign.bound and made.per_entry(value):
        return f"{what} depends on {made.index} and every element is written"
    changed = made.disturbed(value)
    if changed:
        return f"{what} depends on {changed}, which the step changes"
    found = made.unprotected(value) if made.per_entry(value) else None
    return f"{what} reads {found} for every index" if found else None


def accumulation(made: Plan, assign: Assign) -> Node | None:
    """What each index contributes, if the update is `x := x + ...` or `x := x or ...`."""
    if assign.bound or made.per_entry_update(assign):
        return None
    target = assign.target
    own: Node = target if isinstance(target, Variable) else Read(target, assign.keys)
    if isinstance(assign.value, Or) and own in assign.value.parts:
        return Or(tuple(p for p in assign.value.parts if p != own))
    amounts = []
    term = assign.value
    while isinstance(term, Add):
        amounts.append(term.amount)
        term = term.term
    if term != own or not amounts:
        return None
    total = amounts[0]
    for amount in amounts[1:]:
        total = Add(total, amount)
    return total
