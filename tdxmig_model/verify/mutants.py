"""What each guard is for: delete one conjunct, and find the run that it forbids.

A mutant is *killed* by a run that breaks a property, *equivalent* if the property is still proved
without the conjunct, and a *survivor* if neither is known.  An equivalent one is *contract-only* if
the TDX module refuses a call that the row without the conjunct allows: no property needs the guard,
but a status code does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from tdxmig_model.errors import UsageError
from tdxmig_model.explore import explore, moves_of
from tdxmig_model.expr import Instance, Interpreter, Node, Property, System, any_of, not_
from tdxmig_model.pool import pool
from tdxmig_model.smt.bounded import inside, search
from tdxmig_model.smt.induction import Prover, conjuncts, known, prove
from tdxmig_model.smt.runs import Run, replay
from tdxmig_model.smt.z3api import Answer
from tdxmig_model.story import Story, tell
from tdxmig_model.verify.judge import (
    LARGER,
    PHASED_STATES,
    SMALL,
    Verdict,
    ceiling,
    direct,
    phased,
    small_instance,
    witness_box,
)

Outcome = Literal["killed", "equivalent", "contract-only", "survivor"]
Deletion = tuple[str, str]
"""A step and the label of one conjunct of its guard."""

Contract = Callable[[str, str, str], bool]
"""Of a model, a step and a label: does an implementation refuse a call that only the conjunct does?

