"""Running a vCPU: TDH.VP.ENTER, guest accesses through the TLB, and TDG.MEM.PAGE.ACCEPT.

Facts of TDX module 1.5.01 (public source) for entry, association, TLB tracking, TDG.VP.VMCALL and
the outcomes of ACCEPT.  The guest's instructions are those of `guest`.  A TD exit reports the exit
reason in RAX 31:0, the faulting GPA in R8, the guest's registers of a VMCALL in R10 to R13.
"""

from __future__ import annotations

from tdxmig_model.backend.soft import guest
from tdxmig_model.backend.soft.call import Call, Point, Steps, refuse
from tdxmig_model.backend.soft.leaves_memory import page_info, private_gpa
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.memory import Memory
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.sept import (
    ACCEPT,
    HPA_MASK,
    LOCK_BIT,
    PRIVATE_GPA_LIMIT,
    READABLE_STATES,
    STATE_MASK,
    STATE_OF,
    WRITE_BIT,
    SeptState,
    SeptTree,
    leaf_entry,
    with_state,
)
from tdxmig_model.backend.soft.state import MIN_TDVPS_PAGES, Tdcs, Tdr, Tdvps, VcpuState
from tdxmig_model.backend.soft.status import Operand, Status, is_error, with_operand

EXIT_EXTERNAL_INTERRUPT = 1
EXIT_HLT = 12
EXIT_EPT_VIOLATION = 48
EXIT_TDCALL = 77
LAST_EXIT_ASYNC, LAST_EXIT_VMCALL = 0, 2
"""TDVPS.LAST_TD_EXIT."""
VMCALL_REGISTERS = tuple(
    (name, name.lower(), 1 << number)
    for number, name in enumerate(("R10", "R11", "R12", "R13"), 10)
)
"""Registers that a VMCALL of the programs passes, and their bits in the guest's RCX."""


def vp_enter(call: Call) -> Steps[int]:
    """TDH.VP.ENTER (0, TDX module 1.5.01): run a vCPU until it exits.

    In: RCX TDVPR; after a VMCALL exit R10 to R13 are the VMM's answer.
    Out: RAX 15:0 exit reason; R8 the GPA of an EPT violation; of a VMCALL RCX which of R10 to
        R13 are the guest's.
    Status: the prologue's; TDCX_NUM_INCORRECT; VCPU_STATE_INCORRECT; VCPU_ASSOCIATED;
        TSC_ROLLBACK; BUSY|TD_EPOCH.
    Source: tdh_vp_enter.c.

    It ends with the timer of the logical processor, HLT, a fault or a VMCALL.  TDR and TDVPR
    stay locked shared while the guest runs; OP_STATE is given back before.
    """
    registers = call.registers
    _, tdcs, vcpu = yield from call.enter_vcpu(registers.rcx, Operand.RCX, Mode.SHARED)
    if vcpu.pages < MIN_TDVPS_PAGES:
        raise refuse(Status.TDX_TDCX_NUM_INCORRECT)
    if vcpu.state is not VcpuState.READY:
        raise refuse(Status.TDX_VCPU_STATE_INCORRECT)
    fresh = call.associate(tdcs, vcpu)
    if call.lp.tsc_behind:
        raise refuse(Status.TDX_TSC_ROLLBACK)
    epoch = yield from _track_entry(call, tdcs, vcpu, fresh)
    call.drop(tdcs.op_state_lock, Mode.SHARED)
    vcpu.state = VcpuState.ACTIVE
    _finish_vmcall(call, vcpu)
    try:
        reason, gpa = yield from _run(call, tdcs, vcpu)
    finally:
        vcpu.state = VcpuState.READY
        tdcs.refcount[epoch & 1] -= 1
    registers.r8 = gpa
    if reason == EXIT_TDCALL:
        _begin_vmcall(call, vcpu)
    return Status.TDX_SUCCESS | reason


def _begin_vmcall(call: Call, vcpu: Tdvps) -> None:
    """The registers that the guest selects go to the VMM, and its answer will come back there."""
    guest_registers = vcpu.registers
    guest_registers["LAST_TD_EXIT"] = LAST_EXIT_VMCALL
    call.registers.rcx = guest_registers["RCX"]
    for name, register, bit in VMCALL_REGISTERS:
        passed = guest_registers["RCX"] & bit
        setattr(call.registers, register, guest_registers[name] if passed else 0)


