"""TDH.IMPORT.MEM: one memory bundle on one forward stream of the destination.

TDX module 1.5.01, checks in its order, with the three severities of what can be wrong with an
entry: A ends the import, B ends it only while import is in order, S skips the entry.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tdxmig_model.backend.soft.batches import NewPage, Opening, workers_for
from tdxmig_model.backend.soft.call import (
    HPA_FIELD,
    NO_PAGE,
    Call,
    Completion,
    Point,
    Steps,
    refuse,
)
from tdxmig_model.backend.soft.crypto import StreamCipher
from tdxmig_model.backend.soft.gpa_entries import (
    CANCEL,
    GPA_MASK,
    INVALID_BIT,
    LEVEL_AND_RESERVED,
    MIGRATE,
    NOP,
    OPERATION_SHIFT,
    PENDING_BIT,
    GpaList,
    failed,
    gpa_list,
)
from tdxmig_model.backend.soft.leaves_export_mem import mac_place, memory_lists
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.memory import (
    HKID_FIELD,
    HKID_SHIFT,
    MIG_EPOCH_MASK,
    PAGE_MASK,
    PageType,
    migration_bepoch,
)
from tdxmig_model.backend.soft.op_state import ALLOWED, IMPORT_IN_ORDER, OpState
from tdxmig_model.backend.soft.sept import (
    HPA_MASK,
    IMPORT_MEM_STATES,
    LOCK_BIT,
    PRIVATE_GPA_LIMIT,
    REMOVED_EPOCH_MASK,
    REMOVED_EPOCH_SHIFT,
    REMOVED_EPOCH_VALID,
    STATE_MASK,
    STATE_OF,
    SeptState,
    leaf_entry,
    removed_entry,
)
from tdxmig_model.backend.soft.session import begin_new, cipher_of, read_mbmd, resume
from tdxmig_model.backend.soft.state import Interrupted, Migsc, MigscLink, Tdcs, Tdr
from tdxmig_model.backend.soft.status import FATAL_BIT, Operand, Status, with_operand
from tdxmig_model.wire.constants import START_EPOCH
from tdxmig_model.wire.gpa_list import GpaStatus
from tdxmig_model.wire.mbmd import BundleType

PAGE = 4096


class Severity(Enum):
    """What an entry error does to the import."""

    A = "abort"
    B = "abort while in order, else skip and count"


class EntryError(Exception):
    """What is wrong with one entry; ends the entry and, by severity, the import."""

    def __init__(self, code: int, status: GpaStatus, severity: Severity) -> None:
        super().__init__(code)
        self.code = code
        self.status = status
        self.severity = severity


def _error(
    status: Status,
    entry_status: GpaStatus,
    severity: Severity,
    operand: Operand | None = Operand.GPA_LIST_ENTRY,
) -> EntryError:
    code = int(status) if operand is None else with_operand(status, operand)
    return EntryError(code, entry_status, severity)


@dataclass(slots=True)
class _Bundle:
    """One call's view of its lists, its stream and its progress.  `pages` is -1 without R13."""

    call: Call
    tdr: Tdr
    tdcs: Tdcs
    entries: GpaList
    buffers: int
    macs: tuple[int, int]
    pages: int
    migsc: Migsc
    cipher: StreamCipher
    problems: int = 0
    opening: Opening | None = None


