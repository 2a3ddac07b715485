"""Does a run tell how it ended from its own traces and reports, whatever fails on the way?"""

from __future__ import annotations

import errno
import os
import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from iv_record import CHILDREN
from test_run import MEMORY, nothing_is_left
from test_session import SESSION, migrate

from tdxmig_model.errors import UsageError
from tdxmig_model.session import SideOutcome
from tdxmig_model.supervisor import At, Injected, RunOptions, child, run_migration
from tdxmig_model.supervisor.child import Failure, Link, PeerEnded, SideReport
from tdxmig_model.supervisor.result import End, explain
from tdxmig_model.supervisor.run import _Both, _differs, judge_written
from tdxmig_model.supervisor.tracefiles import reserved, written_traces
from tdxmig_model.transport import Faults

assert nothing_is_left  # the fixture of test_run watches over the runs here too


def run(**options: Any) -> Any:
    return run_migration(RunOptions(memory=MEMORY, vcpus=1, peer_timeout=1.5, **options))


def test_a_connection_that_breaks_in_the_start_token_still_brings_the_td_back() -> None:
    """The source has no connection any more; the supervisor hands it the abort token."""
    whole = run(guest="idle").bytes
    result = run(guest="idle", injected=Injected(stream=Faults(cut_at=whole - 10)))
    assert (result.source_runnable, result.destination_runnable) == (True, False)
    assert result.abort_token_used
    assert result.trace["accepted"], result.trace


def test_a_destination_that_dies_after_it_committed_had_the_td() -> None:
    CHILDREN.lost = 1
    result = run(injected=Injected(kill=At.parse("destination:cleanup")))
    assert (result.ok, result.ending) == (False, "migrated")
    assert (result.source_state, result.destination_state) == ("POST_EXPORT", None)
    assert "the destination had taken it over" in result.sentence
    assert "SIGKILL" in result.cause


def test_a_report_sent_ahead_says_who_had_the_td() -> None:
    source = End("source", SideReport(SideOutcome("source", op_state="POST_EXPORT")))
    gone = End("destination", None, "it failed", migrated=True)
    assert "had taken it over" in explain(source, gone)
    assert "abort token" in explain(source, replace(gone, migrated=False))


# --- traces --------------------------------------------------------------------------------------


def test_old_traces_are_gone_before_the_run(tmp_path: Path) -> None:
    stale = tmp_path / "source.ndjson"
    stale.write_text("of an earlier run\n")
    with reserved(tmp_path):
        assert not stale.exists()
        assert written_traces(tmp_path) == {}
        stale.touch()
        assert written_traces(tmp_path) == {}, "an empty trace says nothing"


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    with reserved(tmp_path):
        with pytest.raises(UsageError, match="another run writes its traces"), reserved(tmp_path):
            pass
        with pytest.raises(UsageError, match="another run writes its traces"):
            run(trace_dir=tmp_path)
    with reserved(tmp_path):
        pass


def test_a_fifo_is_no_trace(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "destination.ndjson")
    with pytest.raises(UsageError, match="no regular file"):
        run(trace_dir=tmp_path)


def test_the_verdict_must_agree_with_the_reports(tmp_path: Path) -> None:
    done = migrate(tmp_path)
    written = dict(zip(("source", "destination"), done.traces, strict=True))
    options = RunOptions()
    reports = [SideReport(outcome, session=SESSION.hex()) for outcome in done.outcomes]
    assert judge_written(written, reports, options).accepted
    other = [reports[0], replace(reports[1], session="ff" * 16)]
    assert "another session" in judge_written(written, other, options).reason
    lines = done.traces[1].read_bytes().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if b'"import_end"' in line)
    done.traces[1].write_bytes(b"".join(lines[:end]))
    verdict = judge_written(written, reports, options)
    assert (verdict.judged, verdict.accepted) == (True, False)
    assert "ends in POST_IMPORT, and the destination reports RUNNABLE" in verdict.reason


# --- children ------------------------------------------------------------------------------------


class Wire:
    """A connection to the supervisor that remembers what was sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send(self, item: Any) -> None:
        self.sent.append(item)

    def recv(self) -> Any:
        return self.inbox.get()

    def close(self) -> None:
        pass


@pytest.mark.parametrize("began", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MemoryError(), UsageError("no")])
def test_only_before_the_session_is_the_environment_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, began: bool, error: Exception
) -> None:
    def program(link: Link, options: RunOptions, place: Any) -> SideReport:
        link.session_began = began
        raise error

    monkeypatch.setattr(child.signals, "ignore", lambda: None)
    wire = Wire()
    child.child_main(program, wire, RunOptions(), None)  # type: ignore[arg-type]
    (failure,) = wire.sent
    assert isinstance(failure, Failure)
    assert failure.usage is not began


def test_a_relayed_token_is_given_once_and_survives_the_end_of_the_process() -> None:
    wire = Wire()
    link = Link(wire)  # type: ignore[arg-type]
    wire.inbox.put(PeerEnded(b"token"))
    wire.inbox.put(PeerEnded(None))
    wire.inbox.put("after")
    while link._inbox.get(timeout=5) != "after":
        pass
    assert link.peer_ended
    assert [link.take_abort_token(), link.take_abort_token()] == [b"token", None]


# --- options and differences ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"memory": 4096.0},
        {"memory": "64MiB"},
        {"vcpus": 1.5},
        {"vcpus": 70_000},
        {"batch": True},
        {"seed": -1},
        {"seed": None},
        {"peer_timeout": 0.0},
        {"peer_timeout": float("nan")},
        {"peer_timeout": float("inf")},
        {"peer_timeout": "5"},
        {"deadline": float("nan")},
    ],
)
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"(?i){next(iter(options)).split('_')[0]}"):
        RunOptions(**options)


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        (("a", ("b",)), ("a", ("b",)), ""),
        (("a", ("b",)), ("x", ("b",)), "the memory of the destination differs"),
        (("a", ("b",)), ("a", ("x",)), "the vCPU state of the destination differs"),
        (("a", ("b",)), ("x", ("x",)), "the memory and vCPU state of the destination differs"),
    ],
)
def test_a_difference_is_named(
    ours: tuple[str, tuple[str, ...]], theirs: tuple[str, tuple[str, ...]], says: str
) -> None:
    sides = [
        SideReport(SideOutcome(side), digests[0], digests[1])
        for side, digests in (("source", ours), ("destination", theirs))
    ]
    found = _differs(_Both(*sides))
    assert found.startswith(says)
    assert bool(found) is bool(says)


@pytest.mark.parametrize(
    "options", [{"capture": Path("there")}, {"injected": Injected(stream=Faults(cut_at=1))}]
)
def test_nothing_stands_between_a_session_and_its_file(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="neither captured nor damaged"):
        RunOptions(transport="file", **options)
