"""Faults in the forward stream of a run, for tests: bytes that change or never arrive."""

from __future__ import annotations

from collections.abc import Sequence

from tdxmig_model.errors import PeerLost
from tdxmig_model.transport import Faults, Transport
from tdxmig_model.transport.base import Readable, Writable, byte_views


class FaultyTransport:
    """A transport whose outgoing bytes suffer `faults`; see `transport.Faults` for their numbers.

    Unlike in a pair in memory the cut is made by the sender: its end closes, and the peer sees the
    end of the stream after `cut_at` bytes.
    """

    def __init__(self, inner: Transport, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults
        self._passed = 0

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
            self._send_view(view, timeout)

    def _send_view(self, view: memoryview, timeout: float | None) -> None:
        first, self._passed = self._passed, self._passed + view.nbytes
        data: Readable = view
        flip, cut, truncate = self._faults.flip_at, self._faults.cut_at, self._faults.truncate_at
        if flip is not None and first <= flip < self._passed:
            changed = bytearray(view)
            changed[flip - first] ^= self._faults.flip_mask
            data = changed
        if truncate is not None and self._passed > truncate:
            data = memoryview(data)[: max(0, truncate - first)]
        if cut is not None and self._passed > cut:
            self._inner.send([memoryview(data)[: max(0, cut - first)]], timeout)
            self._inner.close()
            raise PeerLost(f"{self.peer}: the connection broke after {cut} bytes")
        self._inner.send([data], timeout)

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        return self._inner.recv(limit, timeout)

    def recv_into(self, buffer: Writable, timeout: float | None = None) -> int:
        return self._inner.recv_into(buffer, timeout)

    def poll(self, timeout: float = 0.0) -> bool:
        return self._inner.poll(timeout)

    def close(self) -> None:
        self._inner.close()
