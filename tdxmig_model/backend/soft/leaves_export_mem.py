"""TDH.EXPORT.MEM: one memory bundle on one forward stream.

TDX module 1.5.01, checks in its order.  Per entry the Secure EPT state and the counters are
committed before the page is encrypted.  In profile "tdx-1.5.01" the bundle counts when its last
entry is done, and a bad buffer or entry ends the call after earlier entries were committed.  In
profile "hardened" the bundle counts when its MBMD is emitted (repairs R1 and R14), buffers and
entries are checked before the commit, and what is wrong with them becomes the status of that entry
alone (R13).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tdxmig_model.backend.soft.batches import Sealing, workers_for
from tdxmig_model.backend.soft.call import HPA_FIELD, Call, Point, Steps, refuse
from tdxmig_model.backend.soft.crypto import StreamCipher
from tdxmig_model.backend.soft.gpa_entries import (
    CANCEL,
    GPA_MASK,
    INVALID_BIT,
    L2_MAP_MASK,
    LEVEL_AND_RESERVED,
    MIGRATE,
    NOP,
    OPERATION_MASK,
    OPERATION_SHIFT,
    PENDING_BIT,
    REMIGRATE,
    GpaList,
    failed,
    gpa_list,
    sanitized,
)
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.op_state import EXPORT_IN_ORDER, OpState
from tdxmig_model.backend.soft.sept import (
    DIRTY_STATES,
    EXPORT,
    EXPORT_MEM_STATES,
    EXPORTED_STATES,
    FIRST_EXPORT_STATES,
    HPA_MASK,
    LOCK_BIT,
    PENDING_STATES,
    PRIVATE_GPA_LIMIT,
    RESTORE,
    STATE_BITS,
    STATE_MASK,
    TLB_TRACKING_REQUIRED,
    WRITE_BIT,
    WRITE_BLOCKED_STATES,
    SeptState,
)
from tdxmig_model.backend.soft.session import begin_new, cipher_of, resume, write_mbmd
from tdxmig_model.backend.soft.state import Interrupted, Migsc, Tdcs
from tdxmig_model.backend.soft.status import Operand, Status
from tdxmig_model.wire.gpa_list import GpaStatus
from tdxmig_model.wire.mbmd import Mbmd

MACS_PER_PAGE = 256
PAGE = 4096


class Verdict(NamedTuple):
    """What EXPORT.MEM does with a page: refuse it with `status`, or carry out the rest."""

    status: GpaStatus
    operation: int = NOP
    state: SeptState = SeptState.FREE
    exported: int = 0
    dirty: int = 0
    tracked: bool = False
    content: bool = False
    pending: bool = False
    writable: bool = False


def judge(op_state: OpState, operation: int, state: SeptState) -> Verdict:
    """The rules of one entry that is no NOP, whose page is in `state`."""
    wrong_state = Verdict(GpaStatus.SEPT_ENTRY_STATE_INCORRECT)
    if state not in EXPORT_MEM_STATES:
        return wrong_state
    exported, dirty = state in EXPORTED_STATES, state in DIRTY_STATES
    pending = state in PENDING_STATES
    if op_state not in EXPORT_IN_ORDER:
        if operation == CANCEL:
            return Verdict(GpaStatus.OP_STATE_INCORRECT)
        outcome = MIGRATE
    elif operation == CANCEL:
        if not exported:
            return wrong_state
        outcome = CANCEL
    elif state in FIRST_EXPORT_STATES:
        outcome = MIGRATE
    elif dirty:
        outcome = REMIGRATE
    else:
        return wrong_state
    cancel = outcome == CANCEL
    # A cancelled page is not read, so it may be writable while the TD runs.
    live = op_state is OpState.LIVE_EXPORT and not cancel
    if live and state not in WRITE_BLOCKED_STATES:
        return wrong_state
    return Verdict(
        GpaStatus.SUCCESS,
        outcome,
        RESTORE[state] if cancel else EXPORT[state],
        exported=-1 if cancel else int(not exported),
        dirty=-int(dirty),
        tracked=live and state in TLB_TRACKING_REQUIRED,
        content=not cancel and not pending,
        pending=pending,
        writable=cancel and not pending,
    )


_VERDICTS = {
    (op_state, operation): {
        STATE_BITS[state]: judge(op_state, operation, state) for state in SeptState
    }
    for op_state in (OpState.LIVE_EXPORT, OpState.PAUSED_EXPORT, OpState.POST_EXPORT)
    for operation in (MIGRATE, CANCEL, REMIGRATE)
}
"""(OP_STATE, operation) -> state bits of an entry -> verdict."""


@dataclass(slots=True)
class _Bundle:
    """One call's view of its lists, its stream and its progress."""

    call: Call
    tdcs: Tdcs
    entries: GpaList
    buffers: int
    macs: tuple[int, int]
    migsc: Migsc
    cipher: StreamCipher
    written: int = 0
    problems: int = 0
    sealing: Sealing | None = None


