"""The name table: what one step is called in each of the worlds it appears in.

A row joins the step of the model, the leaf of the TDX module, the command of the KVM stream device
(first generation), the type of the bundle that the leaf produces or consumes, the event in a trace,
and the functions of QEMU's TDX migration code that do the same.  Leaf numbers are those of the TDX
module 1.5.01, command ids those of the out-of-tree kernel headers of the first generation.

The table is data and nothing else; it imports no other part of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from tdxmig_model.errors import UsageError


class Side(Enum):
    """Which end of a migration takes a step."""

    SOURCE = "source"
    DESTINATION = "destination"


class Kind(Enum):
    """A leaf step is one call of the TDX module, a lifecycle event what a hypervisor does."""

    LEAF = "leaf"
    LIFECYCLE = "lifecycle"


class Call(Enum):
    """How the TDX module is entered: by the host, or by a guest (here the MigTD)."""

    SEAMCALL = "SEAMCALL"
    TDCALL = "TDCALL"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of the TDX module 1.5.01."""

    name: str
    number: int
    call: Call = Call.SEAMCALL


@dataclass(frozen=True, slots=True)
class KvmCommand:
    """A command of struct kvm_tdx_cmd."""

    name: str
    id: int


@dataclass(frozen=True, slots=True)
class Name:
    """One row.  None and () mean that there is no counterpart.

    `kvm` is the command that user space issues for this step; `kvm_inside` is a command issued for
    something else that brings the step about.  `bundle` is an MB_TYPE by name.  For a lifecycle
    event `leaf` is the one that its program is about.  `seed` is facts about QEMU's TDX migration
    code, callbacks before what they call.
    """

    step: str
    side: Side
    kind: Kind
    leaf: Leaf | None = None
    kvm: KvmCommand | None = None
    kvm_inside: KvmCommand | None = None
    bundle: str | None = None
    seed: tuple[str, ...] = ()

    @property
    def trace_event(self) -> str:
        """The name in a trace, which is the step's."""
        return self.step


# Leaves.
_VP_ENTER: Final = Leaf("TDH.VP.ENTER", 0)
_MEM_TRACK: Final = Leaf("TDH.MEM.TRACK", 38)
_EXPORT_ABORT: Final = Leaf("TDH.EXPORT.ABORT", 64)
_EXPORT_BLOCKW: Final = Leaf("TDH.EXPORT.BLOCKW", 65)
_EXPORT_RESTORE: Final = Leaf("TDH.EXPORT.RESTORE", 66)
_EXPORT_MEM: Final = Leaf("TDH.EXPORT.MEM", 68)
_EXPORT_PAUSE: Final = Leaf("TDH.EXPORT.PAUSE", 70)
_EXPORT_TRACK: Final = Leaf("TDH.EXPORT.TRACK", 71)
_EXPORT_STATE_IMMUTABLE: Final = Leaf("TDH.EXPORT.STATE.IMMUTABLE", 72)
_EXPORT_STATE_TD: Final = Leaf("TDH.EXPORT.STATE.TD", 73)
_EXPORT_STATE_VP: Final = Leaf("TDH.EXPORT.STATE.VP", 74)
_EXPORT_UNBLOCKW: Final = Leaf("TDH.EXPORT.UNBLOCKW", 75)
_IMPORT_ABORT: Final = Leaf("TDH.IMPORT.ABORT", 80)
_IMPORT_END: Final = Leaf("TDH.IMPORT.END", 81)
_IMPORT_COMMIT: Final = Leaf("TDH.IMPORT.COMMIT", 82)
_IMPORT_MEM: Final = Leaf("TDH.IMPORT.MEM", 83)
_IMPORT_TRACK: Final = Leaf("TDH.IMPORT.TRACK", 84)
_IMPORT_STATE_IMMUTABLE: Final = Leaf("TDH.IMPORT.STATE.IMMUTABLE", 85)
_IMPORT_STATE_TD: Final = Leaf("TDH.IMPORT.STATE.TD", 86)
_IMPORT_STATE_VP: Final = Leaf("TDH.IMPORT.STATE.VP", 87)
_MIG_STREAM_CREATE: Final = Leaf("TDH.MIG.STREAM.CREATE", 96)
_SERVTD_WR: Final = Leaf("TDG.SERVTD.WR", 20, Call.TDCALL)

