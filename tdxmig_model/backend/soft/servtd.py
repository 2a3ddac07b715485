"""Service TD binding arithmetic: TDINFO hash, SERVTD_HASH, binding handles, the bindings table.

Facts of TDX module 1.5.01 (public source), for its one binding slot and its one type, Migration TD.
"""

from __future__ import annotations

import hashlib
import struct

from tdxmig_model.backend.soft.metadata import Value
from tdxmig_model.backend.soft.state import Binding, BindingState, Tdcs, Uuid

SERVTD_TYPE_MIGTD = 0
SERVTD_ATTRIBUTES_FIXED_0 = 0x0000_07FF_0000_0001
INSTANCE_BINDING = 1
U64 = 0xFFFF_FFFF_FFFF_FFFF

# ATTRIBUTES, XFAM, MRTD, MRCONFIGID, MROWNER, MROWNERCONFIG, RTMR[4], SERVTD_HASH, reserved.
_TDINFO = struct.Struct("<QQ48s48s48s48s192s48s64s")
_IGNORED = ("ATTRIBUTES", "XFAM", "MRTD", "MRCONFIGID", "MROWNER", "MROWNERCONFIG")
_BINDING = struct.Struct("<BxHxxxxQ32s48s32x")


def _bytes(value: Value) -> bytes:
    words = (value,) if isinstance(value, int) else value
    return struct.pack(f"<{len(words)}Q", *words)


def tdinfo_hash(tdcs: Tdcs, attributes: int) -> bytes:
    """SHA-384 of TDINFO_STRUCT; SERVTD_ATTR bits 47:32 name the parts that count as zero."""
    ignored = attributes >> 32 & 0x7FF
    parts: list[bytes | int] = []
    for bit, name in enumerate(_IGNORED):
        raw = _bytes(tdcs.fields[name])
        raw = bytes(len(raw)) if ignored >> bit & 1 else raw
        parts.append(int.from_bytes(raw, "little") if bit < 2 else raw)
    rtmrs = _bytes(tdcs.fields["RTMR"])
    kept = [b"" if ignored >> 6 + i & 1 else rtmrs[48 * i : 48 * i + 48] for i in range(4)]
    parts.append(b"".join(rtmr.ljust(48, b"\0") for rtmr in kept))
    parts.append(bytes(48) if ignored >> 10 & 1 else _bytes(tdcs.fields["SERVTD_HASH"]))
    return hashlib.sha384(_TDINFO.pack(*parts, b"")).digest()


def servtd_hash(binding: Binding) -> tuple[int, ...]:
    """SERVTD_HASH over the bound or pre-bound service TD; zeros without one."""
    if binding.state is BindingState.NOT_BOUND:
        return (0,) * 6
    raw = binding.info_hash + struct.pack("<HQ", binding.servtd_type, binding.attributes)
    return struct.unpack("<6Q", hashlib.sha384(raw).digest())


def make_handle(servtd_uuid: Uuid, tdr_hpa: int, slot: int) -> int:
    """Binding handle: slot 11:0, TDR page 51:12, plus the first word of the service TD's UUID."""
    return (tdr_hpa | slot) + servtd_uuid[0] & U64


def break_handle(handle: int, servtd_uuid: Uuid) -> tuple[int, int]:
    """(TDR HPA, slot) of a binding handle."""
    raw = handle - servtd_uuid[0] & U64
    return raw & 0xF_FFFF_FFFF_F000, raw & 0xFFF


def bindings_table(binding: Binding) -> tuple[int, ...]:
    """The slot as SERVTD_BINDINGS_TABLE exports it: 16 elements."""
    raw = _BINDING.pack(
        binding.state,
        binding.servtd_type,
        binding.attributes,
        _bytes(binding.uuid),
        binding.info_hash,
    )
    return struct.unpack("<16Q", raw)


def binding_importable(binding: Binding, table: tuple[int, ...]) -> bool:
    """An imported slot in use must be valid, and of type and attributes of a slot in use here."""
    state, servtd_type, attributes, _, _ = _BINDING.unpack(struct.pack("<16Q", *table))
    if state == BindingState.NOT_BOUND:
        return True
    if state not in (BindingState.PRE_BOUND, BindingState.BOUND):
        return False
    if servtd_type != SERVTD_TYPE_MIGTD or attributes & ~SERVTD_ATTRIBUTES_FIXED_0:
        return False
    if binding.state is BindingState.NOT_BOUND:
        return True
    same: bool = (servtd_type, attributes) == (binding.servtd_type, binding.attributes)
    return same
