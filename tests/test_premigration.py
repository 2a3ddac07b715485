"""Do two sides agree on keys, version and session over pinned TLS, and fail clearly otherwise?"""

from __future__ import annotations

import copy
import datetime
import pickle
import socket
import ssl
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Literal

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tdxmig_model import premigration
from tdxmig_model.errors import PeerError, PeerLost, UsageError
from tdxmig_model.premigration import (
    Agreement,
    Identity,
    MigrationKey,
    Versions,
    choose_version,
    exchange,
    fingerprint,
    make_identity,
)

SOURCE_KEY = bytes(range(32))
DESTINATION_KEY = bytes(range(32, 64))

Outcome = Agreement | Exception
ANY_VERSION = Versions()


@pytest.fixture(scope="module")
def identities() -> tuple[Identity, Identity, Identity]:
    return make_identity("source"), make_identity("destination"), make_identity("stranger")


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def run(
    role: Literal["source", "destination"],
    connection: socket.socket,
    identity: Identity,
    peer: bytes,
    key: bytes,
    versions: Versions = ANY_VERSION,
) -> Outcome:
    try:
        return exchange(role, connection, identity, peer, MigrationKey(key), versions, 5.0)
    except (PeerError, UsageError) as error:
        connection.close()
        return error


def both(
    sockets: tuple[socket.socket, socket.socket],
    source: Identity,
    destination: Identity,
    *,
    source_expects: Identity | None = None,
    destination_expects: Identity | None = None,
    source_versions: Versions = ANY_VERSION,
    destination_versions: Versions = ANY_VERSION,
    destination_key: bytes = DESTINATION_KEY,
) -> tuple[Outcome, Outcome]:
    with ThreadPoolExecutor(1) as pool:
        far = pool.submit(
            run,
            "destination",
            sockets[1],
            destination,
            (destination_expects or source).certificate,
            destination_key,
            destination_versions,
        )
        near = run(
            "source",
            sockets[0],
            source,
            (source_expects or destination).certificate,
            SOURCE_KEY,
            source_versions,
        )
        return near, far.result()


def test_each_side_gets_the_others_key_and_both_the_same_session(identities, sockets) -> None:
    near, far = both(sockets, *identities[:2])
    assert isinstance(near, Agreement)
    assert isinstance(far, Agreement)
    assert near.peer_key.take() == DESTINATION_KEY
    assert far.peer_key.take() == SOURCE_KEY
    assert near.session_id == far.session_id
    assert len(near.session_id) == 16
    assert near.version == far.version == 0


def test_the_session_id_is_another_one_each_time(identities) -> None:
    seen = set()
    for _ in range(3):
        pair = socket.socketpair()
        near, _far = both(pair, *identities[:2])
        assert isinstance(near, Agreement)
        seen.add(near.session_id)
        for end in pair:
            end.close()
    assert len(seen) == 3


def test_the_socket_is_clean_for_other_traffic_afterwards(identities, sockets) -> None:
    near, far = both(sockets, *identities[:2])
    assert isinstance(near, Agreement)
    assert isinstance(far, Agreement)
    for sender, receiver in (sockets, sockets[::-1]):
        sender.sendall(b"plain")
        receiver.settimeout(5.0)
        assert receiver.recv(100) == b"plain"


def test_nothing_secret_is_on_the_wire(identities) -> None:
    (near, tap_near), (tap_far, far) = socket.socketpair(), socket.socketpair()
    seen = bytearray()

    def forward(incoming: socket.socket, outgoing: socket.socket) -> None:
        while data := incoming.recv(65536):
            seen.extend(data)
            outgoing.sendall(data)

    pumps = [
        threading.Thread(target=forward, args=ends)
        for ends in ((tap_near, tap_far), (tap_far, tap_near))
    ]
    for pump in pumps:
        pump.start()
    first, second = both((near, far), *identities[:2])
    for end in (near, far):
        end.close()
    for pump in pumps:
        pump.join()
    for end in (tap_near, tap_far):
        end.close()
    assert isinstance(first, Agreement)
    assert isinstance(second, Agreement)
    assert len(seen) > 1000
    for secret in (SOURCE_KEY, DESTINATION_KEY, first.session_id):
        assert secret not in seen


