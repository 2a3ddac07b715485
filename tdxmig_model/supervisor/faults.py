"""Faults in the forward stream of a run, for tests: bytes that change, move or never arrive."""

from __future__ import annotations

from collections.abc import Sequence

from tdxmig_model.errors import PeerLost
from tdxmig_model.transport import Faults, FaultyLine, Transport
from tdxmig_model.transport.base import Readable, Writable, byte_views


class FaultyTransport:
    """A transport whose outgoing bytes suffer `faults`; see `transport.Faults` for their numbers.

    Unlike in a pair in memory the cut is made by the sender: its end closes, and the peer sees the
    end of the stream after `cut_at` bytes.
    """

    def __init__(self, inner: Transport, faults: Faults) -> None:
        self._inner = inner
        self._line = FaultyLine(faults)

    @property
    def peer(self) -> str:
        return self._inner.peer

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._inner.bytes_received

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        for view in byte_views(buffers):
            self._inner.send([self._line.carry(bytes(view))], timeout)
            if self._line.broke:
                self._inner.close()
                raise PeerLost(f"{self.peer}: the connection broke after {self.bytes_sent} bytes")

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        return self._inner.recv(limit, timeout)

    def recv_into(self, buffer: Writable, timeout: float | None = None) -> int:
        return self._inner.recv_into(buffer, timeout)

    def poll(self, timeout: float = 0.0) -> bool:
        return self._inner.poll(timeout)

    def close(self) -> None:
        self._inner.close()
