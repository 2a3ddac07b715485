"""Proof by induction, for every size: one query for each pair of a step and a conjunct.

The invariant is the conjunction of all properties and lemmas of a profile.  It is assumed before
the step; one conjunct is to hold after it.  A conjunct that reads nothing the step writes needs no
query.  E-matching with the triggers of the properties is tried first, model-based instantiation
second.  Work is bounded by z3's resource counter, so an answer does not depend on the machine.

A failed induction is *not inductive*, which is not *violated*: the state before the step may be
unreachable.  What rests on a failed conjunct is not proved either: failed conjuncts are removed
from the invariant until what is left is inductive.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType

from tdxmig_model.expr import (
    IndexType,
    MapVariable,
    Node,
    Property,
    Size,
    Step,
    System,
    Variable,
    all_of,
    forall,
)
from tdxmig_model.pool import pool
from tdxmig_model.smt.encode import reads, split
from tdxmig_model.smt.unbounded import Unbounded, sized_indexes
from tdxmig_model.smt.z3api import Answer, Solver, Term

INIT = "initial state"
QUICK, THOROUGH = 2_000_000, 2_000_000
"""Work for E-matching and for model-based instantiation, in z3's resource units."""


@dataclass(frozen=True, slots=True)
class Conjunct:
    """One conjunct of the invariant: a piece of a property, or a fact of a variable's type."""

    identifier: str
    owner: str
    formula: Node
    reads: frozenset[str]


@dataclass(frozen=True, slots=True)
class Query:
    """The result of one (step, conjunct) query."""

    step: str
    conjunct: str
    answer: Answer
    method: str
    ms: float


@dataclass(frozen=True, slots=True)
class Induction:
    """The result of a whole induction.

    `inductive` are the conjuncts that are proved: they hold initially and every step keeps them,
    assuming only each other.  `failed` maps every other conjunct to the queries that failed, each
    against the invariant that was left when it was asked.
    """

    conjuncts: tuple[Conjunct, ...]
    inductive: frozenset[str]
    failed: dict[str, tuple[Query, ...]]
    queries: int
    fallbacks: int
    slowest: Query | None
    ms: float
    ms_by_owner: dict[str, float]

    def proves(self, owner: str) -> bool:
        """Whether every conjunct of a property is proved."""
        mine = [c.identifier for c in self.conjuncts if c.owner == owner]
        return all(c in self.inductive for c in mine)

    def ms_of(self, owner: str) -> float:
        """Time spent on the queries of a property."""
        return self.ms_by_owner.get(owner, 0.0)

    def why(self, owner: str) -> str:
        """Which conjuncts of a property are not inductive, and which steps break them."""
        mine = [c.identifier for c in self.conjuncts if c.owner == owner]
        parts = []
        for name in mine:
            steps = dict.fromkeys(q.step for q in self.failed.get(name, ()))
            if steps:
                parts.append(f"{name} is not kept by {', '.join(steps)}")
        return "; ".join(parts)


def conjuncts(system: System, properties: Iterable[Property] | None = None) -> list[Conjunct]:
    """The conjuncts of an invariant, and the ranges of index-valued variables."""
    found = []
    for claimed in system.properties if properties is None else properties:
        pieces = split(claimed.formula)
        for number, piece in enumerate(pieces, 1):
            name = claimed.identifier if len(pieces) == 1 else f"{claimed.identifier}.{number}"
            found.append(Conjunct(name, claimed.identifier, piece, reads(piece)))
    sized = sized_indexes(system)
    for variable in system.variables:
        formula = _range_of(variable, sized)
        if formula is not None:
            name = f"type of {variable.name}"
            found.append(Conjunct(name, name, formula, reads(formula)))
    return found


def _range_of(variable: Variable | MapVariable, sized: frozenset[str]) -> Node | None:
    """An ordered index as the type of a variable says that its value is an element."""
    kind = variable.kind
    if not isinstance(kind, IndexType) or not kind.ordered or int(variable.init.value) < 0:
        return None

    def inside(value: Node) -> Node:
        low = value.ge(0)
        return all_of(low, value.lt(Size(kind))) if kind.name in sized else low

    if isinstance(variable, Variable):
        return inside(variable)
    names = {f"k{i}": index for i, index in enumerate(variable.indexes)}
    return forall(names, lambda *keys: inside(variable[keys]))


