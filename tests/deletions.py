"""The guard deletions of specs/deletions.toml, and how each of their places is judged."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tdxmig_model.expr import System, not_
from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.model.words import HARDENED, without
from tdxmig_model.smt import counter_lemmas, parser_lemmas
from tdxmig_model.smt.induction import prove
from tdxmig_model.verify.judge import LARGER, SMALL, reach, small_instance
from tdxmig_model.verify.mutants import judge_deletion

REPOSITORY = Path(__file__).resolve().parent.parent
DELETIONS: list[dict[str, Any]] = tomllib.loads(
    (REPOSITORY / "specs" / "deletions.toml").read_text()
)["deletion"]
BY_NAME = {s.name: s for s in SYSTEMS}
WIDTHS = "widths"
DEPTH = 12


@dataclass(frozen=True)
class Place:
    """Where the models have a guard, and what falls without it."""

    deletion: str
    system: str
    property: str
    step: str = ""
    label: str = ""
    update: str = ""
    repair: str = ""
    check: str = ""
    equivalent: str = ""
    open: str = ""

    @property
    def name(self) -> str:
        what = [self.step, self.label or self.update or self.repair or self.check]
        return f"{self.deletion}-{self.system}-{':'.join(w for w in what if w)}-{self.property}"

    @property
    def expected(self) -> str:
        """The outcome that the file states."""
        return "equivalent" if self.equivalent else "survivor" if self.open else "killed"


PLACES = [Place(entry["id"], **p) for entry in DELETIONS for p in entry.get("places", ())]


def judged(place: Place) -> str:
    """What the deletion does to the property: killed, equivalent or survivor."""
    if place.check:
        return _without_check(place)
    if place.label:
        part = BY_NAME[place.system].under(HARDENED)
        found = judge_deletion(part, ((place.step, place.label), place.property))
        assert found.outcome != "killed" or found.broken == place.property, found.as_json()
        return found.outcome
    mutant = without_update(place) if place.update else without_repair(place)
    if place.equivalent:
        return "equivalent" if prove(mutant).proves(place.property) else "survivor"
    return "killed" if _breaks(mutant, place) else "survivor"


def without_update(place: Place) -> System:
    """The hardened system in which a row leaves a variable alone."""
    part = BY_NAME[place.system].under(HARDENED)
    row = part.step(place.step)
    kept = tuple(a for a in row.then if a.target.name != place.update)
    assert len(kept) == len(row.then) - 1, f"{place.step} does not write {place.update}"
    steps = tuple(replace(row, then=kept) if s is row else s for s in part.steps)
    return replace(part, steps=steps, _by_name={})


def without_repair(place: Place) -> System:
    """The hardened system without a repair; with a step: of the rows that come back only this."""
    system = BY_NAME[place.system]
    part, hardened = system.under(without(place.repair)), system.under(HARDENED)
    assert part.steps != hardened.steps, f"{place.system} has nothing of {place.repair}"
    back = [s.name for s in part.steps if not hardened.has_step(s.name)]
    for name in back:
        if place.step and name != place.step:
            part = part.without_step(name)
    return part


def _breaks(mutant: System, place: Place) -> bool:
    """Whether a run of a small instance breaks the property, by way of the step."""
    bad = {"broken": not_(mutant.property(place.property).formula)}
    for sizes in (SMALL, LARGER):
        run = reach(mutant, small_instance(mutant, sizes), bad, depth=DEPTH).runs.get("broken")
        if run is not None:
            taken = [step for step, _ in run.moves]
            assert not place.step or place.step in taken, taken
            return True
    return False


def _without_check(place: Place) -> str:
    judge = {
        **dict.fromkeys(parser_lemmas.CHECKS, parser_lemmas.parser_lemmas),
        **dict.fromkeys(counter_lemmas.CHECKS, counter_lemmas.counter_lemmas),
    }[place.check]
    found = judge(HARDENED, without=frozenset({place.check}))
    claims = {
        lemma.identifier: lemma.claims
        for lemma in parser_lemmas.lemmas(HARDENED) + counter_lemmas.lemmas(HARDENED)
    }
    fallen = {claims[r.identifier] for r in found if r.verdict == "violated"}
    return "killed" if place.property in fallen else "survivor"
