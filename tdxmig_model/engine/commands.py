"""What the engine asks a backend to do, and what it is told afterwards.

A command is one call of a TDX module leaf (TDX module 1.5.01), with lists as NumPy columns of GPAs.
``name`` is the model's step name, which is also the name of the trace event.  Commands and results
are plain data: the engine yields commands, somebody else executes them.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tdxmig_model.wire.extensions import ReturnMessage
    from tdxmig_model.wire.gpa_list import GpaOperation
    from tdxmig_model.wire.records import Bundle, Record

T = TypeVar("T")

Gpas: TypeAlias = NDArray[np.uint64]
"""Guest physical addresses, multiples of 4096; shape ``(n,)``, at most 512 for a list leaf."""

STATUS_ERROR_BIT = 1 << 63
STATUS_FATAL_BIT = 1 << 61


# --- source --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExportStateImmutable:
    """TDH.EXPORT.STATE.IMMUTABLE: start the migration session; the result carries a bundle."""

    name: ClassVar[str] = "export_state_immutable"


@dataclass(frozen=True, slots=True, eq=False)
class ExportBlockw:
    """TDH.EXPORT.BLOCKW: write-block pages; the result carries one status per entry."""

    gpas: Gpas
    name: ClassVar[str] = "export_blockw"


@dataclass(frozen=True, slots=True)
class MemTrack:
    """TDH.MEM.TRACK: advance TD_EPOCH, so that translations from before it can be told stale."""

    name: ClassVar[str] = "mem_track"


@dataclass(frozen=True, slots=True)
class ExportUnblockw:
    """TDH.EXPORT.UNBLOCKW: make one page writable again; an exported one becomes dirty."""

    gpa: int
    name: ClassVar[str] = "export_unblockw"


@dataclass(frozen=True, slots=True, eq=False)
class ExportMem:
    """TDH.EXPORT.MEM on one forward stream; the result has a bundle and one status per entry."""

    stream: int
    gpas: Gpas
    operation: GpaOperation
    name: ClassVar[str] = "export_mem"


@dataclass(frozen=True, slots=True)
class ExportTrack:
    """TDH.EXPORT.TRACK: an epoch token, or the start token if ``in_order_done``."""

    in_order_done: bool = False

    @property
    def name(self) -> str:
        return "export_track_start" if self.in_order_done else "export_track"


@dataclass(frozen=True, slots=True)
class ExportPause:
    """TDH.EXPORT.PAUSE: from here on no vCPU of the source TD can be entered."""

    name: ClassVar[str] = "export_pause"


@dataclass(frozen=True, slots=True)
class ExportStateTd:
    """TDH.EXPORT.STATE.TD; the result carries a bundle."""

    name: ClassVar[str] = "export_state_td"


@dataclass(frozen=True, slots=True)
class ExportStateVp:
    """TDH.EXPORT.STATE.VP of the vCPU with this index; the result carries a bundle."""

    vcpu: int
    stream: int = 0
    name: ClassVar[str] = "export_state_vp"


@dataclass(frozen=True, slots=True)
class ExportAbort:
    """TDH.EXPORT.ABORT: without a token before the start token, with the destination's after it."""

    token: bytes | None = None

    @property
    def name(self) -> str:
        return "export_abort" if self.token is None else "export_abort_with_token"


@dataclass(frozen=True, slots=True, eq=False)
class ExportRestore:
    """TDH.EXPORT.RESTORE: take exported pages out of the session; one status per entry."""

    gpas: Gpas
    name: ClassVar[str] = "export_restore"


# --- destination ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImportStateImmutable:
    """TDH.IMPORT.STATE.IMMUTABLE: start the migration session on the destination."""

    bundle: Bundle
    name: ClassVar[str] = "import_state_immutable"


@dataclass(frozen=True, slots=True)
class ImportMem:
    """TDH.IMPORT.MEM on one forward stream; the result carries one status per entry."""

    stream: int
    bundle: Bundle
    name: ClassVar[str] = "import_mem"


@dataclass(frozen=True, slots=True)
class ImportTrack:
    """TDH.IMPORT.TRACK: consume an epoch token or, as its MBMD says, the start token."""

    bundle: Bundle

    @property
    def name(self) -> str:
        return "import_track_start" if self.bundle.mbmd.is_start_token else "import_track"


