"""What every migration leaf of one session shares: keys at its start, MBMDs, streams.

Facts of TDX module 1.5.01: the working keys rotate and all streams are uninitialised at each start;
an MBMD's MAC covers its first 32 bytes with MIGS_INDEX and IV_COUNTER zero.
"""

from __future__ import annotations

from tdxmig_model.backend.soft.call import Call, refuse
from tdxmig_model.backend.soft.crypto import StreamCipher
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.state import ZERO_KEY, Interrupted, Migsc, MigscLink, Tdcs
from tdxmig_model.backend.soft.status import Status
from tdxmig_model.errors import WireError
from tdxmig_model.wire.constants import MBMD_SIZE
from tdxmig_model.wire.mbmd import BundleType, Mbmd

ANY_EPOCH = -1
"""Saved by leaves whose RESUME does not compare MIG_EPOCH."""


def rotate_keys(call: Call, tdcs: Tdcs) -> None:
    """Session start: keys to working copies, a new encryption key, counters and streams reset.

    Repairs R5 of an import and R15 of an export (hardened): a decryption key that is zero, was used
    before, or is this TD's own encryption key is refused, and nothing has changed.
    """
    known = (
        ZERO_KEY,
        tdcs.mig_dec_working_key,
        tdcs.mig_enc_working_key,
        tdcs.mig_enc_key,
    )
    if call.module.hardened and tdcs.mig_dec_key in known:
        raise refuse(Status.TDX_INVALID_MIGRATION_DECRYPTION_KEY)
    tdcs.mig_enc_working_key = tdcs.mig_enc_key
    tdcs.mig_enc_key = call.fresh_random(32)
    tdcs.mig_dec_working_key = tdcs.mig_dec_key
    forget_decryption_key(tdcs)
    tdcs.mig_working_version = tdcs.mig_version
    tdcs.mig_epoch = 0
    tdcs.total_mb_count = 0
    uninitialize_streams(tdcs)


def forget_decryption_key(tdcs: Tdcs) -> None:
    """MIG_DEC_KEY_SET := 0; a session needs a key that is written from now on."""
    tdcs.mig_dec_key_set = False
    tdcs.mig_dec_key_words.clear()


def uninitialize_streams(tdcs: Tdcs) -> None:
    """INITIALIZED := 0 on all links; their next use sets key and counters again."""
    for link in tdcs.links:
        link.initialized = False


def cipher_of(migsc: Migsc) -> StreamCipher:
    """The cipher of an initialised stream."""
    if migsc.cipher is None:
        raise refuse(Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    return migsc.cipher


def unfinished_memory(link: MigscLink) -> bool:
    """Is an EXPORT.MEM of this stream interrupted and not resumed yet?"""
    record = link.migsc.interrupted
    return link.initialized and record is not None and record.leaf == Leaf.EXPORT_MEM


def write_mbmd(call: Call, hpa: int, mbmd: Mbmd) -> None:
    """Store the 48 bytes into the VMM's buffer."""
    call.memory.bytes[hpa : hpa + MBMD_SIZE] = mbmd.pack()


def read_mbmd(call: Call, hpa: int, kind: BundleType, version: int, index: int) -> Mbmd:
    """Fetch an MBMD once and check size, type, version, stream and reserved fields."""
    raw = bytes(call.memory.bytes[hpa : hpa + MBMD_SIZE])
    try:
        mbmd = Mbmd.unpack(raw)
    except WireError:
        raise refuse(Status.TDX_INVALID_MBMD) from None
    if mbmd.bundle_type is not kind or mbmd.mig_version != version or mbmd.migs_index != index:
        raise refuse(Status.TDX_INVALID_MBMD)
    return mbmd


def begin_new(call: Call, link: MigscLink) -> None:
    """A NEW invocation on this stream: it discards an interrupted one.

    Repair R1 (hardened): an unfinished EXPORT.MEM must be finished; NEW is refused until then.
    """
    if call.module.hardened and unfinished_memory(link):
        raise refuse(Status.TDX_INVALID_RESUMPTION)
    link.migsc.interrupted = None


_SURVIVE_A_WRONG_RESUME = frozenset({Leaf.EXPORT_MEM, Leaf.EXPORT_STATE_IMMUTABLE})


def resume(call: Call, link: MigscLink, operands: tuple[int, ...], tdcs: Tdcs) -> Interrupted:
    """The interrupted call that this RESUME continues, if leaf, operands and epoch are the same.

    The flag is cleared before the comparison, so a RESUME that does not match destroys the
    possibility to resume; with repairs R1 and R4 (hardened) EXPORT.MEM and
    EXPORT.STATE.IMMUTABLE survive it.
    """
    record = link.migsc.interrupted
    if record is None:
        raise refuse(Status.TDX_INVALID_RESUMPTION)
    keep = call.module.hardened and record.leaf in _SURVIVE_A_WRONG_RESUME
    matches = (
        record.leaf == call.leaf
        and record.operands == operands
        and record.mig_epoch in (tdcs.mig_epoch, ANY_EPOCH)
    )
    if matches or not keep:
        link.migsc.interrupted = None
    if not matches:
        raise refuse(Status.TDX_INVALID_RESUMPTION)
    return record
