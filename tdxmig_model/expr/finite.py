"""A finite instance of a system: what search, TLA+ and Promela enumerate.

Integers have no bound of their own and maps have a size, so that a finite instance has to say which
steps stay inside.  There is one rule for all uses, stated as conditions in the language itself:

* A step is *clipped* (not taken, and counted) if evaluating it, from left to right and only as far
  as needed, reads or writes a map outside its size.
* It is clipped if it would give an integer variable a value whose magnitude is above the variable's
  *ceiling*.  A variable whose value is used as a position has the size of that index as its
  ceiling; the caller may give ceilings to all others.

Nothing here is needed at run time, where indexes may be unbounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tdxmig_model.errors import ModelError
from tdxmig_model.expr.build import subterms
from tdxmig_model.expr.counts import Count, CountBelow
from tdxmig_model.expr.interp import Instance, Value
from tdxmig_model.expr.nodes import (
    Add,
    And,
    Assign,
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
from tdxmig_model.expr.types import BOOL, INT, IndexType, is_integer

TRUE = Literal(True, BOOL)
FALSE = Literal(False, BOOL)

Environment = Mapping[Node, Literal]


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition of a finite step: a guard conjunct, or (`clips`) a bound of the instance."""

    label: str
    formula: Node
    clips: bool


@dataclass(frozen=True, slots=True)
class FiniteStep:
    """A row in a finite instance; conditions are evaluated in order, up to the first no."""

    row: Step
    conditions: tuple[Condition, ...]
    updates: tuple[Assign, ...]


def ceilings(
    system: System, instance: Instance, given: int | Mapping[str, int] | None = None
) -> dict[str, int]:
    """The ceiling of each integer variable that has one, by name.

    `given` is one ceiling for all variables that are no positions, or one for each that is named.
    """
    found: dict[str, int] = {}
    for row in system.steps:
        terms = [n.formula for n in row.when]
        terms += [t for a in row.then for t in (*a.keys, a.value)]
        reads = [n for t in terms for n in subterms(t) if isinstance(n, Read)]
        pairs = [(r.map, r.keys) for r in reads]
        pairs += [(a.target, a.keys) for a in row.then if isinstance(a.target, MapVariable)]
        for target, keys in pairs:
            for kind, key in zip(target.indexes, keys, strict=False):
                for name in _roots(key):
                    size = instance.bounded(kind)
                    found[name] = min(found.get(name, size), size)
    named = given if isinstance(given, Mapping) else {}
    unknown = set(named) - {v.name for v in system.variables}
    if unknown:
        raise ModelError(f"the {system.name} model has no variable {', '.join(sorted(unknown))}")
    for variable in system.variables:
        if not is_integer(variable.kind):
            continue
        if variable.name in named:
            found[variable.name] = named[variable.name]
        elif isinstance(given, int):
            found.setdefault(variable.name, given)
    return found


def _roots(key: Node) -> Iterator[str]:
    """Names of the variables whose value is the position, up to constants."""
    match key:
        case Variable():
            yield key.name
        case Read():
            yield key.map.name
        case Add():
            yield from _roots(key.term)
        case Choice():
            yield from _roots(key.then)
            yield from _roots(key.otherwise)


def finite_step(row: Step, instance: Instance, ceiling: Mapping[str, int]) -> FiniteStep:
    """The row with its conditions, simplified."""
    simple = (
        Condition(c.label, simplify(c.formula, instance), c.clips)
        for c in finite_conditions(row, instance, ceiling)
    )
    conditions = tuple(c for c in simple if c.formula != TRUE)
    return FiniteStep(row, conditions, tuple(_simple_update(a, instance) for a in row.then))


def finite_conditions(row: Step, instance: Instance, ceiling: Mapping[str, int]) -> list[Condition]:
    """The conjuncts of the row as they were written, and before each what it needs to be defined;
    then the conditions under which the updates stay inside the instance.
    """
    conditions: list[Condition] = []

    def add(label: str, formula: Node, *, clips: bool) -> None:
        # What was seen to hold for an earlier term still does: all of them read one state.
        known = any(c.formula == formula for c in conditions)
        if not clips or not (known or simplify(formula, instance) == TRUE):
            conditions.append(Condition(label, formula, clips))

    for wanted in row.when:
        add(f"{wanted.label}: inside", defined(wanted.formula, instance), clips=True)
        add(wanted.label, wanted.formula, clips=False)
    for assign in row.then:
        label = f"{assign.target.name}: inside"
        if isinstance(assign.target, MapVariable):
            add(label, _inside_keys(assign.target, assign.keys, instance), clips=True)
        inner = defined(assign.value, instance)
        below = _below(_simple_update(assign, instance), ceiling.get(assign.target.name))
        if assign.bound:
            inner, below = ForAll(assign.bound, inner), ForAll(assign.bound, below)
        add(label, inner, clips=True)
        add(f"{assign.target.name}: ceiling", below, clips=True)
    return conditions


