"""GPA list operands and single entries as the leaves read them, one 64-bit word at a time.

Bit positions are those of `wire.gpa_list`, which also has the columns; here an entry is judged and
rewritten while its page is locked.  Facts of TDX module 1.5.01.
"""

from __future__ import annotations

from dataclasses import dataclass

from tdxmig_model.backend.soft.call import Call, refuse
from tdxmig_model.backend.soft.sept import HPA_MASK
from tdxmig_model.backend.soft.status import Operand, Status
from tdxmig_model.errors import WireError
from tdxmig_model.wire.gpa_list import GpaListInfo, GpaOperation, GpaStatus

LEVEL_AND_RESERVED = 0x3 | 0xF << 3 | 0x3 << 54 | 0x7 << 61
"""Bits that are 0 in every valid entry."""
GPA_MASK = HPA_MASK
PENDING_BIT = 1 << 2
L2_MAP_MASK = 0x7 << 7
OPERATION_SHIFT = 52
OPERATION_MASK = 0x3 << OPERATION_SHIFT
STATUS_SHIFT = 56
STATUS_MASK = 0x1F << STATUS_SHIFT
INVALID_BIT = 1 << 63
"""Of a page list entry: there is no page."""

NOP, MIGRATE, CANCEL, REMIGRATE = (int(operation) for operation in GpaOperation)


@dataclass(slots=True)
class GpaList:
    """RCX decoded; `base` is the word index of entry 0, `position` the next entry to process."""

    base: int
    first: int
    last: int
    position: int
    fixed: int

    def register(self) -> int:
        """RCX as it goes back: first_entry is the next entry, 512 wraps to 0."""
        return self.fixed | (self.position & 511) << 3


def gpa_list(call: Call, register: int) -> GpaList:
    """GPA_LIST_INFO; OPERAND_INVALID|RCX if malformed or if the list is no VMM page."""
    try:
        info = GpaListInfo.from_register(register)
    except WireError:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RCX) from None
    hpa = call.shared_page(info.hpa, Operand.RCX)
    fixed = register & ~(511 << 3)
    return GpaList(hpa >> 3, info.first_entry, info.last_entry, info.first_entry, fixed)


def failed(entry: int, status: GpaStatus) -> int:
    """The entry as NOP with a status."""
    return entry & ~(OPERATION_MASK | STATUS_MASK) | status << STATUS_SHIFT


def sanitized(entry: int, status: GpaStatus) -> int:
    """A malformed entry as a valid NOP with a status: reserved bits and level cleared."""
    return failed(entry & ~LEVEL_AND_RESERVED, status)


def with_status(entry: int, status: GpaStatus) -> int:
    """The entry with a status, its operation kept."""
    return entry & ~STATUS_MASK | status << STATUS_SHIFT
