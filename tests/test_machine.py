"""Is the lifecycle machine the model's rows and nothing else: refusals, moves, missing rows?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from tdxmig_model.errors import ModelError, Refused
from tdxmig_model.expr import EnumType, System, Value, Variable
from tdxmig_model.machine import SIDES, LifecycleMachine, event_name
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.words import HARDENED, START_EPOCH
from tdxmig_model.project import Edge, edges

VCPUS = 2
START = START_EPOCH.value

# A whole good run of each side: events with their parameters; on the destination a record and its
# epoch come before the event that takes them.
Event = tuple[str, Mapping[str, int]]
GOOD_SOURCE: list[Event] = [
    ("setup", {}),
    ("export_immutable", {}),
    ("confirm_import", {}),
    ("export_memory", {}),
    ("start_epoch", {}),
    ("export_memory", {}),
    ("cancel_page", {}),
    ("pause", {}),
    ("start_epoch", {}),
    ("export_memory", {}),
    ("export_td_state", {}),
    ("export_vcpu_state", {"vcpu": 1}),
    ("export_vcpu_state", {"vcpu": 0}),
    ("finish_epochs", {}),
    ("export_memory", {}),
    ("cleanup", {}),
]
GOOD_DESTINATION: list[tuple[str, Mapping[str, int], str, int]] = [
    ("setup", {}, "", 0),
    ("import_immutable", {}, "IMMUTABLE", 0),
    ("import_memory", {}, "MEMORY", 0),
    ("import_epoch", {}, "EPOCH", 1),
    ("import_memory", {}, "MEMORY", 1),
    ("import_epoch", {}, "EPOCH", 2),
    ("import_td_state", {}, "TD_STATE", 2),
    ("import_vcpu_state", {"vcpu": 1}, "VCPU_STATE", 2),
    ("import_vcpu_state", {"vcpu": 0}, "VCPU_STATE", 2),
    ("import_start_token", {}, "START_TOKEN", START),
    ("commit", {}, "", 0),
    ("import_memory", {}, "MEMORY", START),
    ("end", {}, "", 0),
    ("cleanup", {}, "", 0),
]


class Recorder:
    """Performs nothing and remembers what it was asked for; `fails` at one event."""

    def __init__(self, fails: str = "") -> None:
        self.asked: list[Event] = []
        self.fails = fails

    def __call__(self, event: str, params: Mapping[str, Value]) -> None:
        if event == self.fails:
            raise OSError(f"{event} broke")
        self.asked.append((event, {k: int(v) for k, v in params.items()}))


def machine(
    side: str, recorder: Recorder, system: System = LIFECYCLE, vcpus: int = VCPUS
) -> LifecycleMachine:
    return LifecycleMachine(side, recorder, vcpus=vcpus, system=system)


def source_until(stop: str, recorder: Recorder, system: System = LIFECYCLE) -> LifecycleMachine:
    """A source just before the first event of that name in a good run."""
    made = machine("source", recorder, system)
    made.assume(confirmation=True)
    for event, params in GOOD_SOURCE:
        if event == stop:
            return made
        made.fire(event, **params)
    raise AssertionError(f"a good run has no {stop}")


def destination_until(stop: str, recorder: Recorder) -> LifecycleMachine:
    """A destination just before the first event of that name; its record has arrived."""
    made = machine("destination", recorder)
    for event, params, record, epoch in GOOD_DESTINATION:
        if record:
            made.deliver(record, epoch)
        if event == stop:
            return made
        made.fire(event, **params)
    raise AssertionError(f"a good run has no {stop}")


def observed(made: LifecycleMachine) -> list[object]:
    """All of the state, in a form that can be compared."""
    return [v.tolist() if hasattr(v, "tolist") else v for v in map(_copied, made.monitor.state)]


def _copied(value: object) -> object:
    return dict(value) if isinstance(value, dict) else value


# --- good runs -----------------------------------------------------------------------------------


def test_a_good_run_of_the_source_performs_every_event_in_order() -> None:
    recorder = Recorder()
    made = machine("source", recorder)
    made.assume(confirmation=True)
    for event, params in GOOD_SOURCE:
        assert event in made.legal()
        made.fire(event, **params)
    assert recorder.asked == GOOD_SOURCE
    assert made.phase == "CLOSED"
    assert made.legal() == []


def test_a_good_run_of_the_destination_performs_every_event_in_order() -> None:
    recorder = Recorder()
    made = machine("destination", recorder)
    for event, params, record, epoch in GOOD_DESTINATION:
        if record:
            assert event not in made.legal()
            made.deliver(record, epoch)
        assert event in made.legal()
        made.fire(event, **params)
    assert recorder.asked == [(event, params) for event, params, _, _ in GOOD_DESTINATION]
    assert made.phase == "CLOSED"


def test_good_runs_and_aborts_fire_every_event() -> None:
    fired = {event for event, _ in GOOD_SOURCE} | {"abort", "abort_with_token"}
    assert fired == {event_name("source", s.name) for s in LIFECYCLE.of_actor("source")}
    fired = {event for event, *_ in GOOD_DESTINATION} | {"abort"}
    assert fired == {event_name("destination", s.name) for s in LIFECYCLE.of_actor("destination")}


def test_an_abort_before_the_start_token_needs_nobody() -> None:
    made = source_until("finish_epochs", Recorder())
    made.fire("abort")
    assert made.phase == "ABORTED"
    made.fire("cleanup")
    assert made.phase == "CLOSED"


def test_after_the_start_token_the_source_aborts_only_with_a_token() -> None:
    recorder = Recorder()
    made = source_until("finish_epochs", recorder)
    made.fire("finish_epochs")
    for event in ("abort", "abort_with_token"):
        with pytest.raises(Refused):
            made.fire(event)
    made.assume(abort_token=True)
    made.fire("abort_with_token")
    assert (made.phase, recorder.asked[-1]) == ("ABORTED", ("abort_with_token", {}))


@pytest.mark.parametrize("stop", ["import_immutable", "import_td_state", "commit"])
def test_the_destination_aborts_until_it_commits(stop: str) -> None:
    made = destination_until(stop, Recorder())
    made.fire("abort")
    assert made.phase == "ABORTED"
    token = made.monitor["abort_token"]
    assert token == (stop != "import_immutable"), "a token can be made once the import has begun"


def test_after_the_commit_the_destination_cannot_abort() -> None:
    made = destination_until("commit", Recorder())
    made.fire("commit")
    with pytest.raises(Refused, match="destination_phase = COMMITTED"):
        made.fire("abort")


# --- refusals ------------------------------------------------------------------------------------


def test_a_refusal_says_what_is_unmet_where_and_what_is_legal() -> None:
    recorder = Recorder()
    made = source_until("export_vcpu_state", recorder)
    before, asked = observed(made), list(recorder.asked)
    with pytest.raises(Refused) as refusal:
        made.fire("finish_epochs")
    error = refusal.value
    assert [unmet.label for unmet in error.unmet] == ["every_vcpu"]
    assert error.unmet[0].values["exported vCPUs"] in (0, "0")
    assert error.state == {"source_phase": "STATE_EXPORT", "source_epoch": "2"}
    assert set(error.legal) == {"confirm_import", "export_vcpu_state", "abort"}
    assert error.why == LIFECYCLE.step("finish_epochs").why
    for part in ("finish_epochs is refused", "every_vcpu: needs exported vCPUs", "legal now: "):
        assert part in str(error)
    assert observed(made) == before
    assert recorder.asked == asked


def test_a_refusal_names_every_unmet_conjunct() -> None:
    made = machine("source", Recorder())
    with pytest.raises(Refused) as refusal:
        made.fire("finish_epochs")
    labels = [unmet.label for unmet in refusal.value.unmet]
    assert labels == ["phase", "every_vcpu", "confirmed"]


@pytest.mark.parametrize("side", SIDES)
def test_every_event_is_refused_or_leads_where_its_row_says(side: str) -> None:
    """At each point of a good run, try every event; what is refused leaves the machine usable."""
    good = len(GOOD_SOURCE if side == "source" else GOOD_DESTINATION)
    for length in range(good + 1):
        recorder = Recorder()
        made = _driven(side, length, recorder)
        for step in LIFECYCLE.of_actor(side):
            event, phase = event_name(side, step.name), made.phase
            params = {p.name: 0 for p in step.params}
            legal, asked = event in made.legal(), len(recorder.asked)
            if _fired(made, event, params):
                assert legal
                targets = {e.target or e.origin for e in _edges(side) if e.step.name == step.name}
                assert made.phase in targets
                assert recorder.asked[asked:] == [(event, params)]
                made = _driven(side, length, recorder)
            else:
                assert made.phase == phase
                assert len(recorder.asked) == asked
                assert not legal or params, "it is legal for another value of a parameter at most"


def _fired(made: LifecycleMachine, event: str, params: Mapping[str, int]) -> bool:
    try:
        made.fire(event, **params)
    except Refused:
        return False
    return True


def _driven(side: str, length: int, recorder: Recorder) -> LifecycleMachine:
    made = machine(side, recorder)
    if side == "source":
        made.assume(confirmation=True)
        for event, params in GOOD_SOURCE[:length]:
            made.fire(event, **params)
    else:
        for event, params, record, epoch in GOOD_DESTINATION[:length]:
            if record:
                made.deliver(record, epoch)
            made.fire(event, **params)
    return made


def test_a_vcpu_is_exported_once_and_must_exist() -> None:
    made = source_until("export_vcpu_state", Recorder())
    made.fire("export_vcpu_state", vcpu=0)
    with pytest.raises(Refused, match="not_exported_yet"):
        made.fire("export_vcpu_state", vcpu=0)
    with pytest.raises(Refused, match="no Vcpu"):
        made.fire("export_vcpu_state", vcpu=VCPUS)
    with pytest.raises(ModelError, match=r"takes \['vcpu'\], got \[\]"):
        made.fire("export_vcpu_state")


@pytest.mark.parametrize(
    ("record", "epoch", "label"),
    [("EPOCH", 0, "newer_epoch"), ("MEMORY", 1, "record_kind"), ("START_TOKEN", 1, "record_kind")],
)
def test_a_record_of_the_wrong_kind_or_epoch_is_refused(
    record: str, epoch: int, label: str
) -> None:
    made = machine("destination", Recorder())
    made.fire("setup")
    made.deliver("IMMUTABLE", 0)
    made.fire("import_immutable")
    made.deliver(record, epoch)
    with pytest.raises(Refused) as refusal:
        made.fire("import_epoch")
    assert refusal.value.unmet[0].label == label


def test_events_of_the_other_side_and_unknown_ones_are_refused() -> None:
    for side, event in (
        ("source", "import_memory"),
        ("source", "destination_setup"),
        ("destination", "export_memory"),
        ("destination", "destination_setup"),
        ("source", "on_setup"),
        ("source", "nothing"),
    ):
        recorder = Recorder()
        made = machine(side, recorder)
        with pytest.raises(Refused, match=f"an event {event} of the {side}") as refusal:
            made.fire(event)
        assert refusal.value.legal == ("setup", "cleanup")
        assert recorder.asked == []


def test_only_the_network_is_assumed() -> None:
    made = machine("source", Recorder())
    with pytest.raises(ModelError, match="source_confirmed is not decided by the network"):
        made.assume(source_confirmed=True)


# --- performing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["setup", "export_memory", "pause", "finish_epochs"])
def test_work_that_fails_moves_nothing(event: str) -> None:
    recorder = Recorder(fails=event)
    made = source_until(event, recorder)
    before, phase = observed(made), made.phase
    with pytest.raises(OSError, match=f"{event} broke"):
        made.fire(event)
    assert made.phase == phase
    assert observed(made) == before
    recorder.fails = ""
    made.fire(event)
    assert recorder.asked[-1][0] == event


def test_nothing_is_fired_while_an_event_is_performed() -> None:
    inner: list[str] = []

    def perform(event: str, _params: Mapping[str, Value]) -> None:
        if event == "setup":
            with pytest.raises(Refused, match="needs setup to have ended"):
                made.fire("cleanup")
            inner.append(made.phase)

    made = LifecycleMachine("source", perform, vcpus=VCPUS)
    made.fire("setup")
    assert (inner, made.phase) == (["IDLE"], "READY")
    made.fire("cleanup")
    assert made.phase == "CLOSED"


@pytest.mark.parametrize("row", [s.name for s in LIFECYCLE.of_actor("source")])
def test_without_its_row_an_event_is_refused_and_never_performed(row: str) -> None:
    recorder = Recorder()
    smaller = LIFECYCLE.without_step(row)
    made = machine("source", recorder, smaller)
    made.assume(confirmation=True, abort_token=True)
    events = [*GOOD_SOURCE, ("abort_with_token", {}), ("abort", {})]
    refused = {event for event, params in events if not _fired(made, event, params)}
    assert row in refused
    assert row not in {event for event, _ in recorder.asked}


def test_without_its_conjunct_a_guard_holds_nothing_back() -> None:
    """The machine has no guard of its own: a mutant of the row is a mutant of the machine."""
    recorder = Recorder()
    made = machine("source", recorder, LIFECYCLE.without("pause", "phase"))
    made.fire("pause")
    assert (made.phase, recorder.asked) == ("PAUSED", [("pause", {})])
    made = machine("source", recorder, LIFECYCLE.without("finish_epochs", "confirmed"))
    for event, params in GOOD_SOURCE[: GOOD_SOURCE.index(("finish_epochs", {})) + 1]:
        if event != "confirm_import":
            made.fire(event, **params)
    assert made.phase == "HANDED_OVER"


# --- the machine as a graph ----------------------------------------------------------------------


def _variable(side: str) -> Variable:
    variable = LIFECYCLE.variable(f"{side}_phase")
    assert isinstance(variable, Variable)
    return variable


def _edges(side: str) -> list[Edge]:
    return edges(LIFECYCLE.under(HARDENED), _variable(side), side)


@pytest.mark.parametrize("side", SIDES)
def test_the_machine_has_the_edges_of_the_projection_and_no_other(side: str) -> None:
    made = machine(side, Recorder())
    ours = {
        (trigger.removeprefix("on_"), origin, transition.dest)
        for trigger, event in made._machine.events.items()
        for origin, transitions in event.transitions.items()
        for transition in transitions
    }
    assert ours == {
        (event_name(side, edge.step.name), edge.origin, edge.target) for edge in _edges(side)
    }
    kind = _variable(side).kind
    assert isinstance(kind, EnumType)
    assert tuple(made._machine.states) == kind.members


@pytest.mark.parametrize("side", SIDES)
def test_there_is_one_transition_for_an_event_in_a_phase(side: str) -> None:
    for event in machine(side, Recorder())._machine.events.values():
        assert all(len(found) == 1 for found in event.transitions.values())


@pytest.mark.parametrize("side", SIDES)
def test_there_are_no_automatic_transitions(side: str) -> None:
    made = machine(side, Recorder())
    triggers = {f"on_{event_name(side, s.name)}" for s in LIFECYCLE.of_actor(side)}
    assert set(made._machine.events) == triggers
    assert not [name for name in dir(made) if name.startswith("to_")]


def test_a_guard_that_the_machine_lost_is_still_asked_for_by_the_library() -> None:
    """A trigger of the library itself passes the same guard: nothing moves past it."""
    recorder = Recorder()
    made = machine("source", recorder)
    with pytest.raises(Refused):
        made.trigger("on_cleanup", step="pause", params={})  # type: ignore[attr-defined]
    assert (made.phase, recorder.asked) == ("IDLE", [])


def test_a_lifecycle_is_of_one_of_two_sides() -> None:
    with pytest.raises(ModelError, match="source or destination, not of both"):
        machine("both", Recorder())


def test_a_step_with_a_computed_phase_is_refused_when_the_machine_is_built() -> None:
    phase = _variable("source")
    steps = tuple(
        replace(s, then=(phase.to(phase),)) if s.name == "pause" else s for s in LIFECYCLE.steps
    )
    with pytest.raises(ModelError, match="step pause gives source_phase a computed value"):
        machine("source", Recorder(), replace(LIFECYCLE, steps=steps, _by_name={}))
