"""A run of the model on software modules: does it reproduce there, and what stops it?"""

from __future__ import annotations

from dataclasses import dataclass

from tdxmig_model.backend.soft.module import Profile
from tdxmig_model.backend.soft.status import is_error
from tdxmig_model.conformance.answers import INTERRUPTED
from tdxmig_model.conformance.side import MAX_VCPUS, STATE_BUFFERS
from tdxmig_model.conformance.twin import Call, Disagreement, Outcome, Twin
from tdxmig_model.errors import ModelError, UsageError
from tdxmig_model.expr import Instance, Interpreter, Property, System
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.smt.bounded import inside
from tdxmig_model.smt.encode import reads
from tdxmig_model.smt.runs import Run, replay

REPLAYABLE = ("leaf", "order", "memory")
"""The models whose rows are calls of a pair of modules."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of a run on the modules of one profile.

    `calls` of its `of` steps were made and accepted.  `reproduces`: all of them were, the state of
    the modules was the model's after each, and at the end the property is false.  `refused` are the
    number, the row and the status class of each call that was not accepted; `why` says in one
    sentence what came of the run.
    """

    profile: str
    reproduces: bool
    calls: int
    of: int
    refused: tuple[tuple[int, str, str], ...]
    why: str

    def as_json(self) -> dict[str, object]:
        """The result as plain data."""
        return {
            "profile": self.profile,
            "reproduces": self.reproduces,
            "calls": self.calls,
            "of": self.of,
            "refused": [
                {"number": number, "step": step, "status": status}
                for number, step, status in self.refused
            ],
            "why": self.why,
        }


def replay_on_modules(
    system: System, run: Run, profile: Profile, broken: Property | None = None
) -> Replayed:
    """Make the calls of a run on a pair of modules of a profile, with its memory model in step.

    `system` is the whole model that the run is of, one of REPLAYABLE.  A call whose list entry
    alone is refused does not end the run; a call that is refused does.  Where model and module
    differ the result says so.
    """
    moves = list(run.moves)
    try:
        twin = _twin(run.instance, profile)
    except UsageError as error:
        return Replayed(profile, False, 0, len(moves), (), str(error))
    refused: list[tuple[int, str, str]] = []
    for number, (row, values) in enumerate(moves, 1):

        def ended(why: str, number: int = number) -> Replayed:
            calls = number - 1 - len([r for r in refused if r[0] < number])
            return Replayed(profile, False, calls, len(moves), tuple(refused), why)

        try:
            outcome = twin.attempt(Call((row,), {n: int(v) for n, v in values.items()}))
        except Disagreement as differs:
            return ended(f"model and module differ: {differs}")
        except UsageError as impossible:
            return ended(f"step {number}, {row}, is no call here: {impossible}")
        if outcome.kind == "accepted":
            continue
        refused.append((number, row, outcome.answer.word))
        if _whole_call(outcome):
            return ended(f"the module refuses step {number}, {row}: {outcome.answer}")
    calls = len(moves) - len(refused)

    def judged(why: str, *, reproduces: bool = False) -> Replayed:
        return Replayed(profile, reproduces, calls, len(moves), tuple(refused), why)

    if broken is None:
        return judged("every call was made", reproduces=not refused)
    try:
        holds = _holds_at_end(twin, system, run, profile, broken)
    except ModelError as error:
        return judged(f"whether {broken.identifier} holds at the end cannot be told: {error}")
    if holds:
        return judged(f"harmless: at the end {broken.identifier} holds")
    why = f"the modules are in the state of the model in which {broken.identifier} is false"
    return judged(why, reproduces=not refused)


def _holds_at_end(twin: Twin, system: System, run: Run, profile: Profile, broken: Property) -> bool:
    """Whether it holds where the run ended; ghosts of another model are those of its own run."""
    if reads(broken.formula) <= {v.name for v in twin.system.variables}:
        return twin.holds(broken)
    part = system.under(profile)
    last = replay(part, run.instance, run.moves).states[-1]
    formula = inside(broken.formula, run.instance)
    return bool(Interpreter(part, run.instance).value(formula, last, {}))


def _twin(sizes: Instance, profile: Profile) -> Twin:
    """A pair with room for the run, and in each bundle for entries that fail besides."""
    bounds = {name: size or 1 for name, size in sizes.sizes.items()}
    entries = bounds.get("Entry", bounds["Page"]) + 2
    return Twin(
        MEMORY.under(profile),
        profile,
        pages=bounds["Page"],
        vcpus=min(bounds["Vcpu"], MAX_VCPUS),
        streams=min(bounds["Stream"], STATE_BUFFERS),
        entries=entries,
    )


def _whole_call(outcome: Outcome) -> bool:
    """Whether the call was refused, and not one entry of its list."""
    answer = outcome.answer
    return answer.violation or (is_error(answer.status) and answer.status != INTERRUPTED)
