"""Both sides in one thread, turn by turn."""

from __future__ import annotations

from time import sleep

from tdxmig_model.session.common import Activity, Side, SideOutcome

_IDLE_SECONDS = 0.001


def migrate_in_process(source: Side, destination: Side) -> tuple[SideOutcome, SideOutcome]:
    """Drive two sides that share a pair of transports to their ends; their outcomes.

    The sides take turns, so a run is the same each time as long as no deadline passes.  When both
    wait, a moment passes before they are asked again.
    """
    turns = {source: source.steps(), destination: destination.steps()}
    while turns:
        moved = False
        for side, steps in list(turns.items()):
            try:
                moved |= next(steps) is Activity.MOVED
            except StopIteration:
                del turns[side]
                moved = True
        if not moved:
            sleep(_IDLE_SECONDS)
    return source.outcome, destination.outcome
