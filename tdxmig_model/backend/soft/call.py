"""One call of a leaf: registers, the locks it holds, and the checks every leaf begins with.

A leaf is a generator.  It yields a `Point` before each lock, at each list entry or page, while it
holds an entry lock, and at its end with all locks still held; whoever drives it decides what runs
meanwhile.  It ends with a status, or by raising `Completion`.  The order of the checks is that of
TDX module 1.5.01.

The docstring of a leaf names its number, operands, outputs and statuses, in the order of its checks
and without the prefix TDX_; BUSY is OPERAND_BUSY.  "The prologue's" are those of the checks that it
begins with: the page of the TDR or TDVPR, BUSY|TDR, TD_FATAL, TD_KEYS_NOT_CONFIGURED,
TDCS_NOT_ALLOCATED, BUSY|OP_STATE and OP_STATE_INCORRECT.  Those of a page, such as "RCX page", are
OPERAND_INVALID, OPERAND_ADDR_RANGE_ERROR, BUSY and PAGE_METADATA_INCORRECT with that operand.
"Source" is the file of the public source of that release, below src/, whose checks and effects the
leaf follows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from tdxmig_model.backend.soft.locks import Lock, Mode
from tdxmig_model.backend.soft.memory import HKID_SHIFT, PAGE_MASK, Memory, PageType
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.sept import LOCK_BIT
from tdxmig_model.backend.soft.state import (
    MIN_TDCS_PAGES,
    Interrupt,
    Lifecycle,
    LogicalProcessor,
    MigscLink,
    Tdcs,
    Tdr,
    Tdvps,
)
from tdxmig_model.backend.soft.status import FATAL_BIT, Operand, Status, with_operand
from tdxmig_model.errors import ModuleHalted
from tdxmig_model.wire.constants import MBMD_SIZE

if TYPE_CHECKING:
    from tdxmig_model.backend.soft.module import Module

T = TypeVar("T")

HPA_FIELD = ((1 << 52) - 1) & ~PAGE_MASK
STREAM_COMMAND_BIT = 1 << 63
NO_PAGE = 0xFFFF_FFFF_FFFF_FFFF


class Point(Enum):
    """Where a leaf can be left for another one."""

    LOCK = "before a lock"
    ENTRY = "between list entries"
    HELD = "inside an entry, with its lock held"
    PAGE = "between metadata pages"
    GUEST = "between guest instructions"
    RELEASE = "done, before its locks are given back"


Steps: TypeAlias = Generator[Point, None, T]
"""A leaf, or a part of one."""


@dataclass(slots=True)
class Registers:
    """General-purpose registers of a SEAMCALL or TDCALL, 64 bit unsigned."""

    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0


class Completion(Exception):
    """Ends a leaf with a status; never leaves the module."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def refuse(status: Status, operand: Operand | None = None) -> Completion:
    """The exception that ends the call with this status and operand id."""
    return Completion(int(status) if operand is None else with_operand(status, operand))


@contextmanager
def failing_import(tdcs: Tdcs) -> Iterator[None]:
    """Inside, every error is fatal: OP_STATE becomes FAILED_IMPORT and FATAL is set."""
    try:
        yield
    except Completion as ended:
        if ended.status == Status.TDX_INTERRUPTED_RESUMABLE:
            raise
        tdcs.op_state = OpState.FAILED_IMPORT
        raise Completion(ended.status | FATAL_BIT) from None


