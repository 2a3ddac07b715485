"""Leaves that change private memory: tables, pages, blocking, removal, TLB tracking.

Facts of TDX module 1.5.01 (public source): TDH.MEM.SEPT.ADD, PAGE.ADD, PAGE.AUG, RANGE.BLOCK,
RANGE.UNBLOCK, PAGE.REMOVE and TRACK.  Pages are 4 KiB; blocking works on level 0.
"""

from __future__ import annotations

from tdxmig_model.backend.soft.call import HPA_FIELD, Call, Steps, refuse
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.memory import PageType
from tdxmig_model.backend.soft.op_state import CAN_RUN, IMPORT_IN_PROGRESS
from tdxmig_model.backend.soft.sept import (
    BLOCKED_BIT,
    FREE_ENTRY,
    HPA_MASK,
    LOCK_BIT,
    PAGE_AUG_STATES,
    PAGE_REMOVE_STATES,
    PENDING_STATES,
    PRIVATE_GPA_LIMIT,
    RANGE_BLOCK_STATES,
    RANGE_UNBLOCK_STATES,
    ROOT_LEVEL,
    RWX,
    STATE_BITS,
    STATE_MASK,
    STATE_OF,
    SeptState,
    leaf_entry,
    removed_entry,
)
from tdxmig_model.backend.soft.state import Tdcs
from tdxmig_model.backend.soft.status import Operand, Status

MEASURED_BLOCK = 128


def page_info(register: int, lowest: int, highest: int) -> tuple[int, int]:
    """RCX as level 2:0 and GPA 51:12; (GPA, level), or OPERAND_INVALID."""
    level = register & 0x7
    gpa = register & HPA_FIELD
    misaligned = gpa & ((1 << 12 + 9 * level) - 1)
    if register & ~(HPA_FIELD | 0x7) or not lowest <= level <= highest or misaligned:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RCX)
    return gpa, level


def private_gpa(gpa: int) -> int:
    """The GPA if it is private, or OPERAND_INVALID|RCX."""
    if gpa >= PRIVATE_GPA_LIMIT:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RCX)
    return gpa


def walk(call: Call, tdcs: Tdcs, gpa: int, level: int) -> int:
    """Word index of the entry at `level`; EPT_WALK_FAILED with the entry in RCX and RDX."""
    slot, reached = tdcs.sept.walk(gpa, level)
    if reached != level:
        report_entry(call, call.memory.words[slot], reached)
        raise refuse(Status.TDX_EPT_WALK_FAILED, Operand.RCX)
    return slot


def report_entry(call: Call, entry: int, level: int) -> None:
    """Secure EPT entry details for the VMM: RCX the entry without its lock, RDX level and state."""
    call.registers.rcx = entry & ~LOCK_BIT
    call.registers.rdx = level | STATE_OF.get(entry & STATE_MASK, SeptState.FREE) << 8


def entry_in(call: Call, slot: int, states: frozenset[SeptState], level: int = 0) -> SeptState:
    """The state of an unlocked entry, if it is one of `states`."""
    entry = call.memory.words[slot]
    if entry & LOCK_BIT:
        raise refuse(Status.TDX_OPERAND_BUSY, Operand.RCX)
    state = STATE_OF[entry & STATE_MASK]
    if state not in states:
        report_entry(call, entry, level)
        raise refuse(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    return state


def sept_add(call: Call) -> Steps[int]:
    """TDH.MEM.SEPT.ADD (3, TDX module 1.5.01): add a Secure EPT table.

    In: RCX GPA and level (1 to 3) of the entry above it; RDX TDR; R8 free page.
    Out: RCX and RDX the entry and its level and state, if they are at fault.
    Status: the prologue's; OPERAND_INVALID|RCX; BUSY|SEPT_TREE; EPT_WALK_FAILED|RCX; BUSY|RCX;
        EPT_ENTRY_STATE_INCORRECT|RCX; R8 page.
    """
    registers = call.registers
    info, page = registers.rcx, registers.r8
    tdr, tdcs = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.SHARED, Mode.SHARED)
    gpa, level = page_info(info, 1, ROOT_LEVEL)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.SHARED, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, level)
    entry_in(call, slot, frozenset({SeptState.FREE}), level)
    yield from call.take_new_page(page, Operand.R8)
    call.adopt_page(tdr, page, PageType.EPT)
    call.memory.page_words(page)[:] = FREE_ENTRY
    call.memory.words[slot] = page | RWX | STATE_BITS[SeptState.NL_MAPPED]
    return Status.TDX_SUCCESS