def import_mem(call: Call) -> Steps[int]:
    """TDH.IMPORT.MEM (83, TDX module 1.5.01): import one memory bundle.

    In: operands of TDH.EXPORT.MEM, with the bundle in them; R13 new-page list, all ones:
        buffers become the TD's pages.
    Out: RCX the next entry; RAX 31:0 entries with a problem; list entries with their status.
    Status: those of TDH.EXPORT.MEM before its entries; OPERAND_INVALID|R13; INVALID_MBMD;
        INCORRECT_MBMD_MAC; INVALID_RESUMPTION; INTERRUPTED_RESUMABLE; by entry EPT_WALK_FAILED,
        EPT_ENTRY_STATE_INCORRECT, INVALID_PAGE_MAC, MIGRATED_IN_CURRENT_EPOCH,
        DISALLOWED_IMPORT_OVER_REMOVED, IMPORT_MISMATCH, OPERAND_INVALID, OPERAND_BUSY, with the
        list that is at fault as operand; OP_STATE_INCORRECT.
    Source: tdh_import_mem.c.

    An entry's error sets FATAL and FAILED_IMPORT, in LIVE_IMPORT neither: RUNNABLE.  Out of
    order the milder ones only skip the entry.
    """
    registers = call.registers
    tdr, tdcs = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.SHARED, Mode.SHARED)
    yield from call.take(tdcs.mig_lock, Mode.SHARED, Operand.MIG)
    index = call.forward_index(tdcs)
    link = yield from call.take_link(tdcs, 1 + index)
    yield from call.take(tdcs.sept_lock, Mode.SHARED, Operand.SEPT_TREE)
    entries = gpa_list(call, registers.rcx)
    buffers, macs = memory_lists(call, entries)
    pages = -1
    if registers.r13 != NO_PAGE:
        pages = call.shared_page(registers.r13, Operand.R13) >> 3
    mbmd_hpa = call.mbmd_buffer(registers.r8)
    if call.command:
        if not link.initialized:
            raise refuse(Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
        resume(call, link, _operands(call), tdcs)
    else:
        _accept_mbmd(call, tdcs, link, index, entries, mbmd_hpa)
    migsc = link.migsc
    bundle = _Bundle(call, tdr, tdcs, entries, buffers, macs, pages, migsc, cipher_of(migsc))
    bundle.opening = _open_ahead(bundle)
    yield from _process(bundle)
    tdcs.total_mb_count += 1
    if bundle.opening is not None and bundle.opening.failure is not None:
        raise bundle.opening.failure
    return Status.TDX_SUCCESS | bundle.problems


def _open_ahead(bundle: _Bundle) -> Opening | None:
    """Worker processes decrypt new pages of a long list into free pages, if there are any."""
    call, entries, words = bundle.call, bundle.entries, bundle.call.memory.words
    workers = workers_for(call, entries.last + 1 - entries.first)
    if workers is None or bundle.pages < 0:
        return None
    pages, reserved = [], {entries.base << 3, bundle.buffers << 3, bundle.pages << 3, *bundle.macs}
    for index in range(entries.first, entries.last + 1):
        entry, source = words[entries.base + index], words[bundle.buffers + index]
        if entry >> OPERATION_SHIFT & 0x3 != MIGRATE or entry & (LEVEL_AND_RESERVED | PENDING_BIT):
            continue
        slot = bundle.tdcs.sept.slot(entry & GPA_MASK)
        if slot < 0 or STATE_OF[words[slot] & STATE_MASK] not in _NEW_PAGE_STATES:
            continue
        if not source & INVALID_BIT and call.memory.shared_ok(source & HPA_FIELD):
            counter = bundle.migsc.iv_counter + 1 + index - entries.first
            target = words[bundle.pages + index]
            pages.append(_new_page(bundle, index, counter, entry, target))
    opening = Opening(call)
    opening.start(bundle.cipher, workers, pages, reserved)
    return opening


_NEW_PAGE_STATES = (SeptState.FREE, SeptState.REMOVED)


def _new_page(bundle: _Bundle, index: int, counter: int, entry: int, target: int) -> NewPage:
    source = _buffer_page(bundle, index)
    return NewPage(index, counter, entry, source, target, bytes(_mac(bundle, index)))


def _buffer_page(bundle: _Bundle, index: int) -> int:
    """HPA of a migration buffer: bits 51:12 of its list entry, whatever the others are."""
    return bundle.call.memory.words[bundle.buffers + index] & HPA_FIELD


def _operands(call: Call) -> tuple[int, ...]:
    registers = call.registers
    return (registers.rcx, registers.r9, registers.r11, registers.r12, registers.r13)


def _accept_mbmd(
    call: Call, tdcs: Tdcs, link: MigscLink, index: int, entries: GpaList, hpa: int
) -> None:
    """NEW: the MBMD opens the bundle.  The stream is started and IV_COUNTER taken before the MAC
    is known, so a wrong MBMD destroys a pending RESUME."""
    if entries.first:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RCX)
    call.ensure_stream(link, tdcs.mig_dec_working_key, index)
    begin_new(call, link)
    migsc = link.migsc
    mbmd = read_mbmd(call, hpa, BundleType.MEM, tdcs.mig_working_version, index)
    if mbmd.num_gpas != entries.last + 1 or mbmd.mig_epoch != tdcs.mig_epoch:
        raise refuse(Status.TDX_INVALID_MBMD)
    if tdcs.op_state in IMPORT_IN_ORDER:
        in_turn = mbmd.mb_counter == migsc.expected_mb_counter
    else:
        # MIG_EPOCH can be another one: an interrupted EXPORT.STATE.IMMUTABLE resets it.
        in_turn = mbmd.mig_epoch == START_EPOCH
    if not in_turn:
        raise refuse(Status.TDX_INVALID_MBMD)
    migsc.iv_counter = mbmd.iv_counter
    if not cipher_of(migsc).tag_ok(mbmd.iv_counter, mbmd.aad(), mbmd.mac):
        raise refuse(Status.TDX_INCORRECT_MBMD_MAC)
    migsc.expected_mb_counter += 1


