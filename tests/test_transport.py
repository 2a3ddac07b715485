"""Do transports deliver every byte, keep deadlines, notice a lost peer, never block each other?"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from tdxmig_model.certificates import write_certificates
from tdxmig_model.errors import PeerLost, UsageError
from tdxmig_model.transport import (
    Address,
    Faults,
    Listener,
    SocketTransport,
    Span,
    TlsFiles,
    TlsTransport,
    Transport,
    connect,
    memory_pair,
    secure,
)
from tdxmig_model.transport.socket import KEEP_ALIVE_SECONDS, MAX_BUFFERS

TLS_KINDS = ["tls", "tls-tcp6"]
SOCKET_KINDS = ["unix", "tcp", "tcp6", *TLS_KINDS]
BOUNDED_KINDS = ["memory-bounded", *SOCKET_KINDS]
KINDS = ["memory", *BOUNDED_KINDS]

Pair: TypeAlias = Callable[[str], AbstractContextManager[tuple[Transport, Transport]]]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    write_certificates(directory)
    return directory


@pytest.fixture
def pair(tmp_path: Path, certificates: Path) -> Pair:
    @contextmanager
    def connected(kind: str) -> Iterator[tuple[Transport, Transport]]:
        ends: tuple[Transport, Transport]
        if kind.startswith("memory"):
            ends = memory_pair(capacity=70_000 if kind == "memory-bounded" else None)
        else:
            ends = sockets(kind, tmp_path)
        if kind in TLS_KINDS:
            ends = with_tls(*ends, certificates)  # type: ignore[arg-type]
        try:
            yield ends
        finally:
            for end in ends:
                end.close()

    return connected


def sockets(kind: str, tmp_path: Path) -> tuple[SocketTransport, SocketTransport]:
    address = f"unix:{tmp_path / 'stream'}"
    if kind != "unix":
        address = "tcp:[::1]:0" if kind.endswith("6") else "tcp:127.0.0.1:0"
    try:
        listener = Listener(address)
    except UsageError:
        if kind.endswith("6"):
            pytest.skip("this host has no IPv6 loopback")
        raise
    with listener:
        near = connect(listener.address, 5.0)
        return near, listener.accept(5.0)


def with_tls(
    near: SocketTransport, far: SocketTransport, certificates: Path, name: str = "localhost"
) -> tuple[TlsTransport, TlsTransport]:
    """The near end is the client; both shake hands at once."""
    ours = TlsFiles.in_directory(certificates, "client")
    theirs = TlsFiles.in_directory(certificates, "server")
    with ThreadPoolExecutor() as pool:
        server = pool.submit(secure, far, theirs, server=True, timeout=5.0)
        client = secure(near, ours, server=False, peer_name=name, timeout=5.0)
        return client, server.result()


def receive_exactly(transport: Transport, count: int) -> bytes:
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        done += transport.recv_into(view[done:], 10.0)
    return bytes(data)


def send_much(transport: Transport) -> None:
    for _ in range(50):
        transport.send([bytes(1 << 20)], 5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_arrives_in_order_from_many_buffers(kind: str, pair: Pair) -> None:
    dice = random.Random(1)
    buffers = [dice.randbytes(dice.choice([0, 1, 8, 16, 48, 4096])) for _ in range(3 * MAX_BUFFERS)]
    whole = b"".join(buffers)
    with pair(kind) as (near, far):
        sender = threading.Thread(target=near.send, args=(buffers, 10.0))
        sender.start()
        assert receive_exactly(far, len(whole)) == whole
        sender.join()
        assert near.bytes_sent == far.bytes_received == len(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_memoryviews_of_wider_items_are_sent_as_bytes(kind: str, pair: Pair) -> None:
    column = np.arange(512, dtype="<u8")
    with pair(kind) as (near, far):
        near.send([column.data, bytearray(b"end")], 5.0)
        assert receive_exactly(far, 4099) == column.tobytes() + b"end"


@pytest.mark.parametrize("kind", BOUNDED_KINDS)
def test_both_sides_sending_at_once_do_not_wait_for_each_other(kind: str, pair: Pair) -> None:
    size = 24 << 20  # far more than all socket buffers together
    there, back = random.Random(2).randbytes(size), random.Random(3).randbytes(size)
    problems: list[BaseException] = []

    with pair(kind) as (near, far):

        def other_side() -> None:
            try:
                far.send([back], 20.0)
                assert receive_exactly(far, size) == there
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=other_side)
        thread.start()
        near.send([there], 20.0)
        assert receive_exactly(near, size) == back
        thread.join()
    assert not problems


@pytest.mark.parametrize("kind", KINDS)
def test_poll_tells_whether_there_is_something_to_receive(kind: str, pair: Pair) -> None:
    with pair(kind) as (near, far):
        assert not far.poll()
        assert not far.poll(0.01)
        near.send([b"x"], 5.0)
        assert far.poll(5.0)
        assert far.recv(10, 1.0) == b"x"
        assert not far.poll()
        near.close()
        assert far.poll(5.0)  # the end of the stream is something to notice too


@pytest.mark.parametrize("kind", KINDS)
def test_what_arrived_before_the_peer_left_is_still_received(kind: str, pair: Pair) -> None:
    with pair(kind) as (near, far):
        near.send([b"last words"], 5.0)
        near.close()
        assert receive_exactly(far, 10) == b"last words"
        with pytest.raises(PeerLost, match=r"closed .*10 received"):
            far.recv(1, 5.0)
        with pytest.raises(PeerLost, match="closed"):
            far.recv_into(bytearray(1), 5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_sending_to_a_peer_that_left_fails(kind: str, pair: Pair) -> None:
    with pair(kind) as (near, far):
        far.close()
        with pytest.raises(PeerLost, match="bytes sent"):
            send_much(near)


@pytest.mark.parametrize("kind", SOCKET_KINDS)
def test_the_last_words_of_a_peer_that_left_survive_a_failed_send(kind: str, pair: Pair) -> None:
    with pair(kind) as (near, far):
        far.send([b"why I left"], 5.0)
        assert near.poll(5.0)
        far.close()
        with pytest.raises(PeerLost):
            send_much(near)
        assert receive_exactly(near, 10) == b"why I left"


@pytest.mark.parametrize("kind", KINDS)
def test_waiting_for_a_silent_peer_ends_at_the_deadline(kind: str, pair: Pair) -> None:
    with pair(kind) as (near, _far), pytest.raises(PeerLost, match="deadline"):
        near.recv(1, 0.02)


@pytest.mark.parametrize("kind", BOUNDED_KINDS)
def test_sending_to_a_peer_that_does_not_read_ends_at_the_deadline(kind: str, pair: Pair) -> None:
    with pair(kind) as (near, _far), pytest.raises(PeerLost, match="no room"):
        near.send([bytes(1 << 20)] * 64, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_end_refuses_and_closes_again_quietly(kind: str, pair: Pair) -> None:
    with pair(kind) as (near, _far):
        near.close()
        near.close()
        for use in (lambda: near.send([b"x"]), lambda: near.recv(1), lambda: near.poll()):
            with pytest.raises(PeerLost, match="already closed"):
                use()


def test_a_cut_breaks_both_directions_after_the_bytes_before_it() -> None:
    near, far = memory_pair(forward=Faults(cut_at=5))
    near.send([b"abc", b"defgh"])
    assert far.recv(100, 0.0) == b"abcde"
    for broken in (near, far):
        with pytest.raises(PeerLost, match="broke"):
            broken.recv(1, 0.0)
        with pytest.raises(PeerLost, match="broke"):
            broken.send([b"x"])


def test_a_flip_changes_one_byte_wherever_the_buffers_begin() -> None:
    for at in range(6):
        near, far = memory_pair(forward=Faults(flip_at=at, flip_mask=0x80))
        near.send([b"abc"])
        near.send([b"def"])
        expected = bytearray(b"abcdef")
        expected[at] ^= 0x80
        assert far.recv(100, 0.0) == expected


def test_a_truncation_ends_the_stream_and_the_sender_does_not_notice() -> None:
    near, far = memory_pair(forward=Faults(truncate_at=4))
    near.send([b"abc", b"def", b"ghi"])
    near.send([b"jkl"])
    assert near.bytes_sent == 12
    assert far.recv(100, 0.0) == b"abcd"
    with pytest.raises(PeerLost, match="closed"):
        far.recv(1, 0.0)


@pytest.mark.parametrize(
    ("faults", "arrives"),
    [
        (Faults(lost=Span(2, 3)), b"abfghij"),
        (Faults(repeated=Span(2, 3)), b"abcdecdefghij"),
        (Faults(late=Span(2, 3)), b"abfghcdeij"),
        (Faults(late=Span(8, 2)), b"abcdefgh"),  # nothing follows, so they never arrive
        (Faults(lost=Span(0, 10)), b""),
        (Faults(repeated=Span(1, 1), cut_at=3), b"abbc"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 10])
def test_bytes_are_lost_repeated_or_late_wherever_the_buffers_begin(
    faults: Faults, arrives: bytes, size: int
) -> None:
    near, far = memory_pair(forward=faults)
    data = b"abcdefghij"
    for at in range(0, len(data), size):
        with contextlib.suppress(PeerLost):
            near.send([data[at : at + size]])
    near.close()
    received = b""
    with contextlib.suppress(PeerLost):
        while True:
            received += far.recv(100, 0.0)
    assert received == arrives


def test_drawn_faults_repeat_with_the_seed_and_cover_every_kind() -> None:
    drawn = [Faults.drawn(random.Random(seed), 1000) for seed in range(50)]
    assert drawn == [Faults.drawn(random.Random(seed), 1000) for seed in range(50)]
    assert any(fault.cut_at is not None for fault in drawn)
    assert any(fault.flip_at is not None for fault in drawn)
    assert any(fault.truncate_at is not None for fault in drawn)
    assert any(fault.lost is not None for fault in drawn)
    assert any(fault.repeated is not None for fault in drawn)
    assert any(fault.late is not None for fault in drawn)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp:example.org:9000", Address("tcp", host="example.org", port=9000)),
        ("tcp:[fe80::1]:0", Address("tcp", host="fe80::1", port=0)),
        ("unix:/run/td 1", Address("unix", path="/run/td 1")),
        ("file:td:1", Address("file", path="td:1")),
    ],
)
def test_addresses_are_read_and_written_back(text: str, address: Address) -> None:
    assert Address.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "unix:",
            "file:",
            "file:a\0b",
            "unix:a\0b",
            "tcp:9000",
            "tcp::1",
            "tcp:::1:80",
            "tcp:h:65536",
        ),
        *("tcp:h:-1", "tcp:h:", "tcp:h:８０", "udp:h:1", "host:80"),
    ],
)
def test_unusable_addresses_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="address"):
        Address.parse(text)


def test_nobody_listening_is_the_callers_problem(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot connect"):
        connect(f"unix:{tmp_path / 'absent'}", 1.0)
    with pytest.raises(UsageError, match="cannot connect"):
        connect("tcp:" + "a" * 70 + ":1", 1.0)
    with Listener("tcp:127.0.0.1:0") as listener:
        address = listener.address
    with pytest.raises(UsageError, match="cannot connect"):
        connect(address, 1.0)


def test_connect_can_wait_for_a_listener_that_comes_later(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'late'}"
    connected: list[SocketTransport] = []
    thread = threading.Thread(target=lambda: connected.append(connect(address, 5.0, retry=True)))
    thread.start()
    thread.join(0.1)
    assert not connected
    with Listener(address) as listener:
        listener.accept(5.0).close()
        thread.join()
    connected[0].close()


def test_accept_ends_at_the_deadline(tmp_path: Path) -> None:
    with (
        Listener(f"unix:{tmp_path / 'lonely'}") as listener,
        pytest.raises(PeerLost, match="nobody connected"),
    ):
        listener.accept(0.02)


def test_a_unix_path_is_private_and_goes_away_with_the_listener(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    with Listener(f"unix:{path}"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not path.exists()


def test_a_stale_unix_socket_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(stale))
    Listener(f"unix:{stale}").close()

    with Listener(f"unix:{tmp_path / 'live'}"), pytest.raises(UsageError, match="cannot listen"):
        Listener(f"unix:{tmp_path / 'live'}")

    precious = tmp_path / "file"
    precious.write_text("precious")
    with pytest.raises(UsageError, match="cannot listen"):
        Listener(f"unix:{precious}")
    assert precious.read_text() == "precious"


def test_a_file_is_no_place_to_connect_to() -> None:
    with pytest.raises(UsageError, match="is a file"):
        connect("file:td", 1.0)
    with pytest.raises(UsageError, match="is a file"):
        Listener("file:td")


@pytest.mark.parametrize("kind", ["tcp", "tcp6", "tls"])
def test_the_kernel_asks_whether_a_silent_host_is_still_there(kind: str, pair: Pair) -> None:
    with pair(kind) as ends:
        for end in ends:
            with socket.socket(fileno=os.dup(end.fileno())) as connection:  # type: ignore[attr-defined]
                assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                idle = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                assert idle == KEEP_ALIVE_SECONDS
