"""Leaves that change private memory: tables, pages, blocking, removal, TLB tracking.

Facts of TDX module 1.5.01 (public source): TDH.MEM.SEPT.ADD, PAGE.ADD, PAGE.AUG, RANGE.BLOCK,
RANGE.UNBLOCK, PAGE.REMOVE and TRACK.  Pages are 4 KiB; whole tables can be blocked too.

A leaf on one entry returns 0 in RCX and RDX, or what its entry is where that is why it failed.
"""

from __future__ import annotations

from tdxmig_model.backend.soft.call import HPA_FIELD, NO_PAGE, Call, Steps, refuse
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.memory import PageType
from tdxmig_model.backend.soft.op_state import CAN_RUN, IMPORT_IN_PROGRESS
from tdxmig_model.backend.soft.sept import (
    FREE_ENTRY,
    HPA_MASK,
    PAGE_AUG_STATES,
    PAGE_REMOVE_STATES,
    PENDING_STATES,
    PRIVATE_GPA_LIMIT,
    PUBLIC_STATE,
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
    table_entry,
    visible_entry,
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


def entry_operands(call: Call) -> tuple[int, int]:
    """RCX and RDX of a leaf on one entry; both are 0 from here on, unless the leaf sets them."""
    registers = call.registers
    operands = registers.rcx, registers.rdx
    registers.rcx = registers.rdx = 0
    return operands


def walk(call: Call, tdcs: Tdcs, gpa: int, level: int) -> int:
    """Word index of the entry at `level`; EPT_WALK_FAILED with the entry in RCX and RDX."""
    if level == 0 and (cached := tdcs.sept.slot(gpa)) >= 0:
        return cached
    slot, reached = tdcs.sept.walk(gpa, level)
    if reached != level:
        report_entry(call, call.memory.words[slot], reached)
        raise refuse(Status.TDX_EPT_WALK_FAILED, Operand.RCX)
    return slot


def report_entry(call: Call, entry: int, level: int) -> None:
    """Secure EPT entry details for the VMM: RCX the entry as it may see it, RDX level and state."""
    call.registers.rcx = visible_entry(entry)
    call.registers.rdx = level | PUBLIC_STATE[STATE_OF[entry & STATE_MASK]] << 8


def lock_entry(call: Call, slot: int, level: int) -> Steps[None]:
    """Lock an entry until the call ends; BUSY with what the walk found in RCX and RDX."""
    found = call.memory.words[slot]
    if not (yield from call.take_entry(slot)):
        report_entry(call, found, level)
        raise refuse(Status.TDX_OPERAND_BUSY, Operand.RCX)


def entry_in(call: Call, slot: int, states: frozenset[SeptState], level: int = 0) -> SeptState:
    """The state of an entry, if it is one of `states`."""
    entry = call.memory.words[slot]
    state = STATE_OF[entry & STATE_MASK]
    if state not in states:
        report_entry(call, entry, level)
        raise refuse(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    return state


ALLOW_EXISTING = 1
"""RDX bit 0 of TDH.MEM.SEPT.ADD: a table that is there already is no error."""
UNUSED_PAGE = 1 << 63
"""R8 bit 63 of TDH.MEM.SEPT.ADD, ignored: it marked the page as not used by a call before."""


def sept_add(call: Call) -> Steps[int]:
    """TDH.MEM.SEPT.ADD (3, TDX module 1.5.01): add a Secure EPT table.

    In: RCX GPA and level (1 to 3) of the entry above it; RDX TDR, bit 0: a table there is left
        as it is; R8 free page, bit 63 ignored.
    Out: RCX and RDX the entry and its level and state, if they are at fault, or 0.
    Status: the prologue's; OPERAND_INVALID|RCX; BUSY|SEPT_TREE; EPT_WALK_FAILED|RCX; BUSY|RCX;
        EPT_ENTRY_STATE_INCORRECT|RCX; R8 page.
    Source: tdh_mem_sept_add.c.
    """
    info, handle = entry_operands(call)
    page = call.registers.r8
    tdr_hpa = handle & ~ALLOW_EXISTING
    tdr, tdcs = yield from call.enter_td(Operand.RDX, tdr_hpa, Mode.SHARED, Mode.SHARED)
    gpa, level = page_info(info, 1, ROOT_LEVEL)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.SHARED, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, level)
    yield from lock_entry(call, slot, level)
    entry_in(call, slot, _SEPT_ADD_STATES, level)
    if page == NO_PAGE:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.R8)
    existing = frozenset({SeptState.NL_MAPPED}) if handle & ALLOW_EXISTING else frozenset()
    if entry_in(call, slot, existing | {SeptState.FREE}, level) is SeptState.NL_MAPPED:
        return Status.TDX_SUCCESS
    page &= ~UNUSED_PAGE
    yield from call.take_new_page(page, Operand.R8)
    call.adopt_page(tdr, page, PageType.EPT)
    call.memory.page_words(page)[:] = FREE_ENTRY
    call.write_entry(slot, table_entry(page))
    return Status.TDX_SUCCESS


