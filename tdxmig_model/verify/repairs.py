"""Which repairs, each alone, remove a counterexample of the unrepaired module."""

from __future__ import annotations

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import Property, System, not_
from tdxmig_model.model.words import REPAIRS, with_only
from tdxmig_model.smt.bounded import inside
from tdxmig_model.smt.runs import Run, replay


def removed_by(system: System, run: Run, broken: Property) -> tuple[str, ...]:
    """The repairs that remove a run of tdx-1.5.01 which ends in a state that breaks a property.

    A repair removes the run if with that repair alone some step of it cannot be taken, or its end
    keeps the property.  Another run may still break the property.  `system` is the whole model.
    """
    wanted = inside(not_(broken.formula), run.instance)

    def stands(repair: str) -> bool:
        try:
            replay(system.under(with_only(repair)), run.instance, run.moves, wanted)
        except ModelError:
            return False
        return True

    return tuple(r for r in REPAIRS if not stands(r))
