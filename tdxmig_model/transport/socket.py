"""Unix and TCP sockets: scatter-gather sends, a deadline on each call, keep-alive."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
from collections.abc import Sequence
from time import monotonic, sleep

from tdxmig_model.errors import PeerLost, UsageError
from tdxmig_model.transport.address import Address
from tdxmig_model.transport.base import (
    DEFAULT_TIMEOUT,
    RECEIVE_AHEAD,
    Inbox,
    Readable,
    Writable,
    byte_views,
)

SOCKET_BUFFER = 4 << 20
"""Bytes asked for in each direction; the kernel may grant less."""

KEEP_ALIVE_SECONDS = 15
"""Silence after which the kernel asks whether the other host is still there, and seconds that it
then may take to answer."""
KEEP_ALIVE_PROBES = 3

_CHUNK = 1 << 20
_RETRY_SECONDS = 0.05


def _max_buffers() -> int:
    try:
        limit = os.sysconf("SC_IOV_MAX")
    except (ValueError, OSError):
        limit = -1
    return limit if limit > 0 else 16  # 16 is the least that POSIX allows


MAX_BUFFERS = _max_buffers()
"""Buffers that one sendmsg takes."""


class SocketTransport:
    """A connected stream socket; see `Transport` for the calls.  Takes the socket over."""

    def __init__(
        self, connection: socket.socket, peer: str, *, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        self._socket = connection
        self.peer = peer
        self._timeout = timeout
        self._ahead = Inbox()
        self._ended = ""
        self._closed = False
        self.bytes_sent = 0
        self.bytes_received = 0
        connection.setblocking(False)
        _large_buffers(connection)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(connection)

    # A subclass gives these another way to move bytes.  Each raises BlockingIOError if it has to
    # wait, and OSError if the connection broke.

    def _send_some(self, views: Sequence[memoryview]) -> int:
        return self._socket.sendmsg(views)

    def _receive_some(self, limit: int) -> bytes:
        return self._socket.recv(limit)

    def _receive_some_into(self, target: memoryview) -> int:
        return self._socket.recv_into(target)

    def send(self, buffers: Sequence[Readable], timeout: float | None = None) -> None:
        self._check_open()
        views = byte_views(buffers)
        end = self._end(timeout)
        index = 0
        while index < len(views):
            try:
                sent = self._send_some(views[index : index + MAX_BUFFERS])
            except BlockingIOError:
                self._wait_to_send(end)
                continue
            except OSError as error:
                raise self._lost(
                    f"the connection broke while sending ({reason_of(error)})"
                ) from error
            self.bytes_sent += sent
            while sent:
                size = views[index].nbytes
                if sent < size:
                    views[index] = views[index][sent:]
                    break
                sent -= size
                index += 1

    def _wait_to_send(self, end: float) -> None:
        """Wait for room; meanwhile take in what the peer sends, so that it can go on too."""
        hungry = not self._ended and self._ahead.size < RECEIVE_AHEAD
        left = end - monotonic()
        events = self._select(select.POLLOUT | (select.POLLIN if hungry else 0), left)
        if not events or left <= 0:
            raise self._lost("no room to send before the deadline")
        if hungry and events & select.POLLIN:
            try:
                data = self._receive_some(_CHUNK)
            except BlockingIOError:
                return
            except OSError as error:
                self._ended = f"the connection broke ({reason_of(error)})"
                return
            self._ahead.put(data)
            if not data:
                self._ended = "the peer closed the connection"

    def recv(self, limit: int, timeout: float | None = None) -> bytes:
        self._check_open()
        end = self._end(timeout)
        if self._ahead.size:
            buffer = bytearray(min(limit, self._ahead.size))
            return bytes(memoryview(buffer)[: self.recv_into(buffer, 0.0)])
        while True:
            self._check_readable()
            try:
                data = self._receive_some(min(limit, _CHUNK))
            except BlockingIOError:
                self._wait_to_receive(end)
                continue
            except OSError as error:
                raise self._broken_receive(error) from error
            self._count(len(data))
            return data

    def peek(self, limit: int) -> bytes:
        """What has arrived, without taking it and without waiting; empty if nothing ever will."""
        try:
            return self._socket.recv(limit, socket.MSG_PEEK)
        except OSError:
            return b""

    def recv_into(self, buffer: Writable, timeout: float | None = None) -> int:
        self._check_open()
        target = memoryview(buffer).cast("B")
        if self._ahead.size:
            count = self._ahead.take_into(target)
            self.bytes_received += count
            return count
        end = self._end(timeout)
        while True:
            self._check_readable()
            try:
                count = self._receive_some_into(target)
            except BlockingIOError:
                self._wait_to_receive(end)
                continue
            except OSError as error:
                raise self._broken_receive(error) from error
            self._count(count)
            return count

    def _count(self, count: int) -> None:
        if not count:
            self._ended = "the peer closed the connection"
            raise self._lost(self._ended)
        self.bytes_received += count

    def _check_readable(self) -> None:
        if self._ended:
            raise self._lost(self._ended)

    def _broken_receive(self, error: OSError) -> PeerLost:
        self._ended = f"the connection broke while receiving ({reason_of(error)})"
        return self._lost(self._ended)

    def _wait_to_receive(self, end: float) -> None:
        if not self._select(select.POLLIN, end - monotonic()):
            raise self._lost("nothing arrived before the deadline")

    def poll(self, timeout: float = 0.0) -> bool:
        self._check_open()
        return bool(self._ahead.size or self._ended or self._select(select.POLLIN, timeout))

    def _select(self, events: int, seconds: float) -> int:
        poller = select.poll()
        poller.register(self._socket, events)
        ready = poller.poll(max(0.0, seconds) * 1000)
        return ready[0][1] if ready else 0

    def _end(self, timeout: float | None) -> float:
        return monotonic() + (self._timeout if timeout is None else timeout)

    def detach(self) -> socket.socket:
        """Give the socket away, before anything was received; this end is closed by it."""
        self._closed = True
        return self._socket

    def fileno(self) -> int:
        """The descriptor, to wait for this connection together with others."""
        return self._socket.fileno()

    def close(self) -> None:
        self._closed = True
        self._socket.close()

    def _check_open(self) -> None:
        if self._closed:
            raise PeerLost(f"{self.peer}: this end is already closed")

    def _lost(self, what: str) -> PeerLost:
        return PeerLost(
            f"{self.peer}: {what} ({self.bytes_sent} bytes sent, {self.bytes_received} received)"
        )


class Listener:
    """A listening socket.  A Unix path is readable and writable by its owner alone."""

    def __init__(self, address: Address | str) -> None:
        wanted = _socket_address(address)
        try:
            self._socket, self.address = (
                _listen_unix(wanted) if wanted.kind == "unix" else _listen_tcp(wanted)
            )
        except (OSError, UnicodeError) as error:
            raise UsageError(f"cannot listen on {wanted}: {reason_of(error)}") from error
        self._closed = False

    def accept(self, timeout: float = DEFAULT_TIMEOUT) -> SocketTransport:
        """Wait for one connection.  PeerLost if none comes before the deadline."""
        self._socket.settimeout(timeout)
        try:
            connection, peer = self._socket.accept()
        except (TimeoutError, BlockingIOError) as error:
            raise PeerLost(
                f"{self.address}: nobody connected within {timeout:g} s; start the source, "
                "or allow more time"
            ) from error
        except OSError as error:
            raise UsageError(f"cannot accept on {self.address}: {error.strerror}") from error
        if self.address.kind == "unix":
            return SocketTransport(connection, str(self.address))
        return SocketTransport(connection, str(Address("tcp", host=peer[0], port=peer[1])))

    def fileno(self) -> int:
        """The descriptor, to wait for a connection together with other things."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening and remove a Unix path.  Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._socket.close()
        if self.address.kind == "unix":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address.path)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def connect(
    address: Address | str, timeout: float = 10.0, *, retry: bool = False
) -> SocketTransport:
    """Connect before the deadline.

    With ``retry`` a peer that does not listen yet is waited for.  UsageError: nobody listens there.
    """
    wanted = _socket_address(address)
    end = monotonic() + timeout
    while True:
        try:
            return SocketTransport(_connect_once(wanted, end), str(wanted))
        except (OSError, UnicodeError) as error:
            waits = isinstance(error, ConnectionRefusedError | FileNotFoundError)
            if not (retry and waits) or monotonic() + _RETRY_SECONDS >= end:
                raise UsageError(
                    f"cannot connect to {wanted}: {reason_of(error)}; start the destination first"
                ) from error
            sleep(_RETRY_SECONDS)


