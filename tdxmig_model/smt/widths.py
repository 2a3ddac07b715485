"""Claims about arithmetic of machine widths, as bit vectors: what a lemma is, and its verdict.

The rows of the models count in unbounded integers.  What depends on the number of bits is stated by
lemmas instead: each is about one operation in any state that satisfies an invariant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tdxmig_model.model.words import repaired
from tdxmig_model.smt import z3api as z
from tdxmig_model.smt.z3api import Answer, Solver, Term

Kind = Literal["check", "subtraction", "read", "invariant", "definedness"]
Verdict = Literal["proved", "violated", "vacuous", "unknown"]


@dataclass(frozen=True, slots=True)
class Lemma:
    """One claim about one iteration: `claim` holds in every state that satisfies `given`."""

    identifier: str
    claims: str
    kind: Kind
    sentence: str
    given: tuple[Term, ...]
    claim: Term
    shown: Mapping[str, Term]


@dataclass(frozen=True, slots=True)
class Result:
    """The verdict on a lemma; `values` are a counterexample, by name."""

    identifier: str
    claims: str
    kind: Kind
    sentence: str
    verdict: Verdict
    values: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checks:
    """Which checks stand: those of a profile, without the ones that a mutant deletes."""

    known: Mapping[str, str | None]
    profile: str
    deleted: frozenset[str] = frozenset()

    def stands(self, label: str) -> bool:
        """Whether a check is made."""
        repair = self.known[label]
        present = repair is None or self.profile in repaired(repair)
        return present and label not in self.deleted

    def need(self, label: str, condition: Term) -> Term:
        """What is known after a check: nothing where it is not made."""
        return condition if self.stands(label) else z.TRUE


def number(value: int, width: int) -> Term:
    """A literal of a width."""
    return z.bits_value(value, width)


def at_least(term: Term, value: int) -> Term:
    """Whether a bit vector is a constant or more."""
    return z.bits_at_most(number(value, z.bits_width(term)), term)


def at_most(term: Term, value: int) -> Term:
    """Whether a bit vector is a constant or less."""
    return z.bits_at_most(term, number(value, z.bits_width(term)))


def decide(lemma: Lemma, seed: int = 0) -> Result:
    """The verdict on one lemma: a claim about no state at all is vacuous."""

    def result(verdict: Verdict, values: Mapping[str, int] | None = None) -> Result:
        found = values or {}
        return Result(lemma.identifier, lemma.claims, lemma.kind, lemma.sentence, verdict, found)

    solver = Solver(quantified=False, seed=seed)
    solver.add(*lemma.given)
    if solver.check() is not Answer.SAT:
        return result("vacuous")
    solver.add(z.negate(lemma.claim))
    answer = solver.check()
    if answer is Answer.UNSAT:
        return result("proved")
    if answer is Answer.UNKNOWN:
        return result("unknown")
    return result("violated", _smallest(solver, lemma.shown))


def _smallest(solver: Solver, shown: Mapping[str, Term]) -> dict[str, int]:
    """The counterexample that is smallest in its first value, then in the second, and so on."""
    values: dict[str, int] = {}
    for name, term in shown.items():
        width = z.bits_width(term)
        low, high = 0, (1 << width) - 1
        while low < high:
            middle = (low + high) // 2
            solver.push()
            solver.add(z.bits_at_most(term, number(middle, width)))
            fits = solver.check() is Answer.SAT
            solver.pop()
            low, high = (low, middle) if fits else (middle + 1, high)
        solver.add(z.equal(term, number(low, width)))
        values[name] = low
    return values
