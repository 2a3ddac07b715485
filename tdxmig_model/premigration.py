"""Pre-migration: migration keys and the migration version, over mutually authenticated TLS 1.3.

Each side has an identity and is given the certificate of the other; no other certificate is
accepted, whoever issued it.  Over that channel they exchange their migration encryption keys (which
become the peer's decryption keys), their version ranges, and a 16-byte session id that both
contribute to.  The module takes the keys once per session (TDX module 1.5.01: MIG_DEC_KEY_SET is
cleared when a session starts), so a `MigrationKey` can be taken once and has no readable text.

The source is the TLS client, the destination the server.  TLS runs in memory and only whole TLS
records are read from the socket, so after `exchange` the socket is still good for other traffic.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import os
import select
import socket
import ssl
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final, Literal, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tdxmig_model.errors import PeerError, PeerLost, UsageError

Role: TypeAlias = Literal["source", "destination"]

KEY_SIZE: Final = 32
"""Bytes of a migration key (AES-256)."""
SESSION_ID_SIZE: Final = 16

_MAGIC: Final = b"tdxmigP1"
_OFFER: Final = struct.Struct(">8sB3xHHHH32s32s")
_VERDICT: Final = struct.Struct(">BH")
_ROLES: Final[dict[Role, int]] = {"source": 1, "destination": 2}
_MAX_REASON: Final = 512
_TLS_HEADER: Final = 5
_TLS_RECORD_TYPES: Final = range(20, 24)
_MAX_TLS_RECORD: Final = (1 << 14) + 256
_VALID_DAYS: Final = 3650


class MigrationKey:
    """256 bits of key that can be taken once.  Neither str, repr nor pickle gives them away."""

    __slots__ = ("_material",)

    def __init__(self, material: bytes) -> None:
        if len(material) != KEY_SIZE:
            raise UsageError(f"a migration key has {KEY_SIZE} bytes, not {len(material)}")
        if not any(material):
            raise UsageError("a migration key of zero bytes is no key")
        self._material: bytearray | None = bytearray(material)

    @property
    def taken(self) -> bool:
        """True after `take`."""
        return self._material is None

    def take(self) -> bytes:
        """The 32 bytes, once.  UsageError: they were taken already; each session needs new keys."""
        if self._material is None:
            raise UsageError("this migration key was used; run pre-migration again for new keys")
        material = bytes(self._material)
        self._material[:] = bytes(KEY_SIZE)
        self._material = None
        return material

    def __repr__(self) -> str:
        return f"<MigrationKey {'taken' if self.taken else 'hidden'}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise UsageError("a migration key cannot be pickled or copied")


@dataclass(frozen=True, slots=True)
class Versions:
    """Migration versions that a TDX module can export and import, both inclusive (0 in 1.5.01)."""

    min_export: int = 0
    max_export: int = 0
    min_import: int = 0
    max_import: int = 0

    def __post_init__(self) -> None:
        for low, high in (
            (self.min_export, self.max_export),
            (self.min_import, self.max_import),
        ):
            if not 0 <= low <= high <= 0xFFFF:
                raise UsageError(f"versions {low} to {high} are no range within 0 to 65535")


def choose_version(source: Versions, destination: Versions) -> int | None:
    """min(max_export, max_import) if the source's exports and the destination's imports overlap."""
    low = max(source.min_export, destination.min_import)
    high = min(source.max_export, destination.max_import)
    return high if low <= high else None


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate (PEM, to be given to the peer) and its private key (PEM, kept)."""

    certificate: bytes
    private_key: bytes = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hexadecimal, to be compared by people."""
        return fingerprint(self.certificate)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What both sides know after `exchange`: the peer's key, the version, the id of the session."""

    peer_key: MigrationKey
    version: int
    session_id: bytes


def make_identity(name: str = "tdxmig") -> Identity:
    """A new P-256 key and a self-signed certificate for it, valid for ten years."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # the clocks of two hosts differ
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Identity(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a PEM certificate's DER, in hexadecimal.  UsageError: it is no certificate."""
    return hashlib.sha256(_der(certificate)).hexdigest()


def _der(certificate: bytes) -> bytes:
    try:
        loaded = x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise UsageError(f"this is no PEM certificate: {error}") from error
    return loaded.public_bytes(serialization.Encoding.DER)


