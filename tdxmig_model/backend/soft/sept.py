"""Secure EPT: the 16 entry states, what each leaf makes of them, and the walk to an entry.

Entries are real 64-bit words in real table pages of the TD.  State encoding: bit 9 (D), bits 56:53
(pending, blocked, write-blocked, exported), bits 7:6 (leaf, IPAT).  Other bits: R, W, X 2:0, memory
type 5:3, entry lock 11, HPA 51:12, suppress-#VE 63.  Facts of TDX module 1.5.01.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.backend.soft.memory import Memory


class SeptState(IntEnum):
    """Secure EPT entry states of TDX module 1.5.01, by index."""

    FREE = 0
    REMOVED = 1
    NL_MAPPED = 2
    NL_BLOCKED = 3
    MAPPED = 4
    BLOCKED = 5
    BLOCKEDW = 6
    EXPORTED_BLOCKEDW = 7
    EXPORTED_DIRTY = 8
    EXPORTED_DIRTY_BLOCKEDW = 9
    PENDING = 10
    PENDING_BLOCKED = 11
    PENDING_BLOCKEDW = 12
    PENDING_EXPORTED_BLOCKEDW = 13
    PENDING_EXPORTED_DIRTY = 14
    PENDING_EXPORTED_DIRTY_BLOCKEDW = 15


S = SeptState

D_BIT = 1 << 9
PAGE_SIZE_BIT = 1 << 7
LEAF_BITS = 0b11 << 6
EXPORTED_BIT = 1 << 53
BLOCKEDW_BIT = 1 << 54
BLOCKED_BIT = 1 << 55
PENDING_BIT = 1 << 56
STATE_MASK = D_BIT | LEAF_BITS | EXPORTED_BIT | BLOCKEDW_BIT | BLOCKED_BIT | PENDING_BIT

READ_BIT, WRITE_BIT, EXECUTE_BIT = 1, 2, 4
RWX = READ_BIT | WRITE_BIT | EXECUTE_BIT
LOCK_BIT = 1 << 11
MEMORY_TYPE_MASK = 0b111 << 3
WRITE_BACK = 6 << 3
HPA_MASK = ((1 << 52) - 1) & ~0xFFF
SUPPRESS_VE_BIT = 1 << 63
REMOVED_EPOCH_SHIFT = 12
REMOVED_EPOCH_MASK = 0xFFFF_FFFF << REMOVED_EPOCH_SHIFT
REMOVED_EPOCH_VALID = 1 << 44

STATE_BITS: tuple[int, ...] = (
    BLOCKED_BIT | BLOCKEDW_BIT | EXPORTED_BIT,  # FREE: a combination nothing else uses
    BLOCKED_BIT | BLOCKEDW_BIT,  # REMOVED: likewise
    0,
    BLOCKED_BIT,
    LEAF_BITS,
    LEAF_BITS | BLOCKED_BIT,
    LEAF_BITS | BLOCKEDW_BIT,
    LEAF_BITS | BLOCKEDW_BIT | EXPORTED_BIT,
    LEAF_BITS | EXPORTED_BIT | D_BIT,
    LEAF_BITS | BLOCKEDW_BIT | EXPORTED_BIT | D_BIT,
    LEAF_BITS | PENDING_BIT,
    LEAF_BITS | PENDING_BIT | BLOCKED_BIT,
    LEAF_BITS | PENDING_BIT | BLOCKEDW_BIT,
    LEAF_BITS | PENDING_BIT | BLOCKEDW_BIT | EXPORTED_BIT,
    LEAF_BITS | PENDING_BIT | EXPORTED_BIT | D_BIT,
    LEAF_BITS | PENDING_BIT | BLOCKEDW_BIT | EXPORTED_BIT | D_BIT,
)
"""State bits of an entry, by state index."""

STATE_OF: dict[int, SeptState] = {bits: SeptState(index) for index, bits in enumerate(STATE_BITS)}
"""State of an entry, by ``entry & STATE_MASK``."""

FREE_ENTRY = STATE_BITS[S.FREE] | SUPPRESS_VE_BIT

# --- flags of states ---------------------------------------------------------------------------

PENDING_STATES = frozenset(s for s in SeptState if STATE_BITS[s] & PENDING_BIT)
EXPORTED_STATES = frozenset(
    {
        S.EXPORTED_BLOCKEDW,
        S.EXPORTED_DIRTY,
        S.EXPORTED_DIRTY_BLOCKEDW,
        S.PENDING_EXPORTED_BLOCKEDW,
        S.PENDING_EXPORTED_DIRTY,
        S.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
DIRTY_STATES = EXPORTED_STATES - {S.EXPORTED_BLOCKEDW, S.PENDING_EXPORTED_BLOCKEDW}
FIRST_EXPORT_STATES = frozenset({S.MAPPED, S.BLOCKEDW, S.PENDING, S.PENDING_BLOCKEDW})
WRITE_BLOCKED_STATES = frozenset(
    {
        S.BLOCKEDW,
        S.EXPORTED_BLOCKEDW,
        S.EXPORTED_DIRTY_BLOCKEDW,
        S.PENDING_BLOCKEDW,
        S.PENDING_EXPORTED_BLOCKEDW,
        S.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
TLB_TRACKING_REQUIRED = frozenset(SeptState) - {
    S.FREE,
    S.REMOVED,
    S.EXPORTED_BLOCKEDW,
    S.PENDING_EXPORTED_BLOCKEDW,
}
READABLE_STATES = frozenset(
    {
        S.MAPPED,
        S.BLOCKEDW,
        S.EXPORTED_BLOCKEDW,
        S.EXPORTED_DIRTY,
        S.EXPORTED_DIRTY_BLOCKEDW,
    }
)
"""States in which the guest can read the page."""

# --- states in which a leaf accepts an entry ---------------------------------------------------

EXPORT_MEM_STATES = FIRST_EXPORT_STATES | EXPORTED_STATES
IMPORT_MEM_STATES = frozenset({S.FREE, S.REMOVED, S.MAPPED, S.PENDING})
RANGE_BLOCK_STATES = frozenset({S.NL_MAPPED, S.MAPPED, S.BLOCKEDW, S.PENDING, S.PENDING_BLOCKEDW})
RANGE_UNBLOCK_STATES = frozenset({S.NL_BLOCKED, S.BLOCKED, S.PENDING_BLOCKED})
PAGE_REMOVE_STATES = frozenset(
    {S.MAPPED, S.BLOCKED, S.BLOCKEDW, S.PENDING, S.PENDING_BLOCKED, S.PENDING_BLOCKEDW}
)
PAGE_AUG_STATES = frozenset({S.FREE, S.REMOVED})

BLOCKW: dict[SeptState, SeptState] = {
    S.MAPPED: S.BLOCKEDW,
    S.EXPORTED_DIRTY: S.EXPORTED_DIRTY_BLOCKEDW,
    S.PENDING: S.PENDING_BLOCKEDW,
    S.PENDING_EXPORTED_DIRTY: S.PENDING_EXPORTED_DIRTY_BLOCKEDW,
}
"""TDH.EXPORT.BLOCKW: state -> state."""

UNBLOCKW: dict[SeptState, SeptState] = {
    S.BLOCKEDW: S.MAPPED,
    S.EXPORTED_BLOCKEDW: S.EXPORTED_DIRTY,
    S.EXPORTED_DIRTY_BLOCKEDW: S.EXPORTED_DIRTY,
    S.PENDING_BLOCKEDW: S.PENDING,
    S.PENDING_EXPORTED_BLOCKEDW: S.PENDING_EXPORTED_DIRTY,
    S.PENDING_EXPORTED_DIRTY_BLOCKEDW: S.PENDING_EXPORTED_DIRTY,
}
"""TDH.EXPORT.UNBLOCKW: state -> state."""

RESTORE: dict[SeptState, SeptState] = {
    state: S.PENDING if state in PENDING_STATES else S.MAPPED for state in EXPORTED_STATES
}
"""TDH.EXPORT.RESTORE, and CANCEL of TDH.EXPORT.MEM: state -> state."""

EXPORT: dict[SeptState, SeptState] = {
    state: S.PENDING_EXPORTED_BLOCKEDW if state in PENDING_STATES else S.EXPORTED_BLOCKEDW
    for state in EXPORT_MEM_STATES
}
"""TDH.EXPORT.MEM with MIGRATE or REMIGRATE: state -> state."""

ACCEPT: dict[SeptState, SeptState] = {
    S.PENDING: S.MAPPED,
    S.PENDING_EXPORTED_DIRTY: S.EXPORTED_DIRTY,
}
"""TDG.MEM.PAGE.ACCEPT: state -> state."""


def with_state(entry: int, state: SeptState) -> int:
    """The entry in another state; permissions, HPA and the lock stay."""
    return entry & ~STATE_MASK | STATE_BITS[state]


def leaf_entry(state: SeptState, hpa: int) -> int:
    """An unlocked leaf entry: RWX for MAPPED, no permission for PENDING."""
    permissions = RWX if state is S.MAPPED else 0
    return hpa | permissions | WRITE_BACK | SUPPRESS_VE_BIT | STATE_BITS[state]


def table_entry(hpa: int) -> int:
    """An unlocked non-leaf entry, NL_MAPPED."""
    return hpa | RWX | SUPPRESS_VE_BIT | STATE_BITS[S.NL_MAPPED]


def removed_entry(mig_epoch: int) -> int:
    """REMOVED with the MIG_EPOCH of the removal, which import compares later."""
    epoch = mig_epoch << REMOVED_EPOCH_SHIFT | REMOVED_EPOCH_VALID
    return STATE_BITS[S.REMOVED] | epoch | SUPPRESS_VE_BIT


PUBLIC_STATE = (0, 5, 132, 129, 4, 1, 8, 9, 11, 12, 2, 3, 16, 17, 19, 20)
"""The number by which the VMM is told of a state, by state index."""
_VISIBLE_LEAF = RWX | MEMORY_TYPE_MASK | LEAF_BITS | HPA_MASK | SUPPRESS_VE_BIT
_VISIBLE_OTHER = RWX | PAGE_SIZE_BIT


def visible_entry(entry: int) -> int:
    """The entry as the VMM is shown it: without software bits, a table or REMOVED without HPA."""
    if entry & STATE_MASK == STATE_BITS[S.FREE]:
        return SUPPRESS_VE_BIT
    is_leaf = entry & LEAF_BITS == LEAF_BITS
    return entry & (_VISIBLE_LEAF if is_leaf else _VISIBLE_OTHER)


# --- the tree ----------------------------------------------------------------------------------

ROOT_LEVEL = 3
"""Four levels, 48-bit guest physical addresses; level 0 holds the entries of 4 KiB pages."""
PRIVATE_GPA_LIMIT = 1 << 47
"""Bit 47 is the shared bit."""


class SeptTree:
    """The walk from the root table to an entry, with a cache of level-0 tables.

    An entry is named by its index into ``memory.words``.
    """

    def __init__(self, memory: Memory, root_hpa: int) -> None:
        self._memory = memory
        self.root_hpa = root_hpa
        self._tables: dict[int, int] = {}

    def slot(self, gpa: int) -> int:
        """Word index of the level-0 entry of `gpa`, or -1 if a table is missing or blocked."""
        table = self._tables.get(gpa >> 21, -1)
        if table < 0:
            above, level = self.walk(gpa, 1)
            if level != 1 or not self._is_table(above):
                return -1
            table = (self._memory.words[above] & HPA_MASK) >> 3
            self._tables[gpa >> 21] = table
        return table + (gpa >> 12 & 511)

    def walk(self, gpa: int, level: int) -> tuple[int, int]:
        """Word index of the entry at `level`, or of the one where the walk ends; and its level."""
        table = self.root_hpa >> 3
        current = ROOT_LEVEL
        while True:
            slot = table + (gpa >> 12 + 9 * current & 511)
            if current == level or not self._is_table(slot):
                return slot, current
            table = (self._memory.words[slot] & HPA_MASK) >> 3
            current -= 1

    def forget(self) -> None:
        """Drop the cache, after a non-leaf entry changed."""
        self._tables.clear()

    def _is_table(self, slot: int) -> bool:
        return self._memory.words[slot] & STATE_MASK == STATE_BITS[S.NL_MAPPED]

    def states(self, gpas: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """State index of each page, FREE where there is no table; shape ``(n,)``."""
        entries = self.entries(gpas)
        return _INDEX_OF_STATE[_state_key(entries)]

    def entries(self, gpas: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The level-0 entries of these GPAs, shape ``(n,)``."""
        regions, inverse = np.unique(gpas >> np.uint64(21), return_inverse=True)
        slots = np.array([self.slot(int(region) << 21) for region in regions], dtype=np.int64)
        bases = slots[inverse]
        index = bases + (gpas >> np.uint64(12) & np.uint64(511)).astype(np.int64)
        found = self._memory.array[np.where(bases < 0, 0, index)]
        return np.where(bases < 0, np.uint64(FREE_ENTRY), found)

    def mapped(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """GPAs of all leaf entries that have a page, ascending, and the entries themselves."""
        gpas: list[NDArray[np.uint64]] = []
        entries: list[NDArray[np.uint64]] = []
        for base, table in self._leaf_tables(self.root_hpa, ROOT_LEVEL, 0):
            words = self._memory.page_words(table)
            used = np.flatnonzero(words & np.uint64(LEAF_BITS) == np.uint64(LEAF_BITS))
            gpas.append(np.uint64(base) + used.astype(np.uint64) * np.uint64(4096))
            entries.append(words[used])
        if not gpas:
            return np.empty(0, np.uint64), np.empty(0, np.uint64)
        return np.concatenate(gpas), np.concatenate(entries)

    def _leaf_tables(self, table: int, level: int, base: int) -> list[tuple[int, int]]:
        if level == 0:
            return [(base, table)]
        found: list[tuple[int, int]] = []
        words = self._memory.page_words(table)
        states = words & np.uint64(STATE_MASK)
        tables = (states == STATE_BITS[S.NL_MAPPED]) | (states == STATE_BITS[S.NL_BLOCKED])
        for index in np.flatnonzero(tables):
            below = int(words[index]) & HPA_MASK
            found += self._leaf_tables(below, level - 1, base | int(index) << 12 + 9 * level)
        return found


def _state_key(entries: NDArray[np.uint64]) -> NDArray[np.intp]:
    """The seven state bits of each entry side by side: the encoding of the module's own table."""
    dirty = entries >> np.uint64(9) & np.uint64(1)
    flags = entries >> np.uint64(53) & np.uint64(0xF)
    leaf = entries >> np.uint64(6) & np.uint64(0x3)
    key: NDArray[np.uint64] = dirty | flags << np.uint64(1) | leaf << np.uint64(5)
    return key.astype(np.intp)


_INDEX_OF_STATE = np.zeros(128, dtype=np.uint8)
_INDEX_OF_STATE[_state_key(np.array(STATE_BITS, dtype=np.uint64))] = np.arange(16)