_SEPT_ADD_STATES = frozenset({SeptState.FREE, SeptState.NL_MAPPED})


def page_add(call: Call) -> Steps[int]:
    """TDH.MEM.PAGE.ADD (2, TDX module 1.5.01): add and measure a page with content.

    In: RCX GPA; RDX TDR, exclusive; R8 free page; R9 source page.
    Out: RCX and RDX the entry and its level and state, if they are at fault, or 0.
    Status: the prologue's; OPERAND_INVALID|RCX; EPT_WALK_FAILED|RCX;
        EPT_ENTRY_STATE_INCORRECT|RCX; OPERAND_INVALID|R9; R8 page.
    Source: tdh_mem_page_add.c.

    Nobody else can have the entry while TDR is exclusive, so it is not locked.
    """
    info, tdr_hpa = entry_operands(call)
    registers, memory = call.registers, call.memory
    page, source = registers.r8, registers.r9
    tdr, tdcs = yield from call.enter_td(Operand.RDX, tdr_hpa, Mode.EXCLUSIVE, None)
    gpa, _ = page_info(info, 0, 0)
    slot = walk(call, tdcs, private_gpa(gpa), 0)
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
    Out: RCX and RDX the entry and its level and state, if they are at fault, or 0.
    Status: the prologue's; OPERAND_INVALID|RCX; BUSY|SEPT_TREE; EPT_WALK_FAILED|RCX; BUSY|RCX;
        EPT_ENTRY_STATE_INCORRECT|RCX; R8 page.
    Source: tdh_mem_page_aug.c.
    """
    info, tdr_hpa = entry_operands(call)
    page = call.registers.r8
    tdr, tdcs = yield from call.enter_td(Operand.RDX, tdr_hpa, Mode.SHARED, Mode.SHARED)
    gpa, _ = page_info(info, 0, 0)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.SHARED, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, 0)
    yield from lock_entry(call, slot, 0)
    entry_in(call, slot, PAGE_AUG_STATES)
    yield from call.take_new_page(page, Operand.R8)
    call.adopt_page(tdr, page, PageType.REG)
    call.write_entry(slot, leaf_entry(SeptState.PENDING, page))
    return Status.TDX_SUCCESS


def range_block(call: Call) -> Steps[int]:
    """TDH.MEM.RANGE.BLOCK (7, TDX module 1.5.01): block a page, or all that is under a table.

    In: RCX GPA and level (0 to 3) of the entry; RDX TDR.
    Out: RCX and RDX the entry and its level and state, if they are at fault, or 0.
    Status: the prologue's; OPERAND_INVALID|RCX; BUSY|SEPT_TREE; EPT_WALK_FAILED|RCX; BUSY|RCX;
        GPA_RANGE_ALREADY_BLOCKED|RCX; EPT_ENTRY_STATE_INCORRECT|RCX.
    Source: tdh_mem_range_block.c.

    BEPOCH of the page, or of the page of the table, becomes TD_EPOCH.
    """
    info, tdr_hpa = entry_operands(call)
    memory = call.memory
    _, tdcs = yield from call.enter_td(Operand.RDX, tdr_hpa, Mode.SHARED, Mode.SHARED)
    gpa, level = page_info(info, 0, ROOT_LEVEL)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.EXCLUSIVE, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, level)
    yield from lock_entry(call, slot, level)
    entry = memory.words[slot]
    if STATE_OF[entry & STATE_MASK] in RANGE_UNBLOCK_STATES:
        report_entry(call, entry, level)
        raise refuse(Status.TDX_GPA_RANGE_ALREADY_BLOCKED, Operand.RCX)
    state = entry_in(call, slot, RANGE_BLOCK_STATES, level)
    call.write_entry(slot, entry & ~(STATE_MASK | RWX) | STATE_BITS[_blocked(state)])
    memory.bepoch[(entry & HPA_MASK) >> 12] = tdcs.td_epoch
    if state is SeptState.NL_MAPPED:
        tdcs.sept.forget()
    return Status.TDX_SUCCESS


def _blocked(state: SeptState) -> SeptState:
    if state is SeptState.NL_MAPPED:
        return SeptState.NL_BLOCKED
    return SeptState.PENDING_BLOCKED if state in PENDING_STATES else SeptState.BLOCKED


def range_unblock(call: Call) -> Steps[int]:
    """TDH.MEM.RANGE.UNBLOCK (39, TDX module 1.5.01): unblock a page, or all under a table.

    In: RCX GPA and level (0 to 3) of the entry; RDX TDR.
    Out: RCX and RDX the entry and its level and state, if they are at fault, or 0.
    Status: the prologue's; OPERAND_INVALID|RCX; BUSY|SEPT_TREE; EPT_WALK_FAILED|RCX; BUSY|RCX;
        EPT_ENTRY_STATE_INCORRECT|RCX; TLB_TRACKING_NOT_DONE|SEPT_TREE where the TD can run.
    Source: tdh_mem_range_unblock.c.
    """
    info, tdr_hpa = entry_operands(call)
    memory = call.memory
    _, tdcs = yield from call.enter_td(Operand.RDX, tdr_hpa, Mode.SHARED, Mode.SHARED)
    gpa, level = page_info(info, 0, ROOT_LEVEL)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.EXCLUSIVE, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, level)
    yield from lock_entry(call, slot, level)
    state = entry_in(call, slot, RANGE_UNBLOCK_STATES, level)
    hpa = memory.words[slot] & HPA_MASK
    if tdcs.op_state in CAN_RUN and not tdcs.tlb_tracked(memory.bepoch[hpa >> 12]):
        raise refuse(Status.TDX_TLB_TRACKING_NOT_DONE, Operand.SEPT_TREE)
    call.write_entry(slot, _unblocked(state, hpa))
    return Status.TDX_SUCCESS


def _unblocked(state: SeptState, hpa: int) -> int:
    if state is SeptState.NL_BLOCKED:
        return table_entry(hpa)
    pending = state in PENDING_STATES
    return leaf_entry(SeptState.PENDING if pending else SeptState.MAPPED, hpa)


LARGEST_PAGE_LEVEL = 2
"""1 GiB; here every page is one of 4 KiB, level 0."""


def page_remove(call: Call) -> Steps[int]:
    """TDH.MEM.PAGE.REMOVE (29, TDX module 1.5.01): take a page from the TD.

    In: RCX GPA and level (0 to 2) of the entry; RDX TDR.
    Out: RCX the page's HPA and RDX 0; or the entry and its level and state, if they are at
        fault, or both 0.
    Status: the prologue's; OPERAND_INVALID|RCX; BUSY|SEPT_TREE; EPT_WALK_FAILED|RCX; BUSY|RCX of
        the entry; EPT_ENTRY_STATE_INCORRECT|RCX; BUSY|RCX of the page; where the TD can run
        GPA_RANGE_NOT_BLOCKED|RCX, TLB_TRACKING_NOT_DONE|RCX.
    Source: tdh_mem_page_remove.c.

    The entry becomes FREE, or REMOVED with MIG_EPOCH while an import is in progress.
    """
    info, tdr_hpa = entry_operands(call)
    memory = call.memory
    tdr, tdcs = yield from call.enter_td(Operand.RDX, tdr_hpa, Mode.SHARED, Mode.SHARED)
    gpa, level = page_info(info, 0, LARGEST_PAGE_LEVEL)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.SHARED, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, level)
    yield from lock_entry(call, slot, level)
    state = entry_in(call, slot, PAGE_REMOVE_STATES, level)
    hpa = memory.words[slot] & HPA_MASK
    yield from call.take_pamt(hpa, Operand.RCX, Mode.EXCLUSIVE)
    if tdcs.op_state in CAN_RUN:
        if state not in RANGE_UNBLOCK_STATES:
            report_entry(call, memory.words[slot], level)
            raise refuse(Status.TDX_GPA_RANGE_NOT_BLOCKED, Operand.RCX)
        if not tdcs.tlb_tracked(memory.bepoch[hpa >> 12]):
            raise refuse(Status.TDX_TLB_TRACKING_NOT_DONE, Operand.RCX)
    importing = tdcs.op_state in IMPORT_IN_PROGRESS
    call.write_entry(slot, removed_entry(tdcs.mig_epoch) if importing else FREE_ENTRY)
    tdr.child_count -= 1
    memory.free(hpa)
    call.registers.rcx = hpa
    return Status.TDX_SUCCESS


def mem_track(call: Call) -> Steps[int]:
    """TDH.MEM.TRACK (38, TDX module 1.5.01): begin the next TLB epoch.

    In: RCX TDR.
    Status: the prologue's; BUSY|TD_EPOCH; PREVIOUS_TLB_EPOCH_BUSY while a vCPU runs in the
        epoch before.
    Source: tdh_mem_track.c.
    """
    _, tdcs = yield from call.enter_td(Operand.RCX, call.registers.rcx, Mode.SHARED, Mode.SHARED)
    yield from call.take(tdcs.epoch_lock, Mode.EXCLUSIVE, Operand.TD_EPOCH)
    if tdcs.refcount[1 - (tdcs.td_epoch & 1)]:
        raise refuse(Status.TDX_PREVIOUS_TLB_EPOCH_BUSY)
    tdcs.td_epoch += 1
    return Status.TDX_SUCCESS