def exchange(
    role: Role,
    connection: socket.socket,
    identity: Identity,
    peer_certificate: bytes,
    local_key: MigrationKey,
    versions: Versions,
    deadline: float = 10.0,
    stopped: Callable[[], str | None] = lambda: None,
) -> Agreement:
    """Authenticate each other, then exchange keys, versions and the session id.

    ``deadline`` is in seconds for all of it; the socket stays open and is left non-blocking.
    ``stopped`` says why to stop waiting, or None; PeerLost then.
    PeerError: another certificate, or no version in common.  PeerLost: the peer went away or is too
    slow.  UsageError: ``local_key`` was used before; it is used up in any case from here on.
    """
    material = local_key.take()
    channel = _Channel(role, connection, identity, peer_certificate, monotonic() + deadline)
    channel.stopped = stopped
    channel.handshake()
    nonce = os.urandom(32)
    channel.write(_pack_offer(role, versions, nonce, material))
    peer_versions, peer_nonce, peer_material = _read_offer(role, channel)
    problem, version = _judge(role, versions, peer_versions, material, peer_material)
    _exchange_verdicts(channel, problem)
    nonces = (nonce, peer_nonce) if role == "source" else (peer_nonce, nonce)
    session_id = hashlib.sha256(_MAGIC + b"".join(nonces)).digest()[:SESSION_ID_SIZE]
    return Agreement(MigrationKey(peer_material), version, session_id)


def _pack_offer(role: Role, versions: Versions, nonce: bytes, material: bytes) -> bytes:
    return _OFFER.pack(
        _MAGIC,
        _ROLES[role],
        versions.min_export,
        versions.max_export,
        versions.min_import,
        versions.max_import,
        nonce,
        material,
    )


def _read_offer(role: Role, channel: _Channel) -> tuple[Versions, bytes, bytes]:
    magic, peer_role, *ranges, nonce, material = _OFFER.unpack(channel.read(_OFFER.size))
    if magic != _MAGIC:
        raise PeerError(f"{channel.peer} does not speak this pre-migration protocol")
    if peer_role == _ROLES[role]:
        raise PeerError(f"{channel.peer} takes the {role} role too; one side has to be the other")
    try:
        return Versions(*ranges), nonce, material
    except UsageError as error:
        raise PeerError(f"{channel.peer} offers impossible versions: {error}") from None


def _judge(
    role: Role, ours: Versions, theirs: Versions, material: bytes, peer_material: bytes
) -> tuple[str, int]:
    """What is wrong, if anything, and the version."""
    if not any(peer_material):
        return "the key offered is zero", 0
    if hmac.compare_digest(material, peer_material):
        return "both sides offer the same key", 0
    source, destination = (ours, theirs) if role == "source" else (theirs, ours)
    version = choose_version(source, destination)
    if version is None:
        problem = (
            f"no migration version in common: the source exports {source.min_export} to "
            f"{source.max_export}, the destination imports {destination.min_import} to "
            f"{destination.max_import}"
        )
        return problem, 0
    return "", version


def _exchange_verdicts(channel: _Channel, problem: str) -> None:
    """Nobody uses a key before both sides have said that they agree."""
    reason = problem.encode()[:_MAX_REASON]
    channel.write(_VERDICT.pack(bool(problem), len(reason)) + reason)
    refused, length = _VERDICT.unpack(channel.read(_VERDICT.size))
    if length > _MAX_REASON:
        raise PeerError(f"{channel.peer} gives a reason of {length} bytes")
    text = channel.read(length).decode(errors="replace")
    if problem:
        raise PeerError(f"pre-migration with {channel.peer} failed: {problem}")
    if refused:
        shown = "".join(letter if letter.isprintable() else "?" for letter in text)
        raise PeerError(f"{channel.peer} refused the pre-migration: {shown}")


_STOP_SECONDS: Final = 0.1
"""How long a wait goes on before somebody who asks to stop is heard."""


