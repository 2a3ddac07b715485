"""TLS 1.3 over a connected socket, both sides authenticated by certificates.

Certificates come as files, or as a directory with the names that QEMU gives them: ca-cert.pem,
server-cert.pem, server-key.pem, client-cert.pem, client-key.pem (QEMU, tls-creds-x509).  The side
that connects is the client.  Each side accepts only certificates of the given authority, and the
client also compares the name in the server's certificate with the host it wanted.
"""

from __future__ import annotations

import contextlib
import select
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from tdxmig_model.errors import PeerError, PeerLost, UsageError
from tdxmig_model.transport.base import DEFAULT_TIMEOUT, RECEIVE_AHEAD
from tdxmig_model.transport.socket import SocketTransport, reason_of

_RECORD = 1 << 14
"""Bytes of plain text in a TLS record; OpenSSL sends one record per call."""
_READ_AT_ONCE = 1 << 18
_STOP_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of one side: the authority it trusts, its own certificate, its private key."""

    authority: Path
    certificate: Path
    private_key: Path

    @classmethod
    def in_directory(cls, directory: Path, endpoint: str) -> TlsFiles:
        """Those of ``endpoint`` (client or server) by QEMU's names."""
        return cls(
            directory / "ca-cert.pem",
            directory / f"{endpoint}-cert.pem",
            directory / f"{endpoint}-key.pem",
        )

    def context(self, *, server: bool) -> ssl.SSLContext:
        """The settings of a connection.  UsageError: a file is missing or does not fit."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        if server:
            context.num_tickets = 0  # no session is resumed
        for path in (self.authority, self.certificate, self.private_key):
            if not path.is_file():
                raise UsageError(
                    f"TLS needs {path}, which is no file; tdxmig identity makes a directory of "
                    "certificates"
                )
        try:
            context.load_verify_locations(self.authority)
        except (ssl.SSLError, OSError) as error:
            raise UsageError(f"{self.authority} is no PEM certificate: {error}") from error
        try:
            context.load_cert_chain(self.certificate, self.private_key, password=self._no_password)
        except (ssl.SSLError, OSError) as error:
            raise UsageError(
                f"{self.private_key} is no PEM key of the certificate {self.certificate}: {error}"
            ) from error
        return context

    def _no_password(self) -> str:
        """OpenSSL would ask the terminal, and wait for ever where there is nobody."""
        raise UsageError(f"the private key {self.private_key} is encrypted; give a plain one")


class TlsTransport(SocketTransport):
    """A TLS connection; see `Transport` for the calls.  Made by `secure`."""

    _socket: ssl.SSLSocket

    def _send_some(self, views: Sequence[memoryview]) -> int:
        return _non_blocking(lambda: self._socket.send(_first_bytes(views, _RECORD)))

    def _receive_some(self, limit: int) -> bytes:
        data = bytearray(min(limit, _READ_AT_ONCE))
        return bytes(data[: self._receive_some_into(memoryview(data))])

    def _receive_some_into(self, target: memoryview) -> int:
        """All records that are there; what ends the connection after some is told by the next."""
        done = _non_blocking(lambda: self._socket.recv_into(target))
        while 0 < done < target.nbytes and not self._ended:
            try:
                count = self._socket.recv_into(target[done:])
            except ssl.SSLWantReadError:
                break
            except OSError as error:
                self._ended = f"the connection broke while receiving ({reason_of(error)})"
                break
            done += count
            if not count:
                self._ended = "the peer closed the connection"
        return done

    def poll(self, timeout: float = 0.0) -> bool:
        """Encrypted bytes may be no data yet, so only what could be decrypted counts."""
        self._check_open()
        end = monotonic() + timeout
        while not (self._ahead.size or self._ended):
            try:
                data = self._receive_some(min(_READ_AT_ONCE, RECEIVE_AHEAD))
            except BlockingIOError:
                if not self._select(select.POLLIN, end - monotonic()):
                    return False
                continue
            except OSError as error:
                self._ended = f"the connection broke while receiving ({reason_of(error)})"
                break
            self._ahead.put(data)
            if not data:
                self._ended = "the peer closed the connection"
        return True

    def peek(self, limit: int) -> bytes:
        self.poll()
        return self._ahead.peek(limit)

    def close(self) -> None:
        """Also tell the peer that this is the end: without that it was cut off."""
        if not self._closed:
            with contextlib.suppress(OSError, ValueError):
                self._socket.unwrap().close()
        super().close()


def _first_bytes(views: Sequence[memoryview], count: int) -> memoryview | bytes:
    """Up to ``count`` bytes of the views; the same ones again if a send has to be repeated."""
    if views[0].nbytes >= count:
        return views[0][:count]
    pieces, size = [], 0
    for view in views:
        pieces.append(view[: count - size])
        size += pieces[-1].nbytes
        if size == count:
            break
    return b"".join(pieces)


def _non_blocking(call: Callable[[], int]) -> int:
    try:
        return call()
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
        raise BlockingIOError from None


def secure(
    plain: SocketTransport,
    files: TlsFiles,
    *,
    server: bool,
    peer_name: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    stopped: Callable[[], str | None] = lambda: None,
) -> TlsTransport:
    """Authenticate both sides over ``plain``, which is taken over, also by a failure.

    ``peer_name``: the name that the server's certificate has to bear (client only).  ``stopped``
    says why to stop waiting.  PeerError: the peer is not who it should be.  PeerLost: it went away,
    or is too slow.  UsageError: our own files cannot be used.
    """
    peer = f"{plain.peer} (TLS)"
    try:
        wrapped = files.context(server=server).wrap_socket(
            plain.detach(),
            server_side=server,
            server_hostname=peer_name,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
        )
    except (OSError, ValueError) as error:
        plain.close()
        raise PeerLost(f"{peer}: TLS cannot begin ({error})") from error
    except UsageError:
        plain.close()
        raise
    try:
        _shake_hands(wrapped, peer, monotonic() + timeout, stopped)
    except PeerError:
        wrapped.close()
        raise
    return TlsTransport(wrapped, peer)


def _shake_hands(
    wrapped: ssl.SSLSocket, peer: str, end: float, stopped: Callable[[], str | None]
) -> None:
    wrapped.setblocking(False)
    while True:
        try:
            wrapped.do_handshake()
            return
        except ssl.SSLWantReadError:
            events = select.POLLIN
        except ssl.SSLWantWriteError:
            events = select.POLLOUT
        except OSError as error:
            raise _refused(error, peer) from error
        poller = select.poll()
        poller.register(wrapped, events)
        while not poller.poll(1000 * min(_STOP_SECONDS, max(0.0, end - monotonic()))):
            if (reason := stopped()) is not None:
                raise PeerLost(f"{peer}: the TLS handshake was stopped: {reason}")
            if monotonic() >= end:
                raise PeerLost(f"{peer}: the TLS handshake was not done before the deadline")


def _refused(error: OSError, peer: str) -> PeerError:
    match error:
        case ssl.SSLCertVerificationError(verify_message=reason):
            return PeerError(
                f"{peer}: its certificate is refused ({reason}); both sides need certificates of "
                "the same authority, and the server's has to bear the name that the client wants"
            )
        case ssl.SSLZeroReturnError() | ssl.SSLEOFError():
            return PeerLost(f"{peer}: it ended the connection in the TLS handshake")
        case ssl.SSLError():
            reason = (error.reason or str(error)).lower().replace("_", " ")
            hint = "; it does not accept our certificate" if "alert" in reason else ""
            return PeerError(f"{peer}: TLS failed ({reason}){hint}; do both sides use TLS?")
    return PeerLost(f"{peer}: the connection broke in the TLS handshake ({reason_of(error)})")
