"""Has each counter of a migration a check or a bound, in the bits that it has?"""

from __future__ import annotations

import pytest

from tdxmig_model.model.words import HARDENED, START_EPOCH, TDX_1_5_01
from tdxmig_model.smt import counter_lemmas as lemmas
from tdxmig_model.verify import verify_widths

# The lemma that falls with a check, and the values of its counterexample.
DELETIONS = {
    "max_exports": ("counter_export_count", {"EXPORT_COUNT": 0x7FFFFFFF}),
    "epoch_overflow": ("counter_mig_epoch", {"MIG_EPOCH": 0xFFFFFFFE}),
    "max_migs": ("counter_num_migs", {"NUM_MIGS": 512}),
    "vcpus_left": ("counter_num_migrated_vcpus", {"NUM_MIGRATED_VCPUS": 0, "NUM_VCPUS": 0}),
}


@pytest.mark.parametrize("profile", [HARDENED, TDX_1_5_01])
@pytest.mark.parametrize("seed", range(5))
def test_no_counter_wraps(profile: str, seed: int) -> None:
    report = verify_widths(profile, ["P49"], seed=seed)
    assert report.holds
    assert {row.verdict for row in report.rows} == {"proved"}
    assert len(report.rows) == 1 + 11


@pytest.mark.parametrize("check", lemmas.CHECKS)
def test_each_check_is_needed(check: str) -> None:
    found = lemmas.counter_lemmas(HARDENED, without=frozenset({check}))
    (fallen,) = [r for r in found if r.verdict != "proved"]
    assert (fallen.identifier, fallen.values) == DELETIONS[check]


def test_the_last_epoch_is_the_one_before_the_start_tokens() -> None:
    assert START_EPOCH.value == lemmas.LAST_EPOCH + 1