class _Facts:
    """What is assumed for several queries: asserted once, for E-matching."""

    def __init__(self, terms: Sequence[Term], seed: int) -> None:
        self.terms = list(terms)
        self._seed = seed
        self._solver: Solver | None = None

    def refute(self, goal: Term) -> Answer:
        """UNSAT if the facts and the goal contradict each other."""
        if self._solver is None:
            self._solver = Solver(quantified=True, mbqi=False, seed=self._seed)
            self._solver.add(*self.terms)
        self._solver.push()
        self._solver.add(goal)
        answer = self._solver.check(rlimit=QUICK)
        self._solver.pop()
        return answer


class Prover:
    """The queries of one system: the state before, the invariant, and one solver for each query.

    An impatient prover does without model-based instantiation.  `given` is known to hold always.
    """

    def __init__(
        self,
        system: System,
        invariant: Sequence[Conjunct],
        seed: int = 0,
        *,
        patient: bool = True,
        given: Sequence[Conjunct] = (),
    ) -> None:
        self.system = system
        self.patient = patient
        self.invariant = tuple(invariant)
        self.seed = seed
        self.encoder = Unbounded(system)
        self.axioms = self.encoder.axioms()
        self.before, self.facts = self.encoder.before()
        self.facts = [*self.facts, *(self.encoder.term(c.formula, self.before, {}) for c in given)]
        self.assumed = {
            c.identifier: self.encoder.term(c.formula, self.before, {}) for c in invariant
        }

    def background(self, without: frozenset[str] = frozenset()) -> list[Term]:
        """Everything assumed of the state before a step."""
        kept = [t for name, t in self.assumed.items() if name not in without]
        return [*self.axioms, *self.facts, *kept]

    def decide(self, facts: _Facts, goal: Term) -> tuple[Answer, str]:
        """Refute facts and goal together: E-matching first, then model-based instantiation."""
        if facts.refute(goal) is Answer.UNSAT:
            return Answer.UNSAT, "E-matching"
        if not self.patient:
            return Answer.UNKNOWN, "E-matching"
        solver = self._solver(facts.terms, goal, mbqi=True)
        return solver.check(rlimit=THOROUGH), "MBQI"

    def _solver(self, facts: Sequence[Term], goal: Term, *, mbqi: bool) -> Solver:
        solver = Solver(quantified=True, mbqi=mbqi, seed=self.seed)
        solver.add(*facts, goal)
        return solver

    def initially(self, wanted: Iterable[Conjunct]) -> list[Query]:
        """Whether conjuncts hold in the initial state."""
        view, facts = self.encoder.initial()
        background = _Facts([*self.axioms, *facts], self.seed)
        return [
            self._timed(INIT, c, background, lambda c=c: self.encoder.refute(c.formula, view, {}))  # type: ignore[misc]
            for c in wanted
        ]

    def kept_by(
        self, step: Step, wanted: Iterable[Conjunct], without: frozenset[str] = frozenset()
    ) -> list[Query]:
        """Whether a step keeps conjuncts, assuming the invariant without some conjuncts."""
        env, ranges = self.encoder.parameters(step)
        guard = self.encoder.guard(step, self.before, env)
        view, counted = self.encoder.post(step, self.before, env)
        background = _Facts([*self.background(without), *ranges, guard, *counted], self.seed)
        return [
            self._timed(
                step.name,
                c,
                background,
                lambda c=c: self.encoder.refute(c.formula, view, env, self.before),  # type: ignore[misc]
            )
            for c in wanted
            if c.reads & step.writes()
        ]

    def can_fire(self, step: Step) -> Answer:
        """Whether a step is compatible with the invariant; UNSAT means that it never fires."""
        env, ranges = self.encoder.parameters(step)
        guard = self.encoder.guard(step, self.before, env)
        solver = self._solver([*self.background(), *ranges], guard, mbqi=False)
        return solver.check(rlimit=QUICK)

    def _timed(self, step: str, c: Conjunct, background: _Facts, goal: Callable[[], Term]) -> Query:
        begun = time.perf_counter()
        answer, method = self.decide(background, goal())
        return Query(step, c.identifier, answer, method, (time.perf_counter() - begun) * 1000)


