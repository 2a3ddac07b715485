"""Does a channel with a thread of its own keep order, bounds and deadlines, and does it end?"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tdxmig_model.errors import PeerLost, UsageError
from tdxmig_model.transport import (
    Faults,
    QueuedReceiver,
    QueuedSender,
    SocketTransport,
    Transport,
    memory_pair,
)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def pair() -> tuple[SocketTransport, SocketTransport]:
    near, far = socket.socketpair()
    return SocketTransport(near, "far", timeout=2.0), SocketTransport(far, "near", timeout=2.0)


def send_often(sender: QueuedSender, size: int, timeout: float) -> None:
    for _ in range(1000):
        sender.send([bytes(size)], timeout)
        time.sleep(0.002)


def receive(transport: Transport, count: int) -> bytes:
    found = bytearray()
    while len(found) < count:
        found += transport.recv(1 << 16, 5.0)
    return bytes(found)


def test_bytes_arrive_in_order_through_both() -> None:
    near, far = pair()
    sender, receiver = QueuedSender(near), QueuedReceiver(far)
    parts = [bytes([n % 256]) * (1 + 997 * n % 70_000) for n in range(300)]
    received: list[bytes] = []
    total = sum(map(len, parts))
    thread = threading.Thread(target=lambda: received.append(receive(receiver, total)))
    thread.start()
    for part in parts:
        sender.send([part[:3], part[3:]])
    thread.join(20)
    assert received == [b"".join(parts)]
    assert receiver.bytes_received == total
    assert sender.bytes_sent == total
    sender.close()
    receiver.close()


def test_a_buffer_may_be_reused_at_once() -> None:
    near, far = pair()
    sender = QueuedSender(near)
    buffer = bytearray(b"first")
    sender.send([buffer])
    buffer[:] = b"later"
    assert receive(far, 5) == b"first"
    sender.close()
    far.close()


def test_the_queue_is_bounded_and_has_a_deadline() -> None:
    near, far = memory_pair(capacity=10)
    sender = QueuedSender(near, timeout=1.0, limit=100)
    began = time.monotonic()
    with pytest.raises(PeerLost, match="no room"):
        send_often(sender, 50, 0.2)
    assert time.monotonic() - began < 2.0
    far.close()
    sender.close()


def test_a_record_larger_than_the_queue_still_goes() -> None:
    near, far = pair()
    sender = QueuedSender(near, limit=100)
    sender.send([bytes(5000)])
    assert receive(far, 5000) == bytes(5000)
    sender.close()
    far.close()


def test_a_broken_connection_is_told_by_the_next_send() -> None:
    near, far = memory_pair(forward=Faults(cut_at=10))
    sender = QueuedSender(near)
    with pytest.raises(PeerLost, match="broke"):
        send_often(sender, 100, 1.0)
    sender.close()
    far.close()


def test_what_arrived_is_given_out_before_the_end_is_told() -> None:
    near, far = pair()
    receiver = QueuedReceiver(far)
    near.send([b"last words"])
    near.close()
    assert receive(receiver, 10) == b"last words"
    assert receiver.poll(1.0)
    with pytest.raises(PeerLost, match="closed"):
        receiver.recv(1)
    receiver.close()


def test_no_more_is_taken_in_than_there_is_room_for() -> None:
    near, far = memory_pair()
    receiver = QueuedReceiver(far, limit=1000)
    for _ in range(5):
        near.send([bytes(1000)])
        time.sleep(0.02)
    time.sleep(0.1)
    assert far.bytes_received == 1000
    assert receive(receiver, 5000) == bytes(5000)
    receiver.close()
    near.close()


def test_waiting_for_bytes_has_a_deadline() -> None:
    near, far = pair()
    receiver = QueuedReceiver(far)
    assert not receiver.poll(0.0)
    with pytest.raises(PeerLost, match="nothing arrived"):
        receiver.recv(1, 0.1)
    receiver.close()
    near.close()
    with pytest.raises(PeerLost, match="already closed"):
        receiver.poll(0.0)


def test_a_channel_has_one_direction() -> None:
    near, far = pair()
    sender, receiver = QueuedSender(near), QueuedReceiver(far)
    for wrong in (lambda: sender.recv(1), lambda: sender.poll(), lambda: receiver.send([b"x"])):
        with pytest.raises(UsageError):
            wrong()
    sender.close()
    receiver.close()
