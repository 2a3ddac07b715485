"""How many elements satisfy a predicate, for an index of any size.

A count is a prefix function c with c(0) = 0 and c(n+1) = c(n) + [predicate(n)]: such a function
exists for every predicate, so these facts may be assumed in any state.  What follows from them by
induction on n is proved in `lemmas` for arbitrary predicates and used here by instances:

* slack: a <= b implies 0 <= c(b) - c(a) <= b - a;
* comparison: if every element below n that satisfies A satisfies B, then a(n) <= b(n), and strictly
  less if some element satisfies B and not A;
* agreement: if A and B agree below n except perhaps at p, then b(n) - a(n) is the difference at p.

The last two have "for every element" on their left, so each instance names a witness: an unknown
element that satisfies A and not B unless the conclusion holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tdxmig_model.expr import Assign, Count, Step
from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.encode import map_key_positions, reads
from tdxmig_model.smt.z3api import Term

Holds = Callable[[Term], Term]
Prefix = Callable[[Term], Term]

ZERO, ONE = z.integer(0), z.integer(1)


@dataclass(frozen=True)
class Tally:
    """One count in one state: its predicate, its prefix function, the size of its index."""

    holds: Holds
    prefix: Prefix
    size: Term

    def total(self) -> Term:
        """How many elements satisfy the predicate."""
        return self.prefix(self.size)


def unit(condition: Term) -> Term:
    """1 where the condition holds, else 0."""
    return z.choose(condition, ONE, ZERO)


def below(element: Term, bound: Term) -> Term:
    """0 <= element < bound."""
    return z.both([z.at_most(ZERO, element), z.less(element, bound)])


def nothing(size: Term) -> Tally:
    """The count of the predicate that no element satisfies."""
    return Tally(lambda p: z.FALSE, lambda n: ZERO, size)


def everything(size: Term) -> Tally:
    """The count of the predicate that every element satisfies."""
    return Tally(lambda p: z.TRUE, lambda n: n, size)


def recursion(tally: Tally) -> Term:
    """c(p + 1) = c(p) + [predicate(p)], at every element whose predicate is looked at."""
    p = z.int_const(z.fresh_name("p"))
    holds = tally.holds(p)
    patterns = [[t] for t, _ in z.applications(holds, [p])]
    if not patterns:
        return z.TRUE
    stepped = z.equal(tally.prefix(z.add(p, ONE)), z.add(tally.prefix(p), unit(holds)))
    return z.for_all([p], z.when(z.at_most(ZERO, p), stepped), patterns)


def slack(tally: Tally) -> Term:
    """For a <= b, between a and b lie at least none and at most all elements."""
    a, b = z.int_const(z.fresh_name("a")), z.int_const(z.fresh_name("b"))
    low, high = tally.prefix(a), tally.prefix(b)
    ordered = z.both([z.at_most(ZERO, a), z.at_most(a, b)])
    more = z.at_most(z.add(high, a), z.add(low, b))
    return z.for_all([a, b], z.when(ordered, z.both([z.at_most(low, high), more])), [[low, high]])


def definition(tally: Tally) -> list[Term]:
    """What defines a prefix function that is an unknown function, with its slack."""
    return [z.equal(tally.prefix(ZERO), ZERO), recursion(tally), slack(tally)]


def bounds(tally: Tally) -> list[Term]:
    """0 <= total <= size, as ground facts."""
    return [z.at_most(ZERO, tally.total()), z.at_most(tally.total(), tally.size)]


def comparison(small: Tally, large: Tally) -> list[Term]:
    """If `small` implies `large` on every element, its total is at most the other's."""
    witness = z.int_const(z.fresh_name("witness"))
    escapes = z.both(
        [below(witness, small.size), small.holds(witness), z.negate(large.holds(witness))]
    )
    facts = [z.either([escapes, z.at_most(small.total(), large.total())])]
    p = z.int_const(z.fresh_name("p"))
    gap = z.both([below(p, small.size), large.holds(p), z.negate(small.holds(p))])
    patterns = [[t] for t, _ in z.applications(gap, [p])]
    if patterns:
        strictly = z.less(small.total(), large.total())
        facts.append(z.for_all([p], z.when(gap, z.either([escapes, strictly])), patterns))
    return facts


def extremes(tally: Tally) -> list[Term]:
    """A total of 0 or of the whole size says something of every element, and conversely."""
    none, every = nothing(tally.size), everything(tally.size)
    return [*comparison(tally, none), *comparison(every, tally)]


def agreement(old: Tally, new: Tally, p: Term) -> Term:
    """If both agree on every element but p, the totals differ by the difference at p."""
    witness = z.int_const(z.fresh_name("witness"))
    differs = z.negate(z.equal(old.holds(witness), new.holds(witness)))
    elsewhere = z.both([below(witness, old.size), z.negate(z.equal(witness, p)), differs])
    return z.either([elsewhere, z.equal(new.total(), shifted(old, new.holds, p)(old.size))])


def shifted(old: Tally, holds: Holds, p: Term) -> Prefix:
    """The prefix function after the predicate changed at p alone: agreement at each n."""
    inside = z.at_most(ZERO, p)
    was, now = old.holds(p), holds(p)
    gained = z.both([inside, now, z.negate(was)])
    lost = z.both([inside, was, z.negate(now)])

    def prefix(n: Term) -> Term:
        reached = z.less(p, n)
        change = z.choose(
            z.both([reached, gained]),
            ONE,
            z.choose(z.both([reached, lost]), z.integer(-1), ZERO),
        )
        return z.add(old.prefix(n), change)

    return prefix


def changed_elements(count: Count, step: Step) -> list[Assign] | None:
    """The point updates through which alone a step can change a count's predicate.

    None if the step can change it in another way: through a scalar, a fill, or a key that is not
    the counted element.
    """
    written = step.writes()
    maps = {m.name: position for m, position in map_key_positions(count.predicate, count.bound)}
    positions: dict[str, set[int | None]] = {}
    for m, position in map_key_positions(count.predicate, count.bound):
        positions.setdefault(m.name, set()).add(position)
    if any(name not in maps for name in reads(count) & written):
        return None
    found = []
    for assign in step.then:
        if assign.target.name not in maps:
            continue
        if assign.bound or len(positions[assign.target.name]) != 1:
            return None
        if positions[assign.target.name] == {None}:
            return None
        found.append(assign)
    return found


def counted_keys(count: Count, assigns: list[Assign]) -> Iterator[tuple[Assign, int]]:
    """For each point update the position of the counted element among its keys."""
    where = {m.name: i for m, i in map_key_positions(count.predicate, count.bound)}
    for assign in assigns:
        position = where[assign.target.name]
        if position is not None:
            yield assign, position
