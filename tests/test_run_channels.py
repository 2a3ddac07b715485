"""Does `tdxmig run` really use several connections, and does it keep to the limits it is given?"""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from iv_record import CHILDREN

from tdxmig_model.cli import main
from tdxmig_model.errors import PeerLost, UsageError
from tdxmig_model.supervisor import At, Injected, RunOptions, RunResult, run_migration
from tdxmig_model.supervisor.channels import accept_channels, connect_channels
from tdxmig_model.trace import read_trace
from tdxmig_model.transport import Faults, Listener, connect
from tdxmig_model.wire.extensions import (
    Capability,
    ChannelOpen,
    Hello,
    encode_channel,
    encode_forward,
)

MEMORY = 4 << 20
SESSION = bytes(range(16))
HELLO = encode_forward(Hello(SESSION, Capability(0), 1, 1, 3))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert multiprocessing.active_children() == []
    assert threading.active_count() == before


def run(**options: object) -> RunResult:
    return run_migration(RunOptions(memory=MEMORY, peer_timeout=2.0, **options))  # type: ignore[arg-type]


def streams_used(trace: Path, step: str) -> Counter[int]:
    return Counter(
        record.message.stream
        for record in read_trace(trace)
        if record.step == step and record.message is not None
    )


# --- several connections -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "streams"), [("unix", 2), ("unix", 5), ("tcp", 3), ("tls", 3)])
def test_a_td_migrates_over_as_many_connections(kind: str, streams: int, tmp_path: Path) -> None:
    result = run(streams=streams, transport=kind, batch=64, trace_dir=tmp_path)
    assert result.ok, result
    assert (result.streams, result.memory_equal, result.vcpus_equal) == (streams, True, True)
    for name, step in (("source", "export_mem"), ("destination", "import_mem")):
        used = streams_used(tmp_path / f"{name}.ndjson", step)
        assert set(used) == set(range(streams))
        assert max(used.values()) - min(used.values()) <= 1


def test_workers_encrypt_and_decrypt_what_the_streams_carry() -> None:
    result = run(streams=2, workers=2, batch=256)
    assert result.ok, result
    assert result.workers == 2


@pytest.mark.parametrize(
    ("event", "destination_state"),
    [("source:export_memory", "FAILED_IMPORT"), ("destination:end", "FAILED_IMPORT")],
)
def test_a_stop_with_several_connections(event: str, destination_state: str) -> None:
    result = run(streams=3, stop_at=At.parse(event))
    assert result.ok, result
    assert (result.source_state, result.destination_state) == ("RUNNABLE", destination_state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_side_with_several_connections(workers: int) -> None:
    CHILDREN.lost = 1
    result = run(
        streams=2, workers=workers, injected=Injected(kill=At.parse("destination:import_memory"))
    )
    assert (result.ending, result.source_state) == ("aborted", "RUNNABLE")
    assert "SIGKILL" in result.cause
    assert result.trace["accepted"], result.trace


def test_a_damaged_first_connection_ends_all() -> None:
    result = run(streams=2, batch=32, injected=Injected(stream=Faults(cut_at=500_000)))
    assert (result.source_state, result.destination_state) == ("RUNNABLE", "FAILED_IMPORT")
    assert "broke" in result.cause


# --- who may connect -----------------------------------------------------------------------------


def accept(listener: Listener, count: int, patience: float = 5.0) -> list[bytes]:
    """What comes on each channel after its opening, in the order of the channels."""
    first, others = accept_channels(
        listener, count, SESSION, patience=patience, timeout=2.0, check=lambda: None
    )
    received = [channel.recv(100, 2.0) for channel in (first, *others)]
    for channel in (first, *others):
        channel.close()
    return received


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    with Listener(f"unix:{tmp_path / 's'}") as found:
        yield found


def test_channels_are_told_apart_by_what_they_say(listener: Listener) -> None:
    """Connections come in any order, and strangers in between."""
    address = listener.address
    for opening in (
        encode_channel(ChannelOpen(2, SESSION)) + b"two",
        encode_channel(ChannelOpen(1, bytes(16))) + b"another session",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(40),
        encode_channel(ChannelOpen(1, SESSION)) + b"one",
        encode_channel(ChannelOpen(1, SESSION)) + b"one again" + bytes(40),
        encode_channel(ChannelOpen(7, SESSION)) + b"too many",
        HELLO,
    ):
        transport = connect(address)
        transport.send([opening])
        KEPT.append(transport)
    assert accept(listener, 3) == [HELLO, b"one", b"two"]
    while KEPT:
        KEPT.pop().close()


KEPT: list[object] = []


def test_a_channel_that_never_comes_is_missed(listener: Listener) -> None:
    transport = connect(listener.address)
    transport.send([HELLO])
    began = time.monotonic()
    with pytest.raises(PeerLost, match="did not begin"):
        accept(listener, 2, patience=0.3)
    assert time.monotonic() - began < 2.0
    transport.close()


def test_the_source_closes_what_it_opened_if_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot connect"):
        connect_channels(f"unix:{tmp_path / 'nobody'}", 2, SESSION, 1.0)


# --- limits and post-copy ------------------------------------------------------------------------


def test_each_iteration_is_in_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "run --memory 4MiB --guest random-writer --max-epochs 2 --batch 64 --json"
    assert main(arguments.split()) == 0
    result = json.loads(capsys.readouterr().out)
    iterations = result["iterations"]
    assert [one["epoch"] for one in iterations] == [1, 2, 3]
    assert [one["live"] for one in iterations] == [True, True, False]
    assert iterations[0]["pages_sent"] == 1024
    assert iterations[0]["pages_left"] == iterations[1]["pages_sent"] > 0
    assert all(one["ms"] > 0 and one["throughput_mib_s"] > 0 for one in iterations)
    assert sum(one["pages_sent"] for one in iterations) == result["pages_sent"]


def test_a_long_downtime_limit_needs_one_epoch() -> None:
    assert run(guest="random-writer", downtime_limit=1e6).epochs == 2


def test_a_td_that_does_not_converge_stays() -> None:
    result = run(guest="random-writer", max_epochs=1, not_converging="abort")
    assert (result.ok, result.ending) == (False, "aborted")
    assert "did not converge" in result.cause
    assert (result.source_runnable, result.destination_runnable) == (True, False)


@pytest.mark.parametrize("streams", [1, 3])
def test_post_copy_ends_with_equal_memory(streams: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        f"run --memory 4MiB --guest random-writer --post-copy --batch 16 --streams {streams}"
    )
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "after the start" in printed
    assert "The destination runs the TD" in printed


def test_all_memory_may_follow_the_start_token() -> None:
    result = run(
        guest="random-writer", max_epochs=0, not_converging="post-copy", batch=4, streams=2
    )
    assert result.ok, result
    assert result.pages_after_start == result.pages == 1024
    assert result.pages_requested > 0
    assert (result.memory_equal, result.vcpus_equal) == (True, True)


@pytest.mark.parametrize(
    "options",
    [
        {"streams": 0},
        {"streams": 512},
        {"workers": -1},
        {"workers": 17},
        {"max_epochs": -1},
        {"max_epochs": 0},
        {"max_epochs": 1.5},
        {"downtime_limit": 0},
        {"bandwidth_limit": float("inf")},
        {"bandwidth_limit": "much"},
        {"not_converging": "hope"},
        {"not_converging": "abort", "post_copy": True},
        {"transport": "file", "streams": 2},
        {"transport": "file", "post_copy": True},
        {"transport": "file", "not_converging": "post-copy"},
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        RunOptions(**options)  # type: ignore[arg-type]
