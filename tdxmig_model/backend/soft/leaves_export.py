"""Source leaves that are not bundles of state or memory.

TDX module 1.5.01: TDH.EXPORT.BLOCKW, UNBLOCKW, RESTORE, TRACK, PAUSE and ABORT.
"""

from __future__ import annotations

from collections.abc import Callable

from tdxmig_model.backend.soft.call import Call, Point, Steps, refuse
from tdxmig_model.backend.soft.gpa_entries import (
    CANCEL,
    GPA_MASK,
    LEVEL_AND_RESERVED,
    NOP,
    OPERATION_SHIFT,
    GpaList,
    failed,
    gpa_list,
    with_status,
)
from tdxmig_model.backend.soft.leaves_memory import (
    entry_in,
    entry_operands,
    page_info,
    private_gpa,
    walk,
)
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.op_state import OpState
from tdxmig_model.backend.soft.sept import (
    BLOCKW,
    DIRTY_STATES,
    EXPORTED_STATES,
    LOCK_BIT,
    PENDING_STATES,
    PRIVATE_GPA_LIMIT,
    RESTORE,
    STATE_MASK,
    STATE_OF,
    UNBLOCKW,
    WRITE_BIT,
    SeptState,
    with_state,
)
from tdxmig_model.backend.soft.session import (
    cipher_of,
    read_mbmd,
    unfinished_memory,
    uninitialize_streams,
    write_mbmd,
)
from tdxmig_model.backend.soft.state import Tdcs
from tdxmig_model.backend.soft.status import Operand, Status
from tdxmig_model.wire.constants import START_EPOCH
from tdxmig_model.wire.gpa_list import GpaStatus
from tdxmig_model.wire.mbmd import BundleType, Mbmd

LAST_IN_ORDER_EPOCH = 0xFFFF_FFFE

EntryEffect = Callable[[Call, Tdcs, int], GpaStatus]
"""Word index of a locked SEPT entry -> status; what BLOCKW or RESTORE does with one page."""


def export_blockw(call: Call) -> Steps[int]:
    """TDH.EXPORT.BLOCKW (65, TDX module 1.5.01): write-block the pages of a list.

    In: RCX GPA_LIST_INFO; RDX TDR.
    Out: RCX the next entry; RAX 31:0 entries with a problem; list entries with their status.
    Status: the prologue's; BUSY|SEPT_TREE; OPERAND_INVALID|RCX or GPA_LIST_ENTRY;
        INTERRUPTED_RESUMABLE (call again with RCX).
    Source: tdh_export_blockw.c.

    BW_EPOCH becomes TD_EPOCH with each page.
    """
    return (yield from _for_each_entry(call, _block))


def export_restore(call: Call) -> Steps[int]:
    """TDH.EXPORT.RESTORE (66, TDX module 1.5.01): make exported pages ordinary ones again.

    In: RCX GPA_LIST_INFO; RDX TDR.
    Out: RCX the next entry; RAX 31:0 entries with a problem; list entries with their status.
    Status: the prologue's; BUSY|SEPT_TREE; OPERAND_INVALID|RCX or GPA_LIST_ENTRY;
        INTERRUPTED_RESUMABLE (call again with RCX).
    Source: tdh_export_restore.c.

    MIG_COUNT - 1 with each page; DIRTY_COUNT stays as it is.
    """
    return (yield from _for_each_entry(call, _restore))


def _block(call: Call, tdcs: Tdcs, slot: int) -> GpaStatus:
    words = call.memory.words
    entry = words[slot]
    state = BLOCKW.get(STATE_OF[entry & STATE_MASK])
    if state is None:
        return GpaStatus.SEPT_ENTRY_STATE_INCORRECT
    words[slot] = with_state(entry, state) & ~WRITE_BIT
    tdcs.bw_epoch = tdcs.td_epoch
    return GpaStatus.SUCCESS


def _restore(call: Call, tdcs: Tdcs, slot: int) -> GpaStatus:
    words = call.memory.words
    entry = words[slot]
    state = RESTORE.get(STATE_OF[entry & STATE_MASK])
    if state is None:
        return GpaStatus.SEPT_ENTRY_STATE_INCORRECT
    if not tdcs.mig_count:
        raise call.halt(tdcs, "MIG_COUNT is 0 although a page is exported")
    words[slot] = writable(entry, state)
    tdcs.mig_count -= 1
    return GpaStatus.SUCCESS


def writable(entry: int, state: SeptState) -> int:
    """The entry in a state without write blocking; a pending page has no permissions."""
    changed = with_state(entry, state)
    return changed if state in PENDING_STATES else changed | WRITE_BIT


