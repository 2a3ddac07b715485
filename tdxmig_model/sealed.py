"""Pre-migration without a conversation: keys sealed for a destination that comes later.

A TD that is stored in a file needs its migration key where it is loaded, and nobody is there to
exchange it with.  The source seals the key for the certificate of the destination and signs it.
This is weaker than `premigration`: the destination adds nothing of its own, so nothing but a note
on its host keeps it from loading a file twice; and no abort token of it could ever be checked by
the source, which has no key of the destination.

Layout, big-endian: magic (8), lengths of point, box and signature (3 x 2); the point of an
ephemeral P-256 key (uncompressed); AES-256-GCM of session id (16), version range (4 x 2) and key
(32); ECDSA-SHA256 of the source over everything before.  The box has a key of its own, HKDF-SHA256
of the ECDH secret with both certificates, so its nonce is zero.
"""

from __future__ import annotations

import secrets
import struct
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tdxmig_model.errors import PeerError, UsageError
from tdxmig_model.premigration import (
    KEY_SIZE,
    SESSION_ID_SIZE,
    Agreement,
    Identity,
    MigrationKey,
    Versions,
    choose_version,
    fingerprint,
)

_MAGIC: Final = b"tdxmigS1"
_HEAD: Final = struct.Struct(">8sHHH")
_BODY: Final = struct.Struct(f">{SESSION_ID_SIZE}sHHHH{KEY_SIZE}s")
_NONCE: Final = bytes(12)
_LONGEST: Final = 1024


def seal(
    identity: Identity,
    destination_certificate: bytes,
    local_key: MigrationKey,
    versions: Versions,
) -> tuple[bytes, bytes]:
    """The sealed key, and the 16-byte id of the session.  ``local_key`` is used up.

    UsageError: an identity or certificate that has no P-256 key.
    """
    session_id = secrets.token_bytes(SESSION_ID_SIZE)
    ephemeral = ec.generate_private_key(ec.SECP256R1())
    point = _point(ephemeral.public_key())
    key = _box_key(
        ephemeral,
        _public_key(destination_certificate),
        identity.certificate,
        destination_certificate,
        point,
    )
    body = _BODY.pack(
        session_id,
        versions.min_export,
        versions.max_export,
        versions.min_import,
        versions.max_import,
        local_key.take(),
    )
    box = AESGCM(key).encrypt(_NONCE, body, _MAGIC)
    signed = _MAGIC + point + box
    signature = _private_key(identity).sign(signed, ec.ECDSA(hashes.SHA256()))
    head = _HEAD.pack(_MAGIC, len(point), len(box), len(signature))
    return head + point + box + signature, session_id


def unseal(
    data: bytes, identity: Identity, source_certificate: bytes, versions: Versions
) -> Agreement:
    """What the source sealed for us.

    PeerError: it is damaged, of another source, for another destination, or of a version that we
    cannot import.
    """
    point, box, signature = _split(data)
    try:
        _public_key(source_certificate).verify(
            signature, _MAGIC + point + box, ec.ECDSA(hashes.SHA256())
        )
        public = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        key = _box_key(
            _private_key(identity), public, source_certificate, identity.certificate, point
        )
        body = AESGCM(key).decrypt(_NONCE, box, _MAGIC)
    except InvalidSignature:
        raise PeerError(
            "the sealed key is not signed by the source with SHA-256 "
            f"{fingerprint(source_certificate)}, or it was changed"
        ) from None
    except (InvalidTag, ValueError):
        raise PeerError(
            f"the sealed key is for another destination than ours, {identity.fingerprint}"
        ) from None
    session_id, *ranges, material = _BODY.unpack(body)
    version = choose_version(Versions(*ranges), versions)
    if version is None:
        raise PeerError(
            f"no migration version in common: the source exports {ranges[0]} to {ranges[1]}, the "
            f"destination imports {versions.min_import} to {versions.max_import}"
        )
    return Agreement(MigrationKey(material), version, session_id)


def _split(data: bytes) -> tuple[bytes, bytes, bytes]:
    if len(data) < _HEAD.size or not data.startswith(_MAGIC):
        raise PeerError("these are no sealed keys of tdxmig")
    lengths = _HEAD.unpack_from(data)[1:]
    if len(data) > _LONGEST or len(data) != _HEAD.size + sum(lengths):
        raise PeerError(f"the sealed key has {len(data)} bytes, which are not what it announces")
    parts, at = [], _HEAD.size
    for length in lengths:
        parts.append(data[at : at + length])
        at += length
    return parts[0], parts[1], parts[2]


def _box_key(
    private: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    source_certificate: bytes,
    destination_certificate: bytes,
    point: bytes,
) -> bytes:
    parties = fingerprint(source_certificate) + fingerprint(destination_certificate)
    return HKDF(
        algorithm=hashes.SHA256(), length=32, salt=None, info=_MAGIC + parties.encode() + point
    ).derive(private.exchange(ec.ECDH(), public))


def _point(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(
        serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
    )


def _public_key(certificate: bytes) -> ec.EllipticCurvePublicKey:
    key = x509.load_pem_x509_certificate(certificate).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError("keys can be sealed for and by P-256 certificates only")
    return key


def _private_key(identity: Identity) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(identity.private_key, None)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the private key of our identity cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UsageError("keys can be sealed for and by P-256 certificates only")
    return key
