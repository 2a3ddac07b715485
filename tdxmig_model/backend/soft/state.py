"""What the TDX module remembers: TDR, TDCS, TDVPS and migration stream contexts (MIGSC).

Field names are those of TDX module 1.5.01.  Fields that travel in metadata lists live in `fields`
under the names of the metadata tables, except the counters that leaves change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

from tdxmig_model.backend.soft.crypto import IvObserver, StreamCipher
from tdxmig_model.backend.soft.locks import Lock
from tdxmig_model.backend.soft.metadata import ListParser, Value
from tdxmig_model.backend.soft.op_state import OpState
from tdxmig_model.backend.soft.sept import SeptTree

MIN_TDCS_PAGES = 6
MAX_TDCS_PAGES = 9
MIN_TDVPS_PAGES = 6
MAX_TDVPS_PAGES = 15
MAX_MIGS = 512
MAX_EXPORT_COUNT = 0x7FFF_FFFF
NO_LP = 0xFFFF_FFFF
ZERO_KEY = bytes(32)
ZERO_UUID = (0, 0, 0, 0)

Uuid = tuple[int, int, int, int]


class Lifecycle(Enum):
    """TDR.LIFECYCLE_STATE."""

    HKID_ASSIGNED = "TD_HKID_ASSIGNED"
    KEYS_CONFIGURED = "TD_KEYS_CONFIGURED"
    BLOCKED = "TD_BLOCKED"
    TEARDOWN = "TD_TEARDOWN"


class VcpuState(IntEnum):
    """TDVPS.STATE."""

    UNINITIALIZED = 0
    READY = 2
    ACTIVE = 4
    DISABLED = 8
    IMPORT = 0x10


class BindingState(IntEnum):
    """State of a service TD binding slot."""

    NOT_BOUND = 0
    PRE_BOUND = 1
    BOUND = 2


@dataclass(slots=True)
class Interrupted:
    """A long leaf that returned TDX_INTERRUPTED_RESUMABLE and may be resumed.

    `operands` are the values that a RESUME must repeat, in the leaf's own order, and `mig_epoch`
    the epoch it must still be in.  `processed` counts list entries or pages done, `written` the
    content pages; `context` is the GCM message in progress of a state leaf, and `parser` holds the
    metadata lists of an import so far.
    """

    leaf: int
    operands: tuple[int, ...]
    mig_epoch: int
    processed: int
    written: int = 0
    mbmd: Any = None
    context: Any = None
    parser: ListParser | None = None


@dataclass(slots=True)
class Migsc:
    """Migration stream context: counters, key and the interrupted call of one stream."""

    hpa: int
    iv_counter: int = 0
    next_mb_counter: int = 0
    expected_mb_counter: int = 0
    interrupted: Interrupted | None = None
    cipher: StreamCipher | None = None


@dataclass(slots=True)
class MigscLink:
    """TDCS.MIGSC_LINKS entry: index 0 is the backward stream, 1 + i is forward stream i."""

    migsc: Migsc
    lock: Lock = field(default_factory=Lock)
    initialized: bool = False

    def start(self, key: bytes, migs_index: int, observer: IvObserver | None) -> None:
        """Initialise the stream: counters 0, nothing interrupted, this key."""
        self.migsc = Migsc(self.migsc.hpa, cipher=StreamCipher(key, migs_index, observer))
        self.initialized = True


@dataclass(slots=True)
class Binding:
    """Service TD binding slot (TDX module 1.5.01 has one, for a Migration TD)."""

    state: BindingState = BindingState.NOT_BOUND
    servtd_type: int = 0
    attributes: int = 0
    uuid: Uuid = ZERO_UUID
    info_hash: bytes = bytes(48)


@dataclass(slots=True)
class Tdcs:
    """TD control structure."""

    sept: SeptTree
    mig_enc_key: bytes
    fields: dict[str, Value]
    op_state: OpState = OpState.UNINITIALIZED
    num_vcpus: int = 0
    num_assoc_vcpus: int = 0
    td_epoch: int = 0
    refcount: list[int] = field(default_factory=lambda: [0, 0])
    bw_epoch: int = 0
    mig_epoch: int = 0
    total_mb_count: int = 0
    export_count: int = 0
    import_count: int = 0
    mig_count: int = 0
    dirty_count: int = 0
    num_migrated_vcpus: int = 0
    imported_vcpus: set[int] = field(default_factory=set)
    mig_enc_working_key: bytes = ZERO_KEY
    mig_dec_key: bytes = ZERO_KEY
    mig_dec_key_set: bool = False
    mig_dec_key_words: set[int] = field(default_factory=set)
    mig_dec_working_key: bytes = ZERO_KEY
    mig_version: int = 0
    mig_working_version: int = 0
    pre_import_uuid: Uuid = ZERO_UUID
    links: list[MigscLink] = field(default_factory=list)
    binding: Binding = field(default_factory=Binding)
    measurement: Any = field(default_factory=hashlib.sha384)
    op_state_lock: Lock = field(default_factory=Lock)
    mig_lock: Lock = field(default_factory=Lock)
    sept_lock: Lock = field(default_factory=Lock)
    epoch_lock: Lock = field(default_factory=Lock)
    bindings_lock: Lock = field(default_factory=Lock)

    @property
    def num_migs(self) -> int:
        """Migration streams, the backward one included."""
        return len(self.links)

    def tlb_tracked(self, epoch: int) -> bool:
        """Has every translation from `epoch` or before been flushed?  (BEPOCH format)"""
        if epoch >> 63:
            return False
        if epoch == self.td_epoch - 1:
            return self.refcount[epoch & 1] == 0
        return epoch < self.td_epoch - 1


@dataclass(slots=True)
class Tdr:
    """TD root: identity, lifecycle, and how many pages the TD owns."""

    hpa: int
    hkid: int
    uuid: Uuid
    lifecycle: Lifecycle = Lifecycle.HKID_ASSIGNED
    fatal: bool = False
    child_count: int = 0
    tdcx: list[int] = field(default_factory=list)
    tdcs: Tdcs | None = None


@dataclass(slots=True)
class Tdvps:
    """One vCPU.  `registers` are the vCPU fields by name; `tlb` maps a GPA page to (HPA, writable).

    `tlb` is what the logical processor has cached for this vCPU: translations survive TD exits and
    changes of the Secure EPT until they are flushed, which is what TLB tracking is about.
    """

    hpa: int
    registers: dict[str, Any]
    pages: int = 1
    state: VcpuState = VcpuState.UNINITIALIZED
    assoc_lp: int = NO_LP
    vcpu_epoch: int = 0
    export_count: int = 0
    tlb: dict[int, tuple[int, bool]] = field(default_factory=dict)

    @property
    def vcpu_index(self) -> int:
        """VCPU_INDEX: order of VP.INIT on the source; travels with the vCPU."""
        index: int = self.registers["VCPU_INDEX"]
        return index


Interrupt = Callable[[], bool]
"""Is a host interrupt pending?  Asked between pages and list entries."""


@dataclass(slots=True)
class LogicalProcessor:
    """One logical processor: `timer` guest instructions run until it interrupts the guest.

    The caller may set `limits_cpuid`, IA32_MISC_ENABLE's limit of CPUID, and `tsc_behind`: its TSC
    is below the one at the last exit of a vCPU.
    """

    index: int
    timer: int = 0
    retired: int = 0
    limits_cpuid: bool = False
    tsc_behind: bool = False
