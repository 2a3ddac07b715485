"""Do both sides, joined in one process, migrate a TD, and end every failure in a legal state?"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from test_trace import SCHEMA, violations

from tdxmig_model import replay
from tdxmig_model.backend.soft.backend import SoftBackend, soft_destination, soft_source
from tdxmig_model.engine.commands import Command, ExportAbort, Result, VpEnter
from tdxmig_model.errors import BackendError, Refused
from tdxmig_model.machine import LifecycleMachine
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.session import (
    DestinationSession,
    Ending,
    Hooks,
    SessionOptions,
    SideOutcome,
    SourceSession,
    migrate_in_process,
)
from tdxmig_model.supervisor import lifecycle_events
from tdxmig_model.trace import TraceWriter, read_trace
from tdxmig_model.transport import Faults, Transport, memory_pair

PAGES, VCPUS = 128, 2
SESSION = bytes(range(16))
OPTIONS = SessionOptions(batch=48, converged_pages=8, peer_timeout=2.0)


class StopBefore(Hooks):
    """Asks for a stop just before one event."""

    def __init__(self, event: str) -> None:
        self.event = event

    def stop_requested(self, event: str | None) -> str | None:
        return f"a stop before {event}" if event == self.event else None


@dataclass
class Migration:
    """Two sides with their backends, after they ran."""

    source: SourceSession
    destination: DestinationSession
    traces: tuple[Path, Path]

    @property
    def outcomes(self) -> tuple[SideOutcome, SideOutcome]:
        return self.source.outcome, self.destination.outcome

    @property
    def states(self) -> tuple[str, str]:
        return self.source.outcome.op_state, self.destination.outcome.op_state

    @property
    def runnable(self) -> tuple[bool, bool]:
        return self.source.outcome.runnable, self.destination.outcome.runnable

    def assert_accepted(self) -> None:
        verdict = replay.judge(*self.traces)
        assert verdict.ok, f"{verdict.refused_at}: {verdict.reason}"


def migrate(
    path: Path,
    *,
    ours: SoftBackend | None = None,
    theirs: SoftBackend | None = None,
    stop: tuple[str, str] = ("", ""),
    forward: Faults | None = None,
    backward: Faults | None = None,
    prepare: Callable[[SourceSession, DestinationSession], None] = lambda s, d: None,
    options: SessionOptions = OPTIONS,
    more_channels: Sequence[tuple[Transport, Transport]] = (),
    streams: int = 0,
    room: int = PAGES,
    destination_hooks: Hooks | None = None,
) -> Migration:
    """Exchange keys, run both sides turn by turn to their ends, and keep their traces.

    There are as many forward streams as channels unless `streams` says otherwise; `room` is what
    the destination has place for.
    """
    streams = streams or 1 + len(more_channels)
    ours = ours or soft_source(PAGES, vcpus=VCPUS, streams=streams)
    theirs = theirs or soft_destination(PAGES, vcpus=VCPUS, streams=streams)
    our_key, their_key = (side.read_migration_encryption_key() for side in (ours, theirs))
    theirs.write_migration_decryption_key(our_key)
    ours.write_migration_decryption_key(their_key)
    here, there = memory_pair(forward=forward or Faults(), backward=backward or Faults())
    traces = path / "source.ndjson", path / "destination.ndjson"
    hooks = {side: StopBefore(stop[1] if stop[0] == side else "") for side in SIDES}
    with (
        TraceWriter(traces[0], "source", SESSION) as first,
        TraceWriter(traces[1], "destination", SESSION) as second,
    ):
        source = SourceSession(
            ours,
            here,
            first,
            gpas=ours.page_gpas(),
            vcpus=VCPUS,
            streams=streams,
            more_channels=[near for near, _ in more_channels],
            session_id=SESSION,
            options=options,
            hooks=hooks["source"],
        )
        destination = DestinationSession(
            theirs,
            there,
            second,
            pages=room,
            vcpus=VCPUS,
            streams=streams,
            more_channels=[far for _, far in more_channels],
            options=options,
            hooks=destination_hooks or hooks["destination"],
        )
        prepare(source, destination)
        migrate_in_process(source, destination)
    return Migration(source, destination, traces)


SIDES = ("source", "destination")


def backends(migration: Migration) -> tuple[SoftBackend, SoftBackend]:
    ours, theirs = migration.source.backend, migration.destination.backend
    assert isinstance(ours, SoftBackend)
    assert isinstance(theirs, SoftBackend)
    return ours, theirs


# --- the good run --------------------------------------------------------------------------------


def test_a_running_td_arrives_as_it_was_at_pause(tmp_path: Path) -> None:
    done = migrate(tmp_path)
    ours, theirs = backends(done)
    assert [outcome.ending for outcome in done.outcomes] == [Ending.MIGRATED] * 2
    assert done.states == ("POST_EXPORT", "RUNNABLE")
    assert done.source.outcome.epochs >= 2
    assert done.source.outcome.pages_moved > PAGES, "the guest dirtied nothing: not a live run"
    assert theirs.page_gpas().tolist() == ours.page_gpas().tolist()
    for gpa in ours.page_gpas().tolist():
        assert theirs.read_page(gpa) == ours.read_page(gpa), f"page at {gpa:#x}"
    for vcpu in range(VCPUS):
        assert dict(theirs.read_vcpu(vcpu)) == dict(ours.read_vcpu(vcpu))
    assert (theirs.memory_digest(), theirs.vcpu_digest()) == (
        ours.memory_digest(),
        ours.vcpu_digest(),
    )
    done.assert_accepted()


def test_the_guest_goes_on_at_the_destination_where_it_stopped(tmp_path: Path) -> None:
    done = migrate(tmp_path)
    ours, theirs = backends(done)
    before = [theirs.read_vcpu(vcpu)["R10"] for vcpu in range(VCPUS)]
    assert all(before)
    assert before == [ours.read_vcpu(vcpu)["R10"] for vcpu in range(VCPUS)]
    assert done.destination.run_guest(50) == 50 * VCPUS
    assert [theirs.read_vcpu(vcpu)["R10"] for vcpu in range(VCPUS)] == [n + 50 for n in before]
    assert theirs.memory_digest() != ours.memory_digest()


def test_the_source_cannot_run_or_take_back_what_it_gave_away(tmp_path: Path) -> None:
    done = migrate(tmp_path)
    for command, status in (
        (VpEnter(0, 1), "TDX_OP_STATE_INCORRECT"),
        (ExportAbort(None), "TDX_OPERAND_INVALID"),
    ):
        with pytest.raises(Refused):
            done.source.enforcer.execute(command)
        result = done.source.backend.execute(command)
        assert (result.ok, result.status_name) == (False, status)


def test_an_idle_guest_still_takes_two_epochs(tmp_path: Path) -> None:
    done = migrate(tmp_path, ours=soft_source(PAGES, vcpus=VCPUS, guest="idle"))
    assert done.states == ("POST_EXPORT", "RUNNABLE")
    assert done.source.outcome.epochs == 2
    assert done.source.outcome.pages_moved == PAGES
    done.assert_accepted()


def test_a_guest_that_never_converges_is_paused_at_the_epoch_limit(tmp_path: Path) -> None:
    options = SessionOptions(
        batch=16, guest_budget=20_000, converged_pages=0, max_epochs=3, peer_timeout=0.5
    )
    done = migrate(tmp_path, options=options)
    assert done.states == ("POST_EXPORT", "RUNNABLE")
    assert done.source.outcome.epochs == 4
    done.assert_accepted()


def test_single_page_bundles(tmp_path: Path) -> None:
    done = migrate(tmp_path, options=SessionOptions(batch=1, guest_budget=2000, peer_timeout=0.5))
    assert done.states == ("POST_EXPORT", "RUNNABLE")
    done.assert_accepted()


# --- stops ---------------------------------------------------------------------------------------

NEVER_COME_UP = {
    ("source", "cancel_page"),
    ("source", "abort"),
    ("source", "abort_with_token"),
    ("destination", "commit"),
    ("destination", "abort"),
}
TOO_LATE = {("source", "cleanup"), ("destination", "cleanup")}
BEFORE_THE_SESSION = {
    ("source", "setup"),
    ("source", "export_immutable"),
    ("destination", "setup"),
    ("destination", "import_immutable"),
}


@pytest.mark.parametrize(
    "stop", [(side, event) for side in SIDES for event in lifecycle_events(side)], ids=":".join
)
def test_a_stop_before_any_event_leaves_one_owner(tmp_path: Path, stop: tuple[str, str]) -> None:
    done = migrate(tmp_path, stop=stop)
    if stop in NEVER_COME_UP | TOO_LATE:
        assert done.states == ("POST_EXPORT", "RUNNABLE")
    elif stop in BEFORE_THE_SESSION:
        assert done.states == ("RUNNABLE", "UNINITIALIZED")
    else:
        assert done.states == ("RUNNABLE", "FAILED_IMPORT")
    assert sum(done.runnable) == 1
    assert all(outcome.sentence for outcome in done.outcomes)
    done.assert_accepted()


def test_a_stop_after_the_start_token_goes_back_by_abort_token(tmp_path: Path) -> None:
    done = migrate(tmp_path, stop=("destination", "end"))
    assert "abort_with_token" in done.source.outcome.events
    assert done.destination.outcome.abort_token is not None
    assert done.source.run_guest(100) == 100 * VCPUS


def test_after_an_abort_the_same_td_migrates_again(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    first = migrate(tmp_path / "first", stop=("source", "finish_epochs"))
    ours, _ = backends(first)
    assert ours.observe()["mig_count"] == 0
    second = migrate(tmp_path, ours=ours)
    ours, theirs = backends(second)
    assert second.states == ("POST_EXPORT", "RUNNABLE")
    assert theirs.memory_digest() == ours.memory_digest()
    second.assert_accepted()


# --- faults --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forward_bytes(tmp_path_factory: pytest.TempPathFactory) -> int:
    return migrate(tmp_path_factory.mktemp("length")).source.outcome.bytes


@pytest.mark.parametrize("seed", range(12))
def test_faults_in_the_forward_stream_leave_at_most_one_owner(
    tmp_path: Path, forward_bytes: int, seed: int
) -> None:
    faults = Faults.drawn(random.Random(seed), forward_bytes)
    done = migrate(tmp_path, forward=faults)
    assert done.runnable == (True, False), f"{faults}: {done.states}"
    assert done.states[1] in ("UNINITIALIZED", "FAILED_IMPORT")
    assert all(outcome.cause and outcome.sentence for outcome in done.outcomes)
    done.assert_accepted()


def test_a_connection_that_breaks_in_the_start_token_leaves_a_way_back(
    tmp_path: Path, forward_bytes: int
) -> None:
    """The source gave the TD away, the destination did not get it: its token is the way back."""
    lost = migrate(tmp_path, forward=Faults(cut_at=forward_bytes - 20))
    assert lost.states == ("POST_EXPORT", "FAILED_IMPORT")
    assert lost.runnable == (False, False)
    assert lost.source.outcome.ending is Ending.UNDECIDED
    assert "abort token" in lost.source.outcome.sentence
    lost.assert_accepted()
    token = lost.destination.outcome.abort_token
    assert token is not None
    assert lost.source.enforcer.execute(ExportAbort(token)).ok
    assert lost.source.runnable


def test_a_lost_answer_leaves_the_destination_as_the_only_owner(tmp_path: Path) -> None:
    """COMMITTED never arrives: the source must not conclude that it may run."""
    heard = migrate(tmp_path).source.transport.bytes_received
    done = migrate(tmp_path, backward=Faults(truncate_at=heard - 4))
    assert done.states == ("POST_EXPORT", "RUNNABLE")
    assert done.source.outcome.ending is Ending.UNDECIDED
    assert "must not run" in done.source.outcome.sentence


def test_a_forged_abort_token_does_not_free_the_source(tmp_path: Path) -> None:
    """A destination that commits and claims to have given up: the module checks the token."""

    def corrupt(source: SourceSession, destination: DestinationSession) -> None:
        receive = source.engine.receive

        def lie(message: object) -> str | None:
            answer = receive(message)  # type: ignore[arg-type]
            if source.engine.abort_token is not None:
                source.engine.abort_token = bytes(32) + bytes(source.engine.abort_token[32:])
            return answer

        source.engine.receive = lie  # type: ignore[method-assign]

    done = migrate(tmp_path, stop=("destination", "end"), prepare=corrupt)
    assert done.states == ("POST_EXPORT", "FAILED_IMPORT")
    assert "POST_EXPORT" in done.source.outcome.sentence


def test_a_module_that_refuses_ends_the_session_on_both_sides(tmp_path: Path) -> None:
    """A page that the module will not export: nothing is lost, the source goes on."""

    def refuse(source: SourceSession, destination: DestinationSession) -> None:
        execute = source.backend.execute

        def stubborn(command: Command) -> Result:
            if command.name == "export_track_start":
                return Result(0x8000_0204_0000_0000, "TDX_OPERAND_BUSY")
            return execute(command)

        source.enforcer.backend.execute = stubborn  # type: ignore[method-assign]

    done = migrate(tmp_path, prepare=refuse)
    assert done.runnable == (True, False)
    assert "export_track_start failed" in done.source.outcome.cause


# --- the lifecycle is the only way ---------------------------------------------------------------


@pytest.mark.parametrize("event", ["pause", "export_memory", "finish_epochs"])
def test_without_its_row_an_event_never_reaches_the_module(tmp_path: Path, event: str) -> None:
    issued: list[str] = []

    def cut(source: SourceSession, destination: DestinationSession) -> None:
        source.machine = LifecycleMachine(
            "source", source._perform, vcpus=VCPUS, system=LIFECYCLE.without_step(event)
        )
        execute = source.backend.execute

        def watch(command: Command) -> Result:
            issued.append(command.name)
            return execute(command)

        source.enforcer.backend.execute = watch  # type: ignore[method-assign]

    done = migrate(tmp_path, prepare=cut)
    leaf = {
        "pause": "export_pause",
        "export_memory": "export_mem",
        "finish_epochs": "export_track_start",
    }[event]
    assert leaf not in issued
    assert done.runnable == (True, False)
    assert event in done.source.outcome.cause


def test_traces_tell_events_and_bundles_in_order(tmp_path: Path) -> None:
    done = migrate(tmp_path)
    source, destination = (list(read_trace(path)) for path in done.traces)
    events = [record.step for record in source if record.kind == "lifecycle"]
    assert events == done.source.outcome.events
    made = [record.message for record in source if record.message is not None]
    taken = [record.message for record in destination if record.message is not None]
    assert made == taken
    exported = np.concatenate([r.gpas() for r in source if r.step == "export_mem"])
    assert exported.size == done.source.outcome.pages_moved
    assert source[-1].params["op_state"] == "POST_EXPORT"
    for path in done.traces:
        for line in path.read_text().splitlines():
            assert list(violations(json.loads(line), SCHEMA)) == []


def test_a_guest_that_the_module_does_not_enter_is_an_error(tmp_path: Path) -> None:
    done = migrate(tmp_path)
    with pytest.raises((Refused, BackendError)):
        done.source.run_guest(1)
