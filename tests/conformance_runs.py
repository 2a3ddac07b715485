"""Runs on model and modules side by side: random walks, and all short runs."""

import random
from collections import Counter

from tdxmig_model.conformance.alphabet import calls

PROFILES = ("tdx-1.5.01", "hardened")


class Tally(Counter):
    """How often: ("accepted", row), ("refused", row, label), ("effect", row), ("narrower", row)."""

    def note(self, call, outcome):
        if outcome.kind == "accepted":
            self["accepted", outcome.row] += 1
        elif outcome.kind == "narrower":
            self["narrower", call.rows[0]] += 1
        for label in outcome.labels:
            self["refused", call.rows[0], label] += 1
        if outcome.effect:
            self["effect", outcome.effect] += 1

    def of_kind(self, kind):
        return sum(count for (first, *_), count in self.items() if first == kind)

    @property
    def effects(self):
        return {row for kind, row, *_ in self if kind == "effect"}


def try_all(twin, tally):
    """Every call in the present state, each undone; those that were accepted."""
    back, accepted = twin.save(), []
    for call in list(calls(twin)):
        outcome = twin.attempt(call)
        tally.note(call, outcome)
        back(call)
        if outcome.kind == "accepted":
            accepted.append(call)
    return accepted


RARELY = {
    "import_failure": 0.03,
    "import_failure_live": 0.05,
    "import_abort": 0.05,
    "export_abort": 0.05,
    "export_abort_with_token": 0.1,
    "source_set_migration_key": 0.1,
    "destination_set_migration_key": 0.1,
    "mem_track": 0.3,
    "guest_write": 0.3,
}


def walk(twin, seed, steps, tally):
    """A random walk in which every call is tried in each state."""
    dice = random.Random(seed)
    for _ in range(steps):
        accepted = try_all(twin, tally)
        if not accepted:
            return
        weights = [RARELY.get(call.rows[0], 1) for call in accepted]
        (chosen,) = dice.choices(accepted, weights)
        twin.attempt(chosen)


def every_run(twin, depth, tally, seen=None):
    """All runs of up to `depth` accepted calls from here; in each of their states every call.

    A state of the model that was visited with as many calls to go is not visited again.
    """
    seen = {} if seen is None else seen
    key = repr(twin.state)
    if seen.get(key, -1) >= depth:
        return seen
    seen[key] = depth
    accepted = try_all(twin, tally)
    if depth:
        back = twin.save()
        for call in accepted:
            twin.attempt(call)
            every_run(twin, depth - 1, tally, seen)
            back()
    return seen
