"""Service TD leaves: binding a Migration TD, and its access to keys and version of the target TD.

Facts of TDX module 1.5.01 (public source): TDH.SERVTD.PREBIND, TDH.SERVTD.BIND, TDG.SERVTD.RD and
TDG.SERVTD.WR.  A Migration TD sees every metadata field that it may read but CPUID values.
"""

from __future__ import annotations

from tdxmig_model.backend.soft.call import Call, Steps, refuse
from tdxmig_model.backend.soft.leaves_run import GuestCall
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.memory import PageType
from tdxmig_model.backend.soft.op_state import (
    INTERRUPTED_START,
    SERVTD_BIND_SERVICE_TD,
    SERVTD_RD_TARGET,
    SERVTD_WR_TARGET,
    OpState,
)
from tdxmig_model.backend.soft.sept import HPA_MASK
from tdxmig_model.backend.soft.servtd import (
    INSTANCE_BINDING,
    SERVTD_ATTRIBUTES_FIXED_0,
    SERVTD_TYPE_MIGTD,
    break_handle,
    make_handle,
    tdinfo_hash,
)
from tdxmig_model.backend.soft.session import forget_decryption_key
from tdxmig_model.backend.soft.state import ZERO_KEY, BindingState, Tdcs, Tdr, Uuid
from tdxmig_model.backend.soft.status import Operand, Status

MIG_DEC_KEY_SET = 0x9810_0000_0000_0001
EXPORT_COUNT = 0x9810_0002_0000_0002
IMPORT_COUNT = 0x9810_0002_0000_0003
MIG_DEC_KEY = 0x9810_0003_0000_0010
MIG_DEC_WORKING_KEY = 0x9810_0003_0000_0014
MIG_ENC_KEY = 0x9810_0003_0000_0018
MIG_ENC_WORKING_KEY = 0x9810_0003_0000_001C
MIG_VERSION = 0x9810_0001_0000_0020
MIG_WORKING_VERSION = 0x9810_0001_0000_0021
TD_UUID = 0x8010_0003_0000_0020
PRE_IMPORT_UUID = 0x9810_0003_0000_0040
KEY_ELEMENTS = 4
KEY_SIZE = 32
MAX_MIG_VERSION = 0
U64 = 0xFFFF_FFFF_FFFF_FFFF
NULL_FIELD = U64
CONTEXT_MASK, TD_CONTEXT = 7 << 52, 1 << 52
"""Bits 54:52 of a field id: what it is a field of."""
MIG_VERSION_MASK = 0xFFFF

_TDCS_FIELDS: dict[int, tuple[str, int]] = {
    0x9010_0001_0000_0005: ("NUM_L2_VMS", U64),
    0x1110_0003_0000_0000: ("ATTRIBUTES", U64),
    0x1110_0003_0000_0001: ("XFAM", U64),
    0x1110_0000_0000_0003: ("GPAW", U64),
    0x1110_0003_0000_0004: ("EPTP", ~HPA_MASK & U64),
    0x1110_0003_0000_0016: ("CONFIG_FLAGS", U64),
    **{0x9910_0003_0000_0000 + word: ("SERVTD_HASH", U64) for word in range(6)},
    0x9910_0001_0000_0006: ("SERVTD_NUM", U64),
}
"""Fields that are kept by name, and which of their bits can be read."""
_READABLE = (
    *((TD_UUID, 4), *((field, 1) for field in list(_TDCS_FIELDS)[:6])),
    *((EXPORT_COUNT, 1), (IMPORT_COUNT, 1), (MIG_DEC_KEY, 4), (MIG_DEC_WORKING_KEY, 4)),
    *((MIG_ENC_KEY, 4), (MIG_ENC_WORKING_KEY, 4), (MIG_VERSION, 1), (MIG_WORKING_VERSION, 1)),
    *((PRE_IMPORT_UUID, 4), *((field, 1) for field in list(_TDCS_FIELDS)[6:])),
)
"""First element and number of elements of each field that a Migration TD can read, in order."""
_ELEMENTS = tuple(first + number for first, count in _READABLE for number in range(count))
_NEXT = dict(zip((NULL_FIELD, *_ELEMENTS), (*_ELEMENTS, NULL_FIELD), strict=True))
"""Element -> the next one; the null field id is before the first and after the last."""