# Commands of the stream device, and the one that starts pre-migration.
_KVM_SET_MIGRATION_INFO: Final = KvmCommand("KVM_TDX_SET_MIGRATION_INFO", 7)
_KVM_EXPORT_STATE_IMMUTABLE: Final = KvmCommand("KVM_TDX_MIG_EXPORT_STATE_IMMUTABLE", 9)
_KVM_IMPORT_STATE_IMMUTABLE: Final = KvmCommand("KVM_TDX_MIG_IMPORT_STATE_IMMUTABLE", 10)
_KVM_EXPORT_MEM: Final = KvmCommand("KVM_TDX_MIG_EXPORT_MEM", 11)
_KVM_IMPORT_MEM: Final = KvmCommand("KVM_TDX_MIG_IMPORT_MEM", 12)
_KVM_EXPORT_TRACK: Final = KvmCommand("KVM_TDX_MIG_EXPORT_TRACK", 13)
_KVM_IMPORT_TRACK: Final = KvmCommand("KVM_TDX_MIG_IMPORT_TRACK", 14)
_KVM_EXPORT_PAUSE: Final = KvmCommand("KVM_TDX_MIG_EXPORT_PAUSE", 15)
_KVM_EXPORT_STATE_TD: Final = KvmCommand("KVM_TDX_MIG_EXPORT_STATE_TD", 16)
_KVM_IMPORT_STATE_TD: Final = KvmCommand("KVM_TDX_MIG_IMPORT_STATE_TD", 17)
_KVM_EXPORT_STATE_VP: Final = KvmCommand("KVM_TDX_MIG_EXPORT_STATE_VP", 18)
_KVM_IMPORT_STATE_VP: Final = KvmCommand("KVM_TDX_MIG_IMPORT_STATE_VP", 19)
_KVM_EXPORT_ABORT: Final = KvmCommand("KVM_TDX_MIG_EXPORT_ABORT", 20)
_KVM_IMPORT_END: Final = KvmCommand("KVM_TDX_MIG_IMPORT_END", 21)

_LOAD: Final = ("tdx_mig_loadvm_state",)
_LOAD_MEMORY: Final = ("tdx_mig_loadvm_state", "tdx_mig_multifd_recv_pages")


