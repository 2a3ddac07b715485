"""A channel that is served by a thread of its own, in one direction.

Whoever works on several channels hands the bytes of one over and goes on with the next: the
operating system copies them while others are encrypted or decrypted.  Both classes are transports,
so that nobody who uses a channel has to know whether a thread serves it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Final

from tdxmig_model.errors import PeerLost, UsageError
from tdxmig_model.transport.base import (
    DEFAULT_TIMEOUT,
    Inbox,
    Readable,
    Transport,
    Writable,
    byte_views,
)

QUEUE_BYTES: Final = 8 << 20
"""Bytes that wait for, or have come from, the peer; who wants more in has to wait."""

_CHUNK: Final = 1 << 20
_LOOK_SECONDS: Final = 0.05
"""How often an idle thread looks whether it is still wanted."""


class _Queued:
    """What both directions share: the channel below, its thread, and how it ended."""

    def __init__(self, inner: Transport, timeout: float, serve: Callable[[], None]) -> None:
        self._inner = inner
        self._timeout = timeout
        self._changed = threading.Condition()
        self._lost: PeerLost | None = None
        self._closed = False
        self._thread = threading.Thread(target=serve, daemon=True)

    @property
    def peer(self) -> str:
        return self._inner.peer

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent

    def close(self) -> None:
        """End the thread and the connection; waits for the call that the thread is in."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(self._timeout + 1.0)
        self._inner.close()

    def _check_open(self) -> None:
        if self._closed:
            raise PeerLost(f"{self.peer}: this end is already closed")

    def _end(self, error: PeerLost) -> None:
        with self._changed:
            self._lost = error
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], timeout: float | None) -> bool:
        """Wait, with the lock held, until `ready` or the channel ended; False if neither."""
        end = monotonic() + (self._timeout if timeout is None else timeout)
        while not ready() and self._lost is None:
            left = end - monotonic()
            if left <= 0 or not self._changed.wait(left):
                return ready() or self._lost is not None
        return True


class QueuedSender(_Queued):
    """The sending end of a channel: ``send`` returns once the bytes are in the queue.

    Bytes that cannot change are not copied.  A connection that breaks is told by the next ``send``.
    """

    def __init__(
        self, inner: Transport, *, timeout: float = DEFAULT_TIMEOUT, limit: int = QUEUE_BYTES
    ) -> None:
        super().__init__(inner, timeout, self._serve)
        self._limit = limit
        self._queue: deque[list[memoryview]] = deque()
        self._size = 0
        self._thread.start()

    @property
    def bytes_received(self) -> int:
        return 0

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        self._check_open()
        views = [view if view.readonly else memoryview(bytes(view)) for view in byte_views(buffers)]
        size = sum(view.nbytes for view in views)
        with self._changed:
            # A record larger than the queue goes in alone.
            if not self._wait(lambda: not self._size or self._size + size <= self._limit, timeout):
                raise PeerLost(f"{self.peer}: no room to send before the deadline")
            if self._lost is not None:
                raise PeerLost(str(self._lost))
            self._queue.append(views)
            self._size += size
            self._changed.notify_all()

    def _serve(self) -> None:
        while (views := self._next()) is not None:
            try:
                self._inner.send(views, self._timeout)
            except PeerLost as error:
                self._end(error)
                return
            with self._changed:
                self._size -= sum(view.nbytes for view in views)
                self._changed.notify_all()

    def _next(self) -> list[memoryview] | None:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            return None if self._closed else self._queue.popleft()

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        raise UsageError("this channel only sends")

    def recv_into(self, buffer: Writable, timeout: float | None = None) -> int:
        raise UsageError("this channel only sends")

    def poll(self, timeout: float = 0.0) -> bool:
        raise UsageError("this channel only sends")


class QueuedReceiver(_Queued):
    """The receiving end of a channel: bytes are taken in before anybody asks for them."""

    def __init__(
        self, inner: Transport, *, timeout: float = DEFAULT_TIMEOUT, limit: int = QUEUE_BYTES
    ) -> None:
        super().__init__(inner, timeout, self._serve)
        self._limit = limit
        self._inbox = Inbox()
        self.bytes_received = 0
        self._thread.start()

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        raise UsageError("this channel only receives")

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        self.poll(self._timeout if timeout is None else timeout)
        buffer = bytearray(max(1, min(limit, self._inbox.size)))
        return bytes(memoryview(buffer)[: self.recv_into(buffer, 0.0)])

    def recv_into(self, buffer: Writable, timeout: float | None = None) -> int:
        self._check_open()
        with self._changed:
            if not self._wait(self._arrived, timeout):
                raise PeerLost(f"{self.peer}: nothing arrived before the deadline")
            count = self._inbox.take_into(memoryview(buffer).cast("B"))
            if not count:
                raise PeerLost(str(self._lost))
            self.bytes_received += count
            self._changed.notify_all()
            return count

    def poll(self, timeout: float = 0.0) -> bool:
        self._check_open()
        with self._changed:
            return self._wait(self._arrived, timeout)

    def _arrived(self) -> bool:
        return bool(self._inbox.size)

    def _serve(self) -> None:
        try:
            while self._has_room():
                if self._inner.poll(_LOOK_SECONDS):
                    data = self._inner.recv(_CHUNK)
                    with self._changed:
                        self._inbox.put(data)
                        self._changed.notify_all()
        except PeerLost as error:
            self._end(error)

    def _has_room(self) -> bool:
        """Wait for room; False once the channel is closed."""
        with self._changed:
            while self._inbox.size >= self._limit and not self._closed:
                self._changed.wait()
            return not self._closed