def _process(bundle: _Bundle) -> Steps[None]:
    call, entries = bundle.call, bundle.entries
    last = entries.last
    words = call.memory.words
    try:
        for index in range(entries.first, last + 1):
            if call.interleaved:
                yield Point.ENTRY
            entry = words[entries.base + index]
            try:
                if call.interleaved:
                    yield from _hold_entry(bundle, index, entry)
                _import_entry(bundle, index, entry)
            except EntryError as error:
                _report(bundle, index, entry, error)
            entries.position = index + 1
            if call.interrupt is not None and index < last and call.interrupted():
                call.registers.rcx = entries.register()
                bundle.migsc.interrupted = Interrupted(
                    call.leaf, _operands(call), bundle.tdcs.mig_epoch, index + 1
                )
                raise refuse(Status.TDX_INTERRUPTED_RESUMABLE)
    finally:
        if bundle.opening is not None:
            bundle.opening.finish()
        call.registers.rcx = entries.register()


def _hold_entry(bundle: _Bundle, index: int, entry: int) -> Steps[None]:
    """Let others run while the page and its Secure EPT entry are locked, as hardware would.

    What is locked by somebody else is not waited for: the entry is judged at once.
    """
    memory, words = bundle.call.memory, bundle.call.memory.words
    slot = bundle.tdcs.sept.slot(entry & GPA_MASK)
    if slot < 0 or not entry >> OPERATION_SHIFT & 0x3 or entry & GPA_MASK >= PRIVATE_GPA_LIMIT:
        return
    if words[slot] & LOCK_BIT:
        return
    page = _page_to_lock(bundle, index, entry, slot)
    if page is not None and not memory.try_lock(page, Mode.EXCLUSIVE):
        return
    words[slot] |= LOCK_BIT
    try:
        yield Point.HELD
    finally:
        words[slot] &= ~LOCK_BIT
        if page is not None:
            memory.unlock(page, Mode.EXCLUSIVE)


