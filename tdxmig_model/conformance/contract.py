"""Which conjuncts of the model's guards a module checks: for each a run that shows it.

A conjunct without which a row could be taken where the module refuses the call is a check of the
module.  Deleting it from the model breaks the agreement of the two, whether a property needs it or
not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tdxmig_model.backend.soft.module import Profile
from tdxmig_model.conformance.alphabet import calls
from tdxmig_model.conformance.migration import MIGRATION, begin, go_on, scene, scenes
from tdxmig_model.conformance.replay import REPLAYABLE
from tdxmig_model.conformance.twin import Call, Twin

_PROFILES: Final[tuple[Profile, ...]] = ("tdx-1.5.01", "hardened")

Conjunct = tuple[str, str]
"""A row and the label of one conjunct of its guard."""

Shown = dict[Conjunct, tuple[Call, ...]]
"""A conjunct -> a run whose last call the module refuses, and only that conjunct the model."""

DEPTH = 1
"""How many calls from the migration and the scenes a refusal is looked for."""

FEW = 4
"""For up to so many conjuncts it is quicker to look for each by itself than for all at once."""


class Contract:
    """Whether the software module checks a conjunct, for a campaign of about `expected` questions.

    Nothing is run before the first question.  For many the answers to all are found at once then,
    which takes most of a minute.  The models whose rows are no calls of a pair of modules, and the
    profiles that no module has, have no answer: for these it is False.
    """

    def __init__(self, profile: str, expected: int) -> None:
        self.profile: Profile | None = next((p for p in _PROFILES if p == profile), None)
        self._expected = expected
        self._shown: Shown | None = None

    def __call__(self, model: str, step: str, label: str) -> bool:
        """Does the module refuse a call that the model's row allows without the conjunct?"""
        if model not in REPLAYABLE or self.profile is None:
            return False
        if self._expected <= FEW:
            return distinguishes(self.profile, step, label, depth=DEPTH) is not None
        if self._shown is None:
            self._shown = refusals(self.profile, depth=DEPTH)
        return (step, label) in self._shown


def refusals(profile: Profile, *, depth: int = 0, wanted: Conjunct | None = None) -> Shown:
    """What is shown on the way through the migration and at the ends of the scenes.

    `depth`: and up to so many calls from there.  With `wanted` only that conjunct is looked for.
    Disagreement if model and module differ.
    """
    shown: Shown = {}
    twin, run = begin(profile), list[Call]()
    for onwards in (*MIGRATION, None):
        _look(twin, run, depth, wanted, shown)
        if onwards is None or (wanted is not None and wanted in shown):
            break
        go_on(twin, onwards)
        run.append(onwards)
    for name, before in scenes(profile).items():
        if wanted is None or wanted not in shown:
            _look(scene(name, profile), before, depth, wanted, shown)
    return shown


def distinguishes(
    profile: Profile, step: str, label: str, *, depth: int = 1
) -> tuple[Call, ...] | None:
    """A run after which the model without this conjunct would accept what the module refuses.

    The last call is the refused one.  None if there is none up to `depth` calls from the migration
    and the scenes.
    """
    conjunct = (step, label)
    for reach in range(depth + 1):
        found = refusals(profile, depth=reach, wanted=conjunct).get(conjunct)
        if found is not None:
            return found
    return None


def _look(
    twin: Twin, run: Sequence[Call], depth: int, wanted: Conjunct | None, shown: Shown
) -> None:
    """Try the calls in the present state, and in those that `depth` more calls lead to."""
    back = twin.save()
    onwards = []
    for call in list(calls(twin)):
        if depth == 0 and wanted is not None and wanted[0] not in call.rows:
            continue
        alone = _alone(twin, call)
        if twin.attempt(call).kind == "accepted":
            onwards.append(call)
        for conjunct in alone:
            shown.setdefault(conjunct, (*run, call))
        back(call)
    for call in onwards if depth else ():
        if wanted is not None and wanted in shown:
            return
        twin.attempt(call)
        _look(twin, (*run, call), depth - 1, wanted, shown)
        back()


def _alone(twin: Twin, call: Call) -> list[Conjunct]:
    """The conjuncts of the call's rows that alone keep their row from being taken."""
    if any(twin.enabled(row, call.values) for row in call.rows):
        return []
    rows = [row for row in call.rows if twin.system.has_step(row)]
    missing = {row: twin.unmet(row, call.values) for row in rows}
    return [(row, min(labels)) for row, labels in missing.items() if len(labels) == 1]