def page_add(call: Call) -> Steps[int]:
    """TDH.MEM.PAGE.ADD (2, TDX module 1.5.01): add and measure a page with content.

    In: RCX GPA; RDX TDR, exclusive; R8 free page; R9 source page.
    Out: RCX and RDX the entry and its level and state, if they are at fault.
    Status: those of TDH.MEM.SEPT.ADD without BUSY|SEPT_TREE; OPERAND_INVALID|R9.
    """
    registers, memory = call.registers, call.memory
    info, page, source = registers.rcx, registers.r8, registers.r9
    tdr, tdcs = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.EXCLUSIVE, None)
    gpa, _ = page_info(info, 0, 0)
    slot = tdcs.sept.slot(private_gpa(gpa))
    if slot < 0:
        slot = walk(call, tdcs, gpa, 0)
    entry_in(call, slot, frozenset({SeptState.FREE}))
    call.shared_page(source, Operand.R9)
    yield from call.take_new_page(page, Operand.R8)
    memory.bytes[page : page + 4096] = memory.bytes[source : source + 4096]
    memory.assign(page, PageType.REG, tdr.hpa)
    tdr.child_count += 1
    memory.words[slot] = leaf_entry(SeptState.MAPPED, page)
    extension = b"MEM.PAGE.ADD".ljust(16, b"\0") + gpa.to_bytes(8, "little")
    tdcs.measurement.update(extension.ljust(MEASURED_BLOCK, b"\0"))
    return Status.TDX_SUCCESS


def page_aug(call: Call) -> Steps[int]:
    """TDH.MEM.PAGE.AUG (6, TDX module 1.5.01): add a page that the guest has to accept.

    In: RCX GPA; RDX TDR; R8 free page.
    Out: RCX and RDX the entry and its level and state, if they are at fault.
    Status: those of TDH.MEM.SEPT.ADD.
    """
    registers = call.registers
    info, page = registers.rcx, registers.r8
    tdr, tdcs = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.SHARED, Mode.SHARED)
    gpa, _ = page_info(info, 0, 0)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.SHARED, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, 0)
    entry_in(call, slot, PAGE_AUG_STATES)
    yield from call.take_new_page(page, Operand.R8)
    call.adopt_page(tdr, page, PageType.REG)
    call.memory.words[slot] = leaf_entry(SeptState.PENDING, page)
    return Status.TDX_SUCCESS


def range_block(call: Call) -> Steps[int]:
    """TDH.MEM.RANGE.BLOCK (7, TDX module 1.5.01): block a page; its BEPOCH becomes TD_EPOCH.

    In: RCX GPA; RDX TDR.
    Out: RCX and RDX the entry and its level and state, if they are at fault.
    Status: the prologue's; OPERAND_INVALID|RCX; BUSY|SEPT_TREE; EPT_WALK_FAILED|RCX;
        GPA_RANGE_ALREADY_BLOCKED|RCX; BUSY|RCX; EPT_ENTRY_STATE_INCORRECT|RCX.
    """
    registers, memory = call.registers, call.memory
    info = registers.rcx
    _, tdcs = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.SHARED, Mode.SHARED)
    gpa, _ = page_info(info, 0, 0)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.EXCLUSIVE, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, 0)
    entry = memory.words[slot]
    if entry & BLOCKED_BIT and STATE_OF[entry & STATE_MASK] in RANGE_UNBLOCK_STATES:
        report_entry(call, entry, 0)
        raise refuse(Status.TDX_GPA_RANGE_ALREADY_BLOCKED, Operand.RCX)
    state = entry_in(call, slot, RANGE_BLOCK_STATES)
    blocked = SeptState.PENDING_BLOCKED if state in PENDING_STATES else SeptState.BLOCKED
    memory.words[slot] = entry & ~(STATE_MASK | RWX) | STATE_BITS[blocked]
    memory.bepoch[(entry & HPA_MASK) >> 12] = tdcs.td_epoch
    return Status.TDX_SUCCESS


