"""Does TLS on the stream let in who it should and nobody else, and tell a cut from an end?"""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from test_transport import certificates, receive_exactly, sockets, with_tls

from tdxmig_model.certificates import load_identity, write_certificates
from tdxmig_model.errors import PeerError, PeerLost, UsageError
from tdxmig_model.transport import SocketTransport, TlsFiles, secure

assert certificates  # a fixture

Result = list[SocketTransport | Exception]


def shake(
    tmp_path: Path, server: TlsFiles, client: TlsFiles, name: str
) -> tuple[SocketTransport | Exception, SocketTransport | Exception]:
    """What both sides, server first, have of a handshake."""
    near, far = sockets("unix", tmp_path)

    def attempt(make: Callable[[], SocketTransport], into: Result) -> None:
        try:
            into.append(make())
        except (PeerError, UsageError) as error:
            into.append(error)

    at_server: Result = []
    at_client: Result = []
    thread = threading.Thread(
        target=attempt, args=(lambda: secure(far, server, server=True, timeout=5.0), at_server)
    )
    thread.start()
    attempt(
        lambda: secure(near, client, server=False, peer_name=name, timeout=5.0),
        at_client,
    )
    if isinstance(at_client[0], SocketTransport):
        # TLS 1.3: the client is done before the server has judged its certificate.
        try:
            at_client[0].recv(1, 0.5)
        except PeerError as error:
            if "deadline" not in str(error):
                at_client[0] = error
    thread.join()
    return at_server[0], at_client[0]


def both(directory: Path) -> tuple[TlsFiles, TlsFiles]:
    return (TlsFiles.in_directory(directory, "server"), TlsFiles.in_directory(directory, "client"))


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
def test_a_server_is_known_by_each_of_its_names(
    tmp_path: Path, certificates: Path, name: str
) -> None:
    ends = shake(tmp_path, *both(certificates), name)
    assert all(isinstance(end, SocketTransport) for end in ends), ends
    for end in ends:
        end.close()  # type: ignore[union-attr]


def test_a_server_of_another_name_is_refused(tmp_path: Path, certificates: Path) -> None:
    at_server, at_client = shake(tmp_path, *both(certificates), "example.org")
    assert isinstance(at_client, PeerError)
    assert "example.org" in str(at_client)
    assert isinstance(at_server, PeerError)


def test_both_sides_refuse_another_authority(tmp_path: Path, certificates: Path) -> None:
    other = tmp_path / "other"
    write_certificates(other)
    server, client = both(certificates)
    strange_server, strange_client = both(other)
    at_server, at_client = shake(tmp_path, strange_server, client, "localhost")
    assert "its certificate is refused" in str(at_client)
    assert "does not accept our certificate" in str(at_server)

    # A client that trusts our authority and shows a certificate of another.
    mixed = TlsFiles(client.authority, strange_client.certificate, strange_client.private_key)
    at_server, at_client = shake(tmp_path, server, mixed, "localhost")
    assert "its certificate is refused" in str(at_server)
    assert isinstance(at_client, PeerError)


def test_a_client_certificate_makes_no_server(tmp_path: Path, certificates: Path) -> None:
    _, client = both(certificates)
    _, at_client = shake(tmp_path, client, client, "localhost")
    assert isinstance(at_client, PeerError)


def test_a_peer_without_tls_is_told_from_one_that_is_silent(
    tmp_path: Path, certificates: Path
) -> None:
    server, _ = both(certificates)
    near, far = sockets("unix", tmp_path)
    near.send([b"no TLS at all, but a plain stream"])
    with pytest.raises(PeerError, match="do both sides use TLS"):
        secure(far, server, server=True, timeout=5.0)
    near.close()
    near, far = sockets("unix", tmp_path)
    with pytest.raises(PeerLost, match="not done before the deadline"):
        secure(far, server, server=True, timeout=0.05)
    near.close()
    near, far = sockets("unix", tmp_path)
    with pytest.raises(PeerLost, match="stopped: enough"):
        secure(far, server, server=True, timeout=5.0, stopped=lambda: "enough")
    near.close()


