"""Is the freshness of pages, and the order of bundles, proved for every size?"""

from __future__ import annotations

import pytest

from tdxmig_model.errors import ModelError
from tdxmig_model.expr import addition, not_, superpose
from tdxmig_model.model import source_state as s
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.model.order import ORDER
from tdxmig_model.model.words import HARDENED, TDX_1_5_01, without
from tdxmig_model.smt.induction import prove
from tdxmig_model.verify import reach, small_instance

CLAIMED = {p.identifier for p in MEMORY.properties if p.level != "lemma"}
SMALLEST = {"Page": 1, "Stream": 1, "Vcpu": 1, "Message": 4, "Epoch": 4, "Entry": 1}


def unproved(system, profile: str, seed: int = 0) -> set[str]:
    found = prove(system.under(profile), seed=seed, jobs=2)
    return {c.owner for c in found.conjuncts if c.identifier in found.failed}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_memory_is_proved_for_every_size(seed: int) -> None:
    assert unproved(MEMORY, HARDENED, seed) == set()


@pytest.mark.slow
@pytest.mark.parametrize("repair", ["R13", "R14"])
def test_one_repair_of_the_lost_bundle_is_enough_where_it_counts(repair: str) -> None:
    """Without R13 a call may end in an error, but its bundle counts; so no page is lost."""
    assert (unproved(MEMORY, without(repair)) == set()) == (repair == "R13")


@pytest.mark.slow
def test_as_published_the_rest_is_proved_all_the_same() -> None:
    failed = unproved(MEMORY, TDX_1_5_01)
    assert CLAIMED & failed == {"P13", "P15"}


def test_a_call_that_does_not_complete_leaves_a_page_that_counts_as_exported() -> None:
    part = MEMORY.under(TDX_1_5_01)
    instance = small_instance(part, SMALLEST)
    bad = {"P15": not_(part.property("P15").formula)}
    run = reach(part, instance, bad, depth=6).runs["P15"]
    steps = [step for step, _ in run.moves]
    assert len(steps) == 6
    assert steps[-2] == "export_mem_migrate"
    # The call ends in an error, or a NEW one takes its place.
    assert steps[-1] in ("export_mem_dropped", "export_mem_begin")


def test_the_order_of_bundles_is_proved_for_every_size() -> None:
    assert unproved(ORDER, HARDENED) == set()


def test_what_is_superposed_leaves_the_smaller_model_alone() -> None:
    base = {v.name for v in LEAF.variables}
    for larger in (MEMORY, ORDER):
        assert larger.base is LEAF
        for row in larger.steps:
            if LEAF.has_step(row.name):
                known = LEAF.step(row.name)
                assert row.when[: len(known.when)] == known.when
                assert row.then[: len(known.then)] == known.then
                assert not {a.target.name for a in row.then[len(known.then) :]} & base
            else:
                assert not row.writes() & base


def test_an_addition_that_writes_the_smaller_model_is_refused() -> None:
    def larger(**additions):
        return superpose(LEAF, "larger", variables=(), additions=additions, steps=(), properties=())

    with pytest.raises(ModelError, match="vp_enter writes source_mig_epoch of the leaf model"):
        larger(vp_enter=addition(s.mig_epoch.to(0)))
    with pytest.raises(ModelError, match="has no step vp_entr"):
        larger(vp_entr=addition())


def test_a_deleted_guard_is_deleted_in_the_smaller_model_as_well() -> None:
    mutant = MEMORY.without("export_track_start", "dirty_count")
    assert mutant.base is not None
    labels = [n.label for n in mutant.base.step("export_track_start").when]
    assert "dirty_count" not in labels
    assert "paused" in labels
    own = MEMORY.without("guest_write", "inside")
    assert own.base is LEAF
