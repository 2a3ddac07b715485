"""After the start token: is every valid abort token used, and does nothing keep a side waiting?"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_session import OPTIONS, SESSION, VCPUS, Migration, migrate

from tdxmig_model.backend.soft.backend import soft_destination, soft_source
from tdxmig_model.session import (
    DECISION_TIMEOUTS,
    DestinationSession,
    Ending,
    Hooks,
    SessionOptions,
    Side,
    SourceSession,
)
from tdxmig_model.trace import TraceWriter
from tdxmig_model.transport import Faults, SocketTransport
from tdxmig_model.wire.extensions import (
    Capability,
    Failed,
    Hello,
    InOrderDone,
    MessageType,
    SessionStarted,
    encode_forward,
    encode_return,
)

SHORT = replace(OPTIONS, peer_timeout=0.3)
TOKEN_MARK = MessageType.ABORT_TOKEN.to_bytes(2, "big")


class Scripted:
    """A transport whose sent records are replaced by what `script` makes of them."""

    def __init__(self, inner: Any, script: Callable[[bytes], Sequence[bytes]]) -> None:
        self.inner, self.script = inner, script

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def send(self, buffers: Sequence[Any], timeout: float | None = None) -> None:
        for record in self.script(b"".join(bytes(part) for part in buffers)):
            self.inner.send([record], timeout)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes of the forward stream of `migrate`."""
    return migrate(tmp_path_factory.mktemp("whole")).source.outcome.bytes


def assert_taken_back(done: Migration) -> None:
    assert done.states == ("RUNNABLE", "FAILED_IMPORT")
    assert "abort_with_token" in done.source.outcome.events
    assert done.source.outcome.ending is Ending.ABORTED
    assert done.source.run_guest(10) == 10 * VCPUS
    done.assert_accepted()


@pytest.mark.parametrize("missing", [4, 20, 40])
def test_the_source_outlasts_a_destination_that_waits_as_long(
    tmp_path: Path, whole: int, missing: int
) -> None:
    """The start token is lost on the way and nobody notices before a timeout passed."""
    assert_taken_back(migrate(tmp_path, forward=Faults(truncate_at=whole - missing), options=SHORT))


def test_the_start_token_stays_until_the_destination_has_everything_else(
    tmp_path: Path, whole: int
) -> None:
    """The last vCPU state is lost on the way: the TD was never given away."""
    done = migrate(tmp_path, forward=Faults(truncate_at=whole - 4000), options=SHORT)
    assert done.states == ("RUNNABLE", "FAILED_IMPORT")
    assert "finish_epochs" not in done.source.outcome.events
    assert "sent no IN_ORDER_DONE" in done.source.outcome.cause or done.source.outcome.heard_of


def test_an_early_or_repeated_in_order_done_ends_the_session(tmp_path: Path) -> None:
    def early(record: bytes) -> Sequence[bytes]:
        started = record.startswith(MessageType.SESSION_STARTED.to_bytes(2, "big"))
        return [record, encode_return(InOrderDone())] if started else [record]

    def prepare(source: SourceSession, destination: DestinationSession) -> None:
        destination.transport = Scripted(destination.transport, early)

    done = migrate(tmp_path, prepare=prepare, options=SHORT)
    assert done.states == ("RUNNABLE", "FAILED_IMPORT")
    assert "the destination sent IN_ORDER_DONE after it had started" in done.source.outcome.cause


def test_a_destination_without_in_order_done_is_migrated_to(tmp_path: Path) -> None:
    def prepare(source: SourceSession, destination: DestinationSession) -> None:
        ours = destination.engine._ours
        fewer = ours.capabilities & ~Capability.IN_ORDER_DONE
        destination.engine._ours = replace(ours, capabilities=fewer)

    done = migrate(tmp_path, prepare=prepare)
    assert done.states == ("POST_EXPORT", "RUNNABLE")
    assert not done.source.engine.in_order_done


def test_a_genuine_token_after_a_forged_one_is_used(tmp_path: Path) -> None:
    def forge_first(record: bytes) -> Sequence[bytes]:
        if not record.startswith(TOKEN_MARK):
            return [record]
        return [record[:-1] + bytes([record[-1] ^ 1]), record]

    def prepare(source: SourceSession, destination: DestinationSession) -> None:
        destination.transport = Scripted(destination.transport, forge_first)

    done = migrate(tmp_path, stop=("destination", "end"), prepare=prepare, options=SHORT)
    assert_taken_back(done)


