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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from iv_record import CHILDREN

from tdxmig_model import replay
from tdxmig_model.cli import main
from tdxmig_model.errors import UsageError
from tdxmig_model.supervisor import (
    At,
    Injected,
    RunOptions,
    RunResult,
    StopSignals,
    run_migration,
)
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


@pytest.mark.parametrize("transport", ["tls", "file"])
def test_run_over_tls_and_through_a_file(transport: str) -> None:
    result = run(transport=transport)
    assert result.ok, result
    assert (result.source_state, result.destination_state) == ("POST_EXPORT", "RUNNABLE")
    assert result.memory_equal
    assert result.trace["accepted"]


@pytest.mark.parametrize(
    ("transport", "event"), [("tls", "destination:end"), ("file", "finish_epochs")]
)
def test_a_stop_over_tls_and_before_the_token_of_a_file(transport: str, event: str) -> None:
    result = run(transport=transport, stop_at=At.parse(event))
    assert result.ok, result
    assert (result.source_runnable, result.destination_runnable) == (True, False)


def test_after_the_start_token_is_in_a_file_nobody_can_give_the_td_back() -> None:
    result = run(transport="file", stop_at=At.parse("destination:end"))
    assert not result.ok
    assert (result.source_runnable, result.destination_runnable) == (False, False)
    assert result.source_state == "POST_EXPORT"
    assert result.trace["accepted"]


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
    after_the_token = event == "destination:end"
    assert result.abort_token_used is after_the_token
    assert ("abort token" in result.sentence) is after_the_token


@pytest.mark.parametrize(
    ("event", "says"), [("source:cleanup", "too late"), ("commit", "never happened")]
)
def test_a_stop_that_comes_too_late_or_never_is_not_what_was_asked(event: str, says: str) -> None:
    result = run(stop_at=At.parse(event))
    assert not result.ok
    assert (result.ending, result.destination_runnable) == ("migrated", True)
    assert result.sentence.startswith("The destination runs the TD")
    assert f"{At.parse(event)} that was asked for" in result.sentence
    assert says in result.sentence


# --- signals -------------------------------------------------------------------------------------


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tdxmig_model", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a process group of its own, as a terminal gives
    )


def wait_until(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_whole_group_ends_in_a_legal_state(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = start("--memory", "32MiB", "--json", "--trace-dir", str(tmp_path))
    trace = tmp_path / "source.ndjson"
    wait_until(lambda: trace.exists() and trace.stat().st_size > 4096)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"")
    result = json.loads(out)
    assert result["interrupted"]
    assert number.name in result["cause"]
    assert result["source_runnable"] + result["destination_runnable"] == 1
    assert not result["trace"]["judged"], "somebody who interrupts is not kept waiting"
    verdict = replay.judge(trace, tmp_path / "destination.ndjson")
    assert verdict.ok, verdict.reason


def test_a_signal_before_the_session_still_tells_who_has_the_td(tmp_path: Path) -> None:
    process = start("--memory", "64MiB", "--trace-dir", str(tmp_path / "traces"))
    wait_until((tmp_path / "traces").exists)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, b"")
    assert "The source runs the TD" in out.decode()
    assert "not judged: no trace was written" in out.decode()


def test_a_second_signal_kills_both_sides_and_the_outcome_is_told(tmp_path: Path) -> None:
    process = start("--memory", "32MiB", "--json", "--trace-dir", str(tmp_path))
    trace = tmp_path / "source.ndjson"
    wait_until(lambda: trace.exists() and trace.stat().st_size > 4096)
    # Both sides stand still, so that the second signal finds them.
    CHILDREN.lost = 2
    for pid in sides_of(process.pid):
        os.kill(pid, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, b"")
    result = json.loads(out)
    assert result["sentence"].startswith("No side can run the TD")
    assert "a second signal" in result["sentence"]
    assert "start token" not in result["sentence"], "nobody is left who knows"
    assert not result["trace"]["judged"]


def sides_of(supervisor: int) -> list[int]:
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    # The third child is the resource tracker of multiprocessing, which ends when it may.
    sides = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(sides) == 2
    return [int(pid) for pid in sides]


def test_a_signal_while_traces_are_judged_ends_the_judging_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(*_arguments: object) -> NoReturn:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
        raise AssertionError("the judging went on")

    monkeypatch.setattr("tdxmig_model.replay.judge_records", judge)
    result = run()
    assert (result.interrupted, result.ok, result.ending) == (True, False, "migrated")
    assert result.sentence.startswith("The destination runs the TD")
    assert (result.trace["judged"], result.trace["reason"]) == (False, "interrupted (SIGINT)")


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.count == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- traces that cannot be written, and deadlines ------------------------------------------------


def test_a_full_disk_ends_the_migration_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TDXMIG_TEST_IV_REPORTS")  # a report would not fit under the limit
    ran = subprocess.run(
        [
            *("bash", "-c", 'ulimit -f 64; exec "$@"', "bash"),
            *(sys.executable, "-m", "tdxmig_model", "run", "--memory", "16MiB", "--json"),
            *("--trace-dir", str(tmp_path)),
        ],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (1, b"")
    result = json.loads(ran.stdout)
    assert (result["source_state"], result["source_runnable"]) == ("RUNNABLE", True)
    assert (result["destination_state"], result["destination_runnable"]) == ("FAILED_IMPORT", False)
    assert "cannot write the trace" in result["cause"]
    assert str(tmp_path) in result["cause"]
    assert not result["trace"]["judged"]
    assert result["pages_sent"] > 0, "the disk was full before anything happened"


def test_the_deadline_grows_with_memory_or_is_given() -> None:
    small, large = RunOptions(memory=64 << 20), RunOptions(memory=4 << 30)
    assert small.seconds < large.seconds
    assert RunOptions(memory=4 << 30, deadline=7.0).seconds == 7.0


def test_a_run_that_takes_longer_than_its_deadline_is_stopped() -> None:
    # Patient, so that sides that are slow to begin are asked to stop and not killed.
    result = run_migration(RunOptions(memory=MEMORY, deadline=0.2, peer_timeout=30.0))
    assert not result.ok
    assert (result.source_runnable, result.destination_runnable) == (True, False)
    assert "longer than 0.2 s" in result.cause


@pytest.mark.parametrize("arguments", ["run --memory 4MiB", "run --memory 4MiB --json"])
def test_a_reader_that_left_is_exit_141(arguments: str) -> None:
    command = [sys.executable, "-m", "tdxmig_model", *arguments.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert (process.communicate(timeout=60)[1], process.returncode) == (b"", 141)


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
        (Faults(truncate_at=1_000_000), "did not complete the record"),
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
        ("--post-copy --not-converging abort", "not both"),
        ("--streams 512", "--streams"),
        ("--max-epochs 0", "choose post-copy"),
        ("--memory 5000", "multiple of 4KiB"),
        ("--memory lots", "not a size"),
        ("--memory 1024GiB", "do not fit"),
        ("--batch 513", "513"),
        ("--abort-at nowhere", "no lifecycle event 'nowhere'"),
        ("--abort-at setup", "source:setup or destination:setup"),
        ("--abort-at middle:setup", "source or destination"),
        ("--profile soft", "soft"),
        ("--trace-dir /dev/null/traces", "/dev/null/traces"),
        ("--deadline 0", "--deadline"),
        ("--deadline inf", "deadline of inf s"),
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