class Call:
    """The context of one leaf in progress."""

    __slots__ = (
        "_entries",
        "_locks",
        "_pages",
        "interleaved",
        "interrupt",
        "leaf",
        "lp",
        "memory",
        "module",
        "registers",
    )

    def __init__(
        self,
        module: Module,
        leaf: Leaf,
        registers: Registers,
        lp: LogicalProcessor,
        interrupt: Interrupt | None,
        interleaved: bool,
    ) -> None:
        self.module = module
        self.memory: Memory = module.memory
        self.leaf = leaf
        self.registers = registers
        self.lp = lp
        self.interrupt = interrupt
        self.interleaved = interleaved
        self._locks: list[tuple[Lock, Mode]] = []
        self._pages: list[tuple[int, Mode]] = []
        self._entries: list[int] = []

    def interrupted(self) -> bool:
        """Is a host interrupt pending?"""
        return self.interrupt is not None and self.interrupt()

    def fresh_random(self, length: int) -> bytes:
        """Fresh key material; TDX_RND_NO_ENTROPY if the source of entropy has none."""
        drawn = self.module.draw(length)
        if drawn is None:
            raise refuse(Status.TDX_RND_NO_ENTROPY)
        return drawn

    def halt(self, tdcs: Tdcs, finding: str) -> ModuleHalted:
        """The exception for a state that the module excludes: hardware stops here for good."""
        leaf = f"TDH.{self.leaf.name.replace('_', '.')}"
        return ModuleHalted(leaf, tdcs.op_state.name, finding)

    # --- locks ---------------------------------------------------------------------------------

    def take(self, lock: Lock, mode: Mode, operand: Operand) -> Steps[None]:
        """Take a lock until the call ends; BUSY on conflict."""
        yield Point.LOCK
        if not lock.acquire(mode):
            raise refuse(Status.TDX_OPERAND_BUSY, operand)
        self._locks.append((lock, mode))

    def drop(self, lock: Lock, mode: Mode) -> None:
        """Give one lock back before the call ends."""
        self._locks.remove((lock, mode))
        lock.release(mode)

    @property
    def holds_locks(self) -> bool:
        """Would anybody find a lock of this call taken?"""
        return bool(self._locks or self._pages or self._entries)

    def release_all(self) -> None:
        """Give back everything: Secure EPT entries, locks, pages, of each kind the last first."""
        while self._entries:
            self.memory.words[self._entries.pop()] &= ~LOCK_BIT
        while self._locks:
            lock, mode = self._locks.pop()
            lock.release(mode)
        while self._pages:
            hpa, mode = self._pages.pop()
            self.memory.unlock(hpa, mode)

    # --- Secure EPT entries --------------------------------------------------------------------

    def take_entry(self, slot: int) -> Steps[bool]:
        """Lock a Secure EPT entry until the call ends; False if somebody else has it locked."""
        yield Point.LOCK
        if self.memory.words[slot] & LOCK_BIT:
            return False
        self.memory.words[slot] |= LOCK_BIT
        self._entries.append(slot)
        return True

    def write_entry(self, slot: int, entry: int) -> None:
        """Another value for an entry; whether it is locked does not change."""
        words = self.memory.words
        words[slot] = entry & ~LOCK_BIT | words[slot] & LOCK_BIT

    # --- physical pages ------------------------------------------------------------------------

    def check_private(self, hpa: int, operand: Operand) -> None:
        """A private page operand: aligned, HKID 0, within MAX_PA, covered by the PAMT."""
        if hpa & PAGE_MASK or hpa >> HKID_SHIFT:
            raise refuse(Status.TDX_OPERAND_INVALID, operand)
        if not self.memory.has_pamt(hpa):
            raise refuse(Status.TDX_OPERAND_ADDR_RANGE_ERROR, operand)

    def take_page(self, hpa: int, operand: Operand, mode: Mode, kind: PageType) -> Steps[None]:
        """Check a private page operand and lock its PAMT entry until the call ends."""
        self.check_private(hpa, operand)
        yield from self.take_pamt(hpa, operand, mode)
        if self.memory.page_type[hpa >> 12] != kind:
            raise refuse(Status.TDX_PAGE_METADATA_INCORRECT, operand)

    def take_pamt(self, hpa: int, operand: Operand, mode: Mode) -> Steps[None]:
        """Lock the PAMT entry of a page until the call ends; BUSY on conflict."""
        yield Point.LOCK
        if not self.memory.try_lock(hpa, mode):
            raise refuse(Status.TDX_OPERAND_BUSY, operand)
        self._pages.append((hpa, mode))

    def take_new_page(self, hpa: int, operand: Operand) -> Steps[None]:
        """A free page that the TD is to own."""
        return self.take_page(hpa, operand, Mode.EXCLUSIVE, PageType.NDA)

    def adopt_page(self, tdr: Tdr, hpa: int, kind: PageType) -> None:
        """Clear a new page and give it to the TD."""
        self.memory.zero_page(hpa)
        self.memory.assign(hpa, kind, tdr.hpa)
        tdr.child_count += 1

    def shared_page(self, hpa: int, operand: Operand) -> int:
        """A 4 KiB buffer of the VMM; returns its HPA."""
        if not self.memory.shared_ok(hpa):
            raise refuse(Status.TDX_OPERAND_INVALID, operand)
        return hpa

    def mbmd_buffer(self, register: int) -> int:
        """The MBMD operand R8: buffer size 63:52 (at least 48), HPA 51:0; returns the HPA."""
        hpa = register & ((1 << 52) - 1)
        if register >> 52 < MBMD_SIZE or not self.memory.shared_ok(hpa, 128, 128):
            raise refuse(Status.TDX_OPERAND_INVALID, Operand.R8)
        return hpa

    # --- TDs -----------------------------------------------------------------------------------

    def enter_td(
        self, operand: Operand, hpa: int, tdr_mode: Mode, op_state_mode: Mode | None
    ) -> Steps[tuple[Tdr, Tdcs]]:
        """The prologue of TD-scope leaves: TDR page, TDR state, OP_STATE lock, OP_STATE."""
        yield from self.take_page(hpa, operand, tdr_mode, PageType.TDR)
        tdr = self.module.tdrs[hpa]
        return tdr, (yield from self.enter_tdcs(tdr, op_state_mode))

    def check_keys(self, tdr: Tdr) -> None:
        """The TD is not fatal and its key is configured."""
        if tdr.fatal:
            raise refuse(Status.TDX_TD_FATAL)
        if tdr.lifecycle is not Lifecycle.KEYS_CONFIGURED:
            raise refuse(Status.TDX_TD_KEYS_NOT_CONFIGURED)

    def enter_tdcs(
        self,
        tdr: Tdr,
        op_state_mode: Mode | None,
        allowed: frozenset[OpState] | None = None,
    ) -> Steps[Tdcs]:
        """TDCS exists, OP_STATE lock, and the leaf (or `allowed`) fits OP_STATE."""
        self.check_keys(tdr)
        tdcs = tdr.tdcs
        if tdcs is None or len(tdr.tdcx) < MIN_TDCS_PAGES:
            raise refuse(Status.TDX_TDCS_NOT_ALLOCATED)
        if op_state_mode is not None:
            yield from self.take(tdcs.op_state_lock, op_state_mode, Operand.OP_STATE)
        if tdcs.op_state not in (self.module.allowed[self.leaf] if allowed is None else allowed):
            raise refuse(Status.TDX_OP_STATE_INCORRECT)
        return tdcs

    def enter_vcpu(
        self, hpa: int, operand: Operand, mode: Mode, op_state_mode: Mode | None = Mode.SHARED
    ) -> Steps[tuple[Tdr, Tdcs, Tdvps]]:
        """The prologue of vCPU-scope leaves: TDVPR page, owner TDR shared, OP_STATE."""
        yield from self.take_page(hpa, operand, mode, PageType.TDVPR)
        tdr = yield from self.take_owner(hpa)
        tdcs = yield from self.enter_tdcs(tdr, op_state_mode)
        return tdr, tdcs, self.module.tdvps[hpa]

    def take_owner(self, hpa: int) -> Steps[Tdr]:
        """Lock the TDR that owns this page, shared."""
        owner = self.memory.owner[hpa >> 12]
        yield from self.take_pamt(owner, Operand.TDR, Mode.SHARED)
        return self.module.tdrs[owner]

    # --- migration streams ---------------------------------------------------------------------

    def forward_index(self, tdcs: Tdcs) -> int:
        """R10: bits 15:0 the forward stream, 62:16 reserved, 63 the command."""
        index = self.registers.r10 & ~STREAM_COMMAND_BIT
        if index >= max(tdcs.num_migs - 1, 0):
            raise refuse(Status.TDX_OPERAND_INVALID, Operand.R10)
        return index

    def stream_zero(self) -> None:
        """R10 of leaves that use forward stream 0 only."""
        if self.registers.r10 & ~STREAM_COMMAND_BIT:
            raise refuse(Status.TDX_OPERAND_INVALID, Operand.R10)

    @property
    def command(self) -> bool:
        """R10 bit 63: RESUME, or "in-order done" for EXPORT.TRACK."""
        return bool(self.registers.r10 & STREAM_COMMAND_BIT)

    def take_link(self, tdcs: Tdcs, number: int) -> Steps[MigscLink]:
        """Lock a MIGSC link: 0 is the backward stream, 1 + i forward stream i."""
        link = tdcs.links[number]
        yield from self.take(link.lock, Mode.EXCLUSIVE, Operand.MIGSC)
        return link

    def ensure_stream(self, link: MigscLink, key: bytes, index: int) -> None:
        """Initialise a stream on its first use in this migration session."""
        if not link.initialized:
            link.start(key, index, self.module.iv_observer)

    # --- vCPU association ----------------------------------------------------------------------

    def associate(self, tdcs: Tdcs, vcpu: Tdvps) -> bool:
        """Bind the vCPU to this logical processor; True if the association is new."""
        if vcpu.assoc_lp == self.lp.index:
            return False
        if vcpu.assoc_lp != NO_LP_ID:
            raise refuse(Status.TDX_VCPU_ASSOCIATED)
        self.associate_initial(tdcs, vcpu)
        return True

    def associate_initial(self, tdcs: Tdcs, vcpu: Tdvps) -> None:
        """Bind a vCPU that no logical processor has; nothing of it is cached here."""
        vcpu.assoc_lp = self.lp.index
        vcpu.tlb.clear()
        tdcs.num_assoc_vcpus += 1


NO_LP_ID = 0xFFFF_FFFF
