"""The encoding for every size: maps are unknown functions, sizes and constants unknown integers.

An index has a size if the system speaks of it (`Size`, a count, or "for every element" as a
condition).  Other indexes, such as positions of the message log, are all integers from 0: what
holds for infinitely many elements of which finitely many are used holds for each finite number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import (
    And,
    Bound,
    Choice,
    Constant,
    Count,
    CountBelow,
    EnumType,
    Equal,
    ForAll,
    IndexType,
    IntType,
    MapVariable,
    Member,
    Node,
    Not,
    Or,
    Parameter,
    Size,
    Step,
    System,
    subterms,
)
from tdxmig_model.expr.types import BoolType, Type
from tdxmig_model.smt import counting
from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.counting import ONE, ZERO, Tally
from tdxmig_model.smt.encode import Encoder, Environment, Reader, View, reads
from tdxmig_model.smt.z3api import Term

MAX_PATTERNS = 8


class Unbounded(Encoder):
    """One system for every size of its indexes and every value of its constants."""

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.sized = sized_indexes(system)
        self._sizes = {k.name: z.int_const(f"size of {k.name}") for k in system.indexes()}
        self._constants = {c.name: z.int_const(f"constant {c.name}") for c in system.constants()}
        self._counts = system.counts()
        for count in self._counts:
            _closed(count)

    def number(self, value: int) -> Term:
        return z.integer(value)

    def member(self, kind: EnumType, position: int) -> Term:
        return z.integer(position)

    def constant(self, constant: Constant) -> Term:
        return self._constants[constant.name]

    def size(self, index: IndexType) -> Term:
        return self._sizes[index.name]

    def axioms(self) -> list[Term]:
        """Each index has an element, and each constant is at least its `least`."""
        facts = [z.at_most(ONE, s) for s in self._sizes.values()]
        for constant in self.system.constants():
            facts.append(z.at_most(z.integer(constant.least), self.constant(constant)))
        return facts

    def in_range(self, kind: Type, value: Term) -> Term:
        """What the type of a parameter or quantified element says of it."""
        match kind:
            case EnumType():
                return counting.below(value, z.integer(len(kind.members)))
            case IndexType() if kind.name in self.sized:
                return counting.below(value, self.size(kind))
            case IndexType():
                return z.at_most(ZERO, value)
            case BoolType() | IntType():
                return z.TRUE
            case _:
                raise ModelError(f"a {kind} has no range")

    # States.

    def before(self) -> tuple[View, list[Term]]:
        """Any state: unknown constants and functions, with what is true of every state."""
        facts: list[Term] = []
        view = View({}, {})
        for variable in self.system.variables:
            predicate = isinstance(variable.kind, BoolType)
            if isinstance(variable, MapVariable):
                arity = len(variable.indexes)
                applied = z.function(variable.name, arity, predicate=predicate)
                view.maps[variable.name] = _reader(applied)
                if isinstance(variable.kind, EnumType):
                    keys = [z.int_const(z.fresh_name("k")) for _ in range(arity)]
                    read = applied(*keys)
                    facts.append(z.for_all(keys, self.in_range(variable.kind, read), [[read]]))
            else:
                make = z.bool_const if predicate else z.int_const
                view.scalars[variable.name] = make(variable.name)
                if isinstance(variable.kind, EnumType):
                    facts.append(self.in_range(variable.kind, view.scalars[variable.name]))
        facts += self._fresh_counts(view, self._counts, "before")
        return view, facts

    def initial(self) -> tuple[View, list[Term]]:
        """The initial state, for every size."""
        view = View({}, {})
        for variable in self.system.variables:
            value = self.literal(variable.init)
            if isinstance(variable, MapVariable):
                view.maps[variable.name] = _constant_reader(value)
            else:
                view.scalars[variable.name] = value
        unclear = []
        for count in self._counts:
            tally = self.tally(count, view, known=False)
            holds = tally.holds(z.int_const(z.fresh_name("p")))
            if z.is_false(holds):
                view.prefixes[count.name] = counting.nothing(tally.size).prefix
            elif z.is_true(holds):
                view.prefixes[count.name] = counting.everything(tally.size).prefix
            else:
                unclear.append(count)
        return view, self._fresh_counts(view, unclear, "initially")

    def parameters(self, step: Step) -> tuple[dict[str, Term], list[Term]]:
        """An unknown value in the range of its type for each parameter."""
        env = {
            p.name: (
                z.bool_const(f"parameter {p.name}")
                if isinstance(p.kind, BoolType)
                else z.int_const(f"parameter {p.name}")
            )
            for p in step.params
        }
        return env, [self.in_range(p.kind, env[p.name]) for p in step.params]

    def post(self, step: Step, view: View, env: Environment) -> tuple[View, list[Term]]:
        """The state after a step, with what is true of its counts."""
        after = self.after(step, view, env)
        renewed: list[Count] = []
        facts: list[Term] = []
        for count in self._counts:
            if not reads(count) & step.writes():
                after.prefixes[count.name] = view.prefixes[count.name]
                continue
            p = self._changed_element(count, step, view, env)
            if p is None:
                renewed.append(count)
            else:
                old = self.tally(count, view)
                after.prefixes[count.name] = counting.shifted(
                    old, self.tally(count, after, known=False).holds, p
                )
        facts += self._fresh_counts(after, renewed, "after")
        for count in renewed:
            old, new = self.tally(count, view), self.tally(count, after)
            facts += [*counting.comparison(old, new), *counting.comparison(new, old)]
            for p in self._candidates(count, step, view, env):
                facts.append(counting.agreement(old, new, p))
        return after, facts

    # Counts.

    def tally(self, count: Count, view: View, *, known: bool = True) -> Tally:
        """A count in a state; with `known` false, before it has a prefix function there."""

        def holds(p: Term) -> Term:
            return self.term(count.predicate, view, {count.bound.name: p})

        prefix = view.prefixes[count.name] if known else (lambda n: ZERO)
        return Tally(holds, prefix, self.size(count.bound.kind))

    def _fresh_counts(self, view: View, counts: Sequence[Count], stem: str) -> list[Term]:
        """Unknown prefix functions for counts, and all that is known of them."""
        facts = []
        for count in counts:
            applied = z.function(z.fresh_name(f"{count.name} {stem}"), 1, predicate=False)
            view.prefixes[count.name] = applied
            tally = self.tally(count, view)
            facts += counting.definition(tally) + counting.bounds(tally)
            facts += counting.extremes(tally)
        for count in counts:
            for other in self._counts:
                if other.bound.kind == count.bound.kind and other.name != count.name:
                    here, there = self.tally(count, view), self.tally(other, view)
                    facts += counting.comparison(here, there)
                    if other not in counts:
                        facts += counting.comparison(there, here)
        return facts

    def _changed_element(
        self, count: Count, step: Step, view: View, env: Environment
    ) -> Term | None:
        """The one element at which a step can change a predicate; None if there may be several."""
        assigns = counting.changed_elements(count, step)
        if not assigns:
            return None
        keys = {a.keys[i] for a, i in counting.counted_keys(count, assigns)}
        return self.term(keys.pop(), view, env) if len(keys) == 1 else None

    def _candidates(self, count: Count, step: Step, view: View, env: Environment) -> Iterator[Term]:
        """Elements at which alone a step might change a predicate."""
        assigns = [a for a in step.then if a.keys and a.target.name in reads(count)]
        keys = [a.keys[i] for a, i in counting.counted_keys(count, assigns)]
        return (self.term(k, view, env) for k in dict.fromkeys(keys))

    def counted(self, node: Count, view: View, env: Environment) -> Term:
        return view.prefixes[node.name](self.size(node.bound.kind))

    def counted_below(self, node: CountBelow, view: View, env: Environment) -> Term:
        limit, kind = self.term(node.limit, view, env), node.of.bound.kind
        if kind.name in self.sized:  # no element lies behind the last one
            limit = z.choose(z.at_most(limit, self.size(kind)), limit, self.size(kind))
        return view.prefixes[node.of.name](limit)

    # Quantifiers.

    def quantified(self, node: ForAll, view: View, env: Environment) -> Term:
        variables = [z.int_const(z.fresh_name(b.name)) for b in node.bound]
        inner = {**env, **{b.name: v for b, v in zip(node.bound, variables, strict=True)}}
        ranges = [self.in_range(b.kind, inner[b.name]) for b in node.bound]
        body = self.term(node.body, view, inner)
        triggers = [self.term(t, view, inner) for t in node.triggers]
        patterns = choose_patterns(triggers, body, variables)
        return z.for_all(variables, z.when(z.both(ranges), body), patterns)

    def refute(self, node: Node, view: View, env: Environment, before: View | None = None) -> Term:
        """The negation of a formula; quantified elements become unknown constants.

        With `before`, triggers are mentioned in that state for each such constant, so that
        E-matching instantiates there what is known of the element.
        """
        match node:
            case Not():
                return self.term(node.body, view, env)
            case And():
                return z.either([self.refute(p, view, env, before) for p in node.parts])
            case Or():
                return z.both([self.refute(p, view, env, before) for p in node.parts])
            case ForAll():
                inner = dict(env)
                for b in node.bound:
                    inner[b.name] = z.int_const(z.fresh_name(b.name))
                facts = [self.in_range(b.kind, inner[b.name]) for b in node.bound]
                if before is not None:
                    facts += [z.mention(self.term(t, before, inner)) for t in node.triggers]
                return z.both([*facts, self.refute(node.body, view, inner, before)])
            case _:
                return z.negate(self.term(node, view, env))


def choose_patterns(
    triggers: Sequence[Term], body: Term, variables: Sequence[Term]
) -> list[list[Term]]:
    """The given triggers if they can serve, else every application in the body that can.

    A term that mentions all variables is a pattern alone; terms that mention some of them are
    combined.
    """
    usable = [t for t in triggers if z.matchable(t)]
    everywhere = frozenset(range(len(variables)))
    found = [pair for t in usable for pair in z.applications(t, variables) if z.same(pair[0], t)]
    if not found or frozenset().union(*(m for _, m in found)) != everywhere:
        found = z.applications(body, variables)
    alone = [[t] for t, mentioned in found if mentioned == everywhere]
    if alone or not found:
        return alone[:MAX_PATTERNS]
    by_variable = [[t for t, m in found if i in m] for i in range(len(variables))]
    combined = [list(dict.fromkeys(c)) for c in product(*by_variable)]
    return combined[:MAX_PATTERNS]


def sized_indexes(system: System) -> frozenset[str]:
    """Names of the indexes whose size the system speaks of."""
    found: set[str] = set()
    formulas: list[Node] = [p.formula for p in system.claims()]
    for step in system.steps:
        formulas += [n.formula for n in step.when]
        formulas += [a.value for a in step.then]
        formulas += [k for a in step.then for k in a.keys]
    for formula in formulas:
        found |= {k.name for k in _counted_to_the_end(formula)}
        found |= {b.kind.name for b in _conditions(formula, positive=True)}
    return frozenset(found)


def _counted_to_the_end(node: Node) -> Iterator[IndexType]:
    """Indexes whose last element a formula can tell: a count below a limit cannot."""
    if isinstance(node, CountBelow):
        yield from _counted_to_the_end(node.of.predicate)
        yield from _counted_to_the_end(node.limit)
        return
    if isinstance(node, Size):
        yield node.of
    elif isinstance(node, Count):
        yield node.bound.kind
    for child in node.children():
        yield from _counted_to_the_end(child)


def _conditions(node: Node, *, positive: bool) -> Iterator[Bound]:
    """Bound elements of quantifiers that are (or may be) negated."""
    match node:
        case Not():
            yield from _conditions(node.body, positive=not positive)
        case And() | Or():
            for part in node.parts:
                yield from _conditions(part, positive=positive)
        case ForAll():
            if not positive:
                yield from node.bound
            yield from _conditions(node.body, positive=positive)
        case Equal() | Choice() | Member():
            for sub in subterms(node):
                if isinstance(sub, ForAll):
                    yield from sub.bound
        case _:
            return


def _closed(count: Count) -> None:
    for node in subterms(count.predicate):
        if isinstance(node, Parameter) or (isinstance(node, Bound) and node != count.bound):
            raise ModelError(
                f"count {count.name} depends on {node}, which is not the element it counts"
            )


def _reader(applied: z.Function) -> Reader:
    return lambda keys: applied(*keys)


def _constant_reader(value: Term) -> Reader:
    return lambda keys: value
