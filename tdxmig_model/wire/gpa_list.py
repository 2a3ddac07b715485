"""GPA lists: which pages a leaf works on, and what became of each.

A list is a page of up to 512 little-endian 64-bit entries (TDX module 1.5.01)::

    1:0  level, 0    9:7   l2_map             53:52  operation   63:61  reserved
    2    pending     11:10 mig_type, 0 = 4K   55:54  reserved
    6:3  reserved    51:12 GPA                60:56  status

`GpaEntry` is one entry for people and tests.  Bulk code keeps a list as a column, a NumPy uint64
array of shape (n,), and uses the functions below; none of them makes an object per entry.
`GpaListInfo` and `PageListInfo` are the register operands that point at such lists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tdxmig_model.errors import WireError
from tdxmig_model.wire.constants import (
    ADDRESS_BITS,
    GPA_ENTRY_SIZE,
    MAX_ENTRIES,
    PAGE_SIZE,
    ByteBuffer,
)

Column: TypeAlias = NDArray[np.uint64]
"""GPA list entries, or GPAs in bytes: uint64, shape (n,)."""

_ADDRESS_MASK: Final = ((1 << ADDRESS_BITS) - 1) & ~(PAGE_SIZE - 1)
_LEVEL_MASK: Final = 0x3
_PENDING_BIT: Final = 2
_L2_MAP_SHIFT: Final = 7
_MIG_TYPE_SHIFT: Final = 10
_OPERATION_SHIFT: Final = 52
_STATUS_SHIFT: Final = 56
_OPERATION_MASK: Final = 0x3 << _OPERATION_SHIFT
_STATUS_MASK: Final = 0x1F << _STATUS_SHIFT
_UNDEFINED_STATUS_BIT: Final = 0x10 << _STATUS_SHIFT
_RESERVED_MASK: Final = (0xF << 3) | (0x3 << 54) | (0x7 << 61)
_ALL_BITS: Final = 0xFFFFFFFFFFFFFFFF


class GpaOperation(IntEnum):
    """Operation of a GPA list entry.  EXPORT.BLOCKW and EXPORT.RESTORE take MIGRATE as "do it"."""

    NOP = 0
    MIGRATE = 1
    CANCEL = 2
    REMIGRATE = 3


class GpaStatus(IntEnum):
    """Status of a GPA list entry (TDX module 1.5.01; 13 and 14 are never returned there)."""

    SUCCESS = 0
    SKIPPED = 1
    SEPT_WALK_FAILED = 2
    SEPT_ENTRY_BUSY_HOST_PRIORITY = 3
    SEPT_ENTRY_STATE_INCORRECT = 4
    TLB_TRACKING_NOT_DONE = 5
    OP_STATE_INCORRECT = 6
    MIGRATED_IN_CURRENT_EPOCH = 7
    MIG_BUFFER_NOT_AVAILABLE = 8
    NEW_PAGE_NOT_AVAILABLE = 9
    INVALID_PAGE_MAC = 10
    DISALLOWED_IMPORT_OVER_REMOVED = 11
    TD_PAGE_BUSY_HOST_PRIORITY = 12
    L2_SEPT_WALK_FAILED = 13
    ATTR_LIST_ENTRY_INVALID = 14
    GPA_LIST_ENTRY_INVALID = 15


@dataclass(frozen=True, slots=True)
class GpaEntry:
    """One GPA list entry; `gpa` in bytes, 4 KiB aligned, below 2**52."""

    gpa: int
    operation: GpaOperation = GpaOperation.NOP
    status: GpaStatus = GpaStatus.SUCCESS
    pending: bool = False
    level: int = 0
    l2_map: int = 0
    mig_type: int = 0

    @property
    def carries_content(self) -> bool:
        """True when the bundle's page of this entry holds ciphertext (the rest is MAC only)."""
        migrates = self.operation in (GpaOperation.MIGRATE, GpaOperation.REMIGRATE)
        return migrates and not self.pending

    def to_int(self) -> int:
        """The entry as a 64-bit number.  Raises WireError when a field does not fit."""
        if self.gpa & ~_ADDRESS_MASK:
            raise _bad("GPA list entry", "gpa", hex(self.gpa), "4 KiB aligned, below 2**52")
        for field, most in (("level", 3), ("l2_map", 7), ("mig_type", 3)):
            value: int = getattr(self, field)
            if not 0 <= value <= most:
                raise _bad("GPA list entry", field, value, f"0 to {most}")
        return (
            self.gpa
            | self.level
            | self.pending << _PENDING_BIT
            | self.l2_map << _L2_MAP_SHIFT
            | self.mig_type << _MIG_TYPE_SHIFT
            | GpaOperation(self.operation) << _OPERATION_SHIFT
            | GpaStatus(self.status) << _STATUS_SHIFT
        )

    def pack(self) -> bytes:
        """The 8 bytes; for an exported entry they are the AAD of its page MAC."""
        return self.to_int().to_bytes(GPA_ENTRY_SIZE, "little")

    @classmethod
    def from_int(cls, value: int, *, offset: int = 0) -> GpaEntry:
        """Decode a 64-bit entry.  Raises WireError on a reserved bit, a level or a status that
        TDX module 1.5.01 does not define; `offset` is where the entry began."""
        if not 0 <= value <= _ALL_BITS:
            raise _bad("GPA list entry", "entry", value, "u64", offset)
        fault = _entry_fault(value, offset)
        if fault:
            raise fault
        return cls(
            gpa=value & _ADDRESS_MASK,
            operation=GpaOperation(value >> _OPERATION_SHIFT & 0x3),
            status=GpaStatus(value >> _STATUS_SHIFT & 0x1F),
            pending=bool(value >> _PENDING_BIT & 1),
            l2_map=value >> _L2_MAP_SHIFT & 0x7,
            mig_type=value >> _MIG_TYPE_SHIFT & 0x3,
        )

    @classmethod
    def unpack(cls, buffer: ByteBuffer, *, offset: int = 0) -> GpaEntry:
        """Decode the 8 bytes at `offset` of `buffer`; WireError as `from_int`, or when short."""
        raw = bytes(memoryview(buffer)[offset : offset + GPA_ENTRY_SIZE]) if offset >= 0 else b""
        if len(raw) != GPA_ENTRY_SIZE:
            raise _bad("GPA list entry is cut short", "entry", f"{len(raw)} bytes", "8", offset)
        return cls.from_int(int.from_bytes(raw, "little"), offset=offset)


