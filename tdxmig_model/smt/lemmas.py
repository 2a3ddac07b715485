"""Proofs, for arbitrary predicates, of the facts about counts that `counting` uses by instances.

Each is an induction on n in two queries, with predicates and prefix functions unknown.  They are
proved again in every verification: nothing about counts is taken on trust.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.counting import ONE, ZERO, Tally, below, shifted, unit
from tdxmig_model.smt.z3api import Answer, Solver, Term

Claim = Callable[[Term], Term]


@dataclass(frozen=True, slots=True)
class Lemma:
    """One recorded lemma and whether z3 proved it."""

    identifier: str
    sentence: str
    proved: bool


def _arbitrary(name: str) -> Tally:
    """A count of an arbitrary predicate, with an unknown prefix function."""
    holds = z.function(f"{name} holds", 1, predicate=True)
    prefix = z.function(f"{name} prefix", 1, predicate=False)
    return Tally(holds, prefix, z.int_const("size"))


def _recursion_at(tally: Tally, n: Term) -> list[Term]:
    """The definition of the prefix function at 0 and from n to n + 1."""
    stepped = z.add(tally.prefix(n), unit(tally.holds(n)))
    return [
        z.equal(tally.prefix(ZERO), ZERO),
        z.equal(tally.prefix(z.add(n, ONE)), stepped),
    ]


def _unsat(*facts: Term) -> bool:
    solver = Solver(quantified=True, mbqi=True)
    solver.add(*facts)
    return solver.check(rlimit=2_000_000) is Answer.UNSAT


def _by_induction(claim: Claim, start: Term, tallies: list[Tally], *given: Term) -> bool:
    """claim(start), and claim(n) implies claim(n + 1) for n >= start."""
    n = z.int_const("n")
    base = [f for t in tallies for f in _recursion_at(t, start)]
    step = [f for t in tallies for f in _recursion_at(t, n)]
    after = z.negate(claim(z.add(n, ONE)))
    return _unsat(*given, *base, z.negate(claim(start))) and _unsat(
        *given, *step, z.at_most(start, n), claim(n), after
    )


def _agree(small: Tally, large: Tally, n: Term, relation: Claim) -> Term:
    """The relation holds of every element below n."""
    i = z.int_const(z.fresh_name("i"))
    patterns = [[small.holds(i)], [large.holds(i)]]
    return z.for_all([i], z.when(below(i, n), relation(i)), patterns)


def count_lemmas() -> list[Lemma]:
    """Slack, comparison, strict comparison and agreement, each proved by induction."""
    a, b = _arbitrary("a"), _arbitrary("b")
    start, p = z.int_const("start"), z.int_const("p")

    def slack(n: Term) -> Term:
        low, high = a.prefix(start), a.prefix(n)
        return z.both([z.at_most(low, high), z.at_most(z.add(high, start), z.add(low, n))])

    def implied(n: Term) -> Term:
        return _agree(a, b, n, lambda i: z.when(a.holds(i), b.holds(i)))

    def comparison(n: Term) -> Term:
        return z.when(implied(n), z.at_most(a.prefix(n), b.prefix(n)))

    def strict(n: Term) -> Term:
        gap = z.both([below(p, n), b.holds(p), z.negate(a.holds(p))])
        smaller = z.less(a.prefix(n), b.prefix(n))
        return z.both([comparison(n), z.when(z.both([implied(n), gap]), smaller)])

    def agreement(n: Term) -> Term:
        same = _agree(
            a,
            b,
            n,
            lambda i: z.either([z.equal(i, p), z.equal(a.holds(i), b.holds(i))]),
        )
        return z.when(same, z.equal(b.prefix(n), shifted(a, b.holds, p)(n)))

    def update(n: Term) -> Term:
        """What `shifted` gives is again a prefix function of the changed predicate."""
        new = shifted(a, lambda i: z.choose(z.equal(i, p), z.bool_const("new"), a.holds(i)), p)
        changed = z.choose(z.equal(n, p), z.bool_const("new"), a.holds(n))
        return z.equal(new(z.add(n, ONE)), z.add(new(n), unit(changed)))

    n = z.int_const("n")
    from_zero = z.at_most(ZERO, start)
    return [
        Lemma(
            "count_slack",
            "Between a and b lie at least none and at most b - a counted elements.",
            _by_induction(slack, start, [a], from_zero),
        ),
        Lemma(
            "count_comparison",
            "A count of fewer elements is smaller, and strictly if one is missing.",
            _by_induction(strict, ZERO, [a, b]),
        ),
        Lemma(
            "count_agreement",
            "If two predicates differ at one element only, so do their counts.",
            _by_induction(agreement, ZERO, [a, b]),
        ),
        Lemma(
            "count_update",
            "Updating one element shifts the prefix counts above it.",
            _unsat(*_recursion_at(a, n), z.at_most(ZERO, n), z.negate(update(n))),
        ),
    ]