def test_a_token_that_comes_another_way_is_used(tmp_path: Path, whole: int) -> None:
    class Relaying(Hooks):
        def __init__(self, destination: Side) -> None:
            self.destination = destination
            self.given = False

        def relays(self) -> bool:
            return not self.given

        def relayed_abort_token(self) -> bytes | None:
            token = None if self.given else self.destination.outcome.abort_token
            self.given = token is not None or self.given
            return token

    def prepare(source: SourceSession, destination: DestinationSession) -> None:
        source.hooks = Relaying(destination)

    done = migrate(tmp_path, forward=Faults(cut_at=whole - 20), prepare=prepare)
    assert_taken_back(done)


def test_a_destination_that_only_complains_does_not_keep_the_source(tmp_path: Path) -> None:
    class Talking(Hooks):
        """Says FAILED whenever the source looks, and never what became of the TD."""

        def __init__(self, source: SourceSession) -> None:
            self.source = source
            self.said = 0

        def relayed_abort_token(self) -> bytes | None:
            self.source._messages.append(Failed("no"))
            self.said += 1
            return None

    def swallow(record: bytes) -> Sequence[bytes]:
        final = (MessageType.COMMITTED, MessageType.FAILED)
        return [] if record.startswith(tuple(m.to_bytes(2, "big") for m in final)) else [record]

    def prepare(source: SourceSession, destination: DestinationSession) -> None:
        source.hooks = Talking(source)
        destination.transport = Scripted(destination.transport, swallow)

    began = time.monotonic()
    done = migrate(tmp_path, prepare=prepare, options=SHORT)
    assert done.states == ("POST_EXPORT", "RUNNABLE")
    assert done.source.outcome.ending is Ending.UNDECIDED
    assert time.monotonic() - began < DECISION_TIMEOUTS * SHORT.peer_timeout + 3.5  # and lingers


# --- peers that are slow on purpose --------------------------------------------------------------


def alone(
    path: Path, build: Callable[..., Side], timeout: float
) -> tuple[Side, socket.socket, threading.Thread]:
    """One side at a socket, running in a thread; the socket's other end."""
    here, there = socket.socketpair()
    trace = TraceWriter(path / "alone.ndjson", build.__name__.removesuffix("_side"), SESSION)
    options = SessionOptions(peer_timeout=timeout)
    side = build(SocketTransport(here, "the peer"), trace, options)
    thread = threading.Thread(target=side.run, daemon=True)
    thread.start()
    return side, there, thread


def destination_side(transport: Any, trace: TraceWriter, options: SessionOptions) -> Side:
    backend = soft_destination(8, vcpus=1)
    return DestinationSession(backend, transport, trace, pages=8, vcpus=1, options=options)


def source_side(transport: Any, trace: TraceWriter, options: SessionOptions) -> Side:
    backend = soft_source(4096, vcpus=1)
    backend.read_migration_encryption_key()
    backend.write_migration_decryption_key(bytes(range(1, 33)))
    gpas = backend.page_gpas()
    return SourceSession(
        backend, transport, trace, gpas=gpas, vcpus=1, session_id=SESSION, options=options
    )


def test_single_bytes_do_not_keep_a_destination_waiting(tmp_path: Path) -> None:
    side, peer, thread = alone(tmp_path, destination_side, 0.4)
    peer.sendall(encode_forward(Hello(SESSION, Capability(31), 8, 1, 1)) + b"\x09")
    end = time.monotonic() + 5
    while thread.is_alive() and time.monotonic() < end:
        try:
            peer.send(b"0")
        except OSError:
            break
        if "did not complete the record" in side.outcome.cause:
            break
        time.sleep(0.1)
    assert "did not complete the record at byte 45 within 0.4 s" in side.outcome.cause
    peer.close()
    thread.join(5)
    assert not thread.is_alive()


def test_a_peer_that_stops_reading_costs_one_timeout(tmp_path: Path) -> None:
    side, peer, thread = alone(tmp_path, source_side, 0.8)
    peer.sendall(encode_return(Hello(SESSION, Capability(31), 4096, 1, 1)))
    peer.sendall(encode_return(SessionStarted()))
    while not peer.recv(1, socket.MSG_PEEK):
        time.sleep(0.01)
    began = time.monotonic()
    thread.join(10)
    assert time.monotonic() - began < 1.5
    assert side.outcome.runnable
    assert "no room to send" in side.outcome.cause
    peer.close()


def test_nothing_is_sent_into_a_record_that_was_not_sent_whole(tmp_path: Path) -> None:
    sent: list[int] = []

    def prepare(source: SourceSession, destination: DestinationSession) -> None:
        inner = source.transport

        def counted(record: bytes) -> Sequence[bytes]:
            sent.append(source.transport.bytes_sent)
            if len(sent) == 4:
                inner.close()  # every later attempt to send raises PeerLost
            return [record]

        source.transport = Scripted(inner, counted)

    done = migrate(tmp_path, prepare=prepare, options=SHORT)
    assert done.runnable == (True, False)
    assert len(sent) == 4
