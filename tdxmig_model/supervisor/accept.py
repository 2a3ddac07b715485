"""Find the connection that carries the migration stream among those that come in."""

from __future__ import annotations

import select
from collections.abc import Callable
from time import monotonic
from typing import Final, Protocol

from tdxmig_model.errors import PeerError, PeerLost
from tdxmig_model.transport import Listener, SocketTransport, TlsFiles, Transport, secure
from tdxmig_model.wire.extensions import Capability, Hello, encode_forward

HELLO_BYTES: Final = len(encode_forward(Hello(bytes(16), Capability(0), 0, 1, 1)))
_HANDSHAKE_SECONDS: Final = 2.0
"""Seconds for the TLS handshake of one connection; others wait meanwhile."""


class Listening(Protocol):
    """Something that becomes readable when somebody connects."""

    def fileno(self) -> int:
        """Its descriptor."""
        ...


def readable(listening: Listening, milliseconds: int) -> bool:
    """Whether it is, or becomes so in time."""
    poller = select.poll()
    poller.register(listening.fileno(), select.POLLIN)
    return bool(poller.poll(milliseconds))


def accept_stream(
    listener: Listener,
    session_id: bytes,
    check: Callable[[], None],
    patience: float,
    tls: TlsFiles | None = None,
) -> Transport:
    """The connection that opens with a HELLO of this session; others are closed.

    With TLS it is the first whose certificate is accepted; the session looks at its HELLO.
    `check` raises to end the wait.  PeerLost: there is none within `patience` seconds; a
    certificate that was refused meanwhile is told, because it may have been the source's.
    """
    waiting: list[SocketTransport] = []
    problem: PeerError | None = None
    end = monotonic() + patience
    found: SocketTransport | None = None
    try:
        while found is None:
            check()
            if monotonic() >= end:
                raise problem or PeerLost(f"the source did not begin within {patience:g} s")
            if readable(listener, 10):
                waiting.append(listener.accept(0.0))
            if tls is None:
                found = _opened(waiting, session_id)
                continue
            while waiting and found is None:
                try:
                    found = secure(waiting.pop(), tls, server=True, timeout=_HANDSHAKE_SECONDS)
                except PeerError as error:
                    problem = error
        return found
    finally:
        for transport in waiting:
            if transport is not found:
                transport.close()


def _opened(waiting: list[SocketTransport], session_id: bytes) -> SocketTransport | None:
    """The first that began with a HELLO of the session; those that began otherwise are closed."""
    for transport in [one for one in waiting if one.poll()]:
        head = transport.peek(HELLO_BYTES)
        if session_id in head:
            return transport
        if not head or len(head) == HELLO_BYTES:
            waiting.remove(transport)
            transport.close()
    return None