def test_a_connection_that_is_cut_did_not_end(tmp_path: Path, certificates: Path) -> None:
    near, far = with_tls(*sockets("unix", tmp_path), certificates)
    near.send([b"half of it"])
    near._socket.close()  # as a process that dies: no word of TLS about the end
    assert receive_exactly(far, 10) == b"half of it"
    with pytest.raises(PeerLost, match="broke"):
        far.recv(1, 5.0)
    far.close()


def test_nothing_on_the_wire_can_be_read(tmp_path: Path, certificates: Path) -> None:
    near, far = with_tls(*sockets("unix", tmp_path), certificates)
    near.send([b"a page of a TD" * 100])
    with socket.socket(fileno=os.dup(far.fileno())) as wire:
        seen = wire.recv(4096, socket.MSG_PEEK)
    assert len(seen) > 1400
    assert b"page" not in seen
    assert far.peek(14) == b"a page of a TD"
    assert receive_exactly(far, 1400) == b"a page of a TD" * 100
    assert near._socket.version() == "TLSv1.3"
    near.close()
    far.close()


def test_unusable_files_are_the_callers_problem(tmp_path: Path, certificates: Path) -> None:
    server, client = both(certificates)
    with pytest.raises(UsageError, match="no file"):
        TlsFiles.in_directory(tmp_path, "server").context(server=True)
    mixed = TlsFiles(server.authority, server.certificate, client.private_key)
    with pytest.raises(UsageError, match="no PEM key of the certificate"):
        mixed.context(server=True)
    rubbish = tmp_path / "ca.pem"
    rubbish.write_text("nothing")
    with pytest.raises(UsageError, match="no PEM certificate"):
        TlsFiles(rubbish, server.certificate, server.private_key).context(server=True)


def test_an_encrypted_key_is_refused_without_asking(tmp_path: Path, certificates: Path) -> None:
    server, _ = both(certificates)
    key = serialization.load_pem_private_key(server.private_key.read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(UsageError, match="is encrypted"):
        TlsFiles(server.authority, server.certificate, locked).context(server=True)


def test_private_keys_are_private_and_files_are_never_replaced(tmp_path: Path) -> None:
    files = write_certificates(tmp_path / "keys", ["td.example.org", "192.0.2.7"])
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    assert {name for name, mode in modes.items() if mode == 0o600} == {
        *("source-key.pem", "destination-key.pem", "server-key.pem", "client-key.pem")
    }
    before = (tmp_path / "keys" / "source-key.pem").read_bytes()
    with pytest.raises(UsageError, match="File exists"):
        write_certificates(tmp_path / "keys")
    assert (tmp_path / "keys" / "source-key.pem").read_bytes() == before
    text = ssl._ssl._test_decode_cert(str(tmp_path / "keys" / "server-cert.pem"))  # type: ignore[attr-defined]
    assert ("DNS", "td.example.org") in text["subjectAltName"]
    assert ("IP Address", "192.0.2.7") in text["subjectAltName"]


def test_an_identity_needs_the_certificate_of_the_peer(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    write_certificates(keys)
    identity, peer = load_identity(keys, "source")
    theirs, ours = load_identity(keys, "destination")
    assert (theirs.certificate, ours) == (peer, identity.certificate)
    (keys / "destination-cert.pem").write_text("nothing")
    with pytest.raises(UsageError, match="no PEM certificate"):
        load_identity(keys, "source")
    (keys / "destination-cert.pem").unlink()
    with pytest.raises(UsageError, match=r"destination-cert\.pem"):
        load_identity(keys, "source")
    with pytest.raises(UsageError, match="neither a host name nor an address"):
        write_certificates(tmp_path / "more", ["é"])