def _page_to_lock(bundle: _Bundle, index: int, entry: int, slot: int) -> int | None:
    """The page whose PAMT entry the operation changes: MIGRATE's new one, the one of CANCEL."""
    operation = entry >> OPERATION_SHIFT & 0x3
    septe = bundle.call.memory.words[slot]
    state = STATE_OF[septe & STATE_MASK]
    if operation == CANCEL and state in (SeptState.MAPPED, SeptState.PENDING):
        return septe & HPA_MASK
    if operation != MIGRATE or state not in _NEW_PAGE_STATES:
        return None
    page, _ = _page_word(bundle, index)
    return page if bundle.call.memory.has_pamt(page) and not page & PAGE_MASK else None


def _report(bundle: _Bundle, index: int, entry: int, error: EntryError) -> None:
    """The entry becomes NOP with a status; by severity the import fails, or goes on."""
    call, tdcs = bundle.call, bundle.tdcs
    _skip(bundle, index, entry, error.status)
    if error.severity is Severity.B and tdcs.op_state not in IMPORT_IN_ORDER:
        bundle.problems += 1
        return
    call.registers.rcx = bundle.entries.register()
    if tdcs.op_state is OpState.LIVE_IMPORT:
        tdcs.op_state = OpState.RUNNABLE
        raise Completion(error.code)
    tdcs.op_state = OpState.FAILED_IMPORT
    raise Completion(error.code | FATAL_BIT)


def _skip(bundle: _Bundle, index: int, entry: int, status: GpaStatus) -> None:
    words = bundle.call.memory.words
    words[bundle.entries.base + index] = failed(entry, status)
    if bundle.pages >= 0:
        words[bundle.pages + index] |= INVALID_BIT


def _import_entry(bundle: _Bundle, index: int, entry: int) -> None:
    """One entry; EntryError if anything is wrong with it.

    Repair R9 (hardened): once another call has ended the import, this one ends too and decides
    nothing.
    """
    call, tdcs, migsc = bundle.call, bundle.tdcs, bundle.migsc
    if call.module.hardened and tdcs.op_state not in ALLOWED[call.leaf]:
        raise refuse(Status.TDX_OP_STATE_INCORRECT)
    words = call.memory.words
    counter = migsc.iv_counter = migsc.iv_counter + 1
    operation = entry >> OPERATION_SHIFT & 0x3
    if operation == NOP:
        _check_tag(bundle, index, counter, entry)
        if entry & LEVEL_AND_RESERVED:
            raise _error(Status.TDX_OPERAND_INVALID, GpaStatus.GPA_LIST_ENTRY_INVALID, Severity.A)
        _skip(bundle, index, entry, GpaStatus.SKIPPED)
        return
    gpa = entry & GPA_MASK
    if entry & LEVEL_AND_RESERVED or gpa >= PRIVATE_GPA_LIMIT:
        raise _error(Status.TDX_OPERAND_INVALID, GpaStatus.GPA_LIST_ENTRY_INVALID, Severity.A)
    slot = tdcs.sept.slot(gpa)
    if slot < 0:
        raise _error(Status.TDX_EPT_WALK_FAILED, GpaStatus.SEPT_WALK_FAILED, Severity.B)
    septe = words[slot]
    if septe & LOCK_BIT:
        status = GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY
        raise _error(Status.TDX_OPERAND_BUSY, status, Severity.B)
    state = STATE_OF[septe & STATE_MASK]
    if state not in IMPORT_MEM_STATES:
        raise _wrong_state(Severity.B)
    if operation != MIGRATE and tdcs.op_state not in IMPORT_IN_ORDER:
        status = GpaStatus.OP_STATE_INCORRECT
        raise _error(Status.TDX_OP_STATE_INCORRECT, status, Severity.A, None)
    buffer = words[bundle.buffers + index]
    content = operation != CANCEL and not entry & PENDING_BIT
    if content and (buffer & INVALID_BIT or not call.memory.shared_ok(buffer & HPA_FIELD)):
        raise _no_buffer()
    if operation == MIGRATE:
        _migrate(bundle, index, counter, entry, slot, state)
    elif operation == CANCEL:
        _cancel(bundle, index, counter, entry, slot, state)
    else:
        _remigrate(bundle, index, counter, entry, slot, state)