def _simple_update(assign: Assign, instance: Instance) -> Assign:
    keys = tuple(simplify(k, instance) for k in assign.keys)
    return Assign(assign.target, keys, assign.bound, simplify(assign.value, instance))


def _below(assign: Assign, ceiling: int | None) -> Node:
    """That the new value's magnitude is at most the ceiling, given that the old one's was."""
    value = assign.value
    if ceiling is None or not is_integer(assign.target.kind):
        return TRUE
    high: Node = Not(Less(Literal(ceiling, INT), value))
    low: Node = Not(Less(value, Literal(-ceiling, INT)))
    own = assign.target if isinstance(assign.target, Variable) else Read(assign.target, assign.keys)
    if isinstance(value, Add) and value.term == own and isinstance(value.amount, Literal):
        return high if int(value.amount.value) >= 0 else low
    if value == own:
        return TRUE
    return And((low, high))


def ground(step: FiniteStep, params: Mapping[str, Value], instance: Instance) -> FiniteStep:
    """The step for one choice of its parameters, simplified; true conditions are gone.

    What comes after a condition that is false can never be evaluated and is gone as well.
    """
    env: dict[Node, Literal] = {p: Literal(params[p.name], p.kind) for p in step.row.params}
    conditions: list[Condition] = []
    for wanted in step.conditions:
        formula = simplify(wanted.formula, instance, env)
        if formula != TRUE:
            conditions.append(Condition(wanted.label, formula, wanted.clips))
        if formula == FALSE:
            break
    updates = tuple(
        Assign(
            a.target,
            tuple(simplify(k, instance, env) for k in a.keys),
            a.bound,
            simplify(a.value, instance, env),
        )
        for a in step.updates
    )
    return FiniteStep(step.row, tuple(conditions), updates)


# --- is a term defined? ---------------------------------------------------------------------------


def defined(node: Node, instance: Instance) -> Node:
    """A formula: evaluating the term stays inside every map that it reads."""
    if not any(isinstance(n, Read) for n in subterms(node)):
        return TRUE
    match node:
        case Read():
            return _and(
                *(defined(k, instance) for k in node.keys),
                _inside_keys(node.map, node.keys, instance, reading=True),
            )
        case And():
            return _in_turn(node.parts, instance, going_on=True)
        case Or():
            return _in_turn(node.parts, instance, going_on=False)
        case Choice():
            then = defined(node.then, instance)
            otherwise = defined(node.otherwise, instance)
            branches: Node = Choice(node.condition, then, otherwise)
            if then == TRUE:
                branches = TRUE if otherwise == TRUE else Or((node.condition, otherwise))
            elif otherwise == TRUE:
                branches = Or((Not(node.condition), then))
            return _and(defined(node.condition, instance), branches)
        case ForAll():
            inner = defined(node.body, instance)
            return TRUE if inner == TRUE else ForAll(node.bound, inner)
        case CountBelow():
            return defined(node.as_count(), instance)
        case Count():
            inner = defined(node.predicate, instance)
            return TRUE if inner == TRUE else ForAll((node.bound,), inner)
        case _:
            return _and(*(defined(child, instance) for child in node.children()))


def _in_turn(parts: tuple[Node, ...], instance: Instance, *, going_on: bool) -> Node:
    """Definedness of a conjunction (or disjunction) that is evaluated from left to right."""
    result: Node = TRUE
    for part in reversed(parts):
        if result != TRUE:
            stops: Node = Not(part) if going_on else part
            result = Or((stops, result))
        result = _and(defined(part, instance), result)
    return result


def _inside_keys(
    target: MapVariable, keys: tuple[Node, ...], instance: Instance, *, reading: bool = False
) -> Node:
    parts = []
    for key, kind in zip(keys, target.indexes, strict=False):
        if not reading:
            parts.append(defined(key, instance))
        parts.append(_inside(key, kind, instance))
    return _and(*parts)


def _inside(key: Node, kind: IndexType, instance: Instance) -> Node:
    """That a position is inside an index; an element of a sort always is."""
    size = instance.bounded(kind)
    if isinstance(key, Literal):
        return TRUE if 0 <= int(key.value) < size else FALSE
    if isinstance(key, Parameter | Bound) and isinstance(key.type, IndexType):
        if instance.bounded(key.type) <= size:
            return TRUE
    elif not kind.ordered:
        return TRUE
    return And((Not(Less(key, Literal(0, INT))), Less(key, Size(kind))))