NAMES: Final[tuple[Name, ...]] = (
    # Source, leaf steps.
    Name(
        "set_migration_key", Side.SOURCE, Kind.LEAF, _SERVTD_WR, kvm_inside=_KVM_SET_MIGRATION_INFO
    ),
    Name(
        "export_state_immutable",
        Side.SOURCE,
        Kind.LEAF,
        _EXPORT_STATE_IMMUTABLE,
        kvm=_KVM_EXPORT_STATE_IMMUTABLE,
        bundle="IMMUTABLE_TD_STATE",
        seed=("tdx_mig_savevm_state_start",),
    ),
    Name("export_blockw", Side.SOURCE, Kind.LEAF, _EXPORT_BLOCKW),
    Name("mem_track", Side.SOURCE, Kind.LEAF, _MEM_TRACK),
    Name("export_unblockw", Side.SOURCE, Kind.LEAF, _EXPORT_UNBLOCKW),
    Name(
        "export_mem",
        Side.SOURCE,
        Kind.LEAF,
        _EXPORT_MEM,
        kvm=_KVM_EXPORT_MEM,
        bundle="MEM",
        seed=("tdx_mig_save_ram", "tdx_mig_multifd_send_prepare"),
    ),
    Name(
        "export_track",
        Side.SOURCE,
        Kind.LEAF,
        _EXPORT_TRACK,
        kvm=_KVM_EXPORT_TRACK,
        bundle="EPOCH_TOKEN",
        seed=("tdx_mig_save_epoch",),
    ),
    Name(
        "export_track_start",
        Side.SOURCE,
        Kind.LEAF,
        _EXPORT_TRACK,
        kvm=_KVM_EXPORT_TRACK,
        bundle="EPOCH_TOKEN",
        seed=("tdx_mig_save_epoch",),
    ),
    Name(
        "export_pause",
        Side.SOURCE,
        Kind.LEAF,
        _EXPORT_PAUSE,
        kvm=_KVM_EXPORT_PAUSE,
        seed=("tdx_mig_savevm_state_pause",),
    ),
    Name(
        "export_state_td",
        Side.SOURCE,
        Kind.LEAF,
        _EXPORT_STATE_TD,
        kvm=_KVM_EXPORT_STATE_TD,
        bundle="MUTABLE_TD_STATE",
        seed=("tdx_mig_save_td",),
    ),
    Name(
        "export_state_vp",
        Side.SOURCE,
        Kind.LEAF,
        _EXPORT_STATE_VP,
        kvm=_KVM_EXPORT_STATE_VP,
        bundle="MUTABLE_VCPU_STATE",
        seed=("tdx_mig_save_one_vcpu",),
    ),
    Name(
        "export_abort",
        Side.SOURCE,
        Kind.LEAF,
        _EXPORT_ABORT,
        kvm=_KVM_EXPORT_ABORT,
        seed=("tdx_mig_savevm_state_ram_abort",),
    ),
    Name("export_abort_with_token", Side.SOURCE, Kind.LEAF, _EXPORT_ABORT, bundle="ABORT_TOKEN"),
    Name("export_restore", Side.SOURCE, Kind.LEAF, _EXPORT_RESTORE, kvm_inside=_KVM_EXPORT_ABORT),
    Name("vp_enter", Side.SOURCE, Kind.LEAF, _VP_ENTER),
    # Destination, leaf steps.
    Name(
        "set_migration_key",
        Side.DESTINATION,
        Kind.LEAF,
        _SERVTD_WR,
        kvm_inside=_KVM_SET_MIGRATION_INFO,
    ),
    Name(
        "import_state_immutable",
        Side.DESTINATION,
        Kind.LEAF,
        _IMPORT_STATE_IMMUTABLE,
        kvm=_KVM_IMPORT_STATE_IMMUTABLE,
        bundle="IMMUTABLE_TD_STATE",
        seed=_LOAD,
    ),
    Name(
        "import_mem",
        Side.DESTINATION,
        Kind.LEAF,
        _IMPORT_MEM,
        kvm=_KVM_IMPORT_MEM,
        bundle="MEM",
        seed=_LOAD_MEMORY,
    ),
    Name(
        "import_track",
        Side.DESTINATION,
        Kind.LEAF,
        _IMPORT_TRACK,
        kvm=_KVM_IMPORT_TRACK,
        bundle="EPOCH_TOKEN",
        seed=_LOAD,
    ),
    Name(
        "import_track_start",
        Side.DESTINATION,
        Kind.LEAF,
        _IMPORT_TRACK,
        kvm=_KVM_IMPORT_TRACK,
        bundle="EPOCH_TOKEN",
        seed=_LOAD,
    ),
    Name(
        "import_state_td",
        Side.DESTINATION,
        Kind.LEAF,
        _IMPORT_STATE_TD,
        kvm=_KVM_IMPORT_STATE_TD,
        bundle="MUTABLE_TD_STATE",
        seed=_LOAD,
    ),
    Name(
        "import_state_vp",
        Side.DESTINATION,
        Kind.LEAF,
        _IMPORT_STATE_VP,
        kvm=_KVM_IMPORT_STATE_VP,
        bundle="MUTABLE_VCPU_STATE",
        seed=_LOAD,
    ),
    Name(
        "import_commit", Side.DESTINATION, Kind.LEAF, _IMPORT_COMMIT, kvm_inside=_KVM_IMPORT_TRACK
    ),
    Name(
        "import_end",
        Side.DESTINATION,
        Kind.LEAF,
        _IMPORT_END,
        kvm=_KVM_IMPORT_END,
        seed=("tdx_mig_loadvm_state_cleanup",),
    ),
    Name("import_abort", Side.DESTINATION, Kind.LEAF, _IMPORT_ABORT, bundle="ABORT_TOKEN"),
    # A failing import leaf that ends the session has this one effect, whichever leaf it is.
    Name("import_failure", Side.DESTINATION, Kind.LEAF),
    Name("vp_enter", Side.DESTINATION, Kind.LEAF, _VP_ENTER),
    # Source, lifecycle events.
    Name("setup", Side.SOURCE, Kind.LIFECYCLE, _MIG_STREAM_CREATE, seed=("tdx_mig_stream_setup",)),
    Name(
        "export_immutable",
        Side.SOURCE,
        Kind.LIFECYCLE,
        _EXPORT_STATE_IMMUTABLE,
        kvm=_KVM_EXPORT_STATE_IMMUTABLE,
        bundle="IMMUTABLE_TD_STATE",
        seed=("tdx_mig_savevm_state_start",),
    ),
    Name("confirm_import", Side.SOURCE, Kind.LIFECYCLE),
    Name(
        "start_epoch",
        Side.SOURCE,
        Kind.LIFECYCLE,
        _EXPORT_TRACK,
        kvm=_KVM_EXPORT_TRACK,
        bundle="EPOCH_TOKEN",
        seed=("tdx_mig_savevm_state_ram_start_epoch",),
    ),
    Name(
        "export_memory",
        Side.SOURCE,
        Kind.LIFECYCLE,
        _EXPORT_MEM,
        kvm=_KVM_EXPORT_MEM,
        bundle="MEM",
        seed=("tdx_mig_savevm_state_ram", "tdx_mig_multifd_send_prepare"),
    ),
    Name(
        "cancel_page",
        Side.SOURCE,
        Kind.LIFECYCLE,
        _EXPORT_MEM,
        kvm=_KVM_EXPORT_MEM,
        bundle="MEM",
        seed=("tdx_mig_savevm_state_ram_cancel",),
    ),
    Name(
        "pause",
        Side.SOURCE,
        Kind.LIFECYCLE,
        _EXPORT_PAUSE,
        kvm=_KVM_EXPORT_PAUSE,
        seed=("tdx_mig_savevm_state_pause",),
    ),
    Name(
        "export_td_state",
        Side.SOURCE,
        Kind.LIFECYCLE,
        _EXPORT_STATE_TD,
        kvm=_KVM_EXPORT_STATE_TD,
        bundle="MUTABLE_TD_STATE",
        seed=("tdx_mig_save_td",),
    ),
    Name(
        "export_vcpu_state",
        Side.SOURCE,
        Kind.LIFECYCLE,
        _EXPORT_STATE_VP,
        kvm=_KVM_EXPORT_STATE_VP,
        bundle="MUTABLE_VCPU_STATE",
        seed=("tdx_mig_save_vcpus", "tdx_mig_save_one_vcpu"),
    ),
    Name(
        "finish_epochs",
        Side.SOURCE,
        Kind.LIFECYCLE,
        _EXPORT_TRACK,
        kvm=_KVM_EXPORT_TRACK,
        bundle="EPOCH_TOKEN",
        seed=("tdx_mig_savevm_state_end", "tdx_mig_save_epoch"),
    ),
    Name(
        "abort",
        Side.SOURCE,
        Kind.LIFECYCLE,
        _EXPORT_ABORT,
        kvm=_KVM_EXPORT_ABORT,
        seed=("tdx_mig_savevm_state_ram_abort",),
    ),
    Name("abort_with_token", Side.SOURCE, Kind.LIFECYCLE, _EXPORT_ABORT, bundle="ABORT_TOKEN"),
    Name("cleanup", Side.SOURCE, Kind.LIFECYCLE, seed=("tdx_mig_cleanup",)),
    # Destination, lifecycle events.
    Name(
        "setup",
        Side.DESTINATION,
        Kind.LIFECYCLE,
        _MIG_STREAM_CREATE,
        seed=("tdx_mig_stream_setup",),
    ),
    Name(
        "import_immutable",
        Side.DESTINATION,
        Kind.LIFECYCLE,
        _IMPORT_STATE_IMMUTABLE,
        kvm=_KVM_IMPORT_STATE_IMMUTABLE,
        bundle="IMMUTABLE_TD_STATE",
        seed=_LOAD,
    ),
    Name(
        "import_epoch",
        Side.DESTINATION,
        Kind.LIFECYCLE,
        _IMPORT_TRACK,
        kvm=_KVM_IMPORT_TRACK,
        bundle="EPOCH_TOKEN",
        seed=_LOAD,
    ),
    Name(
        "import_memory",
        Side.DESTINATION,
        Kind.LIFECYCLE,
        _IMPORT_MEM,
        kvm=_KVM_IMPORT_MEM,
        bundle="MEM",
        seed=_LOAD_MEMORY,
    ),
    Name(
        "import_td_state",
        Side.DESTINATION,
        Kind.LIFECYCLE,
        _IMPORT_STATE_TD,
        kvm=_KVM_IMPORT_STATE_TD,
        bundle="MUTABLE_TD_STATE",
        seed=_LOAD,
    ),
    Name(
        "import_vcpu_state",
        Side.DESTINATION,
        Kind.LIFECYCLE,
        _IMPORT_STATE_VP,
        kvm=_KVM_IMPORT_STATE_VP,
        bundle="MUTABLE_VCPU_STATE",
        seed=_LOAD,
    ),
    Name(
        "import_start_token",
        Side.DESTINATION,
        Kind.LIFECYCLE,
        _IMPORT_TRACK,
        kvm=_KVM_IMPORT_TRACK,
        bundle="EPOCH_TOKEN",
        seed=_LOAD,
    ),
    Name("commit", Side.DESTINATION, Kind.LIFECYCLE, _IMPORT_COMMIT, kvm_inside=_KVM_IMPORT_TRACK),
    Name(
        "end",
        Side.DESTINATION,
        Kind.LIFECYCLE,
        _IMPORT_END,
        kvm=_KVM_IMPORT_END,
        seed=("tdx_mig_loadvm_state_cleanup",),
    ),
    Name("abort", Side.DESTINATION, Kind.LIFECYCLE, _IMPORT_ABORT, bundle="ABORT_TOKEN"),
    Name(
        "cleanup",
        Side.DESTINATION,
        Kind.LIFECYCLE,
        seed=("tdx_mig_loadvm_state_cleanup", "tdx_mig_cleanup"),
    ),
)
"""Every row, in the order of a migration: leaf steps of both sides, then lifecycle events."""