def _for_each_entry(call: Call, effect: EntryEffect) -> Steps[int]:
    """The common course of BLOCKW and RESTORE; interruptible, without state in the module."""
    registers = call.registers
    _, tdcs = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.SHARED, Mode.SHARED)
    yield from call.take(tdcs.sept_lock, Mode.SHARED, Operand.SEPT_TREE)
    entries = gpa_list(call, registers.rcx)
    words, problems = call.memory.words, 0
    try:
        for index in range(entries.first, entries.last + 1):
            yield Point.ENTRY
            entry = words[entries.base + index]
            problems += yield from _entry(call, tdcs, entries, entry, effect)
            entries.position = index + 1
            if index < entries.last and call.interrupted():
                raise refuse(Status.TDX_INTERRUPTED_RESUMABLE)
    finally:
        registers.rcx = entries.register()
    return Status.TDX_SUCCESS | problems


def _entry(
    call: Call, tdcs: Tdcs, entries: GpaList, entry: int, effect: EntryEffect
) -> Steps[bool]:
    """One entry; True if it counts as a problem."""
    words = call.memory.words
    place = entries.base + entries.position
    operation = entry >> OPERATION_SHIFT & 0x3
    skip = operation in (NOP, CANCEL)
    gpa = entry & GPA_MASK
    if entry & LEVEL_AND_RESERVED or (not skip and gpa >= PRIVATE_GPA_LIMIT):
        words[place] = failed(entry, GpaStatus.GPA_LIST_ENTRY_INVALID)
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.GPA_LIST_ENTRY)
    if skip:
        words[place] = failed(entry, GpaStatus.SKIPPED)
        return False
    slot = tdcs.sept.slot(gpa)
    if slot < 0:
        status = GpaStatus.SEPT_WALK_FAILED
    elif words[slot] & LOCK_BIT:
        status = GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY
    else:
        if call.interleaved:
            words[slot] |= LOCK_BIT
            try:
                yield Point.HELD
            finally:
                words[slot] &= ~LOCK_BIT
        status = effect(call, tdcs, slot)
    words[place] = failed(entry, status) if status else with_status(entry, status)
    return bool(status)


def export_unblockw(call: Call) -> Steps[int]:
    """TDH.EXPORT.UNBLOCKW (75, TDX module 1.5.01): let the guest write a page again.

    In: RCX GPA, level 0; RDX TDR.
    Out: RCX and RDX the Secure EPT entry and its level and state, if they are at fault, or 0.
    Status: the prologue's; OPERAND_INVALID|RCX; BUSY|SEPT_TREE; EPT_WALK_FAILED|RCX; BUSY|RCX;
        EPT_ENTRY_STATE_INCORRECT|RCX.
    Source: tdh_export_unblockw.c.

    DIRTY_COUNT + 1 if the page was exported and clean.
    """
    info, tdr_hpa = entry_operands(call)
    _, tdcs = yield from call.enter_td(Operand.RDX, tdr_hpa, Mode.SHARED, Mode.SHARED)
    gpa, _ = page_info(info, 0, 0)
    private_gpa(gpa)
    yield from call.take(tdcs.sept_lock, Mode.SHARED, Operand.SEPT_TREE)
    slot = walk(call, tdcs, gpa, 0)
    if not (yield from call.take_entry(slot)):
        raise refuse(Status.TDX_OPERAND_BUSY, Operand.RCX)
    state = entry_in(call, slot, _UNBLOCKW_STATES)
    call.write_entry(slot, writable(call.memory.words[slot], UNBLOCKW[state]))
    if state in EXPORTED_STATES and state not in DIRTY_STATES:
        tdcs.dirty_count += 1
    return Status.TDX_SUCCESS


_UNBLOCKW_STATES = frozenset(UNBLOCKW)


