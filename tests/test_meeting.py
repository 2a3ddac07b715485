"""Do both sides find each other before the session, whoever else connects or keeps silent?"""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tdxmig_model.backend.soft.backend import soft_destination, soft_source
from tdxmig_model.errors import PeerError, PeerLost
from tdxmig_model.premigration import make_identity
from tdxmig_model.supervisor.child import Addresses, Built, Link, PeerEnded, Place, Stop
from tdxmig_model.supervisor.options import RunOptions
from tdxmig_model.supervisor.programs import _accept_source, _connect_plain, _premigrate
from tdxmig_model.transport import connect
from tdxmig_model.wire.extensions import Capability, Hello, encode_forward

OPTIONS = RunOptions(memory=1 << 20, vcpus=1, transport="tcp", peer_timeout=1.0)


class Supervisor:
    """The other end of a link: `said` is what the child told, `tell` tells it something."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.send, self.recv, self.tell = self.said.put, self.told.get, self.told.put


class Waiting:
    """A destination that waits for its source in a thread."""

    def __init__(self, work: Path, options: RunOptions = OPTIONS) -> None:
        ours, theirs = make_identity("source"), make_identity("destination")
        self.place = Place(work, work, ours, theirs.certificate)
        self.supervisor = Supervisor()
        self.link = Link(self.supervisor)  # type: ignore[arg-type]
        self.found: Any = None
        place = Place(work, work, theirs, ours.certificate)
        backend = soft_destination(options.pages, vcpus=1)

        def wait() -> None:
            try:
                self.found = _accept_source(self.link, options, place, backend)
            except PeerError as error:
                self.found = error

        self.thread = threading.Thread(target=wait, daemon=True)
        self.thread.start()
        self.addresses: Addresses = self.supervisor.said.get(timeout=10)

    def source(self, identity: Place | None = None) -> bytes:
        """What a source does until it is connected; the session id."""
        link = Link(Supervisor())  # type: ignore[arg-type]
        backend = soft_source(OPTIONS.pages, vcpus=1)
        with closing(_connect_plain(self.addresses.premigration, 5.0)) as plain:
            return _premigrate("source", plain, identity or self.place, backend, link, 5.0)

    def ended(self, seconds: float) -> Any:
        self.thread.join(seconds)
        assert not self.thread.is_alive()
        return self.found


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.0\r\n\r\n" * 20], ids=["silent", "noisy"])
def test_somebody_else_who_connects_first_does_not_end_the_run(
    tmp_path: Path, words: bytes
) -> None:
    waiting = Waiting(tmp_path)
    assert not isinstance(waiting.addresses.premigration, str)
    port = int(waiting.addresses.migration.rpartition(":")[2])
    others = [
        socket.create_connection(address)
        for address in (waiting.addresses.premigration, ("127.0.0.1", port))
    ]
    for other in others:
        other.sendall(words)
    session_id = waiting.source()
    stream = connect(waiting.addresses.migration, 5.0)
    stream.send([encode_forward(Hello(session_id, Capability(31), 8, 1, 1))])
    found, transport, more = waiting.ended(5)
    assert (found, more) == (session_id, [])
    assert session_id in transport.recv(100)
    for one in (*others, stream, transport):
        one.close()


def test_a_stop_is_heard_while_somebody_keeps_silent(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path, RunOptions(memory=1 << 20, transport="tcp", peer_timeout=60.0))
    assert not isinstance(waiting.addresses.premigration, str)
    with socket.create_connection(waiting.addresses.premigration):
        time.sleep(0.2)
        waiting.supervisor.tell(Stop("enough"))
        assert "enough" in str(waiting.ended(3))


def test_a_source_that_is_built_has_one_timeout_to_connect(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    time.sleep(1.5)
    assert waiting.thread.is_alive(), "before that its TD may take long to build"
    waiting.supervisor.tell(Built())
    assert "did not connect within 1 s" in str(waiting.ended(5))


def test_the_reason_of_the_genuine_source_is_told(tmp_path: Path) -> None:
    waiting = Waiting(tmp_path)
    stranger = make_identity("stranger")
    place = Place(tmp_path, tmp_path, stranger, waiting.place.peer_certificate)
    with pytest.raises(PeerError):
        waiting.source(place)
    waiting.supervisor.tell(PeerEnded(None))
    found = waiting.ended(5)
    assert isinstance(found, PeerError)
    assert not isinstance(found, PeerLost)
    assert "certificate" in str(found)


def test_limits_grow_with_memory() -> None:
    assert RunOptions(memory=4 << 30).build_seconds > 300
    assert RunOptions().build_seconds < 60
