"""A run of the model on software modules: does it reproduce there, and what stops it?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tdxmig_model.backend.soft.module import Profile
from tdxmig_model.backend.soft.status import is_error
from tdxmig_model.conformance.answers import INTERRUPTED
from tdxmig_model.conformance.side import MAX_VCPUS, STATE_BUFFERS
from tdxmig_model.conformance.twin import Call, Disagreement, Outcome, Twin
from tdxmig_model.errors import UsageError
from tdxmig_model.expr import Instance, Property
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.smt.runs import Move

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
    moves: Sequence[Move], sizes: Instance, profile: Profile, broken: Property | None = None
) -> Replayed:
    """Make the calls of a run on a pair of modules of a profile, with its memory model in step.

    `sizes` is the instance of the run.  A call whose list entry alone is refused does not end the
    run; a call that is refused does.  Where model and module differ the result says so.
    """
    moves = list(moves)
    try:
        twin = _twin(sizes, profile)
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
    return _judged(twin, profile, len(moves), refused, broken)


def _twin(sizes: Instance, profile: Profile) -> Twin:
    """A pair with room for the run; a bundle may have more entries than in the run, if they fail."""
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


def _judged(
    twin: Twin,
    profile: str,
    of: int,
    refused: Sequence[tuple[int, str, str]],
    broken: Property | None,
) -> Replayed:
    calls = of - len(refused)
    if broken is None:
        return Replayed(profile, not refused, calls, of, tuple(refused), "every call was made")
    if twin.holds(broken):
        why = f"harmless: at the end {broken.identifier} holds"
        return Replayed(profile, False, calls, of, tuple(refused), why)
    why = f"the modules are in the state of the model in which {broken.identifier} is false"
    return Replayed(profile, not refused, calls, of, tuple(refused), why)