The models know no implementation, so whoever starts a campaign may bring one.
"""

UNCHANGED = "induction without the conjunct"
STATES = 100_000
DIRECTED_STATES = 5_000
UNAIMED_STATES = 2_000_000
"""How many states a search in phases visits where no property lists the conjunct."""

DEPTH = 16
"""How many steps bounded checking looks ahead."""

WORK, UNAIMED_WORK = 30_000_000, 3_000_000
"""z3 resource units for one query, and where no property lists the conjunct."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """The system without one conjunct.

    `target` is the property that lists the conjunct among its guards, None where any property
    counts; `broken` is the property that the run breaks.
    """

    step: str
    label: str
    target: str | None
    outcome: Outcome
    broken: str | None
    method: str
    depth: int | None
    ms: float
    story: Story | None = None
    run: Run | None = None
    model: str = ""
    verdicts: tuple[tuple[str, Verdict], ...] = ()
    """What is known of the properties that were judged, by their ids."""

    @property
    def deletion(self) -> Deletion:
        """What was deleted."""
        return self.step, self.label

    def as_json(self) -> dict[str, object]:
        """The mutant as plain data."""
        return {
            "model": self.model,
            "step": self.step,
            "label": self.label,
            "target": self.target,
            "outcome": self.outcome,
            "broken": self.broken,
            "method": self.method,
            "depth": self.depth,
            "ms": round(self.ms, 1),
            "counterexample": self._told(),
            "ending": [] if self.story is None else list(self.story.ending),
        }

    def properties_as_json(self) -> list[dict[str, object]]:
        """The verdicts on the properties of the model without the conjunct, as plain data."""
        return [
            {
                "model": self.model,
                "id": name,
                "deleted": f"{self.step}:{self.label}",
                "verdict": verdict,
                "method": self.method,
                "depth": self.depth,
                "ms": round(self.ms, 1),
                "counterexample": self._told() if name == self.broken else None,
            }
            for name, verdict in self.verdicts
        ]

    def _told(self) -> list[dict[str, object]] | None:
        return None if self.story is None else [e.as_json() for e in self.story.events]


def listed(system: System, profile: str) -> list[tuple[Deletion, str]]:
    """The conjuncts that properties of a profile name as their guards, with the property."""
    part = system.under(profile)
    found = []
    for claimed in part.properties:
        for step, label in claimed.guards:
            system.step(step).needs(label)
            if part.has_step(step) and label in [n.label for n in part.step(step).when]:
                found.append(((step, label), claimed.identifier))
    return found


def every(system: System, profile: str) -> list[tuple[Deletion, None]]:
    """All conjuncts of all guards of a profile."""
    steps = system.under(profile).steps
    return [((s.name, n.label), None) for s in steps for n in s.when]


def mutants(
    system: System,
    profile: str,
    deletions: Sequence[tuple[Deletion, str | None]] | None = None,
    *,
    seed: int = 0,
    jobs: int = 1,
    depth: int = DEPTH,
    progress: Callable[[Mutant], None] | None = None,
    contract: Contract | None = None,
) -> list[Mutant]:
    """Judge deletions (by default those that properties list), each with its target property.

    `jobs` processes share them; `contract` is asked here.  UsageError for a conjunct that the
    profile does not have.
    """
    chosen = listed(system, profile) if deletions is None else list(deletions)
    part = system.under(profile)
    for (step, label), _ in chosen:
        if not part.has_step(step) or label not in [n.label for n in part.step(step).when]:
            raise UsageError(f"under {profile} the {part.name} model has no {step}:{label}")
    judge = partial(judge_deletion, part, seed=seed, depth=depth)
    results = []
    for found in _mapped(judge, chosen, jobs):
        mutant = found
        if found.outcome == "equivalent" and contract and contract(part.name, *found.deletion):
            mutant = replace(found, outcome="contract-only")
        results.append(mutant)
        if progress is not None:
            progress(mutant)
    if any(m.method == UNCHANGED for m in results):
        # What the other steps keep was not asked again: it must have been proved once.
        base = prove(part, seed=seed, jobs=jobs)
        if base.failed:
            results = [_doubted(m) if m.method == UNCHANGED else m for m in results]
    return results


def _doubted(mutant: Mutant) -> Mutant:
    nothing: Verdict = "unknown"
    unknown = tuple((name, nothing) for name, _ in mutant.verdicts)
    method = "the invariant itself is not inductive"
    return replace(mutant, outcome="survivor", method=method, verdicts=unknown)


def _mapped(
    judge: Callable[[tuple[Deletion, str | None]], Mutant],
    chosen: Sequence[tuple[Deletion, str | None]],
    jobs: int,
) -> Iterable[Mutant]:
    if jobs == 1 or len(chosen) == 1:
        yield from map(judge, chosen)
        return
    with pool(jobs) as workers:
        yield from workers.map(judge, chosen)


def judge_deletion(
    part: System,
    deletion: tuple[Deletion, str | None],
    *,
    seed: int = 0,
    depth: int = DEPTH,
) -> Mutant:
    """Delete one conjunct of a system (of one profile) and look for a run that breaks a property.

    The run is one of the mutant, replayed on the interpreter.
    """
    begun = time.perf_counter()
    (step, label), target = deletion
    mutant = part.without(step, label)
    claims = [p for p in part.properties if p.level != "lemma"]
    aimed = [p for p in claims if target in (None, p.identifier)]

    unproved: list[Property] = []

    def done(outcome: Outcome, method: str, run: Run | None = None) -> Mutant:
        broken = None if run is None else _broken(mutant, run, [*aimed, *claims])
        story = None
        if run is not None:
            story = tell(mutant, run, broken=broken, deleted=(step, label), original=part)
        return Mutant(
            step,
            label,
            target,
            outcome,
            None if broken is None else broken.identifier,
            method,
            None if run is None else run.depth,
            (time.perf_counter() - begun) * 1000,
            story,
            run,
            part.name,
            _verdicts(outcome, aimed, unproved, broken),
        )

    if _still_inductive(part, mutant, seed):
        return done("equivalent", UNCHANGED)
    hunt = _Hunt(part, mutant, seed, aimed=target is not None)
    run = hunt.explicitly(aimed, hunt.small)
    if run is not None:
        return done("killed", "explicit search", run)
    # Where all states of the small instance are good a proof is likelier than a longer run.
    weaker = prove(mutant, seed=seed, patient=False) if hunt.complete else None
    hopeful = [p for p in aimed if weaker is None or not weaker.proves(p.identifier)]
    run = hunt.directed(hopeful)
    if run is not None:
        return done("killed", "directed search", run)
    run = hunt.explicitly(hopeful, hunt.larger)
    if run is not None:
        return done("killed", "explicit search", run)
    weaker = weaker or prove(mutant, seed=seed, patient=False)
    unproved += [p for p in claims if not weaker.proves(p.identifier)]
    # The target first; what else the conjunct protects counts as well.
    doubtful = [p for p in aimed if p in unproved]
    run = hunt.phased(doubtful)
    if run is not None:
        return done("killed", "search in phases", run)
    run = hunt.bounded(doubtful, depth)
    if run is not None:
        return done("killed", "bounded checking", run)
    others = [p for p in unproved if p not in aimed]
    run = (
        hunt.explicitly(others, hunt.small)
        or hunt.directed(others)
        or hunt.explicitly(others, hunt.larger)
        or hunt.bounded(others, depth)
    )
    if run is not None:
        return done("killed", "search for other properties", run)
    if doubtful:
        return done("survivor", hunt.searched())
    return done("equivalent", "induction with a weaker invariant")


def _verdicts(
    outcome: Outcome,
    aimed: Sequence[Property],
    unproved: Sequence[Property],
    broken: Property | None,
) -> tuple[tuple[str, Verdict], ...]:
    """What is known of the properties aimed at, and of the one that a run breaks.

    If a run was found before a proof was tried nothing is known of the others.
    """
    known: dict[str, Verdict] = {}
    for claimed in aimed:
        tried = outcome != "killed" or bool(unproved)
        known[claimed.identifier] = "proved" if tried and claimed not in unproved else "unknown"
    if broken is not None:
        known[broken.identifier] = "violated"
    return tuple(known.items())


def _any_false(claims: Sequence[Property]) -> Node:
    return any_of(*(not_(p.formula) for p in claims))


def _broken(mutant: System, run: Run, claims: Sequence[Property]) -> Property | None:
    """The first property that the last state of a run breaks."""
    interpreter = Interpreter(mutant, run.instance)
    for claimed in claims:
        bad = inside(not_(claimed.formula), run.instance)
        if interpreter.value(bad, run.states[-1], {}):
            return claimed
    return None


def _still_inductive(part: System, mutant: System, seed: int) -> bool:
    """Whether the whole invariant is kept without the conjunct: the rows that lost it can tell.

    Not if the smaller model lost something with the conjunct: every row may rest on that.
    """
    invariant = conjuncts(mutant)
    given = known(mutant, seed)
    if given != known(part, seed):
        return False
    prover = Prover(mutant, invariant, seed, patient=False, given=given)
    weaker = [s for s in mutant.steps if s.when != part.step(s.name).when]
    queries = [q for s in weaker for q in prover.kept_by(s, invariant)]
    return all(q.answer is Answer.UNSAT for q in queries)


class _Hunt:
    """The search for a run to a bad state: breadth first, directed, in phases, then bounded."""

    def __init__(self, part: System, mutant: System, seed: int, *, aimed: bool) -> None:
        self.states = PHASED_STATES if aimed else UNAIMED_STATES
        self.work = WORK if aimed else UNAIMED_WORK
        self.part = part
        self.mutant = mutant
        self.seed = seed
        self.small = small_instance(mutant, SMALL)
        self.larger = small_instance(mutant, LARGER)
        self.two_streams = small_instance(mutant, {**SMALL, "Stream": 2})
        self.visited: dict[str, None] = {}
        self.complete = False
        """Whether the last explicit search saw every state of its instance."""

    def explicitly(self, claims: Sequence[Property], instance: Instance) -> Run | None:
        """A shortest run, within the first states of an instance, that breaks some claim."""
        if not claims:
            return None
        formula = inside(_any_false(claims), instance)
        seen = explore(
            self.mutant,
            instance,
            bad=formula,
            limit=STATES,
            ceiling=ceiling(instance),
            digest=False,
        )
        self.complete = not seen.truncated
        if seen.trace is not None:
            return replay(self.mutant, instance, moves_of(seen.trace), formula)
        whole = "the first" if seen.truncated else "all"
        self.visited[f"{whole} {seen.states} states"] = None
        return None

    def directed(self, claims: Sequence[Property]) -> Run | None:
        """A run of the small instance that breaks a claim, each claim by itself."""
        for claimed in claims:
            formula = inside(not_(claimed.formula), self.small)
            run = direct(self.mutant, self.small, formula, DIRECTED_STATES)
            if run is not None:
                return run
        return None

    def phased(self, claims: Sequence[Property]) -> Run | None:
        """A run of a small instance that breaks some claim, one actor after the other."""
        if not claims:
            return None
        for instance in (self.small, self.two_streams):
            formula = inside(_any_false(claims), instance)
            run = phased(self.mutant, instance, formula, witness_box(self.part), self.states)
            if run is not None:
                return run
        return None

    def bounded(self, claims: Sequence[Property], depth: int) -> Run | None:
        """A run of up to `depth` steps, each claim by itself, shallow searches first."""
        hopeless: set[tuple[int, str]] = set()
        refuted: dict[tuple[int, str], int] = {}
        for instance, limit in (
            (self.small, depth - 6),
            (self.small, depth - 2),
            (self.larger, depth - 6),
            (self.small, depth),
        ):
            for claimed in claims:
                key = (id(instance), claimed.identifier)
                if key in hopeless:
                    continue
                found = search(
                    self.mutant,
                    instance,
                    inside(not_(claimed.formula), instance),
                    depth=max(limit, 1),
                    refuted=refuted.get(key, -1),
                    seed=self.seed,
                    work=self.work,
                )
                if found.run is not None:
                    return found.run
                refuted[key] = found.depth
                if not found.complete:
                    hopeless.add(key)
        if refuted:
            self.visited[f"{min(refuted.values())} steps"] = None
        return None

    def searched(self) -> str:
        """What was searched in vain."""
        return f"not inductive; no run in {', '.join(self.visited)}"