def servtd_prebind(call: Call) -> Steps[int]:
    """TDH.SERVTD.PREBIND (49, TDX module 1.5.01): say which service TD may be bound later.

    In: RCX TDR; RDX HPA of its TDINFO hash; R8 slot; R9 type; R10 attributes.
    Status: the prologue's; OPERAND_INVALID|RDX, |R8, |R9, |R10; BUSY|SERVTD_BINDINGS;
        SERVTD_BOUND.
    Source: tdh_servtd_prebind.c.
    """
    registers = call.registers
    _, tdcs = yield from call.enter_td(Operand.RCX, registers.rcx, Mode.SHARED, Mode.SHARED)
    if not call.memory.shared_ok(registers.rdx, 64, 64):
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RDX)
    _check_slot(call, registers.r10)
    yield from call.take(tdcs.bindings_lock, Mode.EXCLUSIVE, Operand.SERVTD_BINDINGS)
    binding = tdcs.binding
    if binding.state is BindingState.BOUND:
        raise refuse(Status.TDX_SERVTD_BOUND)
    binding.servtd_type, binding.attributes = registers.r9, registers.r10
    binding.info_hash = bytes(call.memory.bytes[registers.rdx : registers.rdx + 48])
    binding.state = BindingState.PRE_BOUND
    return Status.TDX_SUCCESS


def _check_slot(call: Call, attributes: int) -> None:
    registers = call.registers
    if registers.r8:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.R8)
    if registers.r9 != SERVTD_TYPE_MIGTD:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.R9)
    if attributes & ~SERVTD_ATTRIBUTES_FIXED_0:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.R10)


def servtd_bind(call: Call) -> Steps[int]:
    """TDH.SERVTD.BIND (48, TDX module 1.5.01): bind a service TD.

    In: RCX target TDR; RDX service TDR; R8 slot; R9 type; R10 attributes.
    Out: RCX binding handle; R10 to R13 the target's UUID; all 0 if it fails.
    Status: the prologue's of both TDs; OPERAND_INVALID|RDX, |R8, |R9, |R10;
        BUSY|SERVTD_BINDINGS; SERVTD_TYPE_MISMATCH; SERVTD_ATTR_MISMATCH; SERVTD_UUID_MISMATCH;
        SERVTD_INFO_HASH_MISMATCH.
    Source: tdh_servtd_bind.c.
    """
    registers, module = call.registers, call.module
    target_hpa, servtd_hpa, attributes = registers.rcx, registers.rdx, registers.r10
    registers.rcx = registers.r10 = registers.r11 = registers.r12 = registers.r13 = 0
    if target_hpa == servtd_hpa:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RDX)
    tdr, tdcs = yield from call.enter_td(Operand.RCX, target_hpa, Mode.SHARED, Mode.SHARED)
    yield from call.take_page(servtd_hpa, Operand.RDX, Mode.SHARED, PageType.TDR)
    service = module.tdrs[servtd_hpa]
    service_tdcs = yield from call.enter_tdcs(service, Mode.SHARED, SERVTD_BIND_SERVICE_TD)
    _check_slot(call, attributes)
    yield from call.take(tdcs.bindings_lock, Mode.EXCLUSIVE, Operand.SERVTD_BINDINGS)
    _bind(call, tdcs, service.uuid, attributes, tdinfo_hash(service_tdcs, attributes))
    registers.rcx = make_handle(service.uuid, target_hpa, 0)
    registers.r10, registers.r11, registers.r12, registers.r13 = tdr.uuid
    return Status.TDX_SUCCESS


def _bind(call: Call, tdcs: Tdcs, uuid: Uuid, attributes: int, info_hash: bytes) -> None:
    binding, registers = tdcs.binding, call.registers
    if binding.state is BindingState.NOT_BOUND:
        if tdcs.op_state not in (OpState.UNINITIALIZED, OpState.INITIALIZED):
            raise refuse(Status.TDX_OP_STATE_INCORRECT)
        binding.servtd_type, binding.attributes = registers.r9, attributes
        binding.info_hash = info_hash
    elif binding.servtd_type != registers.r9:
        raise refuse(Status.TDX_SERVTD_TYPE_MISMATCH)
    elif binding.attributes != attributes:
        raise refuse(Status.TDX_SERVTD_ATTR_MISMATCH)
    elif binding.state is BindingState.BOUND and binding.attributes & INSTANCE_BINDING:
        if binding.uuid != uuid:
            raise refuse(Status.TDX_SERVTD_UUID_MISMATCH)
        binding.info_hash = info_hash
    elif binding.info_hash != info_hash:
        raise refuse(Status.TDX_SERVTD_INFO_HASH_MISMATCH)
    binding.uuid = uuid
    binding.state = BindingState.BOUND


