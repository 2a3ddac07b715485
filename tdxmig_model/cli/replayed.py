"""``tdxmig verify --replay``: counterexamples on the interpreter and on the software module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tdxmig_model.backend.soft.module import Profile
from tdxmig_model.conformance import REPLAYABLE, Replayed, replay_on_modules
from tdxmig_model.conformance.demonstrations import DEMONSTRATIONS, NOT_SHOWN
from tdxmig_model.errors import ModelError
from tdxmig_model.expr import not_
from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.model.words import HARDENED
from tdxmig_model.smt.bounded import inside
from tdxmig_model.smt.runs import replay
from tdxmig_model.verify import Report, Row

_MODULES: Final[tuple[Profile, ...]] = ("tdx-1.5.01", "hardened")
_MODELS: Final = {system.name: system for system in SYSTEMS}


@dataclass(frozen=True, slots=True)
class Replay:
    """A violated property: what its counterexample does on the interpreter and on modules.

    `interpreter` is a sentence.  `modules` are the profile that was judged and hardened; empty
    where no calls of the software module show this, and `why` says so.
    """

    model: str
    identifier: str
    interpreter: str
    interpreted: bool
    modules: tuple[Replayed, ...]
    why: str = ""

    def as_json(self) -> dict[str, object]:
        """The replay as plain data."""
        return {
            "model": self.model,
            "id": self.identifier,
            "interpreter": {"reproduces": self.interpreted, "why": self.interpreter},
            "software_module": [one.as_json() for one in self.modules],
            "why": self.why,
        }

    def text(self) -> str:
        """The replay as lines."""
        lines = [f"{self.identifier} replayed:", f"  on the interpreter: {self.interpreter}"]
        lines += [f"  on the software module, {one.profile}: {_told(one)}" for one in self.modules]
        if self.why:
            lines.append(f"  on the software module: not replayed, {self.why}")
        return "\n".join(lines)


def replays(profile: str, reports: Iterable[Report]) -> list[Replay]:
    """Replay the counterexample of each violated property that is no lemma."""
    return [
        _replay(report.system, profile, row)
        for report in reports
        for row in report.rows
        if row.verdict == "violated" and row.level != "lemma"
    ]


def _replay(model: str, profile: str, row: Row) -> Replay:
    interpreted, text = _on_interpreter(model, profile, row)
    try:
        modules, why = _on_modules(model, profile, row)
    except ModelError as error:
        modules, why = (), f"the calls of its demonstration fail: {error}"
    return Replay(model, row.identifier, text, interpreted, modules, why)


def _on_interpreter(model: str, profile: str, row: Row) -> tuple[bool, str]:
    """Whether the trace replays to a state in which the property is false, and a sentence."""
    if row.run is None:
        return False, "not replayed, this verdict is not on a run of steps"
    system = _MODELS[model].under(profile)
    claimed = next(p for p in system.properties if p.identifier == row.identifier)
    bad = inside(not_(claimed.formula), row.run.instance)
    try:
        replay(system, row.run.instance, row.run.moves, bad)
    except ModelError as error:
        return False, f"does not reproduce: {error}"
    return True, f"reproduces, {row.run.depth} steps to a state in which {row.identifier} is false"


def _on_modules(model: str, profile: str, row: Row) -> tuple[tuple[Replayed, ...], str]:
    """The counterexample on the modules of the profile and of hardened; or why there is none."""
    profiles: list[Profile] = [p for p in _MODULES if p in (profile, HARDENED)]
    if row.run is not None and model in REPLAYABLE:
        system = _MODELS[model]
        claimed = next(p for p in system.properties if p.identifier == row.identifier)
        return tuple(replay_on_modules(system, row.run, p, claimed) for p in profiles), ""
    shown = DEMONSTRATIONS.get(row.identifier)
    if shown is not None:
        return tuple(shown(p) for p in profiles), ""
    if row.identifier in NOT_SHOWN:
        return (), NOT_SHOWN[row.identifier]
    return (), f"no step of the {model} model is a call of the pair of modules that replays drive"


def _told(one: Replayed) -> str:
    word = "reproduces" if one.reproduces else "does not reproduce"
    refused = "; ".join(f"{n} {step}: {status}" for n, step, status in one.refused)
    parts = [f"{word}, {one.calls} of {one.of} calls accepted"]
    parts += [f"refused {refused}"] if refused else []
    return "; ".join([*parts, one.why])