def build_entries(gpas: ArrayLike, operation: GpaOperation = GpaOperation.MIGRATE) -> Column:
    """A new list for `gpas` (bytes, shape (n,), n up to 512) that asks for `operation`.

    Status, pending, level and the rest are 0.  Raises WireError when a GPA is not 4 KiB aligned
    or not below 2**52, or when there are more than 512.
    """
    column = _as_column(gpas)
    if column.size > MAX_ENTRIES:
        raise _bad("GPA list", "entries", column.size, f"0 to {MAX_ENTRIES}")
    if (column & np.uint64(_ALL_BITS ^ _ADDRESS_MASK)).any():
        index = int(np.flatnonzero(column & np.uint64(_ALL_BITS ^ _ADDRESS_MASK))[0])
        gpa = hex(int(column[index]))
        offset = index * GPA_ENTRY_SIZE
        raise _bad("GPA list", "gpa", gpa, "4 KiB aligned, below 2**52", offset)
    return column | np.uint64(GpaOperation(operation) << _OPERATION_SHIFT)


def entries_from_bytes(buffer: ByteBuffer) -> Column:
    """A GPA list as a column; a read-only view when `buffer` is `bytes`, never a copy.

    Raises WireError when the length is no multiple of 8 or above 512 entries.  Entries are taken
    as they are; see `check_entries`.
    """
    length = memoryview(buffer).nbytes
    if length % GPA_ENTRY_SIZE or length > MAX_ENTRIES * GPA_ENTRY_SIZE:
        raise _bad("GPA list", "length", length, f"a multiple of 8 up to {MAX_ENTRIES * 8}")
    return np.frombuffer(buffer, dtype="<u8").astype(np.uint64, copy=False)


def entries_to_bytes(entries: Column) -> bytes:
    """The column as it travels: 8 bytes per entry, little-endian."""
    return entries.astype("<u8", copy=False).tobytes()


def entry_gpas(entries: Column) -> Column:
    """GPA of each entry in bytes, shape (n,)."""
    return entries & np.uint64(_ADDRESS_MASK)