def export_track(call: Call) -> Steps[int]:
    """TDH.EXPORT.TRACK (71, TDX module 1.5.01): begin the next epoch, or end the in-order phase.

    In: RCX TDR; R8 MBMD buffer; R10 bit 63: the start token, POST_EXPORT.
    Out: the epoch token in the MBMD.
    Status: the prologue's; BUSY|MIG; OPERAND_INVALID|R10, |R8; BUSY|MIGSC;
        MIGRATION_STREAM_STATE_INCORRECT; MIGRATION_EPOCH_OVERFLOW; OP_STATE_INCORRECT;
        EXPORTED_DIRTY_PAGES_REMAIN.
    Source: tdh_export_track.c.

    Repair R14 (hardened): INVALID_RESUMPTION while a memory bundle is unfinished.
    """
    registers = call.registers
    _, tdcs = yield from call.enter_td(Operand.RCX, registers.rcx, Mode.SHARED, Mode.EXCLUSIVE)
    yield from call.take(tdcs.mig_lock, Mode.EXCLUSIVE, Operand.MIG)
    call.stream_zero()
    buffer = call.mbmd_buffer(registers.r8)
    link = yield from call.take_link(tdcs, 1)
    if not link.initialized:
        raise refuse(Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    if call.module.hardened and any(unfinished_memory(other) for other in tdcs.links[1:]):
        # Repair R14: a token waits until every EXPORT.MEM call has ended.  Below is repair R10: the
        # token carries the version that the session began with.
        raise refuse(Status.TDX_INVALID_RESUMPTION)
    _advance_epoch(tdcs, final=call.command)
    migsc = link.migsc
    migsc.interrupted = None
    tdcs.total_mb_count += 1
    migsc.iv_counter += 1
    token = Mbmd.epoch_token(
        total_mb=tdcs.total_mb_count,
        mig_epoch=tdcs.mig_epoch,
        iv_counter=migsc.iv_counter,
        mig_version=tdcs.mig_working_version if call.module.hardened else tdcs.mig_version,
    )
    write_mbmd(call, buffer, token.with_mac(cipher_of(migsc).tag(migsc.iv_counter, token.aad())))
    migsc.next_mb_counter = 1
    return Status.TDX_SUCCESS


def _advance_epoch(tdcs: Tdcs, *, final: bool) -> None:
    if not final:
        if tdcs.mig_epoch == LAST_IN_ORDER_EPOCH:
            raise refuse(Status.TDX_MIGRATION_EPOCH_OVERFLOW)
        tdcs.mig_epoch += 1
        return
    if tdcs.op_state is not OpState.PAUSED_EXPORT:
        raise refuse(Status.TDX_OP_STATE_INCORRECT)
    if tdcs.dirty_count:
        raise refuse(Status.TDX_EXPORTED_DIRTY_PAGES_REMAIN)
    tdcs.mig_epoch = START_EPOCH
    tdcs.op_state = OpState.POST_EXPORT


def export_pause(call: Call) -> Steps[int]:
    """TDH.EXPORT.PAUSE (70, TDX module 1.5.01): stop the TD; PAUSED_EXPORT.

    In: RCX TDR, exclusive, so that no vCPU is in the guest.
    Status: the prologue's.
    Source: tdh_export_pause.c.
    """
    _, tdcs = yield from call.enter_td(Operand.RCX, call.registers.rcx, Mode.EXCLUSIVE, None)
    if any(tdcs.refcount):
        raise call.halt(tdcs, f"REFCOUNT is {tdcs.refcount} although no vCPU can be in the guest")
    tdcs.td_epoch += 1
    tdcs.op_state = OpState.PAUSED_EXPORT
    return Status.TDX_SUCCESS


def export_abort(call: Call) -> Steps[int]:
    """TDH.EXPORT.ABORT (64, TDX module 1.5.01): end the export; RUNNABLE.

    In: RCX TDR; R8 0, or in POST_EXPORT the MBMD of an abort token; R10 0.
    Status: the prologue's; BUSY|MIG; OPERAND_INVALID|R10, |R8; INVALID_MBMD; BUSY|MIGSC;
        INCORRECT_MBMD_MAC.
    Source: tdh_export_abort.c.
    """
    registers = call.registers
    _, tdcs = yield from call.enter_td(Operand.RCX, registers.rcx, Mode.SHARED, Mode.EXCLUSIVE)
    yield from call.take(tdcs.mig_lock, Mode.EXCLUSIVE, Operand.MIG)
    if registers.r10:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.R10)
    if tdcs.op_state is OpState.POST_EXPORT:
        yield from _check_abort_token(call, tdcs)
    elif registers.r8:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.R8)
    uninitialize_streams(tdcs)
    tdcs.op_state = OpState.RUNNABLE
    return Status.TDX_SUCCESS


def _check_abort_token(call: Call, tdcs: Tdcs) -> Steps[None]:
    buffer = call.mbmd_buffer(call.registers.r8)
    token = read_mbmd(call, buffer, BundleType.ABORT_TOKEN, tdcs.mig_working_version, 0)
    link = yield from call.take_link(tdcs, 0)
    call.ensure_stream(link, tdcs.mig_dec_working_key, 0)
    if not cipher_of(link.migsc).tag_ok(token.iv_counter, token.aad(), token.mac):
        raise refuse(Status.TDX_INCORRECT_MBMD_MAC)