Work = tuple[str, frozenset[str]]
_prover: Prover | None = None


def _start_worker(system: System, seed: int, patient: bool, given: Sequence[Conjunct]) -> None:
    global _prover
    _prover = Prover(system, conjuncts(system), seed, patient=patient, given=given)


def _run(work: Work, wanted: frozenset[str], prover: Prover | None = None) -> list[Query]:
    """All queries of one step (or of the initial state) for the wanted conjuncts."""
    found = prover or _prover
    assert found is not None
    step, without = work
    chosen = [c for c in found.invariant if c.identifier in wanted]
    if step == INIT:
        return found.initially(chosen)
    return found.kept_by(found.system.step(step), chosen, without)


def prove(
    system: System,
    *,
    seed: int = 0,
    jobs: int = 1,
    progress: Callable[[Query], None] | None = None,
    patient: bool = True,
) -> Induction:
    """Find the largest inductive part of the invariant of a system (of one profile).

    What the model that this one is superposed on proves is proved there, and assumed here.  `jobs`
    processes share the steps.  `progress` is called with every query that was answered.
    Without patience there is no model-based instantiation.
    """
    begun = time.perf_counter()
    invariant = conjuncts(system)
    given = known(system, seed, jobs)
    answered: list[Query] = []
    failed: dict[str, tuple[Query, ...]] = {}
    names = [INIT, *(s.name for s in system.steps)]
    with _Runner(system, invariant, seed, jobs, patient, given) as runner:
        while True:
            dropped = frozenset(failed)
            wanted = frozenset(c.identifier for c in invariant) - dropped
            queries = []
            for batch in runner.run([(name, dropped) for name in names], wanted):
                for query in batch:
                    queries.append(query)
                    if progress:
                        progress(query)
            answered += queries
            news = [q for q in queries if q.answer is not Answer.UNSAT]
            for query in news:
                failed[query.conjunct] = (*failed.get(query.conjunct, ()), query)
            if not news:
                break
    return Induction(
        tuple(invariant),
        wanted,
        failed,
        len(answered),
        sum(q.method == "MBQI" for q in answered),
        max(answered, key=lambda q: q.ms, default=None),
        (time.perf_counter() - begun) * 1000,
        _by_owner(invariant, answered),
    )


def known(system: System, seed: int = 0, jobs: int = 1) -> tuple[Conjunct, ...]:
    """What the model proves on which a system is superposed; proved once for each process."""
    return () if system.base is None else _known(system.base, seed, jobs)


@lru_cache(maxsize=8)
def _known(base: System, seed: int, jobs: int) -> tuple[Conjunct, ...]:
    proof = prove(base, seed=seed, jobs=jobs)
    kept = tuple(c for c in proof.conjuncts if c.identifier in proof.inductive)
    return (*kept, *known(base, seed, jobs))


def _by_owner(invariant: Sequence[Conjunct], answered: Sequence[Query]) -> dict[str, float]:
    owners = {c.identifier: c.owner for c in invariant}
    total: dict[str, float] = {}
    for query in answered:
        owner = owners[query.conjunct]
        total[owner] = total.get(owner, 0.0) + query.ms
    return total


class _Runner:
    """Runs the queries of many steps, here or in processes."""

    def __init__(
        self,
        system: System,
        invariant: Sequence[Conjunct],
        seed: int,
        jobs: int,
        patient: bool,
        given: Sequence[Conjunct],
    ) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._prover: Prover | None = None
        self._stack = ExitStack()
        if jobs > 1:
            workers = pool(jobs, _start_worker, (system, seed, patient, given))
            self._pool = self._stack.enter_context(workers)
        else:
            self._prover = Prover(system, invariant, seed, patient=patient, given=given)

    def __enter__(self) -> _Runner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def run(self, work: Sequence[Work], wanted: frozenset[str]) -> Iterable[list[Query]]:
        """The queries of each piece of work, in the order of the work."""
        if self._pool is None:
            return (_run(w, wanted, self._prover) for w in work)
        return self._pool.map(_run, work, [wanted] * len(work))
