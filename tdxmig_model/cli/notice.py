"""What is to be done about a violation that a command shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tdxmig_model.expr import not_
from tdxmig_model.model import systems
from tdxmig_model.model.words import PUBLIC_REPAIRS, TDX_1_5_01

if TYPE_CHECKING:
    from tdxmig_model.cli.instance import Chosen
    from tdxmig_model.explore.search import Trace


def classified(identifier: str, removed_by: Sequence[str]) -> str:
    """A line on a violated property, by the repairs that remove its counterexample."""
    repairs = ", ".join(removed_by) or "no repair"
    if PUBLIC_REPAIRS & set(removed_by):
        return f"{identifier} is public: {repairs} of specs/repairs.toml removes it"
    return (
        f"{identifier} is unreported ({repairs} removes it): "
        "report to the vendor before publishing (SECURITY.md)"
    )


def removing(chosen: Chosen, identifier: str, trace: Trace) -> tuple[str, ...]:
    """The repairs that remove the trace to a violated property, each alone.

    None for a profile that is not the published one.
    """
    if chosen.profile != TDX_1_5_01:
        return ()
    from tdxmig_model.smt.bounded import inside
    from tdxmig_model.smt.runs import replay
    from tdxmig_model.verify.repairs import removed_by

    claimed = chosen.system.property(identifier)
    bad = inside(not_(claimed.formula), chosen.instance)
    moves = [(taken.step, taken.params) for taken in trace]
    run = replay(chosen.system, chosen.instance, moves, bad)
    whole = next(s for s in systems.SYSTEMS if s.name == chosen.system.name)
    return removed_by(whole, run, claimed)