def export_mem(call: Call) -> Steps[int]:
    """TDH.EXPORT.MEM (68, TDX module 1.5.01): export the pages of a list as one bundle.

    In: RCX GPA_LIST_INFO; RDX TDR; R8 MBMD buffer; R9 buffer list; R10 stream 15:0 and command
        63 (RESUME); R11, R12 MAC lists of entries 0 to 255, 256 to 511.
    Out: RCX the next entry; RDX list, MAC and content pages; RAX 31:0 entries with a problem;
        MBMD, buffers, MACs, list entries as they travel.
    Status: the prologue's; BUSY|MIG; OPERAND_INVALID|R10; BUSY|MIGSC; BUSY|SEPT_TREE;
        OPERAND_INVALID|RCX, |R9, |R11, |R12, |R8; MIGRATION_STREAM_STATE_INCORRECT;
        INVALID_RESUMPTION; OPERAND_INVALID|GPA_LIST_ENTRY, |MIG_BUFF_LIST_ENTRY (1.5.01);
        INTERRUPTED_RESUMABLE.
    Source: tdh_export_mem.c.
    """
    registers = call.registers
    _, tdcs = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.SHARED, Mode.SHARED)
    yield from call.take(tdcs.mig_lock, Mode.SHARED, Operand.MIG)
    index = call.forward_index(tdcs)
    link = yield from call.take_link(tdcs, 1 + index)
    yield from call.take(tdcs.sept_lock, Mode.SHARED, Operand.SEPT_TREE)
    entries = gpa_list(call, registers.rcx)
    buffers, macs = memory_lists(call, entries)
    mbmd_hpa = call.mbmd_buffer(registers.r8)
    if call.command:
        if not link.initialized:
            raise refuse(Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
        record = resume(call, link, _operands(call), tdcs)
        bundle = _Bundle(
            call, tdcs, entries, buffers, macs, link.migsc, cipher_of(link.migsc), record.written
        )
    else:
        if entries.first:
            raise refuse(Status.TDX_OPERAND_INVALID, Operand.RCX)
        call.ensure_stream(link, tdcs.mig_enc_working_key, index)
        begin_new(call, link)
        bundle = _Bundle(call, tdcs, entries, buffers, macs, link.migsc, cipher_of(link.migsc))
        _emit_mbmd(bundle, mbmd_hpa, index)
    bundle.sealing = _sealing(bundle)
    yield from _process(bundle)
    if not call.module.hardened:
        _count(bundle)
    if bundle.sealing is not None and bundle.sealing.failure is not None:
        raise bundle.sealing.failure
    mac_pages = 1 + (entries.last >= MACS_PER_PAGE)
    registers.rdx = 1 + mac_pages + bundle.written
    return Status.TDX_SUCCESS | bundle.problems


def _sealing(bundle: _Bundle) -> Sealing | None:
    """Worker processes encrypt the pages of a long list, if there are any."""
    entries = bundle.entries
    workers = workers_for(bundle.call, entries.last + 1 - entries.first)
    if workers is None:
        return None
    lists = frozenset({entries.base << 3, bundle.buffers << 3, *bundle.macs})
    return Sealing(bundle.call, bundle.cipher, workers, lists)


def memory_lists(call: Call, entries: GpaList) -> tuple[int, tuple[int, int]]:
    """R9, R11 and R12: word index of the buffer list, HPAs of the MAC list pages (0 if unused)."""
    registers = call.registers
    buffers = call.shared_page(registers.r9, Operand.R9) >> 3
    low = high = 0
    if entries.first < MACS_PER_PAGE:
        low = call.shared_page(registers.r11, Operand.R11)
    if entries.last >= MACS_PER_PAGE:
        high = call.shared_page(registers.r12, Operand.R12)
    return buffers, (low, high)


def mac_place(macs: tuple[int, int], index: int) -> int:
    """HPA of the 16-byte MAC of list entry `index`."""
    return macs[index >> 8] + ((index & 255) << 4)


def _operands(call: Call) -> tuple[int, ...]:
    """What a RESUME must repeat."""
    registers = call.registers
    return (registers.rcx, registers.r9, registers.r11, registers.r12)


def _emit_mbmd(bundle: _Bundle, hpa: int, index: int) -> None:
    """The MBMD goes out before any page."""
    migsc, tdcs = bundle.migsc, bundle.tdcs
    migsc.iv_counter += 1
    mbmd = Mbmd.memory(
        num_gpas=bundle.entries.last + 1,
        mb_counter=migsc.next_mb_counter,
        mig_epoch=tdcs.mig_epoch,
        iv_counter=migsc.iv_counter,
        migs_index=index,
        mig_version=tdcs.mig_working_version,
    )
    mac = bundle.cipher.tag(migsc.iv_counter, mbmd.aad())
    write_mbmd(bundle.call, hpa, mbmd.with_mac(mac))
    if bundle.call.module.hardened:
        _count(bundle)


def _count(bundle: _Bundle) -> None:
    bundle.tdcs.total_mb_count += 1
    bundle.migsc.next_mb_counter += 1


def _process(bundle: _Bundle) -> Steps[None]:
    call, entries = bundle.call, bundle.entries
    words, last = call.memory.words, entries.last
    try:
        for index in range(entries.first, last + 1):
            if call.interleaved:
                yield Point.ENTRY
            entry = words[entries.base + index]
            if call.interleaved:
                yield from _hold_entry(bundle, entry)
            _export_entry(bundle, index, entry)
            entries.position = index + 1
            if call.interrupt is not None and index < last and call.interrupted():
                call.registers.rcx = entries.register()
                bundle.migsc.interrupted = Interrupted(
                    call.leaf, _operands(call), bundle.tdcs.mig_epoch, index + 1, bundle.written
                )
                raise refuse(Status.TDX_INTERRUPTED_RESUMABLE)
    finally:
        if bundle.sealing is not None:
            bundle.sealing.finish()
        call.registers.rcx = entries.register()


def _hold_entry(bundle: _Bundle, entry: int) -> Steps[None]:
    """Let others run while the page's Secure EPT entry is locked, as hardware would."""
    words = bundle.call.memory.words
    slot = bundle.tdcs.sept.slot(entry & GPA_MASK)
    operation = entry >> OPERATION_SHIFT & 0x3
    if operation == NOP or slot < 0 or entry & GPA_MASK >= PRIVATE_GPA_LIMIT:
        return
    if not words[slot] & LOCK_BIT:
        words[slot] |= LOCK_BIT
        try:
            yield Point.HELD
        finally:
            words[slot] &= ~LOCK_BIT


def _export_entry(bundle: _Bundle, index: int, entry: int) -> None:
    """Steps 1 to 12 of one entry: judge, commit, encrypt, write back."""
    call, tdcs = bundle.call, bundle.tdcs
    words = call.memory.words
    # Repair R11 (hardened): an exported page is not writable, however it was before.
    keep = ~WRITE_BIT if call.module.hardened else -1
    place, buffer_place = bundle.entries.base + index, bundle.buffers + index
    buffer = words[buffer_place]
    slot, page = -1, 0
    operation = entry >> OPERATION_SHIFT & 0x3
    if entry & LEVEL_AND_RESERVED or (operation and entry & GPA_MASK >= PRIVATE_GPA_LIMIT):
        entry = _malformed(bundle, place, entry)
        status = GpaStatus.GPA_LIST_ENTRY_INVALID
    elif not operation:
        status = GpaStatus.SKIPPED
    elif (slot := tdcs.sept.slot(entry & GPA_MASK)) < 0:
        status = GpaStatus.SEPT_WALK_FAILED
    elif (septe := words[slot]) & LOCK_BIT:
        status = GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY
    else:
        verdict = _VERDICTS[tdcs.op_state, operation][septe & STATE_MASK]
        status = verdict.status
        if verdict.tracked and not tdcs.tlb_tracked(tdcs.bw_epoch):
            status = GpaStatus.TLB_TRACKING_NOT_DONE
        if not status:
            entry &= ~(OPERATION_MASK | PENDING_BIT | L2_MAP_MASK)
            entry |= verdict.operation << OPERATION_SHIFT | verdict.pending << 2
            if verdict.content and not _buffer_usable(call, buffer):
                status = GpaStatus.MIG_BUFFER_NOT_AVAILABLE
            else:
                septe = septe & ~STATE_MASK | STATE_BITS[verdict.state]
                words[slot] = septe | WRITE_BIT if verdict.writable else septe & keep
                tdcs.mig_count += verdict.exported
                tdcs.dirty_count += verdict.dirty
                page = septe & HPA_MASK if verdict.content else 0
    if status:
        entry = failed(entry, status)
        if status is not GpaStatus.SKIPPED:
            bundle.problems += 1
    _write_out(bundle, index, entry, buffer, page)


def _malformed(bundle: _Bundle, place: int, entry: int) -> int:
    """An entry with reserved bits, or with a GPA that is not private."""
    if bundle.call.module.hardened:
        return sanitized(entry, GpaStatus.GPA_LIST_ENTRY_INVALID)
    words = bundle.call.memory.words
    words[place] = failed(entry, GpaStatus.GPA_LIST_ENTRY_INVALID)
    raise refuse(Status.TDX_OPERAND_INVALID, Operand.GPA_LIST_ENTRY)


def _buffer_usable(call: Call, buffer: int) -> bool:
    """Is there a buffer?  Only the hardened profile looks at its HPA before the commit."""
    if buffer & INVALID_BIT:
        return False
    return not call.module.hardened or call.memory.shared_ok(buffer & HPA_FIELD)


def _write_out(bundle: _Bundle, index: int, entry: int, buffer: int, page: int) -> None:
    """Encrypt the page at `page` (0: none, MAC only) and write entry, buffer entry and MAC."""
    memory, hardened = bundle.call.memory, bundle.call.module.hardened
    migsc, cipher = bundle.migsc, bundle.cipher
    counter = migsc.iv_counter = migsc.iv_counter + 1
    aad = entry.to_bytes(8, "little")
    mac_at = mac_place(bundle.macs, index)
    if page:
        target = buffer & HPA_FIELD
        if not hardened and not memory.shared_ok(target):
            raise refuse(Status.TDX_OPERAND_INVALID, Operand.MIG_BUFF_LIST_ENTRY)
        later = bundle.sealing
        if later is None or not later.add(page, target, counter, entry, mac_at):
            sealed = cipher.encrypt_page(counter, aad, memory.bytes[page : page + PAGE])
            memory.bytes[target : target + PAGE] = sealed[:PAGE]
            memory.bytes[mac_at : mac_at + 16] = sealed[PAGE:]
        bundle.written += 1
    else:
        memory.bytes[mac_at : mac_at + 16] = cipher.tag(counter, aad)
        memory.words[bundle.buffers + index] = buffer | INVALID_BIT
    memory.words[bundle.entries.base + index] = entry