def servtd_read(call: GuestCall) -> Steps[int]:
    """TDG.SERVTD.RD (18, TDX module 1.5.01): read a field of the TD that the caller serves.

    In: RCX binding handle; RDX field id, whatever its context code, or the null id (all ones);
        R10 to R13 target UUID.
    Out: R8 the value; RDX the next field id, of the null id the first, null after the last or if
        it fails; R10 to R13 the UUID if it was updated.
    Status: OPERAND_INVALID|RCX; page and BUSY of TDR; OP_STATE_INCORRECT; TARGET_UUID_MISMATCH;
        TARGET_UUID_UPDATED; BUSY|SERVTD_BINDINGS; SERVTD_NOT_BOUND; SERVTD_UUID_MISMATCH;
        SERVTD_INFO_HASH_MISMATCH; METADATA_FIRST_FIELD_ID_IN_CONTEXT; METADATA_FIELD_ID_INCORRECT;
        METADATA_FIELD_NOT_READABLE; RND_NO_ENTROPY.
    Source: tdg_servtd_rd_wr.c.
    """
    registers = call.registers
    field = _in_td(registers.rdx)
    registers.r8, registers.rdx = 0, NULL_FIELD
    tdr, tdcs = yield from _target(call, SERVTD_RD_TARGET | INTERRUPTED_START)
    if field == NULL_FIELD:
        registers.rdx = _NEXT[NULL_FIELD]
        return Status.TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT
    registers.r8 = _read_field(call, tdr, tdcs, field)
    registers.rdx = _NEXT[field]
    return Status.TDX_SUCCESS


def _in_td(field: int) -> int:
    """The field id as one of the TD; the null id stays."""
    if field | CONTEXT_MASK == NULL_FIELD:
        return NULL_FIELD
    return field & ~CONTEXT_MASK | TD_CONTEXT


def servtd_write(call: GuestCall) -> Steps[int]:
    """TDG.SERVTD.WR (20, TDX module 1.5.01): write a field of the TD that the caller serves.

    In: operands of TDG.SERVTD.RD; R8 value; R9 write mask.
    Out: R8 the old value; R10 to R13 the UUID if it was updated.
    Status: those of TDG.SERVTD.RD up to SERVTD_INFO_HASH_MISMATCH; METADATA_FIELD_ID_INCORRECT;
        METADATA_FIELD_NOT_WRITABLE, also if the mask leaves nothing to write;
        METADATA_FIELD_VALUE_NOT_VALID.
    Source: tdg_servtd_rd_wr.c.
    """
    registers = call.registers
    value, mask, field = registers.r8, registers.r9, _in_td(registers.rdx)
    registers.r8 = 0
    _, tdcs = yield from _target(call, SERVTD_WR_TARGET | INTERRUPTED_START)
    registers.r8 = _write_field(call, tdcs, field, value, mask)
    return Status.TDX_SUCCESS


def _target(call: GuestCall, allowed: frozenset[OpState]) -> Steps[tuple[Tdr, Tdcs]]:
    """The checks of an access: handle, TD, OP_STATE, UUID, binding, caller's UUID and hash.

    What hardware answers with a cross-TD trap to the VMM ends the call with that status here.
    """
    registers, caller = call.registers, call.tdr
    target_hpa, slot = break_handle(registers.rcx, caller.uuid)
    if slot:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RCX)
    yield from call.take_page(target_hpa, Operand.TDR, Mode.SHARED, PageType.TDR)
    tdr = call.module.tdrs[target_hpa]
    tdcs = yield from call.enter_tdcs(tdr, Mode.SHARED, allowed)
    wanted = (registers.r10, registers.r11, registers.r12, registers.r13)
    if wanted != tdr.uuid:
        if wanted != tdcs.pre_import_uuid:
            raise refuse(Status.TDX_TARGET_UUID_MISMATCH)
        registers.r10, registers.r11, registers.r12, registers.r13 = tdr.uuid
        raise refuse(Status.TDX_TARGET_UUID_UPDATED)
    yield from call.take(tdcs.bindings_lock, Mode.SHARED, Operand.SERVTD_BINDINGS)
    binding = tdcs.binding
    if binding.state is not BindingState.BOUND:
        raise refuse(Status.TDX_SERVTD_NOT_BOUND)
    if binding.uuid != caller.uuid:
        raise refuse(Status.TDX_SERVTD_UUID_MISMATCH)
    if binding.info_hash != tdinfo_hash(call.tdcs, binding.attributes):
        raise refuse(Status.TDX_SERVTD_INFO_HASH_MISMATCH)
    return tdr, tdcs