def _finish_vmcall(call: Call, vcpu: Tdvps) -> None:
    """If the guest waits for the answer to a VMCALL, this entry brings it."""
    guest_registers = vcpu.registers
    if guest_registers["LAST_TD_EXIT"] == LAST_EXIT_VMCALL:
        guest_registers["LAST_TD_EXIT"] = LAST_EXIT_ASYNC
        guest_registers["RAX"] = int(Status.TDX_SUCCESS)
        for name, register, bit in VMCALL_REGISTERS:
            if guest_registers["RCX"] & bit:
                guest_registers[name] = getattr(call.registers, register)


def _track_entry(call: Call, tdcs: Tdcs, vcpu: Tdvps, fresh: bool) -> Steps[int]:
    """Count the vCPU into the current TLB epoch, and flush what it cached in an older one."""
    yield from call.take(tdcs.epoch_lock, Mode.SHARED, Operand.TD_EPOCH)
    epoch = tdcs.td_epoch
    tdcs.refcount[epoch & 1] += 1
    call.drop(tdcs.epoch_lock, Mode.SHARED)
    if vcpu.vcpu_epoch != epoch:
        if not fresh:
            vcpu.tlb.clear()
        vcpu.vcpu_epoch = epoch
    return epoch


def _run(call: Call, tdcs: Tdcs, vcpu: Tdvps) -> Steps[tuple[int, int]]:
    """Guest instructions until something ends them: (exit reason, faulting GPA or 0)."""
    lp, interleaved = call.lp, call.interleaved
    lp.retired = waited = 0
    machine = GuestMachine(call, tdcs, vcpu)
    step = guest.step
    try:
        while lp.retired + waited < lp.timer:
            if interleaved:
                yield Point.GUEST
            try:
                ran = step(machine)
            except guest.Retry:
                # Time passes while the guest tries again, so that the timer ends that too.
                waited += 1
                continue
            lp.retired += 1
            if ran is not guest.Ran.ON:
                return EXIT_HLT if ran is guest.Ran.HALTED else EXIT_TDCALL, 0
    except guest.EptViolation as fault:
        return EXIT_EPT_VIOLATION, fault.gpa
    return EXIT_EXTERNAL_INTERRUPT, 0


class GuestMachine:
    """What a guest program can touch: its registers, and private memory through the TLB."""

    __slots__ = ("_hardened", "_memory", "_sept", "_tlb", "_words", "registers")

    def __init__(self, call: Call, tdcs: Tdcs, vcpu: Tdvps) -> None:
        self._memory = call.memory
        self._hardened = call.module.hardened
        self.registers = vcpu.registers
        self._words = call.memory.words
        self._sept = tdcs.sept
        self._tlb = vcpu.tlb

    def read(self, gpa: int) -> int:
        """The 64-bit word at `gpa`."""
        page = gpa & ~0xFFF
        cached = self._tlb.get(page) or self._translate(page)
        return self._words[cached[0] + (gpa & 0xFFF) >> 3]

    def write(self, gpa: int, value: int) -> None:
        """Store a 64-bit word; EptViolation if the page is write-blocked or not there."""
        page = gpa & ~0xFFF
        cached = self._tlb.get(page)
        if cached is None or not cached[1]:
            # A missing permission is looked up again, as hardware does before it faults.
            cached = self._translate(page)
            if not cached[1]:
                raise guest.EptViolation(page)
        self._words[cached[0] + (gpa & 0xFFF) >> 3] = value

    def accept(self, gpa: int) -> None:
        """TDG.MEM.PAGE.ACCEPT; a page that was accepted before stays as it is."""
        status = accept_page(self._memory, self._sept, gpa, hardened=self._hardened)
        if is_error(status):
            raise guest.Retry

    def _translate(self, page: int) -> tuple[int, bool]:
        slot = self._sept.slot(page) if page < PRIVATE_GPA_LIMIT else -1
        if slot < 0:
            raise guest.EptViolation(page)
        if STATE_OF[self._words[slot] & STATE_MASK] in ACCEPT:
            # The guest's #VE handler accepts a pending page and runs the instruction again.
            self.accept(page)
        entry = self._words[slot]
        if STATE_OF[entry & STATE_MASK] not in READABLE_STATES:
            raise guest.EptViolation(page)
        found = (entry & HPA_MASK, bool(entry & WRITE_BIT))
        self._tlb[page] = found
        return found


