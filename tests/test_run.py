"""Does `tdxmig run` migrate between two processes, and does every way it can fail end well?"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from iv_record import CHILDREN

from tdxmig_model.cli import main
from tdxmig_model.errors import UsageError
from tdxmig_model.supervisor import At, Injected, RunOptions, RunResult, run_migration
from tdxmig_model.transport import Faults

MEMORY = 4 << 20
WANTED = {
    *("ok", "profile", "pages", "bytes", "epochs", "bundles", "streams", "vcpus", "downtime_ms"),
    *("throughput_mib_s", "memory_equal", "source_state", "destination_state", "steps_checked"),
    "trace",
}


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, no socket file and no temporary directory survives a run."""
    # pytest makes tmp_path, which may be too long for a Unix socket, before TMPDIR changes.
    scratch = Path(tempfile.mkdtemp(prefix="t-"))
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    assert multiprocessing.active_children() == []
    scratch.rmdir()  # fails if anything is left in it


def run(**options: object) -> RunResult:
    return run_migration(RunOptions(memory=MEMORY, peer_timeout=2.0, **options))  # type: ignore[arg-type]


# --- the good run --------------------------------------------------------------------------------


def test_run_migrates_and_prints_one_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    traces = tmp_path / "traces"
    arguments = ["run", "--memory", "8MiB", "--json", "--trace-dir", str(traces)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    result = json.loads(printed.out)
    assert set(result) >= WANTED
    assert (result["ok"], result["memory_equal"], result["vcpus_equal"]) == (True, True, True)
    assert (result["source_state"], result["destination_state"]) == ("POST_EXPORT", "RUNNABLE")
    assert result["pages"] == 2048
    assert result["pages_sent"] > 2048, "the guest dirtied nothing: not a live migration"
    assert result["epochs"] >= 2
    assert result["bytes"] > result["pages_sent"] * 4096
    assert [
        (probe["step"], probe["refused_by_enforcer"], probe["status_name"])
        for probe in result["refusals"]
    ] == [
        ("vp_enter", True, "TDX_OP_STATE_INCORRECT"),
        ("export_abort", True, "TDX_OPERAND_INVALID"),
    ]
    assert result["guest_instructions"] > 0
    assert result["steps_checked"] > 2 * 2048
    assert result["trace"]["accepted"]
    assert result["trace"]["source"] == str(traces / "source.ndjson")
    assert {path.name for path in traces.iterdir()} == {"source.ndjson", "destination.ndjson"}


def test_a_long_temporary_path_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert run().ok
    assert list(long.iterdir()) == []


def test_run_over_tcp_with_a_summary(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "run --memory 4MiB --vcpus 3 --batch 64 --transport tcp --guest random-writer"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "memory equal" in printed.out
    assert "The destination runs the TD" in printed.out


def test_both_processes_are_watched_for_repeated_ivs() -> None:
    """What they report is what they encrypted; the observer of the test run judges it as well."""
    result = run()
    began, reports = CHILDREN.take()
    assert (began, len(reports)) == (2, 2)
    # The destination encrypts nothing; the source each page and vCPU, and an MBMD per bundle.
    few, many = sorted(reports, key=len)
    assert few == []
    assert len(set(many)) == len(many) >= result.pages_sent + result.bundles


def test_a_use_by_both_processes_is_seen_and_so_is_a_missing_report() -> None:
    for name, text in (("1.began", ""), ("2.began", ""), ("1.pairs", "a\nb\n")):
        (CHILDREN.directory / name).write_text(text)
    with pytest.raises(AssertionError, match="2 processes began, 1 reported"):
        CHILDREN.judge()
    for name, text in (("1.pairs", "a\nb\n"), ("2.pairs", "b\n")):
        (CHILDREN.directory / name.replace("pairs", "began")).touch()
        (CHILDREN.directory / name).write_text(text)
    with pytest.raises(AssertionError, match="more than once"):
        CHILDREN.judge()


# --- stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "destination_state"),
    [
        ("source:export_immutable", "UNINITIALIZED"),
        ("finish_epochs", "FAILED_IMPORT"),
        ("destination:end", "FAILED_IMPORT"),
    ],
)
def test_a_stop_leaves_the_source_as_owner(event: str, destination_state: str) -> None:
    result = run(stop_at=At.parse(event))
    assert result.ok, result
    assert (result.source_state, result.destination_state) == ("RUNNABLE", destination_state)
    assert (result.source_runnable, result.destination_runnable) == (True, False)
    assert result.sentence.startswith("The source runs the TD")
    assert f"before {At.parse(event)}" in result.cause


@pytest.mark.parametrize(
    ("event", "says"), [("source:cleanup", "too late"), ("commit", "did not come up")]
)
def test_a_stop_that_comes_too_late_or_never(event: str, says: str) -> None:
    result = run(stop_at=At.parse(event))
    assert result.ok
    assert result.destination_runnable
    assert says in result.sentence


def test_interrupt_ends_in_a_legal_state(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    command = [sys.executable, "-m", "tdxmig_model", "run", "--memory", "32MiB", "--json"]
    process = subprocess.Popen(
        [*command, "--trace-dir", str(traces)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a process group of its own, as a terminal gives
    )
    trace = traces / "source.ndjson"
    end = time.monotonic() + 20
    while not (trace.exists() and trace.stat().st_size > 4096) and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"")
    result = json.loads(out)
    assert result["interrupted"]
    assert result["source_runnable"] + result["destination_runnable"] == 1
    assert result["trace"]["accepted"], result["trace"]


# --- lost peers and damaged streams --------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "ending", "states", "says"),
    [
        ("source:export_memory", "lost", (None, "FAILED_IMPORT"), "never got a start token"),
        ("source:cleanup", "migrated", (None, "RUNNABLE"), "The destination runs the TD"),
        ("destination:import_memory", "aborted", ("RUNNABLE", None), "The source runs the TD"),
        ("destination:end", "undecided", ("POST_EXPORT", None), "nobody is left who could make"),
    ],
)
def test_a_killed_side(
    event: str, ending: str, states: tuple[str | None, str | None], says: str
) -> None:
    CHILDREN.lost = 1
    began = time.monotonic()
    result = run(injected=Injected(kill=At.parse(event)))
    assert time.monotonic() - began < 8
    assert (result.ok, result.ending) == (False, ending)
    assert (result.source_state, result.destination_state) == states
    assert says in result.sentence
    assert "SIGKILL" in result.cause
    assert result.trace["accepted"], result.trace


def test_a_side_that_hangs_is_given_up_and_killed() -> None:
    CHILDREN.lost = 1
    result = run(injected=Injected(hang=At.parse("source:pause")))
    assert (result.source_state, result.destination_state) == (None, "FAILED_IMPORT")
    assert "hung" in result.cause


@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        (Faults(flip_at=1_000_000), "TDX_INVALID_PAGE_MAC"),
        (Faults(cut_at=1_000_000), "broke"),
        (Faults(truncate_at=1_000_000), "sent nothing for 2 s"),
    ],
    ids=["flipped", "cut", "stalled"],
)
def test_a_damaged_stream(faults: Faults, cause: str) -> None:
    result = run(injected=Injected(stream=faults))
    assert not result.ok
    assert (result.source_state, result.destination_state) == ("RUNNABLE", "FAILED_IMPORT")
    assert cause in result.cause
    assert result.trace["accepted"], result.trace