def _wrong_state(severity: Severity) -> EntryError:
    status = GpaStatus.SEPT_ENTRY_STATE_INCORRECT
    return _error(Status.TDX_EPT_ENTRY_STATE_INCORRECT, status, severity)


def _no_buffer() -> EntryError:
    status, operand = GpaStatus.MIG_BUFFER_NOT_AVAILABLE, Operand.MIG_BUFF_LIST_ENTRY
    return _error(Status.TDX_OPERAND_INVALID, status, Severity.A, operand)


def _bad_mac() -> EntryError:
    return _error(Status.TDX_INVALID_PAGE_MAC, GpaStatus.INVALID_PAGE_MAC, Severity.A)


def _mac(bundle: _Bundle, index: int) -> memoryview:
    at = mac_place(bundle.macs, index)
    return bundle.call.memory.bytes[at : at + 16]


def _check_tag(bundle: _Bundle, index: int, counter: int, entry: int) -> None:
    """The MAC of an entry without content."""
    mac = bytes(_mac(bundle, index))
    if not bundle.cipher.tag_ok(counter, entry.to_bytes(8, "little"), mac):
        raise _bad_mac()


def _decrypt(bundle: _Bundle, index: int, counter: int, entry: int, target: int) -> bool:
    """Copy ciphertext and MAC out of the VMM's reach, then decrypt into the page at `target`."""
    if bundle.opening is not None:
        ahead = bundle.opening.take(_new_page(bundle, index, counter, entry, target))
        if ahead is not None:
            return ahead
    memory, slot = bundle.call.memory, bundle.cipher.slot
    source = _buffer_page(bundle, index)
    slot[:PAGE] = memory.bytes[source : source + PAGE]
    slot[PAGE:] = _mac(bundle, index)
    page = memory.bytes[target : target + PAGE]
    return bundle.cipher.decrypt_page(counter, entry.to_bytes(8, "little"), page)


def _migrate(
    bundle: _Bundle, index: int, counter: int, entry: int, slot: int, state: SeptState
) -> None:
    """MIGRATE: a page that is not here yet, or was removed in an older epoch."""
    memory, tdcs = bundle.call.memory, bundle.tdcs
    if state not in (SeptState.FREE, SeptState.REMOVED):
        raise _wrong_state(Severity.B)
    if state is SeptState.REMOVED and _removed_too_late(memory.words[slot], tdcs.mig_epoch):
        status = GpaStatus.DISALLOWED_IMPORT_OVER_REMOVED
        raise _error(Status.TDX_DISALLOWED_IMPORT_OVER_REMOVED, status, Severity.A)
    hpa = _destination_page(bundle, index)
    pending = bool(entry & PENDING_BIT)
    if pending:
        _check_tag(bundle, index, counter, entry)
        memory.zero_page(hpa)
    elif not _decrypt(bundle, index, counter, entry, hpa):
        memory.zero_page(hpa)
        raise _bad_mac()
    memory.assign(hpa, PageType.REG, bundle.tdr.hpa)
    memory.bepoch[hpa >> 12] = migration_bepoch(tdcs.export_count, tdcs.mig_epoch)
    bundle.tdr.child_count += 1
    memory.words[slot] = leaf_entry(SeptState.PENDING if pending else SeptState.MAPPED, hpa)


def _removed_too_late(septe: int, mig_epoch: int) -> bool:
    removed = (septe & REMOVED_EPOCH_MASK) >> REMOVED_EPOCH_SHIFT
    return bool(septe & REMOVED_EPOCH_VALID) and removed >= mig_epoch


