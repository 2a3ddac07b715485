"""Who has which migration key: what the exchange between the Migration TDs comes to.

The model says of keys only that those of the observed session are fresh and that its destination
has them.  So both ends of that session get one pair of keys when they begin it; every other session
of the source has keys that nobody else has.
"""

from __future__ import annotations

import hashlib

from tdxmig_model.backend.soft.crypto import StreamCipher
from tdxmig_model.conformance.side import Side
from tdxmig_model.wire.mbmd import Mbmd

FORWARD = hashlib.sha256(b"observed session, forward").digest()
BACKWARD = hashlib.sha256(b"observed session, backward").digest()


def key_of(number: int) -> bytes:
    """The key that the Migration TD of the source writes the n-th time."""
    return hashlib.sha256(f"peer key {number}".encode()).digest()


def begin_observed(source: Side) -> None:
    """What the exchange before the observed session left in the source's TD."""
    if source.tdcs.mig_dec_key_set:
        source.tdcs.mig_enc_key, source.tdcs.mig_dec_key = FORWARD, BACKWARD


def begin_import(destination: Side) -> None:
    """What the same exchange left in the destination's TD, besides the key that was written."""
    destination.tdcs.mig_enc_key = BACKWARD


def abort_token(key: bytes) -> bytes:
    """An abort token under a key, 48 bytes."""
    token = Mbmd.abort_token(mb_counter=0, iv_counter=1)
    return token.with_mac(StreamCipher(key, 0).tag(1, token.aad())).pack()


def memory_bundle(epoch: int, counter: int, stream: int, iv_counter: int) -> bytes:
    """The MBMD of a bundle of one entry under the forward key, 48 bytes."""
    mbmd = Mbmd.memory(
        num_gpas=1, mb_counter=counter, mig_epoch=epoch, iv_counter=iv_counter, migs_index=stream
    )
    return mbmd.with_mac(StreamCipher(FORWARD, stream).tag(iv_counter, mbmd.aad())).pack()
