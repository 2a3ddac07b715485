"""The words that every part of the model shares: enums, indexes, constants, actors and profiles.

Names are those of the TDX module ABI (release 1.5.01).
"""

from __future__ import annotations

from tdxmig_model.expr import Constant, enum, index, member, sort

SOURCE = "source"
DESTINATION = "destination"
NETWORK = "network"

HARDENED = "hardened"
TDX_1_5_01 = "tdx-1.5.01"
PROFILES = (HARDENED, TDX_1_5_01)
"""The profiles that a user can choose; the others tell which repair removes a counterexample."""

REPAIRS = tuple(f"R{n}" for n in range(1, 16))
"""The repairs of the hardened profile, by their ids in specs/repairs.toml."""

PUBLIC_REPAIRS = frozenset({"R1", "R2", "R3", "R4", "R5", "R8", "R10", "R11", "R13"})
"""The repairs with public references, which specs/repairs.toml lists."""


def without(repair: str) -> str:
    """The name of the profile that has every repair but one."""
    return f"{HARDENED} without {repair}"


def with_only(repair: str) -> str:
    """The name of the profile that has one repair and no other."""
    return f"{TDX_1_5_01} with {repair}"


_STANDING: dict[str, frozenset[str]] = {
    HARDENED: frozenset(REPAIRS),
    TDX_1_5_01: frozenset(),
    **{without(r): frozenset(REPAIRS) - {r} for r in REPAIRS},
    **{with_only(r): frozenset({r}) for r in REPAIRS},
}
ALL_PROFILES = tuple(_STANDING)


def repaired(repair: str) -> tuple[str, ...]:
    """The profiles that have a repair."""
    return tuple(p for p, standing in _STANDING.items() if repair in standing)


def unrepaired(repair: str) -> tuple[str, ...]:
    """The profiles that lack a repair."""
    return tuple(p for p, standing in _STANDING.items() if repair not in standing)


MODULE = "TDX module 1.5.01"


def cite_leaf(name: str, number: int) -> str:
    """The citation of a row that is a SEAMCALL leaf, or a part of one."""
    return f"TDH.{name}, leaf {number}; {MODULE}"


OP_STATE = enum(
    "OpState",
    "UNINITIALIZED",
    "INITIALIZED",
    "RUNNABLE",
    "LIVE_EXPORT",
    "PAUSED_EXPORT",
    "POST_EXPORT",
    "MEMORY_IMPORT",
    "STATE_IMPORT",
    "POST_IMPORT",
    "LIVE_IMPORT",
    "FAILED_IMPORT",
)
UNINITIALIZED = member(OP_STATE, "UNINITIALIZED")
INITIALIZED = member(OP_STATE, "INITIALIZED")
RUNNABLE = member(OP_STATE, "RUNNABLE")
LIVE_EXPORT = member(OP_STATE, "LIVE_EXPORT")
PAUSED_EXPORT = member(OP_STATE, "PAUSED_EXPORT")
POST_EXPORT = member(OP_STATE, "POST_EXPORT")
MEMORY_IMPORT = member(OP_STATE, "MEMORY_IMPORT")
STATE_IMPORT = member(OP_STATE, "STATE_IMPORT")
POST_IMPORT = member(OP_STATE, "POST_IMPORT")
LIVE_IMPORT = member(OP_STATE, "LIVE_IMPORT")
FAILED_IMPORT = member(OP_STATE, "FAILED_IMPORT")

SEPT = enum(
    "SeptState",
    "FREE",
    "REMOVED",
    "NL_MAPPED",
    "NL_BLOCKED",
    "MAPPED",
    "BLOCKED",
    "BLOCKEDW",
    "EXPORTED_BLOCKEDW",
    "EXPORTED_DIRTY",
    "EXPORTED_DIRTY_BLOCKEDW",
    "PENDING",
    "PENDING_BLOCKED",
    "PENDING_BLOCKEDW",
    "PENDING_EXPORTED_BLOCKEDW",
    "PENDING_EXPORTED_DIRTY",
    "PENDING_EXPORTED_DIRTY_BLOCKEDW",
)
FREE = member(SEPT, "FREE")
REMOVED = member(SEPT, "REMOVED")
MAPPED = member(SEPT, "MAPPED")
BLOCKEDW = member(SEPT, "BLOCKEDW")
EXPORTED_BLOCKEDW = member(SEPT, "EXPORTED_BLOCKEDW")
EXPORTED_DIRTY = member(SEPT, "EXPORTED_DIRTY")
EXPORTED_DIRTY_BLOCKEDW = member(SEPT, "EXPORTED_DIRTY_BLOCKEDW")
PENDING = member(SEPT, "PENDING")
PENDING_BLOCKEDW = member(SEPT, "PENDING_BLOCKEDW")
PENDING_EXPORTED_BLOCKEDW = member(SEPT, "PENDING_EXPORTED_BLOCKEDW")
PENDING_EXPORTED_DIRTY = member(SEPT, "PENDING_EXPORTED_DIRTY")
PENDING_EXPORTED_DIRTY_BLOCKEDW = member(SEPT, "PENDING_EXPORTED_DIRTY_BLOCKEDW")

# The migration bundle types (MB_TYPE); a start token is an epoch token of the start epoch.
BUNDLE = enum(
    "BundleType",
    "IMMUTABLE_TD_STATE",
    "MUTABLE_TD_STATE",
    "MUTABLE_VCPU_STATE",
    "MEM",
    "EPOCH_TOKEN",
)
IMMUTABLE_TD_STATE = member(BUNDLE, "IMMUTABLE_TD_STATE")
MUTABLE_TD_STATE = member(BUNDLE, "MUTABLE_TD_STATE")
MUTABLE_VCPU_STATE = member(BUNDLE, "MUTABLE_VCPU_STATE")
MEM = member(BUNDLE, "MEM")
EPOCH_TOKEN = member(BUNDLE, "EPOCH_TOKEN")

PAGE = index("Page")
STREAM = index("Stream")
MESSAGE = index("Message")
EPOCH = index("Epoch")
VCPU = sort("Vcpu")
ENTRY = index("Entry")

# What a GPA list entry asks for.  An entry that failed on export is sent as NOP.
OPERATION = enum("Operation", "NOP", "MIGRATE", "CANCEL", "REMIGRATE")
NOP = member(OPERATION, "NOP")
MIGRATE = member(OPERATION, "MIGRATE")
CANCEL = member(OPERATION, "CANCEL")
REMIGRATE = member(OPERATION, "REMIGRATE")

START_EPOCH = Constant("START_EPOCH", value=0xFFFFFFFF, small=3, least=2)
"""MIG_EPOCH of a start token and of everything after it."""