def _page_word(bundle: _Bundle, index: int) -> tuple[int, Severity]:
    """The page for a MIGRATE, and how bad it is if that is no address: from the new-page list, or
    in place the buffer's raw word without its key id.  INVALID_BIT is set if there is none."""
    words = bundle.call.memory.words
    page = words[bundle.pages + index] if bundle.pages >= 0 else INVALID_BIT
    if page & INVALID_BIT:
        return words[bundle.buffers + index] & ~HKID_FIELD, Severity.B
    return page, Severity.A


def _destination_page(bundle: _Bundle, index: int) -> int:
    """The free page for a MIGRATE.  Nothing else runs until it is taken, so it is not locked."""
    memory = bundle.call.memory
    page, severity = _page_word(bundle, index)
    if page & INVALID_BIT:
        raise _no_buffer()
    status, operand = GpaStatus.NEW_PAGE_NOT_AVAILABLE, Operand.NEW_PAGE_LIST_ENTRY
    if page & PAGE_MASK or page >> HKID_SHIFT:
        raise _error(Status.TDX_OPERAND_INVALID, status, severity, operand)
    if not memory.has_pamt(page):
        raise _error(Status.TDX_OPERAND_ADDR_RANGE_ERROR, status, Severity.B, operand)
    if memory.is_locked(page):
        raise _error(Status.TDX_OPERAND_BUSY, status, Severity.B, operand)
    if memory.page_type[page >> 12]:
        raise _error(Status.TDX_PAGE_METADATA_INCORRECT, status, Severity.B, operand)
    return page


def _check_epoch(bundle: _Bundle, hpa: int) -> None:
    """A page is overwritten or cancelled only by a strictly newer epoch than it came with."""
    if bundle.call.memory.bepoch[hpa >> 12] & MIG_EPOCH_MASK >= bundle.tdcs.mig_epoch:
        status = GpaStatus.MIGRATED_IN_CURRENT_EPOCH
        raise _error(Status.TDX_MIGRATED_IN_CURRENT_EPOCH, status, Severity.A)


def _remigrate(
    bundle: _Bundle, index: int, counter: int, entry: int, slot: int, state: SeptState
) -> None:
    """REMIGRATE: a newer version, decrypted straight into the page."""
    memory = bundle.call.memory
    if state not in (SeptState.MAPPED, SeptState.PENDING):
        raise _wrong_state(Severity.A)
    hpa = memory.words[slot] & HPA_MASK
    _check_epoch(bundle, hpa)
    pending = bool(entry & PENDING_BIT)
    if pending and state is not SeptState.PENDING:
        status = GpaStatus.SEPT_ENTRY_STATE_INCORRECT
        raise _error(Status.TDX_IMPORT_MISMATCH, status, Severity.A)
    if pending:
        _check_tag(bundle, index, counter, entry)
    elif not _decrypt(bundle, index, counter, entry, hpa):
        raise _bad_mac()
    memory.words[slot] = leaf_entry(SeptState.PENDING if pending else SeptState.MAPPED, hpa)
    old = memory.bepoch[hpa >> 12]
    memory.bepoch[hpa >> 12] = old & ~MIG_EPOCH_MASK | bundle.tdcs.mig_epoch


def _cancel(
    bundle: _Bundle, index: int, counter: int, entry: int, slot: int, state: SeptState
) -> None:
    """CANCEL: the page is taken out again; the entry remembers in which epoch."""
    memory = bundle.call.memory
    if state not in (SeptState.MAPPED, SeptState.PENDING):
        raise _wrong_state(Severity.A)
    _check_tag(bundle, index, counter, entry)
    hpa = memory.words[slot] & HPA_MASK
    if memory.is_locked(hpa):
        status = GpaStatus.TD_PAGE_BUSY_HOST_PRIORITY
        raise _error(Status.TDX_OPERAND_BUSY, status, Severity.A)
    _check_epoch(bundle, hpa)
    memory.words[slot] = removed_entry(bundle.tdcs.mig_epoch)
    bundle.tdr.child_count -= 1
    memory.free(hpa)
