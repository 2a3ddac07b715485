"""Migration bundle metadata (MBMD): the 48 bytes in front of every bundle.

Layout (TDX module 1.5.01, all fields little-endian)::

    0  u16 SIZE, always 48          8  u32 MB_COUNTER        24  8 type-specific bytes
    2  u16 MIG_VERSION             12  u32 MIG_EPOCH         32  16-byte MAC
    4  u16 MIGS_INDEX              16  u64 IV_COUNTER
    6  u8  MB_TYPE, 7 reserved

Decoding checks form alone: size, type, reserved bytes, and the bounds of what is later used as a
length or an index.  Versions, counters, epochs and MACs are judged by the TDX module.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from tdxmig_model.wire.constants import (
    MAC_SIZE,
    MAX_ENTRIES,
    MAX_FORWARD_STREAMS,
    MBMD_SIZE,
    START_EPOCH,
    ByteBuffer,
)
from tdxmig_model.wire.fault import fault

_LAYOUT: Final = struct.Struct("<HHHBBIIQ8s16s")
_IV_LAYOUT: Final = struct.Struct("<QHH")
_NO_MAC: Final = bytes(MAC_SIZE)
_NO_FIELDS: Final = bytes(8)


class BundleType(IntEnum):
    """MB_TYPE of an MBMD (TDX module 1.5.01)."""

    IMMUTABLE_TD_STATE = 0
    MUTABLE_TD_STATE = 1
    MUTABLE_VCPU_STATE = 2
    MEM = 16
    EPOCH_TOKEN = 32
    ABORT_TOKEN = 33

    @property
    def is_token(self) -> bool:
        """True for the bundles that are an MBMD and nothing else."""
        return self in (BundleType.EPOCH_TOKEN, BundleType.ABORT_TOKEN)

    @property
    def is_state(self) -> bool:
        """True for immutable, TD and vCPU state: encrypted metadata pages under one MAC."""
        return self <= BundleType.MUTABLE_VCPU_STATE


# Type-specific bytes 24..31 that are reserved and must be 0, as (first, past last) ranges.
_RESERVED: Final = {
    BundleType.IMMUTABLE_TD_STATE: ((26, 28), (29, 32)),
    BundleType.MUTABLE_TD_STATE: ((24, 32),),
    BundleType.MUTABLE_VCPU_STATE: ((26, 32),),
    BundleType.MEM: ((26, 32),),
    BundleType.EPOCH_TOKEN: (),
    BundleType.ABORT_TOKEN: ((24, 32),),
}
# (field, offset, largest value) for the range check of `pack`.
_INTEGER_FIELDS: Final = (
    ("size", 0, 0xFFFF),
    ("mig_version", 2, 0xFFFF),
    ("migs_index", 4, 0xFFFF),
    ("bundle_type", 6, 0xFF),
    ("mb_counter", 8, 0xFFFFFFFF),
    ("mig_epoch", 12, 0xFFFFFFFF),
    ("iv_counter", 16, 0xFFFFFFFFFFFFFFFF),
)


def iv_bytes(counter: int, stream: int) -> bytes:
    """The 12-byte AES-GCM IV: IV_COUNTER (u64), MIGS_INDEX (u16), two zero bytes, little-endian.

    A memory bundle whose MBMD has IV_COUNTER c uses c for the MBMD and c + 1 + k for list entry k.
    Raises WireError when a value does not fit its field.  Source: TDX module 1.5.01.
    """
    if not 0 <= counter <= 0xFFFFFFFFFFFFFFFF:
        raise fault("IV counter", 0, "iv_counter", counter, "u64")
    if not 0 <= stream <= 0xFFFF:
        raise fault("IV stream", 8, "migs_index", stream, "u16")
    return _IV_LAYOUT.pack(counter, stream, 0)


@dataclass(frozen=True, slots=True)
class Mbmd:
    """One MBMD.  Values are kept as found; `pack` refuses only what its fields cannot hold."""

    bundle_type: BundleType
    migs_index: int
    mb_counter: int
    mig_epoch: int
    iv_counter: int
    type_specific: bytes = _NO_FIELDS
    mac: bytes = _NO_MAC
    mig_version: int = 0
    size: int = MBMD_SIZE

    def pack(self) -> bytes:
        """The 48 bytes.  Raises WireError when a value does not fit its field."""
        return self._pack(self.migs_index, self.iv_counter)

    def aad(self) -> bytes:
        """The 32 bytes under the MBMD MAC: header and type-specific bytes, with MIGS_INDEX and
        IV_COUNTER 0.  Those two are bound by the IV (TDX module 1.5.01)."""
        return self._pack(0, 0)[:32]

    def iv(self) -> bytes:
        """The 12-byte IV of the MBMD MAC, and of the pages of a state bundle."""
        return iv_bytes(self.iv_counter, self.migs_index)

    def with_mac(self, mac: bytes) -> Mbmd:
        """The same MBMD with another 16-byte MAC."""
        return replace(self, mac=bytes(mac))

    def _pack(self, migs_index: int, iv_counter: int) -> bytes:
        for field, offset, most in _INTEGER_FIELDS:
            value: int = getattr(self, field)
            if not 0 <= value <= most:
                raise fault("MBMD", offset, field, value, f"0 to {most}")
        for field, offset, length in (("type_specific", 24, 8), ("mac", 32, MAC_SIZE)):
            if len(getattr(self, field)) != length:
                value = len(getattr(self, field))
                raise fault("MBMD", offset, field, f"{value} bytes", f"{length} bytes")
        return _LAYOUT.pack(
            self.size,
            self.mig_version,
            migs_index,
            self.bundle_type,
            0,
            self.mb_counter,
            self.mig_epoch,
            iv_counter,
            self.type_specific,
            self.mac,
        )

    @classmethod
    def unpack(cls, buffer: ByteBuffer, *, offset: int = 0, stream_offset: int = 0) -> Mbmd:
        """Decode the 48 bytes at `offset` of `buffer`.

        `stream_offset` is where `buffer` begins in its stream; errors count from there.  Raises
        WireError when fewer than 48 bytes are left, SIZE is not 48, the type is unknown, a
        reserved byte is set, MIGS_INDEX is no forward stream, or NUM_GPAS of a memory bundle is
        not 1 to 512.
        """
        length = memoryview(buffer).nbytes
        at = stream_offset + offset
        if offset < 0 or length - offset < MBMD_SIZE:
            left = max(0, length - offset)
            raise fault("MBMD is cut short", at, "size", f"{left} bytes", f"{MBMD_SIZE} bytes")
        fields = _LAYOUT.unpack_from(buffer, offset)
        size, version, index, number, reserved, mb_counter, epoch, iv_counter, specific, mac = (
            fields
        )
        if size != MBMD_SIZE:
            raise fault("MBMD", at, "size", size, str(MBMD_SIZE))
        if index >= MAX_FORWARD_STREAMS:
            raise fault("MBMD", at + 4, "migs_index", index, f"0 to {MAX_FORWARD_STREAMS - 1}")
        try:
            bundle_type = BundleType(number)
        except ValueError:
            known = ", ".join(str(member.value) for member in BundleType)
            raise fault("MBMD", at + 6, "bundle_type", number, f"one of {known}") from None
        if reserved:
            raise fault("MBMD", at + 7, "reserved", reserved, "0")
        mbmd = cls(bundle_type, index, mb_counter, epoch, iv_counter, specific, mac, version, size)
        mbmd._check_type_specific(at)
        return mbmd

    def _check_type_specific(self, at: int) -> None:
        for first, past in _RESERVED[self.bundle_type]:
            value = self.type_specific[first - 24 : past - 24]
            if any(value):
                raise fault("MBMD", at + first, "reserved", value.hex(), "zero bytes")
        if self.bundle_type is BundleType.MEM and not 1 <= self.num_gpas <= MAX_ENTRIES:
            raise fault("MBMD", at + 24, "num_gpas", self.num_gpas, f"1 to {MAX_ENTRIES}")

    def _specific(self, field: str, first: int, length: int, *types: BundleType) -> int:
        if self.bundle_type not in types:
            bound = " or ".join(bundle_type.name for bundle_type in types)
            raise fault("MBMD has no such field", 24 + first, field, self.bundle_type.name, bound)
        return int.from_bytes(self.type_specific[first : first + length], "little")

    @property
    def num_gpas(self) -> int:
        """GPA list entries of a memory bundle.  WireError for any other type."""
        return self._specific("num_gpas", 0, 2, BundleType.MEM)

    @property
    def total_mb(self) -> int:
        """Bundles of the migration session so far, this epoch token included."""
        return self._specific("total_mb", 0, 8, BundleType.EPOCH_TOKEN)

    @property
    def vp_index(self) -> int:
        """Index of the vCPU whose state the bundle holds."""
        return self._specific("vp_index", 0, 2, BundleType.MUTABLE_VCPU_STATE)

    @property
    def num_forward_streams(self) -> int:
        """Forward streams of the source (NUM_F_MIGS), in the immutable state."""
        return self._specific("num_forward_streams", 0, 2, BundleType.IMMUTABLE_TD_STATE)

    @property
    def num_sys_md_pages(self) -> int:
        """Pages of system metadata at the head of the immutable state."""
        return self._specific("num_sys_md_pages", 4, 1, BundleType.IMMUTABLE_TD_STATE)

    @property
    def is_start_token(self) -> bool:
        """True for the epoch token that ends the in-order phase."""
        return self.bundle_type is BundleType.EPOCH_TOKEN and self.mig_epoch == START_EPOCH

    @classmethod
    def immutable_state(
        cls,
        *,
        iv_counter: int,
        num_forward_streams: int,
        num_sys_md_pages: int = 1,
        mac: bytes = _NO_MAC,
        mig_version: int = 0,
    ) -> Mbmd:
        """MBMD of TDH.EXPORT.STATE.IMMUTABLE: stream 0, MB_COUNTER 0, MIG_EPOCH 0."""
        specific = _specific_bytes("<HHB3x", num_forward_streams, 0, num_sys_md_pages)
        kind = BundleType.IMMUTABLE_TD_STATE
        return cls(kind, 0, 0, 0, iv_counter, specific, mac, mig_version)

    @classmethod
    def td_state(
        cls,
        *,
        mb_counter: int,
        mig_epoch: int,
        iv_counter: int,
        mac: bytes = _NO_MAC,
        mig_version: int = 0,
    ) -> Mbmd:
        """MBMD of TDH.EXPORT.STATE.TD: stream 0."""
        kind = BundleType.MUTABLE_TD_STATE
        return cls(kind, 0, mb_counter, mig_epoch, iv_counter, _NO_FIELDS, mac, mig_version)

    @classmethod
    def vcpu_state(
        cls,
        *,
        vp_index: int,
        mb_counter: int,
        mig_epoch: int,
        iv_counter: int,
        migs_index: int = 0,
        mac: bytes = _NO_MAC,
        mig_version: int = 0,
    ) -> Mbmd:
        """MBMD of TDH.EXPORT.STATE.VP: any forward stream."""
        kind = BundleType.MUTABLE_VCPU_STATE
        specific = _specific_bytes("<H6x", vp_index)
        return cls(kind, migs_index, mb_counter, mig_epoch, iv_counter, specific, mac, mig_version)

    @classmethod
    def memory(
        cls,
        *,
        num_gpas: int,
        mb_counter: int,
        mig_epoch: int,
        iv_counter: int,
        migs_index: int = 0,
        mac: bytes = _NO_MAC,
        mig_version: int = 0,
    ) -> Mbmd:
        """MBMD of TDH.EXPORT.MEM: any forward stream, 1 to 512 GPA list entries."""
        specific = _specific_bytes("<H6x", num_gpas)
        kind = BundleType.MEM
        return cls(kind, migs_index, mb_counter, mig_epoch, iv_counter, specific, mac, mig_version)

    @classmethod
    def epoch_token(
        cls,
        *,
        total_mb: int,
        mig_epoch: int,
        iv_counter: int,
        mac: bytes = _NO_MAC,
        mig_version: int = 0,
    ) -> Mbmd:
        """MBMD of TDH.EXPORT.TRACK: stream 0, MB_COUNTER 0; the start token when MIG_EPOCH is
        0xFFFFFFFF."""
        specific = _specific_bytes("<Q", total_mb)
        kind = BundleType.EPOCH_TOKEN
        return cls(kind, 0, 0, mig_epoch, iv_counter, specific, mac, mig_version)

    @classmethod
    def abort_token(
        cls, *, mb_counter: int, iv_counter: int, mac: bytes = _NO_MAC, mig_version: int = 0
    ) -> Mbmd:
        """MBMD of TDH.IMPORT.ABORT: backward stream (index 0), MIG_EPOCH 0."""
        kind = BundleType.ABORT_TOKEN
        return cls(kind, 0, mb_counter, 0, iv_counter, _NO_FIELDS, mac, mig_version)


def _specific_bytes(layout: str, *values: int) -> bytes:
    try:
        return struct.pack(layout, *values)
    except struct.error:
        raise fault("MBMD", 24, "type_specific", values, f"values that fit {layout}") from None
