"""A transport inside one process: a pair of ends, optionally with faults at chosen bytes.

Usable from one thread (an unlimited pair never waits, and ``poll(0)`` uses no clock, so a
simulation stays deterministic) and from two.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import monotonic

from tdxmig_model.errors import PeerLost
from tdxmig_model.transport.base import (
    DEFAULT_TIMEOUT,
    RECEIVE_AHEAD,
    Inbox,
    Readable,
    Writable,
    byte_views,
)
from tdxmig_model.transport.faults import NO_FAULTS, Faults, FaultyLine


class _Pipe:
    """One direction: what is on its way, its faults, and whether more can come."""

    def __init__(self, capacity: int | None, faults: Faults) -> None:
        self.capacity = capacity
        self.line = FaultyLine(faults)
        self.pending = Inbox()
        self.ended = False
        self.abandoned = False

    def room(self) -> int | None:
        """Bytes that may enter now; None is without limit."""
        return None if self.capacity is None else max(0, self.capacity - self.pending.size)

    def enter(self, data: bytes) -> bool:
        """Let ``data`` in, faults applied; False if the connection broke on it."""
        self.pending.put(self.line.carry(data))
        self.ended |= self.line.ended
        return not self.line.broke


class _Link:
    """What the two ends share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.broken = False


class MemoryTransport:
    """One end of a pair made by `memory_pair`; see `Transport` for the calls."""

    def __init__(self, name: str, link: _Link, outgoing: _Pipe, incoming: _Pipe) -> None:
        self._name = name
        self._link = link
        self._outgoing = outgoing
        self._incoming = incoming
        self._ahead = Inbox()
        self._closed = False
        self.bytes_sent = 0
        self.bytes_received = 0

    @property
    def peer(self) -> str:
        return f"memory:{self._name}"

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        end = _Deadline(timeout)
        with self._link.changed:
            for view in byte_views(buffers):
                self._send_view(view, end)

    def _send_view(self, view: memoryview, end: _Deadline) -> None:
        done = 0
        while done < view.nbytes:
            self._check_open()
            if self._link.broken or self._outgoing.abandoned:
                raise self._lost("the connection " + self._how())
            room = self._outgoing.room()
            if room == 0:
                self._take_ahead()
                if not self._link.changed.wait(end.left()) and not self._outgoing.room():
                    raise self._lost("no room to send before the deadline")
                continue
            count = view.nbytes - done if room is None else min(room, view.nbytes - done)
            alive = self._outgoing.enter(bytes(view[done : done + count]))
            done += count
            self.bytes_sent += count
            self._link.broken |= not alive
            self._link.changed.notify_all()

    def _take_ahead(self) -> None:
        """While waiting for room: free the other direction, so that the peer can go on."""
        size = min(self._incoming.pending.size, RECEIVE_AHEAD - self._ahead.size)
        if size > 0:
            data = bytearray(size)
            self._incoming.pending.take_into(memoryview(data))
            self._ahead.put(bytes(data))
            self._link.changed.notify_all()

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        self.poll(DEFAULT_TIMEOUT if timeout is None else timeout)
        buffer = bytearray(max(1, min(limit, self._ahead.size + self._incoming.pending.size)))
        return bytes(memoryview(buffer)[: self.recv_into(buffer, 0.0)])

    def recv_into(self, buffer: Writable, timeout: float | None = None) -> int:
        target = memoryview(buffer).cast("B")
        with self._link.changed:
            self._check_open()
            if not self._wait(_Deadline(timeout)):
                raise self._lost("nothing arrived before the deadline")
            count = self._ahead.take_into(target)
            count += self._incoming.pending.take_into(target[count:])
            if not count:
                raise self._lost("the connection " + self._how())
            self.bytes_received += count
            self._link.changed.notify_all()
            return count

    def poll(self, timeout: float = 0.0) -> bool:
        with self._link.changed:
            self._check_open()
            return self._wait(_Deadline(timeout))

    def _ready(self) -> bool:
        pending = self._ahead.size or self._incoming.pending.size
        return bool(pending) or self._incoming.ended or self._link.broken

    def _wait(self, end: _Deadline) -> bool:
        while not self._ready():
            left = end.left()
            if left <= 0 or not self._link.changed.wait(left):
                return self._ready()
        return True

    def close(self) -> None:
        with self._link.changed:
            self._closed = True
            self._outgoing.ended = True
            self._incoming.abandoned = True
            self._link.changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise PeerLost(f"{self.peer}: this end is already closed")

    def _how(self) -> str:
        return "broke" if self._link.broken else "was closed by the peer"

    def _lost(self, what: str) -> PeerLost:
        return PeerLost(
            f"{self.peer}: {what} ({self.bytes_sent} bytes sent, {self.bytes_received} received)"
        )


class _Deadline:
    """Seconds left of a call; reads no clock if there is no time to wait."""

    __slots__ = ("_end",)

    def __init__(self, timeout: float | None) -> None:
        seconds = DEFAULT_TIMEOUT if timeout is None else timeout
        self._end = monotonic() + seconds if seconds > 0 else 0.0

    def left(self) -> float:
        return max(0.0, self._end - monotonic()) if self._end else 0.0


def memory_pair(
    *,
    capacity: int | None = None,
    forward: Faults = NO_FAULTS,
    backward: Faults = NO_FAULTS,
) -> tuple[MemoryTransport, MemoryTransport]:
    """Two connected ends, source first.

    ``capacity`` bounds the bytes on their way in each direction (None: without limit, ``send``
    never waits).  ``forward`` are the faults from the first end to the second, ``backward`` the
    others.
    """
    link = _Link()
    there, back = _Pipe(capacity, forward), _Pipe(capacity, backward)
    return (
        MemoryTransport("destination", link, there, back),
        MemoryTransport("source", link, back, there),
    )