def _and(*parts: Node) -> Node:
    kept = tuple(p for p in parts if p != TRUE)
    return TRUE if not kept else kept[0] if len(kept) == 1 else And(kept)


# --- constant folding -----------------------------------------------------------------------------


def simplify(node: Node, instance: Instance, env: Environment | None = None) -> Node:
    """The term with sizes, named constants and `env` put in, and what is constant worked out.

    Parts that cannot change the value are dropped, also those that may read outside a map:
    `defined` is asked of the term as it was written.
    """
    known = env or {}
    match node:
        case Parameter() | Bound():
            return known.get(node, node)
        case Constant():
            return Literal(instance.constant(node), INT)
        case Size():
            return Literal(instance.bounded(node.of), INT)
        case Literal() | Variable():
            return node
        case Read():
            return Read(node.map, tuple(simplify(k, instance, known) for k in node.keys))
        case And():
            return _simple_parts(node.parts, instance, known, stop=FALSE, go=TRUE)
        case Or():
            return _simple_parts(node.parts, instance, known, stop=TRUE, go=FALSE)
        case Not():
            body = simplify(node.body, instance, known)
            if isinstance(body, Literal):
                return Literal(not body.value, BOOL)
            return body.body if isinstance(body, Not) else Not(body)
        case Choice():
            return _simple_choice(node, instance, known)
        case ForAll():
            inner = _without(known, node.bound)
            body = simplify(node.body, instance, inner)
            return body if isinstance(body, Literal) else ForAll(node.bound, body)
        case CountBelow():
            return simplify(node.as_count(), instance, known)
        case Count():
            inner = _without(known, (node.bound,))
            return Count(node.name, node.bound, simplify(node.predicate, instance, inner))
        case _:
            return _simple_value(node, instance, known)


def _simple_value(node: Node, instance: Instance, env: Environment) -> Node:
    """Terms whose subterms are all evaluated."""
    match node:
        case Add():
            term = simplify(node.term, instance, env)
            amount = simplify(node.amount, instance, env)
            if isinstance(amount, Literal):
                if isinstance(term, Literal):
                    return Literal(int(term.value) + int(amount.value), INT)
                if amount.value == 0 and is_integer(term.type):
                    return term
            return Add(term, amount)
        case Equal() | Less():
            left = simplify(node.left, instance, env)
            right = simplify(node.right, instance, env)
            if isinstance(left, Literal) and isinstance(right, Literal):
                same, less = left.value == right.value, left.value < right.value
                return Literal(same if isinstance(node, Equal) else less, BOOL)
            return type(node)(left, right)
        case Member():
            term = simplify(node.term, instance, env)
            if isinstance(term, Literal):
                return Literal(term.value in [m.value for m in node.members], BOOL)
            return Member(term, node.members)
        case Lookup():
            term = simplify(node.term, instance, env)
            if isinstance(term, Literal):
                table = {old.value: new for old, new in node.table}
                return table.get(term.value, term)
            return Lookup(term, node.table)
        case _:
            raise ModelError(f"a finite instance does not know {type(node).__name__}")


def _simple_parts(
    parts: tuple[Node, ...], instance: Instance, env: Environment, *, stop: Node, go: Node
) -> Node:
    kept: list[Node] = []
    for part in parts:
        simple = simplify(part, instance, env)
        if simple == stop:
            return stop
        if simple != go:
            kept.append(simple)
    if not kept:
        return go
    if len(kept) == 1:
        return kept[0]
    return And(tuple(kept)) if go == TRUE else Or(tuple(kept))


def _simple_choice(node: Choice, instance: Instance, env: Environment) -> Node:
    condition = simplify(node.condition, instance, env)
    if isinstance(condition, Literal):
        return simplify(node.then if condition.value else node.otherwise, instance, env)
    then = simplify(node.then, instance, env)
    otherwise = simplify(node.otherwise, instance, env)
    if then == otherwise and isinstance(then, Literal):
        return then
    return Choice(condition, then, otherwise)


def _without(env: Environment, bound: tuple[Bound, ...]) -> Environment:
    return {k: v for k, v in env.items() if k not in bound}


def unrolled(bound: tuple[Bound, ...], body: Node, instance: Instance) -> Iterator[Node]:
    """The body for every choice of the bound elements, in order."""
    if not bound:
        yield body
        return
    first, *others = bound
    for value in range(instance.bounded(first.kind)):
        inner = simplify(body, instance, {first: Literal(value, first.kind)})
        yield from unrolled(tuple(others), inner, instance)