@dataclass(frozen=True, slots=True)
class ImportStateTd:
    """TDH.IMPORT.STATE.TD."""

    bundle: Bundle
    name: ClassVar[str] = "import_state_td"


@dataclass(frozen=True, slots=True)
class ImportStateVp:
    """TDH.IMPORT.STATE.VP into the vCPU with this index."""

    bundle: Bundle
    vcpu: int
    name: ClassVar[str] = "import_state_vp"


@dataclass(frozen=True, slots=True)
class ImportCommit:
    """TDH.IMPORT.COMMIT: the destination TD may run; out-of-order import may go on."""

    name: ClassVar[str] = "import_commit"


@dataclass(frozen=True, slots=True)
class ImportEnd:
    """TDH.IMPORT.END: the destination TD may run and the migration session is over."""

    name: ClassVar[str] = "import_end"


@dataclass(frozen=True, slots=True)
class ImportAbort:
    """TDH.IMPORT.ABORT: give the import up; the result carries a bundle with the abort token."""

    name: ClassVar[str] = "import_abort"


@dataclass(frozen=True, slots=True)
class VpEnter:
    """TDH.VP.ENTER: run one vCPU until ``budget`` guest instructions are used or it exits."""

    vcpu: int
    budget: int
    name: ClassVar[str] = "vp_enter"


SourceCommand: TypeAlias = (
    ExportStateImmutable
    | ExportBlockw
    | MemTrack
    | ExportUnblockw
    | ExportMem
    | ExportTrack
    | ExportPause
    | ExportStateTd
    | ExportStateVp
    | ExportAbort
    | ExportRestore
    | VpEnter
)
DestinationCommand: TypeAlias = (
    ImportStateImmutable
    | ImportMem
    | ImportTrack
    | ImportStateTd
    | ImportStateVp
    | ImportCommit
    | ImportEnd
    | ImportAbort
    | VpEnter
)
Command: TypeAlias = SourceCommand | DestinationCommand


# --- what comes back -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VcpuExit:
    """Why a vCPU came back: ``gpa`` is set for an EPT violation, ``instructions`` were executed."""

    reason: Literal["budget", "ept_violation", "halt"]
    gpa: int | None
    instructions: int


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The outcome of one command.

    ``status`` is the module's 64-bit completion status (RAX) and ``status_name`` its name.  For a
    leaf that works through a GPA list, ``statuses`` has one GpaStatus per entry (uint8, ``(n,)``),
    and the status can be a success although entries failed.  A backend resumes interrupted calls
    itself.
    """

    status: int
    status_name: str
    bundle: Bundle | None = None
    statuses: NDArray[np.uint8] | None = None
    exit: VcpuExit | None = None

    @property
    def ok(self) -> bool:
        """True unless ERROR (bit 63) is set; success may carry FATAL (IMPORT.ABORT) or a count."""
        return not self.status & STATUS_ERROR_BIT


class Backend(Protocol):
    """Who executes commands: the software TDX module, or a migration stream device."""

    @property
    def capabilities(self) -> frozenset[str]:
        """What this backend can do beyond the commands themselves."""
        ...

    def execute(self, command: Command) -> Result:
        """Run one command.  A refusing module is a Result.

        Raises BackendError only when the backend itself cannot work.
        """
        ...

    def observe(self) -> dict[str, int | str | list[int]]:
        """The protocol state that this backend lets one see, by the model's variable names."""
        ...

    def page_states(self, gpas: Gpas) -> NDArray[np.uint8]:
        """Secure EPT entry state index (0..15) of each page, shape ``(n,)``."""
        ...

    def close(self) -> None:
        """Give back what the backend holds.  Idempotent."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Send:
    """Yielded by the engine beside commands: put this record on the wire.  Answered with None.

    The source sends records of the forward path, the destination messages of the return path.
    Memory may travel on the channel of its forward ``stream``; all else is on that of stream 0.
    """

    record: Record | ReturnMessage
    stream: int = 0


Operation: TypeAlias = Generator[Command | Send, Result | None, T]
"""One lifecycle event: yields commands and sends, is sent a Result per command, returns a T."""
