"""Do worker processes end with the work they are for, whatever ends it?"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tdxmig_model.errors import UsageError
from tdxmig_model.pool import pool

_begun = ""


def begin(word: str) -> None:
    global _begun
    _begun = word


def begun(number: int) -> tuple[str, int]:
    return _begun, number


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def children(pid: int) -> list[int]:
    try:
        return [int(w) for w in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(seen: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.02)


def verifying() -> tuple[subprocess.Popen[bytes], list[int]]:
    """`tdxmig verify` in a process group of its own, and its workers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tdxmig_model", "verify", "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    # One beside the proof, which searches for witnesses, and one at least for the proof.
    wait_until(lambda: len(children(process.pid)) >= 2)
    return process, children(process.pid)


def test_workers_are_begun_and_answer_in_order() -> None:
    with pool(2, begin, ("ready",)) as workers:
        assert list(workers.map(begun, range(5))) == [("ready", n) for n in range(5)]
    assert multiprocessing.active_children() == []


def test_an_error_gives_up_what_workers_are_at() -> None:
    began = time.monotonic()

    def fail() -> None:
        with pool(2) as workers:
            for _ in range(4):
                workers.submit(time.sleep, 60)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert time.monotonic() - began < 20
    assert multiprocessing.active_children() == []


def test_a_worker_that_the_host_kills_is_told_as_such() -> None:
    with pytest.raises(UsageError, match="a worker process was killed"), pool(1) as workers:
        list(workers.map(die, range(1)))


def test_an_interrupt_of_verify_ends_its_workers_at_once() -> None:
    process, workers = verifying()
    time.sleep(1.0)  # into the queries, where z3 would take the signal for itself
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"tdxmig: interrupted\n")
    assert time.monotonic() - began < 10
    assert not any(map(running, workers))


def test_workers_end_with_a_verify_that_is_killed() -> None:
    process, workers = verifying()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    wait_until(lambda: not any(map(running, workers)), seconds=10)
    process.communicate(timeout=10)