def range_unblock(call: Call) -> Steps[int]:
    """TDH.MEM.RANGE.UNBLOCK (39, TDX module 1.5.01): unblock a page.

    In: RCX GPA; RDX TDR.
    Out: RCX and RDX the entry and its level and state, if they are at fault.
    Status: the prologue's; OPERAND_INVALID|RCX; BUSY|SEPT_TREE; EPT_WALK_FAILED|RCX; BUSY|RCX;
        EPT_ENTRY_STATE_INCORRECT|RCX; TLB_TRACKING_NOT_DONE|RCX where the TD can run.
    """
    registers, memory = call.registers, call.memory
    info = registers.rcx
    _, tdcs = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.SHARED, Mode.SHARED)
    gpa, _ = page_info(info, 0, 0)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.EXCLUSIVE, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, 0)
    state = entry_in(call, slot, RANGE_UNBLOCK_STATES)
    hpa = memory.words[slot] & HPA_MASK
    if tdcs.op_state in CAN_RUN and not tdcs.tlb_tracked(memory.bepoch[hpa >> 12]):
        raise refuse(Status.TDX_TLB_TRACKING_NOT_DONE, Operand.RCX)
    unblocked = SeptState.PENDING if state in PENDING_STATES else SeptState.MAPPED
    memory.words[slot] = leaf_entry(unblocked, hpa)
    return Status.TDX_SUCCESS


def page_remove(call: Call) -> Steps[int]:
    """TDH.MEM.PAGE.REMOVE (29, TDX module 1.5.01): take a page from the TD.

    In: RCX GPA; RDX TDR.
    Out: RCX the page's HPA; or RCX and RDX the entry and its level and state, if they are at
        fault.
    Status: the prologue's; OPERAND_INVALID|RCX; BUSY|SEPT_TREE; EPT_WALK_FAILED|RCX; BUSY|RCX;
        EPT_ENTRY_STATE_INCORRECT|RCX; where the TD can run GPA_RANGE_NOT_BLOCKED|RCX,
        TLB_TRACKING_NOT_DONE|RCX.

    The entry becomes FREE, or REMOVED with MIG_EPOCH while an import is in progress.
    """
    registers, memory = call.registers, call.memory
    info = registers.rcx
    tdr, tdcs = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.SHARED, Mode.SHARED)
    gpa, _ = page_info(info, 0, 0)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.SHARED, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, 0)
    state = entry_in(call, slot, PAGE_REMOVE_STATES)
    hpa = memory.words[slot] & HPA_MASK
    if memory.is_locked(hpa):
        raise refuse(Status.TDX_OPERAND_BUSY, Operand.RCX)
    if tdcs.op_state in CAN_RUN:
        if state not in RANGE_UNBLOCK_STATES:
            report_entry(call, memory.words[slot], 0)
            raise refuse(Status.TDX_GPA_RANGE_NOT_BLOCKED, Operand.RCX)
        if not tdcs.tlb_tracked(memory.bepoch[hpa >> 12]):
            raise refuse(Status.TDX_TLB_TRACKING_NOT_DONE, Operand.RCX)
    importing = tdcs.op_state in IMPORT_IN_PROGRESS
    memory.words[slot] = removed_entry(tdcs.mig_epoch) if importing else FREE_ENTRY
    tdr.child_count -= 1
    memory.free(hpa)
    registers.rcx = hpa
    return Status.TDX_SUCCESS


def mem_track(call: Call) -> Steps[int]:
    """TDH.MEM.TRACK (38, TDX module 1.5.01): begin the next TLB epoch.

    In: RCX TDR.
    Status: the prologue's; BUSY|TD_EPOCH; PREVIOUS_TLB_EPOCH_BUSY while a vCPU runs in the
        epoch before.
    """
    _, tdcs = yield from call.enter_td(Operand.RCX, call.registers.rcx, Mode.SHARED, Mode.SHARED)
    yield from call.take(tdcs.epoch_lock, Mode.EXCLUSIVE, Operand.TD_EPOCH)
    if tdcs.refcount[1 - (tdcs.td_epoch & 1)]:
        raise refuse(Status.TDX_PREVIOUS_TLB_EPOCH_BUSY)
    tdcs.td_epoch += 1
    return Status.TDX_SUCCESS