def accept_page(memory: Memory, sept: SeptTree, gpa: int, *, hardened: bool) -> int:
    """TDG.MEM.PAGE.ACCEPT of a 4 KiB page in one step, as a guest program does it: its status."""
    slot = _entry_to_accept(sept, gpa, 0)
    if memory.words[slot] & LOCK_BIT:
        return with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)
    return _accept(memory, slot, gpa, 0, hardened=hardened)


def _entry_to_accept(sept: SeptTree, gpa: int, level: int) -> int:
    slot, reached = sept.walk(gpa, level)
    if reached != level:
        raise guest.EptViolation(gpa)
    return slot


def _accept(memory: Memory, slot: int, gpa: int, level: int, *, hardened: bool) -> int:
    """PENDING -> MAPPED, PENDING_EXPORTED_DIRTY -> EXPORTED_DIRTY, the page zeroed.  EptViolation
    where hardware exits to the VMM, which has to provide the page."""
    entry = memory.words[slot]
    state = STATE_OF[entry & STATE_MASK]
    free = state is SeptState.FREE or (hardened and state is SeptState.REMOVED)
    if not free and state in (SeptState.REMOVED, SeptState.NL_MAPPED, SeptState.NL_BLOCKED):
        return Status.TDX_PAGE_SIZE_MISMATCH | level
    if state in READABLE_STATES:
        return Status.TDX_PAGE_ALREADY_ACCEPTED | level
    if state not in ACCEPT:
        raise guest.EptViolation(gpa)
    memory.zero_page(entry & HPA_MASK)
    accepted = with_state(leaf_entry(SeptState.MAPPED, entry & HPA_MASK), ACCEPT[state])
    memory.words[slot] = accepted | entry & LOCK_BIT
    return Status.TDX_SUCCESS


class GuestCall(Call):
    """A TDCALL: the context of the calling TD and vCPU besides that of any call."""

    __slots__ = ("tdcs", "tdr")

    tdr: Tdr
    tdcs: Tdcs

    def enter_guest(self, vcpu_hpa: int) -> None:
        """The caller runs on this vCPU; what TDH.VP.ENTER refuses cannot run, and so not call."""
        tdr = self.module.tdrs[self.memory.owner[vcpu_hpa >> 12]]
        vcpu = self.module.tdvps[vcpu_hpa]
        self.check_keys(tdr)
        if tdr.tdcs is None or tdr.tdcs.op_state not in self.module.allowed[Leaf.VP_ENTER]:
            raise refuse(Status.TDX_OP_STATE_INCORRECT)
        if vcpu.state not in (VcpuState.READY, VcpuState.ACTIVE):
            raise refuse(Status.TDX_VCPU_STATE_INCORRECT)
        self.tdr, self.tdcs = tdr, tdr.tdcs


def page_accept(call: GuestCall) -> Steps[int]:
    """TDG.MEM.PAGE.ACCEPT (6, TDX module 1.5.01): take a pending page as one of the guest's own.

    In: RCX GPA 51:12 and level 2:0 (0 or 1); pages here are 4 KiB.
    Status: OPERAND_INVALID|RCX; BUSY|RCX; PAGE_ALREADY_ACCEPTED; PAGE_SIZE_MISMATCH, both with
        the level.
    Source: tdg_mem_page_accept.c.

    Raises guest.EptViolation where hardware exits to the VMM, which has to provide the page. In
    1.5.01 a removed entry is no free one, and the guest is told of another page size
    (intel/tdx-module issue 18).  Repair R8 (hardened): it is free.
    """
    gpa, level = page_info(call.registers.rcx, 0, 1)
    private_gpa(gpa)
    slot = _entry_to_accept(call.tdcs.sept, gpa, level)
    if not (yield from call.take_entry(slot)):
        raise refuse(Status.TDX_OPERAND_BUSY, Operand.RCX)
    yield Point.HELD
    return _accept(call.memory, slot, gpa, level, hardened=call.module.hardened)