def test_a_destination_with_another_certificate_is_refused(identities, sockets) -> None:
    source, destination, stranger = identities
    near, far = both(sockets, source, stranger, source_expects=destination)
    assert isinstance(near, PeerError)
    assert "another certificate" in str(near)
    assert destination.fingerprint in str(near)
    assert isinstance(far, PeerError)
    assert "refused" in str(far)


def test_a_source_with_another_certificate_is_refused(identities, sockets) -> None:
    source, destination, stranger = identities
    near, far = both(sockets, stranger, destination, destination_expects=source)
    assert isinstance(far, PeerError)
    assert "another certificate" in str(far)
    assert isinstance(near, PeerError)
    assert "exchange the certificates again" in str(near)


def test_a_refused_source_learns_why_even_if_the_destination_closed_before_it_wrote(
    identities, sockets, monkeypatch
) -> None:
    source, destination, stranger = identities
    closed = threading.Event()
    pack = premigration._pack_offer

    def pack_late(*offer):
        closed.wait(5.0)
        return pack(*offer)

    monkeypatch.setattr(premigration, "_pack_offer", pack_late)
    with ThreadPoolExecutor(1) as pool:
        far = pool.submit(
            run, "destination", sockets[1], destination, source.certificate, DESTINATION_KEY
        )
        far.add_done_callback(lambda _: closed.set())
        near = run("source", sockets[0], stranger, destination.certificate, SOURCE_KEY)
    assert isinstance(near, PeerError)
    assert "exchange the certificates again" in str(near)


def issued(
    key: ec.EllipticCurvePrivateKey, name: str, signer: ec.EllipticCurvePrivateKey, issuer: str
) -> Identity:
    """A certificate for `name` by `issuer`, which is an authority if it signs its own."""
    names = {
        text: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer)
    }
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(names[name])
        .issuer_name(names[issuer])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=name == issuer, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Identity(certificate.public_bytes(pem), private)


def test_a_certificate_that_the_pinned_one_issued_is_refused_too(identities, sockets) -> None:
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = issued(authority_key, "authority", authority_key, "authority")
    impostor_key = ec.generate_private_key(ec.SECP256R1())
    impostor = issued(impostor_key, "impostor", authority_key, "authority")
    near, _far = both(sockets, identities[0], impostor, source_expects=authority)
    assert isinstance(near, PeerError)
    assert "another certificate" in str(near)
    assert impostor.fingerprint in str(near)


@pytest.mark.parametrize(
    ("source", "destination", "version"),
    [
        (Versions(), Versions(), 0),
        (Versions(max_export=5), Versions(max_import=3), 3),
        (Versions(min_export=2, max_export=3), Versions(max_import=9), 3),
        (Versions(min_export=3, max_export=4), Versions(max_import=2), None),
        (Versions(max_export=1), Versions(min_import=2, max_import=4), None),
        # What the source imports and the destination exports does not matter.
        (Versions(min_import=7, max_import=8), Versions(min_export=1, max_export=2), 0),
    ],
)
def test_the_version_is_the_highest_of_the_overlap(
    source: Versions, destination: Versions, version: int | None
) -> None:
    assert choose_version(source, destination) == version


def test_versions_that_do_not_overlap_end_it_on_both_sides(identities, sockets) -> None:
    near, far = both(
        sockets,
        *identities[:2],
        source_versions=Versions(min_export=3, max_export=4),
        destination_versions=Versions(max_import=2),
    )
    for outcome in (near, far):
        assert isinstance(outcome, PeerError)
        assert "exports 3 to 4, the destination imports 0 to 2" in str(outcome)


def test_the_higher_version_reaches_both_sides(identities, sockets) -> None:
    near, far = both(
        sockets,
        *identities[:2],
        source_versions=Versions(max_export=4),
        destination_versions=Versions(max_import=2),
    )
    assert isinstance(near, Agreement)
    assert isinstance(far, Agreement)
    assert near.version == far.version == 2


def test_the_same_key_from_both_sides_is_refused(identities, sockets) -> None:
    for outcome in both(sockets, *identities[:2], destination_key=SOURCE_KEY):
        assert isinstance(outcome, PeerError)
        assert "same key" in str(outcome)