# --- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--post-copy", "--post-copy"),
        ("--streams 2", "--streams"),
        ("--memory 5000", "multiple of 4KiB"),
        ("--memory lots", "not a size"),
        ("--memory 1024GiB", "do not fit"),
        ("--batch 513", "513"),
        ("--abort-at nowhere", "no lifecycle event 'nowhere'"),
        ("--abort-at setup", "source:setup or destination:setup"),
        ("--abort-at middle:setup", "source or destination"),
        ("--profile soft", "soft"),
        ("--trace-dir /dev/null/traces", "/dev/null/traces"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert len(printed.err.splitlines()) == 1


def test_a_failed_migration_exits_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    injected = Injected(stream=Faults(flip_at=500_000))
    build = RunOptions
    monkeypatch.setattr(
        "tdxmig_model.supervisor.RunOptions", lambda **chosen: build(**chosen, injected=injected)
    )
    assert main(["run", "--memory", "4MiB"]) == 1
    assert "not as asked" in capsys.readouterr().out


def test_options_that_cannot_be_are_refused() -> None:
    for options in ({"memory": 4097}, {"batch": 0}, {"vcpus": 0}, {"transport": "pigeon"}):
        with pytest.raises(UsageError):
            RunOptions(**options)  # type: ignore[arg-type]
