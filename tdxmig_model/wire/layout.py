"""The structures of the wire as tables of fields: for people, for inspection, for Wireshark.

The decoders of this package are written by hand and judge what they read; these tables only say
where each field is and what to call it, also in bytes that no decoder accepts.  Tests hold the two
against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, Literal, TypeAlias

from tdxmig_model.wire.constants import GPA_ENTRY_SIZE, MBMD_SIZE, ByteBuffer
from tdxmig_model.wire.extensions import Capability, MessageType
from tdxmig_model.wire.gpa_list import GpaOperation, GpaStatus
from tdxmig_model.wire.mbmd import BundleType
from tdxmig_model.wire.multifd import INITIAL_SIZE, PACKET_HEADER_SIZE, PacketFlags
from tdxmig_model.wire.records import FLAG_CONTINUE, HEADER_SIZE, RamFlags

Value: TypeAlias = int | bytes | str
Kind: TypeAlias = Literal["number", "hex", "bytes", "text"]


@dataclass(frozen=True, slots=True)
class Field:
    """One field: `size` bytes at `offset` of its structure.

    `bits` are (lowest, width) of the number that those bytes are; a field with `shift` stands for
    its value times 2**shift.  `values` names numbers, `flags` single bits.  `kind` says how to
    show it: text ends at the first zero byte.
    """

    name: str
    offset: int
    size: int
    title: str
    kind: Kind = "number"
    bits: tuple[int, int] | None = None
    shift: int = 0
    values: Mapping[int, str] = field(default_factory=dict)
    flags: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Structure:
    """Fields of one structure in order; `size` bytes, numbers in `byteorder`."""

    name: str
    title: str
    size: int
    byteorder: Literal["little", "big"]
    fields: tuple[Field, ...]

    def decode(self, buffer: ByteBuffer, at: int = 0) -> dict[str, Value]:
        """Every field of the structure at `at`, whatever it holds; bytes that are missing are 0."""
        raw = bytes(memoryview(buffer)[at : at + self.size]).ljust(self.size, b"\0")
        return {one.name: self._value(raw, one) for one in self.fields}

    def _value(self, raw: bytes, one: Field) -> Value:
        data = raw[one.offset : one.offset + one.size]
        if one.kind == "bytes":
            return data
        if one.kind == "text":
            return data.partition(b"\0")[0].decode("ascii", "backslashreplace")
        number = int.from_bytes(data, self.byteorder)
        if one.bits:
            lowest, width = one.bits
            number = number >> lowest & ((1 << width) - 1)
        return number << one.shift


def value_name(one: Field, value: int) -> str:
    """What `value` is called, or its flags joined with "|"; the empty string when it has no name.

    Bits of a flag field that have no name are told as a number.
    """
    if one.values:
        return one.values.get(value, "")
    names = [name for bit, name in one.flags.items() if value & bit]
    rest = value & ~sum(one.flags)
    return "|".join([*names, *([hex(rest)] if rest and one.flags else [])])


def _names(members: type[IntEnum]) -> dict[int, str]:
    return {member.value: member.name for member in members}


TDX_HEADER: Final = Structure(
    "header",
    "TDX header",
    HEADER_SIZE,
    "little",
    (
        Field("flags", 0, 2, "flags", "hex", flags={FLAG_CONTINUE: "CONTINUE"}),
        Field("buf_list_num", 2, 2, "buffers"),
    ),
)

MBMD: Final = Structure(
    "mbmd",
    "MBMD",
    MBMD_SIZE,
    "little",
    (
        Field("size", 0, 2, "SIZE"),
        Field("mig_version", 2, 2, "MIG_VERSION"),
        Field("migs_index", 4, 2, "MIGS_INDEX (stream)"),
        Field("bundle_type", 6, 1, "MB_TYPE", values=_names(BundleType)),
        Field("reserved", 7, 1, "reserved", "hex"),
        Field("mb_counter", 8, 4, "MB_COUNTER"),
        Field("mig_epoch", 12, 4, "MIG_EPOCH", "hex"),
        Field("iv_counter", 16, 8, "IV_COUNTER"),
        Field("type_specific", 24, 8, "type-specific bytes", "bytes"),
        Field("mac", 32, 16, "MAC", "bytes"),
    ),
)

MBMD_SPECIFIC: Final[Mapping[BundleType, tuple[Field, ...]]] = {
    BundleType.IMMUTABLE_TD_STATE: (
        Field("num_forward_streams", 24, 2, "NUM_F_MIGS"),
        Field("num_sys_md_pages", 28, 1, "NUM_SYS_MD_PAGES"),
    ),
    BundleType.MUTABLE_TD_STATE: (),
    BundleType.MUTABLE_VCPU_STATE: (Field("vp_index", 24, 2, "VP_INDEX"),),
    BundleType.MEM: (Field("num_gpas", 24, 2, "NUM_GPAS"),),
    BundleType.EPOCH_TOKEN: (Field("total_mb", 24, 8, "TOTAL_MB"),),
    BundleType.ABORT_TOKEN: (),
}
"""What the type-specific bytes hold, at offsets of the MBMD."""

GPA_ENTRY: Final = Structure(
    "gpa",
    "GPA list entry",
    GPA_ENTRY_SIZE,
    "little",
    (
        Field("level", 0, 8, "level", bits=(0, 2)),
        Field("pending", 0, 8, "pending", bits=(2, 1)),
        Field("reserved_0", 0, 8, "reserved", "hex", bits=(3, 4)),
        Field("l2_map", 0, 8, "L2 map", "hex", bits=(7, 3)),
        Field("mig_type", 0, 8, "migration type", bits=(10, 2), values={0: "4 KiB"}),
        Field("gpa", 0, 8, "GPA", "hex", bits=(12, 40), shift=12),
        Field("operation", 0, 8, "operation", bits=(52, 2), values=_names(GpaOperation)),
        Field("reserved_1", 0, 8, "reserved", "hex", bits=(54, 2)),
        Field("status", 0, 8, "status", bits=(56, 5), values=_names(GpaStatus)),
        Field("reserved_2", 0, 8, "reserved", "hex", bits=(61, 3)),
    ),
)

RAM_RECORD: Final = Structure(
    "ram",
    "RAM record",
    8,
    "big",
    (
        Field("offset", 0, 8, "offset in the block", "hex", bits=(12, 52), shift=12),
        Field(
            "flags",
            0,
            8,
            "flags",
            "hex",
            bits=(0, 12),
            flags={flag.value: flag.name or "" for flag in RamFlags},
        ),
    ),
)

MULTIFD_INITIAL: Final = Structure(
    "multifd_initial",
    "multifd initial packet",
    INITIAL_SIZE,
    "big",
    (
        Field("magic", 0, 4, "magic", "hex"),
        Field("version", 4, 4, "version"),
        Field("uuid", 8, 16, "UUID of the guest", "bytes"),
        Field("channel", 24, 1, "channel"),
        Field("unused", 25, 39, "unused", "bytes"),
    ),
)

MULTIFD_PACKET: Final = Structure(
    "multifd",
    "multifd packet",
    PACKET_HEADER_SIZE,
    "big",
    (
        Field("magic", 0, 4, "magic", "hex"),
        Field("version", 4, 4, "version"),
        Field(
            "flags",
            8,
            4,
            "flags",
            "hex",
            flags={flag.value: flag.name or "" for flag in PacketFlags},
        ),
        Field("pages_alloc", 12, 4, "offsets there is room for"),
        Field("normal_pages", 16, 4, "pages"),
        Field("next_packet_size", 20, 4, "payload bytes"),
        Field("packet_num", 24, 8, "packet number"),
        Field("unused", 32, 32, "unused", "bytes"),
        Field("block", 64, 256, "RAM block", "text"),
    ),
)

MESSAGE: Final = Structure(
    "message",
    "message",
    4,
    "big",
    (
        Field("type", 0, 2, "type", "hex", values=_names(MessageType)),
        Field("length", 2, 2, "payload bytes"),
    ),
)

HELLO: Final = Structure(
    "hello",
    "HELLO",
    40,
    "big",
    (
        Field("version", 0, 2, "version"),
        Field("streams", 2, 2, "forward streams"),
        Field(
            "capabilities",
            4,
            4,
            "capabilities",
            "hex",
            flags={flag.value: flag.name or "" for flag in Capability},
        ),
        Field("page_count", 8, 8, "private pages"),
        Field("vcpu_count", 16, 4, "vCPUs"),
        Field("reserved", 20, 4, "reserved", "hex"),
        Field("session_id", 24, 16, "session id", "bytes"),
    ),
)

STRUCTURES: Final = (
    TDX_HEADER,
    MBMD,
    GPA_ENTRY,
    RAM_RECORD,
    MULTIFD_INITIAL,
    MULTIFD_PACKET,
    MESSAGE,
    HELLO,
)
"""Every structure with fields of its own."""