class _Channel:
    """TLS 1.3 in memory over a socket, with one deadline for everything."""

    def __init__(
        self,
        role: Role,
        connection: socket.socket,
        identity: Identity,
        peer_certificate: bytes,
        end: float,
    ) -> None:
        if role not in _ROLES:
            raise UsageError(f"role {role!r}: source or destination")
        self.peer = f"the {'destination' if role == 'source' else 'source'}"
        self._socket = connection
        self._end = end
        self.stopped: Callable[[], str | None] = lambda: None
        self._pinned = _der(peer_certificate)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = _context(role, identity, peer_certificate)
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=role == "destination"
        )
        connection.setblocking(False)

    def handshake(self) -> None:
        """Authenticate both sides.  PeerError: the peer's certificate is not the pinned one."""
        self._run(self._tls.do_handshake)
        certificate = self._tls.getpeercert(binary_form=True) or b""
        if not hmac.compare_digest(certificate, self._pinned):
            found = hashlib.sha256(certificate).hexdigest()
            raise self._wrong_certificate(f"it has {found}")

    def write(self, data: bytes) -> None:
        """Send all of ``data``."""
        self._run(partial(self._tls.write, data))

    def read(self, count: int) -> bytes:
        """Receive exactly ``count`` bytes."""
        data = bytearray()
        while len(data) < count:
            piece = self._run(partial(self._tls.read, count - len(data)))
            if not piece:
                raise PeerLost(f"{self.peer} ended the pre-migration early")
            data += piece
        return bytes(data)

    def _run(self, step: Callable[[], object]) -> bytes:
        """Run a TLS operation, moving its bytes until it is done."""
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                self._flush()
                self._incoming.write(self._read_record())
            except ssl.SSLError as error:
                with contextlib.suppress(PeerLost):
                    self._flush()  # the alert, so that the peer knows too
                raise self._explain(error) from None
            else:
                try:
                    self._flush()
                except PeerLost as lost:
                    raise self._last_words(lost) from None
                return result if isinstance(result, bytes) else b""

    def _last_words(self, lost: PeerLost) -> PeerError:
        """Why the peer closed before it took what we sent: its alert, if one is waiting.

        A TLS 1.3 server judges the client's certificate after the client has finished.
        """
        try:
            while True:
                self._incoming.write(self._read_record())
                with contextlib.suppress(ssl.SSLWantReadError):
                    self._tls.read(1)
        except ssl.SSLError as error:
            return self._explain(error)
        except PeerError:
            return lost

    def _explain(self, error: ssl.SSLError) -> PeerError:
        if isinstance(error, ssl.SSLCertVerificationError):
            return self._wrong_certificate(error.verify_message)
        reason = (error.reason or str(error)).lower().replace("_", " ")
        if isinstance(error, ssl.SSLZeroReturnError | ssl.SSLEOFError):
            return PeerLost(f"{self.peer} ended the pre-migration early")
        if "alert" in reason:
            return PeerError(
                f"{self.peer} refused the TLS connection ({reason}): it expects another "
                "certificate than ours; exchange the certificates again"
            )
        return PeerError(f"TLS with {self.peer} failed: {reason}")

    def _wrong_certificate(self, detail: str) -> PeerError:
        wanted = hashlib.sha256(self._pinned).hexdigest()
        return PeerError(
            f"{self.peer} showed another certificate than the pinned one with SHA-256 {wanted} "
            f"({detail}); exchange the certificates again, or somebody is in between"
        )

    def _flush(self) -> None:
        data = memoryview(self._outgoing.read())
        while data:
            try:
                data = data[self._socket.send(data) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)
            except OSError as error:
                raise self._lost(error) from error

    def _read_record(self) -> bytes:
        """One whole TLS record and not a byte more."""
        header = self._read_exactly(_TLS_HEADER)
        length = int.from_bytes(header[3:], "big")
        if header[0] not in _TLS_RECORD_TYPES or header[1] != 3 or length > _MAX_TLS_RECORD:
            raise PeerError(f"{self.peer} does not speak TLS (it sent {header.hex()})")
        return header + self._read_exactly(length)

    def _read_exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                piece = self._socket.recv(count - len(data))
            except BlockingIOError:
                self._wait(select.POLLIN)
                continue
            except OSError as error:
                raise self._lost(error) from error
            if not piece:
                raise PeerLost(f"{self.peer} closed the connection during pre-migration")
            data += piece
        return data

    def _wait(self, events: int) -> None:
        poller = select.poll()
        poller.register(self._socket, events)
        while (left := self._end - monotonic()) > 0:
            if poller.poll(min(left, _STOP_SECONDS) * 1000):
                return
            if (reason := self.stopped()) is not None:
                raise PeerLost(f"pre-migration with {self.peer} was stopped: {reason}")
        raise PeerLost(f"{self.peer} did not finish pre-migration before the deadline")

    def _lost(self, error: OSError) -> PeerLost:
        return PeerLost(f"the connection to {self.peer} broke in pre-migration ({error.strerror})")


def _context(role: Role, identity: Identity, peer_certificate: bytes) -> ssl.SSLContext:
    """TLS 1.3 that trusts the peer's certificate alone, and asks for it on both sides."""
    protocol = ssl.PROTOCOL_TLS_CLIENT if role == "source" else ssl.PROTOCOL_TLS_SERVER
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate itself is pinned, its name means nothing
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=peer_certificate.decode("ascii"))
        with tempfile.TemporaryDirectory(prefix="tdxmig-") as folder:  # 0700, gone after loading
            path = Path(folder) / "identity.pem"
            path.touch(mode=0o600)
            path.write_bytes(identity.private_key + identity.certificate)
            context.load_cert_chain(path)
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"the identity or the peer's certificate cannot be used: {error}"
        ) from error
    return context
