"""Certificates of both sides in one directory, for premigration and for TLS on the stream.

The two have nothing to do with each other.  Premigration speaks for the TDX modules (it stands for
the migration TDs) and pins the one certificate of the peer; TLS on the stream speaks for the hosts,
as in QEMU, and trusts an authority.  Nobody has to use the files made here: any PEM files with
these names will do.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tdxmig_model.errors import UsageError
from tdxmig_model.premigration import Identity, Role, fingerprint, make_identity

LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
"""Names in a server's certificate for connections that stay on one host."""
_VALID_DAYS: Final = 3650
_ROLES: Final[tuple[Role, Role]] = ("source", "destination")


def write_certificates(directory: Path, names: Sequence[str] = ()) -> list[Path]:
    """Make everything that both sides need; the files, those with a private key readable by the
    owner alone.

    source-cert.pem, source-key.pem, destination-cert.pem and destination-key.pem are for
    premigration; ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem and client-key.pem
    for TLS, with the names of QEMU.  ``names`` are host names and addresses of the server beside
    those of one host.  The authority's own key is thrown away, so it can never certify anybody
    else.  UsageError: a file is there already, or cannot be written.
    """
    files: dict[str, bytes] = {}
    for role in _ROLES:
        identity = make_identity(f"tdxmig {role}")
        files[f"{role}-cert.pem"] = identity.certificate
        files[f"{role}-key.pem"] = identity.private_key
    files |= _tls_files([*LOCAL_NAMES, *names])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return [_write(directory / name, data) for name, data in files.items()]
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}") from error


def _write(path: Path, data: bytes) -> Path:
    mode = 0o600 if path.name.endswith("-key.pem") else 0o644
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return path


def load_identity(directory: Path, role: Role) -> tuple[Identity, bytes]:
    """Our identity for premigration, and the certificate (PEM) of the peer.

    UsageError: a file is missing or holds something else.
    """
    peer: Role = "destination" if role == "source" else "source"
    certificate = _read(directory / f"{role}-cert.pem")
    key = _read(directory / f"{role}-key.pem")
    peer_certificate = _read(directory / f"{peer}-cert.pem")
    fingerprint(certificate), fingerprint(peer_certificate)  # refuses what is no certificate
    return Identity(certificate, key), peer_certificate


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; tdxmig identity makes these files, and each "
            "side needs its own two and the certificate of the other"
        ) from error


def _tls_files(names: Sequence[str]) -> dict[str, bytes]:
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("tdxmig authority", authority_key, None, authority_key, [])
    files = {"ca-cert.pem": _pem(authority)}
    for endpoint, alternative in (("server", names), ("client", ())):
        key = ec.generate_private_key(ec.SECP256R1())
        made = _certificate(
            f"tdxmig {endpoint}", key, authority, authority_key, alternative, endpoint
        )
        files[f"{endpoint}-cert.pem"] = _pem(made)
        files[f"{endpoint}-key.pem"] = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    return files


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate | None,
    authority_key: ec.EllipticCurvePrivateKey,
    names: Sequence[str],
    endpoint: str = "",
) -> x509.Certificate:
    """A certificate of ``authority``, or that of the authority itself if there is none yet."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    now = datetime.datetime.now(datetime.UTC)
    ski = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    aki = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if authority is None else authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # the clocks of two hosts differ
        .not_valid_after(now + datetime.timedelta(days=_VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(_key_usage(authority=authority is None), critical=True)
        .add_extension(ski, critical=False)
        .add_extension(aki, critical=False)
    )
    if endpoint:
        server = endpoint == "server"
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        made = made.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if names:
        alternative = x509.SubjectAlternativeName([_general_name(one) for one in names])
        made = made.add_extension(alternative, critical=False)
    return made.sign(authority_key, hashes.SHA256())


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise UsageError(f"{name!r} is neither a host name nor an address") from error


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