def _key_word(key: bytes, element: int) -> int:
    return int.from_bytes(key[8 * element : 8 * element + 8], "little")


def _read_field(call: GuestCall, tdr: Tdr, tdcs: Tdcs, field: int) -> int:
    if field == MIG_DEC_KEY_SET:
        raise refuse(Status.TDX_METADATA_FIELD_NOT_READABLE)
    if field in _TDCS_FIELDS:
        name, mask = _TDCS_FIELDS[field]
        stored = tdcs.fields[name]
        return (stored if isinstance(stored, int) else stored[field & 0x7]) & mask
    for first, uuid in ((TD_UUID, tdr.uuid), (PRE_IMPORT_UUID, tdcs.pre_import_uuid)):
        if first <= field < first + len(uuid):
            return uuid[field - first]
    scalars = {
        EXPORT_COUNT: tdcs.export_count,
        IMPORT_COUNT: tdcs.import_count,
        MIG_VERSION: tdcs.mig_version,
        MIG_WORKING_VERSION: tdcs.mig_working_version,
    }
    if field in scalars:
        return scalars[field]
    if field == MIG_ENC_KEY:
        # Reading its first element makes a fresh key; the other elements return the rest of it.
        _renew_encryption_key(call, tdcs)
    keys = {
        MIG_ENC_KEY: tdcs.mig_enc_key,
        MIG_DEC_KEY: tdcs.mig_dec_key,
        MIG_ENC_WORKING_KEY: tdcs.mig_enc_working_key,
        MIG_DEC_WORKING_KEY: tdcs.mig_dec_working_key,
    }
    for first, key in keys.items():
        if first <= field < first + KEY_ELEMENTS:
            return _key_word(key, field - first)
    raise refuse(Status.TDX_METADATA_FIELD_ID_INCORRECT)


def _renew_encryption_key(call: GuestCall, tdcs: Tdcs) -> None:
    """A fresh MIG_ENC_KEY; without entropy it is all zero.

    Repair R6 (hardened): a decryption key that came before belongs to another exchange and is
    forgotten; without entropy the key that was there stays.
    """
    hardened = call.module.hardened
    drawn = call.module.draw(KEY_SIZE)
    if drawn is None:
        tdcs.mig_enc_key = tdcs.mig_enc_key if hardened else ZERO_KEY
        raise refuse(Status.TDX_RND_NO_ENTROPY)
    tdcs.mig_enc_key = drawn
    if hardened:
        forget_decryption_key(tdcs)


def _write_field(call: GuestCall, tdcs: Tdcs, field: int, value: int, mask: int) -> int:
    if field not in _ELEMENTS and field != MIG_DEC_KEY_SET:
        raise refuse(Status.TDX_METADATA_FIELD_ID_INCORRECT)
    if field == MIG_VERSION and mask & MIG_VERSION_MASK:
        old = tdcs.mig_version
        new = old & ~mask | value & mask
        if new > MAX_MIG_VERSION:
            raise refuse(Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)
        tdcs.mig_version = new
        return old
    if MIG_DEC_KEY <= field < MIG_DEC_KEY + KEY_ELEMENTS and mask:
        return _write_key_word(call, tdcs, field - MIG_DEC_KEY, value, mask)
    raise refuse(Status.TDX_METADATA_FIELD_NOT_WRITABLE)


def _write_key_word(call: GuestCall, tdcs: Tdcs, element: int, value: int, mask: int) -> int:
    """One of the four words of MIG_DEC_KEY; any of them sets MIG_DEC_KEY_SET.

    Repair R7 (hardened): it takes all four, each written whole and none twice since the last time.
    """
    old = _key_word(tdcs.mig_dec_key, element)
    word = (old & ~mask | value & mask) & U64
    key = bytearray(tdcs.mig_dec_key)
    key[8 * element : 8 * element + 8] = word.to_bytes(8, "little")
    tdcs.mig_dec_key = bytes(key)
    words = tdcs.mig_dec_key_words
    if element in words:
        words.clear()
    if mask == U64:
        words.add(element)
    tdcs.mig_dec_key_set = len(words) == KEY_ELEMENTS or not call.module.hardened
    return old
