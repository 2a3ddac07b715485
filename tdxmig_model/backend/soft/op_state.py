"""OP_STATE of a TD: the states, their flags, and which leaf may be called in which state.

Facts of TDX module 1.5.01.  The table is written here by hand and compared with the published one
in a test.  START_IMPORT and START_EXPORT are those of later public releases, where an interrupted
immutable leaf leaves the TD in a state of its own; here they are repairs of the profile hardened.
"""

from __future__ import annotations

from enum import IntEnum


class OpState(IntEnum):
    """TDCS.OP_STATE; the last two exist in the profile hardened alone."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    RUNNABLE = 2
    LIVE_EXPORT = 3
    PAUSED_EXPORT = 4
    POST_EXPORT = 5
    MEMORY_IMPORT = 6
    STATE_IMPORT = 7
    POST_IMPORT = 8
    LIVE_IMPORT = 9
    FAILED_IMPORT = 10
    START_IMPORT = 11
    START_EXPORT = 12


PUBLISHED_STATES = tuple(state for state in OpState if state <= OpState.FAILED_IMPORT)
"""The OP_STATEs of TDX module 1.5.01."""


class Leaf(IntEnum):
    """SEAMCALL leaf numbers (TDH.*) of the leaves that this module has."""

    VP_ENTER = 0
    MNG_ADDCX = 1
    MEM_PAGE_ADD = 2
    MEM_SEPT_ADD = 3
    VP_ADDCX = 4
    MEM_PAGE_AUG = 6
    MEM_RANGE_BLOCK = 7
    MNG_KEY_CONFIG = 8
    MNG_CREATE = 9
    VP_CREATE = 10
    MR_FINALIZE = 17
    VP_FLUSH = 18
    MNG_VPFLUSHDONE = 19
    MNG_KEY_FREEID = 20
    MNG_INIT = 21
    VP_INIT = 22
    PHYMEM_PAGE_RECLAIM = 28
    MEM_PAGE_REMOVE = 29
    MEM_TRACK = 38
    MEM_RANGE_UNBLOCK = 39
    PHYMEM_CACHE_WB = 40
    SERVTD_BIND = 48
    SERVTD_PREBIND = 49
    EXPORT_ABORT = 64
    EXPORT_BLOCKW = 65
    EXPORT_RESTORE = 66
    EXPORT_MEM = 68
    EXPORT_PAUSE = 70
    EXPORT_TRACK = 71
    EXPORT_STATE_IMMUTABLE = 72
    EXPORT_STATE_TD = 73
    EXPORT_STATE_VP = 74
    EXPORT_UNBLOCKW = 75
    IMPORT_ABORT = 80
    IMPORT_END = 81
    IMPORT_COMMIT = 82
    IMPORT_MEM = 83
    IMPORT_TRACK = 84
    IMPORT_STATE_IMMUTABLE = 85
    IMPORT_STATE_TD = 86
    IMPORT_STATE_VP = 87
    MIG_STREAM_CREATE = 96


class GuestLeaf(IntEnum):
    """TDCALL leaf numbers (TDG.*) of the leaves that this module has."""

    MEM_PAGE_ACCEPT = 6
    SERVTD_RD = 18
    SERVTD_WR = 20


def _states(row: str) -> frozenset[OpState]:
    """One 0 or 1 per OP_STATE, UNINITIALIZED first."""
    return frozenset(OpState(number) for number, cell in enumerate(row) if cell == "1")


ALLOWED: dict[Leaf, frozenset[OpState]] = {
    # UNINITIALIZED, INITIALIZED, RUNNABLE | LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT |
    # MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT, LIVE_IMPORT, FAILED_IMPORT
    Leaf.VP_ENTER: _states("00110000010"),
    Leaf.MNG_ADDCX: _states("10000000000"),
    Leaf.MEM_PAGE_ADD: _states("01000000000"),
    Leaf.MEM_SEPT_ADD: _states("01110011110"),
    Leaf.VP_ADDCX: _states("01000001000"),
    Leaf.MEM_PAGE_AUG: _states("01110000010"),
    Leaf.MEM_RANGE_BLOCK: _states("01111100110"),
    Leaf.VP_CREATE: _states("01000001000"),
    Leaf.MR_FINALIZE: _states("01000000000"),
    Leaf.VP_FLUSH: _states("11111111111"),
    Leaf.MNG_INIT: _states("10000000000"),
    Leaf.VP_INIT: _states("01000000000"),
    Leaf.MEM_PAGE_REMOVE: _states("01111100111"),
    Leaf.MEM_TRACK: _states("01111111110"),
    Leaf.MEM_RANGE_UNBLOCK: _states("01111100110"),
    Leaf.SERVTD_BIND: _states("11110000110"),
    Leaf.SERVTD_PREBIND: _states("11000000000"),
    Leaf.EXPORT_ABORT: _states("00011100000"),
    Leaf.EXPORT_BLOCKW: _states("00010000000"),
    Leaf.EXPORT_RESTORE: _states("00100000000"),
    Leaf.EXPORT_MEM: _states("00011100000"),
    Leaf.EXPORT_PAUSE: _states("00010000000"),
    Leaf.EXPORT_TRACK: _states("00011000000"),
    Leaf.EXPORT_STATE_IMMUTABLE: _states("00100000010"),
    Leaf.EXPORT_STATE_TD: _states("00001000000"),
    Leaf.EXPORT_STATE_VP: _states("00001000000"),
    Leaf.EXPORT_UNBLOCKW: _states("00111100000"),
    Leaf.IMPORT_ABORT: _states("00000011101"),
    Leaf.IMPORT_END: _states("00000000110"),
    Leaf.IMPORT_COMMIT: _states("00000000100"),
    Leaf.IMPORT_MEM: _states("00000011110"),
    Leaf.IMPORT_TRACK: _states("00000011000"),
    Leaf.IMPORT_STATE_IMMUTABLE: _states("10000000000"),
    Leaf.IMPORT_STATE_TD: _states("00000010000"),
    Leaf.IMPORT_STATE_VP: _states("00000001000"),
    Leaf.MIG_STREAM_CREATE: _states("11100000000"),
}
"""OP_STATEs in which each leaf is allowed; leaves that do not look at OP_STATE are not listed."""

_IN_START_IMPORT = frozenset({Leaf.VP_FLUSH, Leaf.IMPORT_STATE_IMMUTABLE})
_IN_START_EXPORT = frozenset(
    {
        Leaf.VP_ENTER,
        Leaf.VP_FLUSH,
        Leaf.MEM_SEPT_ADD,
        Leaf.MEM_PAGE_AUG,
        Leaf.MEM_RANGE_BLOCK,
        Leaf.MEM_PAGE_REMOVE,
        Leaf.MEM_TRACK,
        Leaf.MEM_RANGE_UNBLOCK,
        Leaf.EXPORT_UNBLOCKW,
        Leaf.EXPORT_STATE_IMMUTABLE,
        Leaf.EXPORT_ABORT,
    }
)
"""The TD goes on running.  Later public releases allow MIG.STREAM.CREATE and SERVTD.BIND too and
not EXPORT.ABORT; here nothing that the bundle speaks of can change, and there is a way out."""


def _hardened(leaf: Leaf, states: frozenset[OpState]) -> frozenset[OpState]:
    start_import = {OpState.START_IMPORT} if leaf in _IN_START_IMPORT else set()
    start_export = {OpState.START_EXPORT} if leaf in _IN_START_EXPORT else set()
    return states | start_import | start_export


HARDENED_ALLOWED = {leaf: _hardened(leaf, states) for leaf, states in ALLOWED.items()}
"""The same in the profile hardened."""

SERVTD_BIND_SERVICE_TD = _states("00111100110")
"""OP_STATEs that a service TD may be in when it is bound."""
SERVTD_RD_TARGET = _states("11111111111")
SERVTD_WR_TARGET = _states("11110011111")
"""OP_STATEs that the target of TDG.SERVTD.RD and TDG.SERVTD.WR may be in."""

INTERRUPTED_START = frozenset({OpState.START_IMPORT, OpState.START_EXPORT})
"""An immutable leaf is interrupted, profile hardened; a service TD reads and writes keys here."""
CAN_RUN = _states("00110000010") | {OpState.START_EXPORT}
"""OP_STATEs in which vCPUs can be entered, so that blocking needs TLB tracking."""

TLB_TRACKING_REQUIRED = _states("00110000010")
ANY_INITIALIZED = _states("01111111111")
EXPORT_IN_ORDER = _states("00011000000")
IMPORT_IN_ORDER = _states("00000011000")
IMPORT_OUT_OF_ORDER = _states("00000000110")
IMPORT_IN_PROGRESS = _states("00000011110")