def entry_operations(entries: Column) -> NDArray[np.uint8]:
    """`GpaOperation` value of each entry, shape (n,)."""
    return (entries >> np.uint64(_OPERATION_SHIFT) & np.uint64(0x3)).astype(np.uint8)


def entry_statuses(entries: Column) -> NDArray[np.uint8]:
    """`GpaStatus` value of each entry, 0 to 31, shape (n,)."""
    return (entries >> np.uint64(_STATUS_SHIFT) & np.uint64(0x1F)).astype(np.uint8)


def entry_pending(entries: Column) -> NDArray[np.bool_]:
    """True where the page is pending, that is added but not accepted by the guest; shape (n,)."""
    pending: NDArray[np.bool_] = (entries & np.uint64(1 << _PENDING_BIT)) != 0
    return pending


def entry_carries_content(entries: Column) -> NDArray[np.bool_]:
    """True where the page of the bundle holds ciphertext: MIGRATE or REMIGRATE and not pending."""
    # MIGRATE and REMIGRATE are the two odd operations, so bit 52 alone tells them.
    bits = entries & np.uint64(1 << _OPERATION_SHIFT | 1 << _PENDING_BIT)
    content: NDArray[np.bool_] = bits == np.uint64(1 << _OPERATION_SHIFT)
    return content


def set_operation(
    entries: Column, operation: GpaOperation | NDArray[np.uint8], where: Any = slice(None)
) -> None:
    """Write the operation into entries in place; `where` is any NumPy index of shape (n,)."""
    _set_field(entries, operation, where, _OPERATION_SHIFT, _OPERATION_MASK)


def set_status(
    entries: Column, status: GpaStatus | NDArray[np.uint8], where: Any = slice(None)
) -> None:
    """Write the status into entries in place; `where` is any NumPy index of shape (n,)."""
    _set_field(entries, status, where, _STATUS_SHIFT, _STATUS_MASK)


def set_pending(
    entries: Column, pending: bool | NDArray[np.bool_], where: Any = slice(None)
) -> None:
    """Write the pending bit into entries in place; `where` is any NumPy index of shape (n,)."""
    _set_field(entries, pending, where, _PENDING_BIT, 1 << _PENDING_BIT)


def valid_entries(entries: Column) -> NDArray[np.bool_]:
    """True where an entry is well formed as TDX module 1.5.01 judges it: reserved fields and level
    0.  The module does not look at mig_type or l2_map, and neither does this."""
    valid: NDArray[np.bool_] = (entries & np.uint64(_RESERVED_MASK | _LEVEL_MASK)) == 0
    return valid


def check_entries(entries: Column, *, offset: int = 0) -> None:
    """Raise WireError for the first entry that is not well formed or has an undefined status.

    `offset` is where the list begins in its stream.
    """
    wrong = entries & np.uint64(_RESERVED_MASK | _LEVEL_MASK | _UNDEFINED_STATUS_BIT)
    for index in np.flatnonzero(wrong):
        fault = _entry_fault(int(entries[index]), offset + int(index) * GPA_ENTRY_SIZE)
        if fault:
            raise fault


@dataclass(frozen=True, slots=True)
class GpaListInfo:
    """GPA_LIST_INFO, the RCX operand of the leaves that take a GPA list.

    Bits: 2:0 format (0, GPA only), 11:3 first_entry, 51:12 HPA of the list page, 54:52 reserved,
    63:55 last_entry (TDX module 1.5.01).
    """

    hpa: int
    last_entry: int
    first_entry: int = 0

    @property
    def count(self) -> int:
        """Entries from first to last."""
        return self.last_entry - self.first_entry + 1

    def to_register(self) -> int:
        """The 64-bit operand.  Raises WireError when a field does not fit."""
        if self.hpa & ~_ADDRESS_MASK:
            raise _bad("GPA_LIST_INFO", "hpa", hex(self.hpa), "4 KiB aligned, below 2**52")
        if not 0 <= self.first_entry <= self.last_entry < MAX_ENTRIES:
            entries = (self.first_entry, self.last_entry)
            raise _bad("GPA_LIST_INFO", "entries", entries, "0 <= first <= last <= 511")
        return self.hpa | self.first_entry << 3 | self.last_entry << 55

    @classmethod
    def from_register(cls, value: int) -> GpaListInfo:
        """Decode the operand.  Raises WireError on a format or reserved bits other than 0, or when
        first_entry is above last_entry."""
        if not 0 <= value <= _ALL_BITS:
            raise _bad("GPA_LIST_INFO", "register", value, "u64")
        if value & 0x7:
            raise _bad("GPA_LIST_INFO", "format", value & 0x7, "0")
        if value >> 52 & 0x7:
            raise _bad("GPA_LIST_INFO", "reserved", value >> 52 & 0x7, "0", 6)
        first, last = value >> 3 & 0x1FF, value >> 55
        if first > last:
            raise _bad("GPA_LIST_INFO", "first_entry", first, f"0 to {last} (last_entry)")
        return cls(hpa=value & _ADDRESS_MASK, last_entry=last, first_entry=first)

    def next_register(self, done: int) -> int:
        """The operand that a leaf returns after `done` entries: first_entry names the next one,
        and 512 wraps to 0."""
        following = replace(self, first_entry=0).to_register()
        return following | (self.first_entry + done) % MAX_ENTRIES << 3


