"""Do the cipher of a stream and the leaves give specs/crypto_vectors.json, byte for byte?"""

import hashlib
import json
from pathlib import Path

import legal_calls as legal
import pytest

from tdxmig_model.backend.soft.crypto import StreamCipher
from tdxmig_model.backend.soft.status import Status

SPECS = Path(__file__).resolve().parent.parent / "specs"
VECTORS = json.loads((SPECS / "crypto_vectors.json").read_text())
KEY = bytes.fromhex(VECTORS["key_hex"])
PAGE = bytes(range(256)) * 16
MBMDS = {vector["name"]: vector for vector in VECTORS["mbmd"]}
ENTRIES = VECTORS["mem_bundle_pages"]
CONTENT = [vector for vector in ENTRIES if vector["plaintext"]]
NO_CONTENT = [vector for vector in ENTRIES if not vector["plaintext"]]
STATE = VECTORS["state_bundle_td"]


def told(vector):
    """Cipher, IV_COUNTER, AAD and MAC of a vector; the IV says which stream it is."""
    iv = bytes.fromhex(vector["iv"])
    cipher = StreamCipher(KEY, int.from_bytes(iv[8:10], "little"))
    counter = int.from_bytes(iv[:8], "little")
    assert cipher.iv(counter) == iv
    return cipher, counter, bytes.fromhex(vector["aad"]), bytes.fromhex(vector["mac"])


def entry_id(vector):
    return f"{vector['entry']} {vector['operation']}"


def test_there_are_vectors_of_every_kind():
    assert MBMDS
    assert CONTENT
    assert NO_CONTENT


@pytest.mark.parametrize("vector", [*MBMDS.values(), *NO_CONTENT], ids=lambda v: v["mac"][:8])
def test_a_tag_without_content(vector):
    cipher, counter, aad, mac = told(vector)
    assert cipher.tag(counter, aad) == mac
    assert cipher.tag_ok(counter, aad, mac)
    assert not cipher.tag_ok(counter + 1, aad, mac)
    assert not cipher.tag_ok(counter, aad, bytes([mac[0] ^ 1]) + mac[1:])


@pytest.mark.parametrize("vector", CONTENT, ids=entry_id)
def test_a_page(vector):
    cipher, counter, aad, mac = told(vector)
    sealed = bytes(cipher.encrypt_page(counter, aad, memoryview(PAGE)))
    assert sealed[4096:] == mac
    assert sealed[:16].hex() == vector["ciphertext_first16"]
    assert hashlib.sha256(sealed[:4096]).hexdigest() == vector["ciphertext_sha256"]
    target = bytearray(4096)
    cipher.slot[:] = sealed
    assert cipher.decrypt_page(counter, aad, memoryview(target))
    assert target == PAGE


def test_a_state_bundle():
    cipher, counter, aad, mac = told(STATE)
    pages = [PAGE, bytes(4096)]
    context = cipher.start_encryption(counter, aad)
    sealed = [context.update(page) for page in pages]
    context.finalize()
    assert context.tag == mac
    assert hashlib.sha256(b"".join(sealed)).hexdigest() == STATE["ciphertext_sha256"]
    back = cipher.start_decryption(counter, aad)
    assert [back.update(page) for page in sealed] == pages
    back.finalize_with_tag(mac)


# --- through leaves ------------------------------------------------------------------------------


def give_key(tdcs, link, vector, total_mb_count):
    """Injected: the key of the vectors, and the counters that make this token the next one."""
    cipher, counter, _, _ = told(vector)
    link.migsc.cipher, link.migsc.iv_counter = cipher, counter - 1
    link.initialized = True
    tdcs.total_mb_count = total_mb_count


def token_left(scene):
    """The MBMD that the call writes."""
    assert scene.status() & ~(1 << 61) == Status.TDX_SUCCESS
    return scene.buffers.read_mbmd().hex()


def test_export_track_writes_the_start_token():
    scene, vector = legal.start_track(), MBMDS["start token (EPOCH_TOKEN)"]
    give_key(scene.tdcs, scene.tdcs.links[1], vector, total_mb_count=11)
    assert token_left(scene) == vector["mbmd_bytes"]


def test_import_abort_writes_the_abort_token():
    scene, vector = legal.import_abort(), MBMDS["abort token"]
    give_key(scene.tdcs, scene.tdcs.links[0], vector, total_mb_count=0)
    assert token_left(scene) == vector["mbmd_bytes"]
