"""What a session needs from whoever moves bytes, and the parts that every transport shares.

A transport is a reliable byte stream in both directions with a deadline on each call.  While
``send`` waits for room it takes in what the peer sends, so that two sides that both send never wait
for each other; ``recv`` hands those bytes out first.  A file has one direction only, and using the
other fails at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

Readable: TypeAlias = bytes | bytearray | memoryview
Writable: TypeAlias = bytearray | memoryview

DEFAULT_TIMEOUT = 30.0
"""Seconds that one call may take unless told otherwise; one call moves at most a few MiB."""

RECEIVE_AHEAD = 64 << 20
"""Bytes that ``send`` takes in while it waits; a peer that sends more has to wait in its turn."""


class Transport(Protocol):
    """A reliable byte stream in both directions.

    ``timeout`` is seconds for the whole call, None the default of the transport.  PeerLost: the
    connection ended, or the deadline passed; what had arrived before can still be received.
    """

    @property
    def peer(self) -> str:
        """Who is at the other end, for messages."""
        ...

    @property
    def bytes_sent(self) -> int:
        """Bytes handed over so far."""
        ...

    @property
    def bytes_received(self) -> int:
        """Bytes given to the caller so far."""
        ...

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        """Send all buffers in order.  They may be reused as soon as the call returns."""
        ...

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        """Wait for bytes and return between 1 and ``limit`` of them."""
        ...

    def recv_into(self, buffer: Writable, timeout: float | None = None) -> int:
        """Wait for bytes and put between 1 and ``len(buffer)`` of them at its beginning."""
        ...

    def poll(self, timeout: float = 0.0) -> bool:
        """True if ``recv`` would return or fail at once; waits up to ``timeout`` seconds for it."""
        ...

    def close(self) -> None:
        """End the connection.  Idempotent."""
        ...


def byte_views(buffers: Sequence[Readable]) -> list[memoryview]:
    """Flat byte views of the buffers that hold anything; no copies."""
    views = (memoryview(buffer).cast("B") for buffer in buffers)
    return [view for view in views if view.nbytes]


class Inbox:
    """Bytes that arrived before anybody asked for them, in order."""

    __slots__ = ("_chunks", "_head", "size")

    def __init__(self) -> None:
        self._chunks: list[memoryview] = []
        self._head = 0
        self.size = 0

    def put(self, data: bytes) -> None:
        """Append ``data``."""
        if data:
            self._chunks.append(memoryview(data))
            self.size += len(data)

    def peek(self, limit: int) -> bytes:
        """Up to ``limit`` bytes, which stay."""
        return b"".join(self._chunks[self._head :])[:limit]

    def take_into(self, target: memoryview) -> int:
        """Move as many bytes as there are and fit into ``target``; returns how many."""
        done = 0
        while done < target.nbytes and self._head < len(self._chunks):
            chunk = self._chunks[self._head]
            count = min(target.nbytes - done, chunk.nbytes)
            target[done : done + count] = chunk[:count]
            done += count
            if count == chunk.nbytes:
                self._head += 1
            else:
                self._chunks[self._head] = chunk[count:]
        if self._head == len(self._chunks):
            self._chunks.clear()
            self._head = 0
        self.size -= done
        return done
