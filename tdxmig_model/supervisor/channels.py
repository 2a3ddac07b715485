"""The connections of a supervised run: one per channel, and a thread for each but the first.

The first connection opens with HELLO, each further one with CHANNEL; both name the migration
session, so that a stranger who connected first takes nobody's place.  Over TLS each connection is
secured on its own.
"""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Final, Protocol

from tdxmig_model.errors import PeerError, PeerLost, WireError
from tdxmig_model.transport import (
    Listener,
    QueuedReceiver,
    QueuedSender,
    SocketTransport,
    TlsFiles,
    Transport,
    connect,
    secure,
)
from tdxmig_model.wire.extensions import (
    CHANNEL_OPEN_SIZE,
    Capability,
    ChannelOpen,
    Hello,
    decode_channel,
    encode_channel,
    encode_forward,
)

HELLO_BYTES: Final = len(encode_forward(Hello(bytes(16), Capability(0), 0, 1, 1)))
_TURN_MILLISECONDS: Final = 10
_HANDSHAKE_SECONDS: Final = 2.0
"""Seconds for the TLS handshake of one connection; others wait meanwhile."""


class Listening(Protocol):
    """What one can wait on until somebody connects."""

    def fileno(self) -> int: ...


def readable(listening: Listening, milliseconds: int) -> bool:
    """Whether somebody has connected; waits for it."""
    poller = select.poll()
    poller.register(listening.fileno(), select.POLLIN)
    return bool(poller.poll(milliseconds))


def connect_channels(
    address: str,
    count: int,
    session_id: bytes,
    timeout: float,
    secured: Callable[[SocketTransport], SocketTransport] = lambda plain: plain,
) -> tuple[SocketTransport, list[Transport]]:
    """The source's connections: channel 0, and the others, each served by a thread.

    `secured` takes a connection over and returns the one to use, for example with TLS.
    UsageError or PeerError: the destination does not take them.
    """
    opened: list[SocketTransport] = []
    try:
        for channel in range(count):
            opened.append(secured(connect(address, timeout)))
            if channel:
                opened[-1].send([encode_channel(ChannelOpen(channel, session_id))], timeout)
    except BaseException:
        for transport in opened:
            transport.close()
        raise
    return opened[0], [QueuedSender(one, timeout=timeout) for one in opened[1:]]


@dataclass(slots=True)
class _Arrivals:
    """Who has connected: channels of this session by number, and others that said nothing yet."""

    session_id: bytes
    tls: TlsFiles | None = None
    problem: PeerError | None = None
    found: dict[int, SocketTransport] = field(default_factory=dict)
    waiting: list[SocketTransport] = field(default_factory=list)

    def add(self, plain: SocketTransport) -> None:
        """Somebody connected; over TLS, who has no certificate of ours is sent away.

        That is kept as the `problem`, because it may have been the source.
        """
        if self.tls is None:
            self.waiting.append(plain)
            return
        try:
            limit = _HANDSHAKE_SECONDS
            self.waiting.append(secure(plain, self.tls, server=True, timeout=limit))
        except PeerError as error:
            self.problem = error

    def sort(self) -> None:
        """Look at what those that wait have sent; who is not of this session is sent away."""
        for transport in [one for one in self.waiting if one.poll()]:
            head = transport.peek(max(HELLO_BYTES, CHANNEL_OPEN_SIZE))
            channel = self._channel(head)
            if channel is not None and channel not in self.found:
                self.waiting.remove(transport)
                self.found[channel] = transport
                if channel:
                    transport.recv(CHANNEL_OPEN_SIZE)
            elif not head or channel is not None or len(head) >= HELLO_BYTES:
                self.waiting.remove(transport)
                transport.close()

    def _channel(self, head: bytes) -> int | None:
        """The number of the channel that begins so, or None as long as that is not known."""
        with contextlib.suppress(WireError):
            opening = decode_channel(head[:CHANNEL_OPEN_SIZE])
            return opening.channel if opening.session_id == self.session_id else None
        return 0 if len(head) >= HELLO_BYTES and self.session_id in head[:HELLO_BYTES] else None


def accept_channels(
    listener: Listener,
    count: int,
    session_id: bytes,
    *,
    patience: float,
    timeout: float,
    check: Callable[[], None],
    tls: TlsFiles | None = None,
) -> tuple[SocketTransport, list[Transport]]:
    """The destination's connections, as `connect_channels` made them; others are closed.

    `check` is called again and again and may raise.  PeerLost: not all came within `patience`.
    PeerError: nor did they, and this is what was wrong with one that came.
    """
    arrivals = _Arrivals(session_id, tls)
    found = arrivals.found
    end = monotonic() + patience
    try:
        while not set(range(count)) <= found.keys():
            check()
            if monotonic() >= end:
                raise arrivals.problem or PeerLost(
                    f"the source did not begin within {patience:g} s"
                )
            if readable(listener, _TURN_MILLISECONDS):
                arrivals.add(listener.accept(0.0))
            arrivals.sort()
    except BaseException:
        arrivals.waiting += found.values()
        raise
    finally:
        for transport in arrivals.waiting:
            transport.close()
    for channel in [number for number in found if number >= count]:
        found.pop(channel).close()
    others = [found[channel] for channel in range(1, count)]
    return found[0], [QueuedReceiver(one, timeout=timeout) for one in others]
