"""Do `tdxmig send` and `tdxmig receive`, two processes, hand a TD over and tell who has it?"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_run import WANTED
from test_transport import certificates

from tdxmig_model import replay
from tdxmig_model.certificates import write_certificates
from tdxmig_model.errors import UsageError
from tdxmig_model.supervisor import Meeting, RunOptions, SideRun, receive_td, send_td
from tdxmig_model.transport import Address, connect

assert certificates  # a fixture

SIZES = ("--memory", "4MiB", "--vcpus", "2")


@dataclass
class Ran:
    """How a process ended."""

    code: int
    out: dict[str, Any]
    err: str


class Running:
    """A started command that prints one JSON object."""

    def __init__(self, *arguments: str, file_limit: int | None = None) -> None:
        def limit() -> None:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        self.process = subprocess.Popen(
            [sys.executable, "-m", "tdxmig_model", *arguments, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=limit,
            text=True,
        )

    def end(self) -> Ran:
        out, err = self.process.communicate(timeout=60)
        return Ran(self.process.returncode, json.loads(out or "{}"), err)


def free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError:
        pytest.skip(f"this host has no {host}")


def address(kind: str, tmp_path: Path) -> str:
    if kind == "unix":
        return f"unix:{tmp_path / 's'}"
    if kind == "tcp6":
        return f"tcp:[::1]:{free_port('::1')}"
    return f"tcp:127.0.0.1:{free_port('127.0.0.1')}"


def both(
    where: str, keys: Path, *extra: str, send: tuple[str, ...] = (), receive: tuple[str, ...] = ()
) -> tuple[Ran, Ran]:
    """Source first."""
    common = (where, "--identity", str(keys), *SIZES, *extra)
    receiving = Running("receive", *common, *receive)
    sending = Running("send", *common, *send)
    return sending.end(), receiving.end()


def assert_migrated(sent: Ran, received: Ran) -> None:
    assert (sent.code, sent.err) == (0, ""), sent
    assert (received.code, received.err) == (0, ""), received
    ours, theirs = sent.out, received.out
    assert set(ours) >= WANTED
    assert set(theirs) == set(ours)
    assert (ours["ok"], theirs["ok"]) == (True, True)
    assert (ours["source_state"], ours["destination_state"]) == ("POST_EXPORT", None)
    assert (theirs["source_state"], theirs["destination_state"]) == (None, "RUNNABLE")
    assert (ours["runnable"], theirs["runnable"]) == (False, True)
    assert len(ours["memory_digest"]) == 64
    assert ours["memory_digest"] == theirs["memory_digest"]
    assert ours["vcpu_digests"] == theirs["vcpu_digests"]
    assert len(ours["vcpu_digests"]) == 2
    assert ours["bytes"] == theirs["bytes"] > 1024 * 4096
    assert all(probe["refused_by_module"] for probe in ours["refusals"])
    assert len(ours["refusals"]) == 2
    assert theirs["guest_instructions"] > 0


@pytest.mark.parametrize(
    ("kind", "tls"),
    [("unix", False), ("tcp", False), ("tcp6", False), ("unix", True), ("tcp6", True)],
)
def test_two_processes_migrate_over_a_connection(
    tmp_path: Path, certificates: Path, kind: str, tls: bool
) -> None:
    extra = ("--tls",) if tls else ()
    folders = tmp_path / "a", tmp_path / "b"
    sent, received = both(
        address(kind, tmp_path),
        certificates,
        *extra,
        send=("--trace-dir", str(folders[0])),
        receive=("--trace-dir", str(folders[1])),
    )
    assert_migrated(sent, received)
    assert sent.out["downtime_ms"] > 0
    assert (sent.out["tls"], received.out["tls"]) == (tls, tls)
    traces = [Path(ran.out["trace"]["path"]) for ran in (sent, received)]
    assert replay.judge(*traces).ok, "the merged traces of both processes"


def test_two_processes_migrate_through_a_file_once(tmp_path: Path, certificates: Path) -> None:
    common = (f"file:{tmp_path / 'td'}", "--identity", str(certificates), *SIZES)
    early = Running("receive", *common).end()
    assert early.code == 2
    assert "there is no file" in early.out["error"]
    sent = Running("send", *common).end()
    assert sent.out["ending"] == "stored"
    assert sent.out["downtime_ms"] is None
    again = Running("send", *common).end()
    assert again.code == 2
    assert "not overwritten" in again.out["error"]
    received = Running("receive", *common).end()
    assert_migrated(sent, received)
    twice = Running("receive", *common).end()
    assert twice.code == 2
    assert "would run twice" in twice.out["error"]


def test_without_room_for_the_start_token_it_is_never_made(
    tmp_path: Path, certificates: Path
) -> None:
    """Everything fits on the disk but the last bytes."""
    common = ("--identity", str(certificates), *SIZES, "--guest", "idle")
    whole = Running("send", f"file:{tmp_path / 'whole'}", *common).end()
    size = (tmp_path / "whole").stat().st_size
    assert size == whole.out["bytes"]
    ran = Running("send", f"file:{tmp_path / 'td'}", *common, file_limit=size - 1).end()
    assert (ran.code, ran.err) == (1, "")
    assert (ran.out["ending"], ran.out["source_state"]) == ("aborted", "RUNNABLE")
    assert ran.out["runnable"]
    assert "could not be enlarged (File too large)" in ran.out["cause"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole", "whole.keys"]


# --- who is at the other end ---------------------------------------------------------------------


def test_another_identity_gets_nothing(tmp_path: Path, certificates: Path) -> None:
    other = tmp_path / "other"
    write_certificates(other)
    where = address("unix", tmp_path)
    receiving = Running("receive", where, "--identity", str(certificates), *SIZES, "--wait", "4")
    sent = Running("send", where, "--identity", str(other), *SIZES).end()
    received = receiving.end()
    for ran in (sent, received):
        assert ran.code == 1
        assert not ran.out["ok"]
        assert "certificate" in ran.out["cause"]
        assert "never began" in ran.out["sentence"]
    assert (sent.out["source_state"], sent.out["runnable"]) == ("RUNNABLE", True)
    assert (received.out["destination_state"], received.out["runnable"]) == ("UNINITIALIZED", False)


def test_tls_on_one_side_alone_is_told(tmp_path: Path, certificates: Path) -> None:
    sent, received = both(
        address("unix", tmp_path), certificates, "--peer-timeout", "1.5", send=("--tls",)
    )
    assert (sent.code, received.code) == (1, 1)
    assert "TLS" in sent.out["cause"]
    assert (sent.out["runnable"], received.out["runnable"]) == (True, False)


def test_strangers_do_not_disturb(tmp_path: Path, certificates: Path) -> None:
    where = address("unix", tmp_path)
    common = (where, "--identity", str(certificates), *SIZES)
    receiving = Running("receive", *common)
    connect(where, 20.0, retry=True).close()
    with closing(connect(where)) as rude:
        rude.send([b"GET / HTTP/1.1\r\n\r\n"])
        sent = Running("send", *common).end()
    assert_migrated(sent, receiving.end())


def test_nobody_there(tmp_path: Path, certificates: Path) -> None:
    common = ("--identity", str(certificates), *SIZES, "--wait", "0.3")
    sent = Running("send", f"unix:{tmp_path / 'absent'}", *common).end()
    assert sent.code == 2
    assert "start the destination first" in sent.out["error"]
    received = Running("receive", f"unix:{tmp_path / 'lonely'}", *common).end()
    assert received.code == 1
    assert "no source came within 0.3 s" in received.out["cause"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("udp:host:1",),
        ("tcp:::1:80",),
        ("file:td", "--tls"),
        ("unix:s", "--tls-dir", "absent"),
        ("unix:s", "--identity", "absent"),
    ],
)
@pytest.mark.parametrize("command", ["send", "receive"])
def test_wrong_arguments_are_one_line(
    tmp_path: Path, certificates: Path, command: str, arguments: tuple[str, ...]
) -> None:
    identity = () if "--identity" in arguments else ("--identity", str(certificates))
    ran = Running(command, *arguments, *identity, *SIZES).end()
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1
    assert "Traceback" not in ran.err
    assert ran.out["ok"] is False


def test_tds_of_different_sizes_do_not_fit(tmp_path: Path, certificates: Path) -> None:
    sent, received = both(address("unix", tmp_path), certificates, receive=("--vcpus", "1"))
    assert (sent.code, received.code) == (1, 1)
    assert "vCPUs" in received.out["cause"]
    assert (sent.out["runnable"], received.out["runnable"]) == (True, False)


# --- stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["source:finish_epochs", "destination:end"])
def test_a_stop_leaves_the_source_as_owner(tmp_path: Path, certificates: Path, event: str) -> None:
    sent, received = both(address("unix", tmp_path), certificates, "--abort-at", event)
    asked, other = (sent, received) if event.startswith("source") else (received, sent)
    assert asked.code == 0
    assert event in asked.out["cause"]
    assert other.code == 1
    assert (sent.out["source_state"], sent.out["runnable"]) == ("RUNNABLE", True)
    assert received.out["destination_state"] == "FAILED_IMPORT"
    assert sent.out["abort_token_used"] is (event == "destination:end")


def wait_until(seen: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_side_that_is_told_to_end_or_killed(
    tmp_path: Path, certificates: Path, side: str, number: signal.Signals
) -> None:
    folder = tmp_path / "traces"
    common = (
        *(address("unix", tmp_path), "--identity", str(certificates), "--memory", "32MiB"),
        *("--peer-timeout", "2"),
    )
    receiving = Running("receive", *common)
    sending = Running("send", *common, "--trace-dir", str(folder))
    trace = folder / "source.ndjson"
    wait_until(lambda: trace.exists() and trace.stat().st_size > 4096)
    hit, other = (sending, receiving) if side == "send" else (receiving, sending)
    os.kill(hit.process.pid, number)
    ended, left = hit.end(), other.end()
    assert left.code == 1
    assert left.out["cause"]
    assert left.out["runnable"] is (side == "receive")
    if number is signal.SIGKILL:
        assert ended.code == -signal.SIGKILL
        return
    assert (ended.code, ended.err) == (130, "")
    assert ended.out["interrupted"]
    assert "SIGTERM" in ended.out["cause"]
    assert ended.out["runnable"] is (side == "send")


@pytest.mark.parametrize("side", [send_td, receive_td])
@pytest.mark.parametrize(
    ("options", "says"), [({"streams": 2}, "2 streams"), ({"post_copy": True}, "post-copy")]
)
def test_what_only_a_supervised_run_has_is_refused(
    side: Callable[..., SideRun], options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    where = Meeting(address=Address.parse(f"unix:{tmp_path / 's'}"), identity=tmp_path, wait=1.0)
    with pytest.raises(UsageError, match=says):
        side(RunOptions(memory=4096, **options), where)