def _socket_address(address: Address | str) -> Address:
    wanted = Address.parse(address) if isinstance(address, str) else address
    if wanted.kind == "file":
        raise UsageError(f"{wanted} is a file, and a connection needs tcp:HOST:PORT or unix:PATH")
    return wanted


def reason_of(error: OSError | UnicodeError) -> str:
    """Why a socket call failed, in words."""
    return (error.strerror if isinstance(error, OSError) else "") or str(error)


def _connect_once(address: Address, end: float) -> socket.socket:
    if address.kind == "unix":
        candidates = [(socket.AF_UNIX, address.path)]
    else:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        candidates = [(family, name) for family, _, _, _, name in found]  # type: ignore[misc]
    problem: OSError | None = None
    for family, name in candidates:
        connection = socket.socket(family, socket.SOCK_STREAM)
        _large_buffers(connection)
        connection.settimeout(max(0.001, end - monotonic()))
        try:
            connection.connect(name)
        except OSError as error:
            connection.close()
            problem = error
        else:
            return connection
    raise problem or OSError("the name has no address")


def _large_buffers(connection: socket.socket) -> None:
    """TCP chooses its window scale while connecting, so the size has to be there before."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice a host that vanished, also while nothing is being sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEP_ALIVE_SECONDS),
        ("TCP_KEEPINTVL", KEEP_ALIVE_SECONDS // KEEP_ALIVE_PROBES),
        ("TCP_KEEPCNT", KEEP_ALIVE_PROBES),
        ("TCP_USER_TIMEOUT", 2000 * KEEP_ALIVE_SECONDS),  # milliseconds, for what is being sent
    ):
        if hasattr(socket, name):  # not every system has each of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _listen_tcp(address: Address) -> tuple[socket.socket, Address]:
    family, _, _, _, name = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _large_buffers(listening)
        listening.bind(name)
        listening.listen(8)
    except OSError:
        listening.close()
        raise
    return listening, Address("tcp", host=address.host, port=listening.getsockname()[1])


def _listen_unix(address: Address) -> tuple[socket.socket, Address]:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(address.path)
        listening.bind(address.path)
        os.chmod(address.path, 0o600)  # before listen: nobody can have connected yet
        listening.listen(8)
    except OSError:
        listening.close()
        raise
    return listening, address


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on any more; anything else stays, and bind fails."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
