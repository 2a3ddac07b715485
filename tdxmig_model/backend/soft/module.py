"""The software TDX module of one host: all protocol state, and the way into its leaves.

`Module.call` runs one leaf straight through.  `Module.start` gives the leaf as a generator, so that
somebody else chooses what runs between its steps; several logical processors can have leaves in
progress at once, and locks then answer BUSY as on hardware.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator
from typing import Literal

from tdxmig_model.backend.soft import (
    leaves_build,
    leaves_export,
    leaves_export_mem,
    leaves_export_state,
    leaves_import,
    leaves_import_mem,
    leaves_memory,
    leaves_run,
    leaves_servtd,
)
from tdxmig_model.backend.soft.call import Call, Completion, Point, Registers, Steps
from tdxmig_model.backend.soft.crypto import IvObserver
from tdxmig_model.backend.soft.findings import Finding
from tdxmig_model.backend.soft.leaves_run import GuestCall
from tdxmig_model.backend.soft.locks import Lock
from tdxmig_model.backend.soft.memory import Memory
from tdxmig_model.backend.soft.op_state import ALLOWED, HARDENED_ALLOWED, GuestLeaf, Leaf
from tdxmig_model.backend.soft.state import Interrupt, Lifecycle, LogicalProcessor, Tdr, Tdvps
from tdxmig_model.backend.soft.status import Operand, Status, with_operand
from tdxmig_model.backend.soft.workers import Workers
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import PAGE_SIZE

Profile = Literal["tdx-1.5.01", "hardened", "demo-cve-2025-30513"]
PROFILES: tuple[Profile, ...] = ("tdx-1.5.01", "hardened", "demo-cve-2025-30513")
Entropy = Callable[[int], bytes | None]
"""Random bytes of the length asked for, or None; an OSError counts as None."""
LEAF_MASK = 0xFFFF
VERSION_MASK = 0xFF << 16

_LEAVES: dict[Leaf, Callable[[Call], Steps[int]]] = {
    Leaf.VP_ENTER: leaves_run.vp_enter,
    Leaf.MNG_ADDCX: leaves_build.mng_addcx,
    Leaf.MEM_PAGE_ADD: leaves_memory.page_add,
    Leaf.MEM_SEPT_ADD: leaves_memory.sept_add,
    Leaf.VP_ADDCX: leaves_build.vp_addcx,
    Leaf.MEM_PAGE_AUG: leaves_memory.page_aug,
    Leaf.MEM_RANGE_BLOCK: leaves_memory.range_block,
    Leaf.MNG_KEY_CONFIG: leaves_build.mng_key_config,
    Leaf.MNG_CREATE: leaves_build.mng_create,
    Leaf.VP_CREATE: leaves_build.vp_create,
    Leaf.MR_FINALIZE: leaves_build.mr_finalize,
    Leaf.VP_FLUSH: leaves_build.vp_flush,
    Leaf.MNG_VPFLUSHDONE: leaves_build.mng_vpflushdone,
    Leaf.MNG_KEY_FREEID: leaves_build.mng_key_freeid,
    Leaf.MNG_INIT: leaves_build.mng_init,
    Leaf.VP_INIT: leaves_build.vp_init,
    Leaf.PHYMEM_PAGE_RECLAIM: leaves_build.phymem_page_reclaim,
    Leaf.MEM_PAGE_REMOVE: leaves_memory.page_remove,
    Leaf.MEM_TRACK: leaves_memory.mem_track,
    Leaf.MEM_RANGE_UNBLOCK: leaves_memory.range_unblock,
    Leaf.PHYMEM_CACHE_WB: leaves_build.phymem_cache_wb,
    Leaf.SERVTD_BIND: leaves_servtd.servtd_bind,
    Leaf.SERVTD_PREBIND: leaves_servtd.servtd_prebind,
    Leaf.EXPORT_ABORT: leaves_export.export_abort,
    Leaf.EXPORT_BLOCKW: leaves_export.export_blockw,
    Leaf.EXPORT_RESTORE: leaves_export.export_restore,
    Leaf.EXPORT_MEM: leaves_export_mem.export_mem,
    Leaf.EXPORT_PAUSE: leaves_export.export_pause,
    Leaf.EXPORT_TRACK: leaves_export.export_track,
    Leaf.EXPORT_STATE_IMMUTABLE: leaves_export_state.export_state_immutable,
    Leaf.EXPORT_STATE_TD: leaves_export_state.export_state_td,
    Leaf.EXPORT_STATE_VP: leaves_export_state.export_state_vp,
    Leaf.EXPORT_UNBLOCKW: leaves_export.export_unblockw,
    Leaf.IMPORT_ABORT: leaves_import.import_abort,
    Leaf.IMPORT_END: leaves_import.import_end,
    Leaf.IMPORT_COMMIT: leaves_import.import_commit,
    Leaf.IMPORT_MEM: leaves_import_mem.import_mem,
    Leaf.IMPORT_TRACK: leaves_import.import_track,
    Leaf.IMPORT_STATE_IMMUTABLE: leaves_import.import_state_immutable,
    Leaf.IMPORT_STATE_TD: leaves_import.import_state_td,
    Leaf.IMPORT_STATE_VP: leaves_import.import_state_vp,
    Leaf.MIG_STREAM_CREATE: leaves_build.mig_stream_create,
}
_GUEST_LEAVES: dict[GuestLeaf, Callable[[GuestCall], Steps[int]]] = {
    GuestLeaf.MEM_PAGE_ACCEPT: leaves_run.page_accept,
    GuestLeaf.SERVTD_RD: leaves_servtd.servtd_read,
    GuestLeaf.SERVTD_WR: leaves_servtd.servtd_write,
}


class Module:
    """One TDX module.

    `profile` "tdx-1.5.01" behaves as published and "hardened" adds the numbered repairs of
    specs/repairs.toml; "demo-cve-2025-30513" shows that CVE as published and is no shipped module.

    `random` gives key material of the length it is asked for; None or an OSError is a source
    without entropy.  `iv_observer` sees every (key, IV) that encrypts.  `findings` lists what a
    bundle made the module do that hardware would do with memory it must not touch; it is never done
    here.

    The caller may set `shut_down`; `ready`, False for a module whose platform is not initialised;
    and `list_size`, how many bytes of each metadata page an export fills, from 144 to 4096.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        profile: Profile = "hardened",
        processors: int = 4,
        random: Entropy = secrets.token_bytes,
        iv_observer: IvObserver | None = None,
    ) -> None:
        if profile not in PROFILES:
            raise UsageError(f"unknown module profile {profile!r}; known: {', '.join(PROFILES)}")
        self.memory = memory
        self.profile: Profile = profile
        self.hardened = profile == "hardened"
        self.demonstration = profile == "demo-cve-2025-30513"
        self.allowed = HARDENED_ALLOWED if profile == "hardened" else ALLOWED
        self.random = random
        self.findings: list[Finding] = []
        self.iv_observer = iv_observer
        self.shut_down = False
        self.ready = True
        self.list_size = PAGE_SIZE
        self.workers: Workers | None = None
        self.processors = [LogicalProcessor(index) for index in range(processors)]
        self.tdrs: dict[int, Tdr] = {}
        self.tdvps: dict[int, Tdvps] = {}
        self.hkids: dict[int, Lifecycle] = {}
        self.kot_lock = Lock()

    def draw(self, length: int) -> bytes | None:
        """Fresh random bytes, or None without entropy."""
        try:
            return self.random(length)
        except OSError:
            return None

    def call(
        self, leaf: int, registers: Registers, *, lp: int = 0, interrupt: Interrupt | None = None
    ) -> int:
        """Run a SEAMCALL leaf straight through; RAX, also returned, is its completion status."""
        registers.rax = leaf
        for _ in self._steps(registers, lp, interrupt, interleaved=False):
            pass
        return registers.rax

    def start(
        self, leaf: int, registers: Registers, *, lp: int = 0, interrupt: Interrupt | None = None
    ) -> Generator[Point, None, None]:
        """A SEAMCALL leaf as steps; RAX is set when the generator ends."""
        registers.rax = leaf
        return self._steps(registers, lp, interrupt, interleaved=True)

    def tdcall(self, leaf: GuestLeaf, registers: Registers, vcpu: int, *, lp: int = 0) -> int:
        """Run a TDCALL leaf on behalf of the vCPU whose TDVPR is at `vcpu`.

        Raises guest.EptViolation where the leaf exits to the VMM instead.
        """
        for _ in self._guest_steps(leaf, registers, vcpu, lp, interleaved=False):
            pass
        return registers.rax

    def start_tdcall(
        self, leaf: GuestLeaf, registers: Registers, vcpu: int, *, lp: int = 0
    ) -> Generator[Point, None, None]:
        """A TDCALL leaf as steps; RAX is set when the generator ends."""
        return self._guest_steps(leaf, registers, vcpu, lp, interleaved=True)

    def _guest_steps(
        self, leaf: GuestLeaf, registers: Registers, vcpu: int, lp: int, *, interleaved: bool
    ) -> Generator[Point, None, None]:
        registers.rax = leaf
        call = GuestCall(self, Leaf.VP_ENTER, registers, self.processors[lp], None, interleaved)

        def body(_call: Call) -> Steps[int]:
            call.enter_guest(vcpu)
            return _GUEST_LEAVES[leaf](call)

        yield from self._run(call, body)

    def _steps(
        self, registers: Registers, lp: int, interrupt: Interrupt | None, *, interleaved: bool
    ) -> Generator[Point, None, None]:
        rax = registers.rax
        if rax & ~(LEAF_MASK | VERSION_MASK) or rax & VERSION_MASK:
            registers.rax = with_operand(Status.TDX_OPERAND_INVALID, Operand.RAX)
            return
        if self.shut_down:
            registers.rax = Status.TDX_SYS_SHUTDOWN
            return
        if not self.ready:
            registers.rax = Status.TDX_SYS_NOT_READY
            return
        body = _LEAVES.get(rax)  # type: ignore[call-overload]
        if body is None:
            registers.rax = with_operand(Status.TDX_OPERAND_INVALID, Operand.RAX)
            return
        processor = self.processors[lp]
        call = Call(self, Leaf(rax), registers, processor, interrupt, interleaved)
        yield from self._run(call, body)

    def _run(self, call: Call, body: Callable[[Call], Steps[int]]) -> Generator[Point, None, None]:
        try:
            try:
                status = yield from body(call)
            except Completion as ended:
                status = ended.status
            if call.interleaved and call.holds_locks:
                yield Point.RELEASE
        finally:
            call.release_all()
        call.registers.rax = int(status)
