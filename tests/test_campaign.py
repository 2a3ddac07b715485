"""Does the campaign over all guards know of every guard either a run or a proof?

Outside the models of the leaves and of memory nothing survives: a conjunct that can be deleted
without a run to a bad state can be deleted from the proof as well.
"""

from __future__ import annotations

import pytest

from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.model.words import HARDENED
from tdxmig_model.smt.induction import prove
from tdxmig_model.verify import Mutant, every, listed, mutants

BY_NAME = {system.name: system for system in SYSTEMS}
LONG = ("leaf", "order", "memory")
"""Models in which some runs are longer than the searches; their listed guards are judged apart."""
QUICK = ("calls", "key_words", "terms", "import locks")
"""Models whose whole campaign takes seconds."""


def campaign(name: str) -> list[Mutant]:
    """Every conjunct of a model, each with the first property that lists it."""
    system = BY_NAME[name]
    targets = dict(reversed(listed(system, HARDENED)))
    return mutants(system, HARDENED, [(d, targets.get(d)) for d, _ in every(system, HARDENED)])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in BY_NAME
        if name not in LONG
    ],
)
def test_no_guard_survives_without_an_explanation(name: str) -> None:
    found = campaign(name)
    assert {m.deletion: m.method for m in found if m.outcome == "survivor"} == {}
    assert {m.outcome for m in found} <= {"killed", "equivalent"}
    assert any(m.outcome == "killed" for m in found)


@pytest.mark.parametrize(
    ("name", "step", "label"),
    [
        ("lifecycle", "import_immutable", "phase"),
        ("lifecycle", "import_start_token", "every_vcpu"),
        ("lifecycle", "import_start_token", "record_kind"),
        ("forks", "abort_session_with_token", "op_state"),
        ("locks", "take_op_state_exclusive", "leaf"),
        ("locks", "pause_td", "order"),
        ("guest pages", "begin_import_of_pages", "in_order"),
        ("guest pages", "cancel_guest_page", "in_order"),
    ],
)
def test_what_forbids_no_run_is_proved_without_it(name: str, step: str, label: str) -> None:
    mutant = BY_NAME[name].under(HARDENED).without(step, label)
    assert prove(mutant, patient=False).failed == {}


def test_a_lemma_that_falls_with_a_guard_does_not_make_it_a_survivor() -> None:
    guard = ("accept_without_page", "phase")
    system = BY_NAME["guest pages"]
    assert prove(system.under(HARDENED).without(*guard), patient=False).failed != {}
    found = mutants(system, HARDENED, [(guard, None)])[0]
    assert (found.outcome, found.method) == ("equivalent", "induction with a weaker invariant")
