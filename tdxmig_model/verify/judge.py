"""Verdicts on what is claimed of a system: proofs for every size, searches in small instances.

Each verdict is a word with one meaning:

* proved: inductive, for every size and every value of the constants;
* exhausted: true of all states of the stated instance;
* bounded: no counterexample of up to `depth` steps in the stated instance;
* violated: with a counterexample, which was replayed on the interpreter;
* reachable: a goal, with a run that reaches it;
* vacuous: the state in which the property says something (its witness) was not reached, or a goal
  was not reached, or a step can never be taken;
* unknown: none of these.

A failed induction alone is never *violated*.  What rests on a conjunct that is not inductive is not
*proved* either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import TracebackType
from typing import Literal

from tdxmig_model.errors import UsageError
from tdxmig_model.explore import Exploration, box_of, directed, explore, in_phases, moves_of
from tdxmig_model.explore.search import Trace
from tdxmig_model.expr import Instance, Interpreter, Node, Property, System, not_
from tdxmig_model.model.words import PUBLIC_REPAIRS, TDX_1_5_01
from tdxmig_model.pool import pool
from tdxmig_model.smt.bounded import inside, search
from tdxmig_model.smt.induction import Induction, Prover, Query, known, prove
from tdxmig_model.smt.lemmas import count_lemmas
from tdxmig_model.smt.runs import Run, replay, shortened
from tdxmig_model.smt.z3api import Answer
from tdxmig_model.story import Story, tell
from tdxmig_model.verify.repairs import removed_by

Verdict = Literal["proved", "exhausted", "bounded", "violated", "reachable", "vacuous", "unknown"]

SMALL = {
    "Page": 1,
    "Stream": 1,
    "Vcpu": 1,
    "Message": 6,
    "Epoch": 4,
    "Entry": 1,
    "Field": 4,
    "Exchange": 3,
    "Key": 5,
    "Use": 3,
    "Counter": 1,
}
LARGER = {
    "Page": 2,
    "Stream": 2,
    "Vcpu": 2,
    "Message": 7,
    "Epoch": 4,
    "Field": 5,
    "Exchange": 4,
    "Key": 6,
    "Use": 4,
    "Counter": 2,
}
"""Sizes of the instances that are searched, by index; any other index has two elements."""

STATES = 200_000
"""How many states a breadth-first search visits before the others take over."""

DIRECTED_STATES = 20_000
"""How many states a directed search visits before bounded checking takes over."""

SLACKS = (0, 50, 100)
PHASED_STATES = 20_000_000
"""By how many percent integers may outgrow the runs to the witnesses, and how many states a search
in phases visits for each; after that bounded checking takes over."""

DEPTH = 16
"""Steps to which bounded checking looks for a run."""

NOT_INDUCTIVE = "not inductive"
"""The method of the verdict on a lemma that the steps of a profile do not keep."""


@dataclass(frozen=True, slots=True)
class Row:
    """The verdict on one property or goal.

    `depth` is the length of the counterexample or witness, or the depth that was searched; None for
    a proof.  `story` is the counterexample.  `detail` names what is not inductive.
    """

    identifier: str
    sentence: str
    level: str
    verdict: Verdict
    method: str
    depth: int | None
    ms: float
    story: Story | None = None
    detail: str = ""
    removed_by: tuple[str, ...] = ()
    """The repairs that remove the counterexample, each alone, from the published module."""
    run: Run | None = None
    """The counterexample as steps and states."""

    @property
    def kind(self) -> str:
        """Of a violation: "public" if a repair with a public reference removes it."""
        if self.verdict != "violated" or self.level == "lemma":
            return ""
        return "public" if PUBLIC_REPAIRS & set(self.removed_by) else "unreported"

    @property
    def holds(self) -> bool:
        """Whether the verdict is a good one without a bound on depth."""
        return self.verdict in ("proved", "exhausted", "reachable")

    @property
    def claims(self) -> bool:
        """Whether the verdict matters by itself.

        A lemma that is not inductive under a profile is only of no help there: no proof rests on
        it, and it is neither true nor false.
        """
        return self.method != NOT_INDUCTIVE

    def as_json(self) -> dict[str, object]:
        """The row as plain data."""
        told = None if self.story is None else [e.as_json() for e in self.story.events]
        if told and self.story is not None:
            told[-1]["broke"] = list(self.story.ending)
        return {
            "id": self.identifier,
            "sentence": self.sentence,
            "level": self.level,
            "verdict": self.verdict,
            "method": self.method,
            "depth": self.depth,
            "ms": round(self.ms, 1),
            "counterexample": told,
            "detail": self.detail,
            "kind": self.kind,
            "removed_by": list(self.removed_by),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """All verdicts on one system under one profile."""

    system: str
    profile: str
    rows: tuple[Row, ...]
    goals: tuple[Row, ...]
    dead_steps: tuple[str, ...]
    assumptions: tuple[str, ...]
    queries: int
    fallbacks: int
    ms: float

    @property
    def holds(self) -> bool:
        """Whether every verdict is a good one and every step can be taken."""
        return not self.dead_steps and all(r.holds for r in (*self.rows, *self.goals) if r.claims)


@dataclass(frozen=True, slots=True)
class Reached:
    """What the searches of one instance found: runs by name, and depths searched in vain."""

    runs: Mapping[str, Run]
    searched: Mapping[str, int]
    exhausted: bool
    taken: frozenset[str]


def small_instance(system: System, sizes: Mapping[str, int] = SMALL) -> Instance:
    """The instance of a system with the given sizes, and small values of its constants."""
    return Instance.small(system, {k.name: sizes.get(k.name, 2) for k in system.indexes()})


def ceiling(instance: Instance) -> int:
    """Largest magnitude of integers that are no positions: room for every position and constant."""
    return max([2, *(n or 0 for n in instance.sizes.values()), *instance.constants.values()])


def as_run(
    system: System, instance: Instance, name: str, exploration: Exploration, wanted: Node
) -> Run:
    """A trace of the explicit search, replayed."""
    trace = exploration.violations.get(name) or exploration.reached.get(name) or ()
    return replay(system, instance, moves_of(trace), wanted)


def _short_run(system: System, instance: Instance, trace: Trace, wanted: Node) -> Run:
    """A trace of a search that does not look for the shortest one, replayed and shortened."""
    return shortened(system, replay(system, instance, moves_of(trace), wanted), wanted)


def direct(
    system: System, instance: Instance, formula: Node, limit: int = DIRECTED_STATES
) -> Run | None:
    """A run that the directed search finds, replayed and shortened."""
    found = directed(system, instance, formula, ceiling=ceiling(instance), limit=limit)
    if found.trace is None:
        return None
    return _short_run(system, instance, found.trace, formula)


@lru_cache(maxsize=8)
def witness_box(system: System) -> Mapping[str, int]:
    """How large integers grow in small runs to all witnesses and goals of a system (of a profile).

    Searched for once in each process.
    """
    wanted = {
        f"witness of {p.identifier}": p.witness for p in system.properties if p.witness is not None
    }
    wanted |= {f"goal {g.identifier}": g.formula for g in system.goals}
    found = reach(system, small_instance(system), wanted, depth=0, shortest=False)
    return box_of(system, (run.states for run in found.runs.values()))


def phased(
    system: System,
    instance: Instance,
    formula: Node,
    box: Mapping[str, int],
    limit: int = PHASED_STATES,
) -> Run | None:
    """A run that the search in phases finds, replayed and shortened."""
    for slack in SLACKS:
        found = in_phases(
            system,
            instance,
            formula,
            ceiling=ceiling(instance),
            box=box,
            slack=slack,
            limit=limit,
        )
        if found.trace is not None:
            return _short_run(system, instance, found.trace, formula)
    return None


def reach(
    system: System,
    instance: Instance,
    wanted: Mapping[str, Node],
    *,
    depth: int = DEPTH,
    states: int = STATES,
    seed: int = 0,
    shortest: bool = True,
    phases: bool = False,
) -> Reached:
    """Runs to states with each of the wanted formulas: breadth-first search, then a directed one,
    if wanted one in phases, then bounded checking.

    Every run that is found is looked through for the other formulas before these are searched for.
    """
    formulas = {name: inside(f, instance) for name, f in wanted.items()}
    seen = explore(
        system, instance, goals=formulas, limit=states, ceiling=ceiling(instance), digest=False
    )
    runs = {name: as_run(system, instance, name, seen, formulas[name]) for name in seen.reached}
    taken = {s.name for s in system.steps} - set(seen.dead_steps)
    searched = dict.fromkeys(formulas, seen.depth)
    exhausted = not seen.truncated and not seen.clipped
    interpreter = Interpreter(system, instance)
    for name, formula in formulas.items():
        if name in runs or exhausted:
            continue
        run = direct(system, instance, formula)
        if run is None and phases:
            run = phased(system, instance, formula, witness_box(system))
        if run is None:
            found = search(system, instance, formula, depth=depth, seed=seed, shortest=shortest)
            searched[name] = max(searched[name], found.depth)
            run = found.run
        if run is None:
            continue
        runs[name] = run
        taken |= {step for step, _ in run.moves}
        for other, also in formulas.items():
            if other not in runs:
                _look_through(interpreter, run, other, also, runs)
    return Reached(runs, searched, exhausted, frozenset(taken))


def _look_through(
    interpreter: Interpreter, run: Run, name: str, formula: Node, runs: dict[str, Run]
) -> None:
    """Note the part of a run that leads to a state with a formula, if there is one."""
    for length, state in enumerate(run.states):
        if interpreter.value(formula, state, {}):
            runs[name] = Run(run.instance, run.moves[:length], run.states[: length + 1])
            return


Progress = Callable[[str, Query | Row], None]


def verify(
    system: System,
    profile: str,
    properties: Iterable[str] | None = None,
    *,
    seed: int = 0,
    jobs: int = 1,
    progress: Progress | None = None,
    sizes: Mapping[str, int] = SMALL,
    depth: int = DEPTH,
) -> Report:
    """Judge the properties (all of them by default) and the goals of a system under a profile.

    The whole invariant takes part in the induction, whatever is judged.  `jobs` processes share its
    steps, and one more searches for witnesses at the same time if there are several.  `progress` is
    called with every query and every row.  UsageError for an unknown property.
    """
    begun = time.perf_counter()
    part = system.under(profile)
    chosen = _chosen(part, properties)
    goals = part.goals if properties is None else ()
    witnesses = {p.identifier: p.witness for p in chosen if p.witness is not None}
    instance = small_instance(part, sizes)
    wanted = {f"goal {g.identifier}": g.formula for g in goals} | {
        f"witness of {name}": formula for name, formula in witnesses.items()
    }

    def tick(query: Query) -> None:
        if progress is not None:
            progress(part.name, query)

    with _Aside(jobs > 1) as aside:
        reaching = aside.submit(part, instance, wanted, depth, seed)
        induction = prove(part, seed=seed, jobs=jobs, progress=tick)
        reached = reaching.result()
    judge = _Judge(system, profile, part, instance, induction, reached, depth, seed)
    rows = [judge.property(p) for p in chosen]
    if properties is None:
        rows += _count_rows(part)
    goal_rows = [judge.goal(g.identifier, g.sentence) for g in goals]
    for row in (*rows, *goal_rows):
        if progress is not None:
            progress(part.name, row)
    return Report(
        part.name,
        profile,
        tuple(rows),
        tuple(goal_rows),
        judge.dead_steps() if properties is None else (),
        part.assumptions,
        induction.queries,
        induction.fallbacks,
        (time.perf_counter() - begun) * 1000,
    )


def _chosen(part: System, identifiers: Iterable[str] | None) -> list[Property]:
    if identifiers is None:
        return list(part.properties)
    known = {p.identifier: p for p in part.properties}
    wanted = list(identifiers)
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"the {part.name} model has no property {name}; it has {', '.join(known)}"
            )
    return [known[name] for name in wanted]


def _count_rows(part: System) -> list[Row]:
    """The facts about counts that the proofs use, proved once more."""
    if not part.counts():
        return []
    begun = time.perf_counter()
    found = count_lemmas()
    ms = (time.perf_counter() - begun) * 1000 / len(found)
    return [
        Row(
            lemma.identifier,
            lemma.sentence,
            "lemma",
            "proved" if lemma.proved else "unknown",
            "induction on the size",
            None,
            ms,
        )
        for lemma in found
    ]


class _Aside:
    """The search for witnesses: in a process of its own while the proof runs, or in line."""

    def __init__(self, parallel: bool) -> None:
        self._parallel = parallel
        self._pool: ProcessPoolExecutor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Aside:
        if self._parallel:
            self._pool = self._stack.enter_context(pool(1))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def submit(
        self,
        part: System,
        instance: Instance,
        wanted: Mapping[str, Node],
        depth: int,
        seed: int,
    ) -> Future[Reached]:
        searching = partial(reach, part, instance, wanted, depth=depth, seed=seed, shortest=False)
        if self._pool is not None:
            return self._pool.submit(searching)
        done: Future[Reached] = Future()
        done.set_result(searching())
        return done


class _Judge:
    """Turns an induction and what was reached into verdicts."""

    def __init__(
        self,
        system: System,
        profile: str,
        part: System,
        instance: Instance,
        induction: Induction,
        reached: Reached,
        depth: int,
        seed: int,
    ) -> None:
        self.whole = system
        self.profile = profile
        self.part = part
        self.instance = instance
        self.induction = induction
        self.reached = reached
        self.depth = depth
        self.seed = seed
        self.sizes = ", ".join(f"{n} {name}" for name, n in instance.sizes.items())

    def property(self, claimed: Property) -> Row:
        """The verdict on a property."""
        if not self.induction.proves(claimed.identifier):
            return self._unproved(claimed)
        ms = self.induction.ms_of(claimed.identifier)
        name = f"witness of {claimed.identifier}"
        if claimed.witness is not None and name not in self.reached.runs:
            searched = self.reached.searched[name]
            method = f"induction; witness not reached in {self._where(name)}"
            return _row(claimed, "vacuous", method, searched, ms)
        return _row(claimed, "proved", "induction", None, ms)

    def _where(self, name: str) -> str:
        if self.reached.exhausted:
            return f"any state of {self.sizes}"
        return f"{self.reached.searched[name]} steps of {self.sizes}"

    def goal(self, identifier: str, sentence: str) -> Row:
        """The verdict on a goal."""
        name = f"goal {identifier}"
        run = self.reached.runs.get(name)
        if run is not None:
            method = f"search in {self.sizes}"
            return Row(identifier, sentence, "goal", "reachable", method, run.depth, 0.0)
        method = f"not reached in {self._where(name)}"
        searched = self.reached.searched[name]
        return Row(identifier, sentence, "goal", "vacuous", method, searched, 0.0)

    def _unproved(self, claimed: Property) -> Row:
        """Look for a counterexample to a property whose induction failed."""
        begun = time.perf_counter()
        detail = self.induction.why(claimed.identifier)
        if claimed.level == "lemma":  # it claims nothing by itself: no counterexample is looked for
            ms = self.induction.ms_of(claimed.identifier)
            return _row(claimed, "unknown", NOT_INDUCTIVE, None, ms, None, detail)
        bad = {claimed.identifier: not_(claimed.formula)}
        found = reach(self.part, self.instance, bad, depth=self.depth, seed=self.seed, phases=True)
        ms = (time.perf_counter() - begun) * 1000 + self.induction.ms_of(claimed.identifier)
        run = found.runs.get(claimed.identifier)
        searched = found.searched[claimed.identifier]
        if run is not None:
            story = tell(self.part, run, broken=claimed)
            row = _row(claimed, "violated", f"search in {self.sizes}", run.depth, ms, story)
            published = self.profile == TDX_1_5_01
            removed = removed_by(self.whole, run, claimed) if published else ()
            return replace(row, removed_by=removed, run=run)
        verdict: Verdict = "exhausted" if found.exhausted else "bounded"
        if not searched:
            verdict = "unknown"
        method = f"{'all states of' if found.exhausted else 'search in'} {self.sizes}"
        return _row(claimed, verdict, method, searched, ms, None, detail)

    def dead_steps(self) -> tuple[str, ...]:
        """Steps that no run took and that the invariant refutes."""
        rest = [s for s in self.part.steps if s.name not in self.reached.taken]
        if not rest:
            return ()
        kept = [c for c in self.induction.conjuncts if c.identifier in self.induction.inductive]
        prover = Prover(self.part, kept, self.seed, given=known(self.part, self.seed))
        return tuple(s.name for s in rest if prover.can_fire(s) is Answer.UNSAT)


def _row(
    claimed: Property,
    verdict: Verdict,
    method: str,
    depth: int | None,
    ms: float,
    story: Story | None = None,
    detail: str = "",
) -> Row:
    return Row(
        claimed.identifier,
        claimed.sentence,
        claimed.level,
        verdict,
        method,
        depth,
        ms,
        story,
        detail,
    )