@dataclass(frozen=True, slots=True)
class PageListInfo:
    """PAGE_LIST_INFO, the R9 operand of the state leaves.

    Bits: 11:0 reserved, 51:12 HPA of the page of 8-byte HPAs, 54:52 reserved, 63:55 last_entry
    (TDX module 1.5.01).
    """

    hpa: int
    last_entry: int

    @property
    def count(self) -> int:
        """Pages of the list."""
        return self.last_entry + 1

    def to_register(self) -> int:
        """The 64-bit operand.  Raises WireError when a field does not fit."""
        if self.hpa & ~_ADDRESS_MASK:
            raise _bad("PAGE_LIST_INFO", "hpa", hex(self.hpa), "4 KiB aligned, below 2**52")
        if not 0 <= self.last_entry < MAX_ENTRIES:
            raise _bad("PAGE_LIST_INFO", "last_entry", self.last_entry, "0 to 511")
        return self.hpa | self.last_entry << 55

    @classmethod
    def from_register(cls, value: int) -> PageListInfo:
        """Decode the operand.  Raises WireError on reserved bits other than 0."""
        if not 0 <= value <= _ALL_BITS:
            raise _bad("PAGE_LIST_INFO", "register", value, "u64")
        if value & 0xFFF or value >> 52 & 0x7:
            reserved = hex(value & (0xFFF | 0x7 << 52))
            raise _bad("PAGE_LIST_INFO", "reserved", reserved, "0")
        return cls(hpa=value & _ADDRESS_MASK, last_entry=value >> 55)


def _entry_fault(value: int, offset: int) -> WireError | None:
    """What makes an entry undecodable, if anything does."""
    if value & _RESERVED_MASK:
        return _bad("GPA list entry", "reserved", hex(value & _RESERVED_MASK), "0", offset)
    if value & _LEVEL_MASK:
        return _bad("GPA list entry", "level", value & _LEVEL_MASK, "0 (4 KiB)", offset)
    if value & _UNDEFINED_STATUS_BIT:
        status = value >> _STATUS_SHIFT & 0x1F
        return _bad("GPA list entry", "status", status, "0 to 15", offset + 7)
    return None


def _as_column(gpas: ArrayLike) -> Column:
    try:
        array = np.asarray(gpas)
        # Negative numbers would wrap silently, and floats would round.
        if array.size and (array.dtype.kind not in "iu" or array.min() < 0):
            raise ValueError(array.dtype)
        column = array.astype(np.uint64)
    except (ValueError, TypeError, OverflowError):
        raise _bad("GPA list", "gpa", repr(gpas)[:80], "unsigned 64-bit integers") from None
    if column.ndim != 1:
        raise _bad("GPA list", "shape", column.shape, "one dimension")
    return column


def _set_field(entries: Column, value: Any, where: Any, shift: int, mask: int) -> None:
    field = np.asarray(value).astype(np.uint64) << np.uint64(shift) & np.uint64(mask)
    entries[where] = entries[where] & np.uint64(_ALL_BITS ^ mask) | field


def _bad(message: str, field: str, value: object, bound: str, offset: int = 0) -> WireError:
    return WireError(message, offset=offset, field=field, value=value, bound=bound)