def test_a_zero_key_of_the_peer_is_refused(identities, sockets, monkeypatch) -> None:
    pack = premigration._pack_offer

    def pack_without_key(role, versions, nonce, material):
        return pack(role, versions, nonce, bytes(32) if role == "destination" else material)

    monkeypatch.setattr(premigration, "_pack_offer", pack_without_key)
    near, far = both(sockets, *identities[:2])
    assert "zero" in str(near)
    assert isinstance(near, PeerError)
    assert isinstance(far, PeerError)
    assert "refused the pre-migration: the key offered is zero" in str(far)


def test_two_sources_notice_it(identities, sockets) -> None:
    source, destination, _ = identities
    with ThreadPoolExecutor(1) as pool:
        far = pool.submit(
            run, "source", sockets[1], destination, source.certificate, DESTINATION_KEY
        )
        near = run("source", sockets[0], source, destination.certificate, SOURCE_KEY)
        assert isinstance(near, PeerError)
        assert isinstance(far.result(), PeerError)


def test_a_silent_peer_ends_it_at_the_deadline(identities, sockets) -> None:
    source, destination, _ = identities
    started = monotonic()
    key = MigrationKey(SOURCE_KEY)
    with pytest.raises(PeerLost, match="deadline"):
        exchange("source", sockets[0], source, destination.certificate, key, Versions(), 0.1)
    assert monotonic() - started < 2.0
    assert key.taken


def test_a_peer_that_leaves_is_reported_as_lost(identities, sockets) -> None:
    source, destination, _ = identities
    sockets[1].close()
    outcome = run("source", sockets[0], source, destination.certificate, SOURCE_KEY)
    assert isinstance(outcome, PeerLost)


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n" * 40, b"\x16\x03\x01\xff\xff" + bytes(99)]
)
def test_a_peer_that_does_not_speak_tls_is_refused(identities, sockets, noise: bytes) -> None:
    source, destination, _ = identities
    sockets[1].sendall(noise)
    outcome = run("source", sockets[0], source, destination.certificate, SOURCE_KEY)
    assert isinstance(outcome, PeerError)
    assert not isinstance(outcome, PeerLost)


def test_tls_1_2_is_not_spoken_even_with_the_right_certificate(
    identities, sockets, tmp_path
) -> None:
    source, destination, _ = identities
    chain = tmp_path / "identity.pem"
    chain.write_bytes(source.private_key + source.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(chain)
    with ThreadPoolExecutor(1) as pool:
        far = pool.submit(
            run, "destination", sockets[1], destination, source.certificate, DESTINATION_KEY
        )
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(sockets[0])
        assert isinstance(far.result(), PeerError)


def test_a_key_is_taken_once_and_has_no_readable_text() -> None:
    key = MigrationKey(SOURCE_KEY)
    agreement = Agreement(key, 0, bytes(16))
    for text in (repr(key), str(key), repr(agreement)):
        assert "hidden" in text
        assert SOURCE_KEY.hex() not in text
        assert "\\x01" not in text
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UsageError, match="pickled or copied"):
            copying(key)
    assert key.take() == SOURCE_KEY
    with pytest.raises(UsageError, match="used"):
        key.take()
    assert "taken" in repr(key)


@pytest.mark.parametrize("material", [b"", bytes(31), bytes(33), bytes(32)])
def test_a_key_has_32_bytes_that_are_not_zero(material: bytes) -> None:
    with pytest.raises(UsageError, match="key"):
        MigrationKey(material)


@pytest.mark.parametrize("limits", [(1, 0, 0, 0), (0, 0, 5, 4), (-1, 0, 0, 0), (0, 65536, 0, 0)])
def test_impossible_version_ranges_are_refused(limits: tuple[int, int, int, int]) -> None:
    with pytest.raises(UsageError, match="range"):
        Versions(*limits)


def test_an_identity_does_not_show_its_private_key_and_leaves_no_file(
    identities, sockets, tmp_path, monkeypatch
) -> None:
    source, destination, _ = identities
    assert "PRIVATE" not in repr(source)
    assert source.fingerprint == fingerprint(source.certificate) != destination.fingerprint
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    both(sockets, source, destination)
    assert list(tmp_path.iterdir()) == []


def test_something_that_is_no_certificate_is_refused(identities, sockets) -> None:
    outcome = run("source", sockets[0], identities[0], b"not a certificate", SOURCE_KEY)
    assert isinstance(outcome, UsageError)
    assert "certificate" in str(outcome)