_BY_STEP: Final = {(row.kind, row.side, row.step): row for row in NAMES}


def find(step: str, side: Side, kind: Kind) -> Name:
    """The row of a step.  Raises UsageError with the steps there are when it is unknown."""
    try:
        return _BY_STEP[kind, side, step]
    except KeyError:
        known = ", ".join(row.step for row in rows(side, kind))
        message = f"no {kind.value} step {step!r} of the {side.value}; there are {known}"
        raise UsageError(message) from None


def rows(side: Side, kind: Kind) -> tuple[Name, ...]:
    """The rows of one side and kind, in order."""
    return tuple(row for row in NAMES if row.side is side and row.kind is kind)


def steps_of_leaf(number: int, call: Call = Call.SEAMCALL) -> tuple[Name, ...]:
    """The leaf steps that a leaf number stands for, source first; () when none."""
    return tuple(
        row
        for row in NAMES
        if row.kind is Kind.LEAF and row.leaf and (row.leaf.number, row.leaf.call) == (number, call)
    )


def steps_of_command(command_id: int) -> tuple[Name, ...]:
    """The leaf steps that happen in a KVM command: those it is issued for, then those inside."""
    leaf_steps = [row for row in NAMES if row.kind is Kind.LEAF]
    issued = [row for row in leaf_steps if row.kvm and row.kvm.id == command_id]
    inside = [row for row in leaf_steps if row.kvm_inside and row.kvm_inside.id == command_id]
    return tuple(issued + inside)
