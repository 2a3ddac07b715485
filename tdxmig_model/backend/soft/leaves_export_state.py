"""State bundles of the source: TDH.EXPORT.STATE.IMMUTABLE, TD and VP (TDX module 1.5.01).

A bundle is one AES-GCM message over its metadata pages; the MBMD, with its MAC, is written last.
A leaf can be interrupted between pages and resumed with the same page list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tdxmig_model.backend.soft.call import Call, Completion, Point, Steps, refuse
from tdxmig_model.backend.soft.fields import ROWS
from tdxmig_model.backend.soft.leaves_build import ATTR_MIGRATABLE, int_field
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.metadata import Scope, Value, build_lists
from tdxmig_model.backend.soft.op_state import OpState
from tdxmig_model.backend.soft.servtd import bindings_table
from tdxmig_model.backend.soft.session import (
    ANY_EPOCH,
    begin_new,
    cipher_of,
    resume,
    rotate_keys,
    write_mbmd,
)
from tdxmig_model.backend.soft.state import (
    MAX_EXPORT_COUNT,
    MIN_TDVPS_PAGES,
    Interrupted,
    Migsc,
    MigscLink,
    Tdcs,
    Tdr,
    Tdvps,
    VcpuState,
)
from tdxmig_model.backend.soft.status import Operand, Status
from tdxmig_model.errors import WireError
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import PageListInfo
from tdxmig_model.wire.mbmd import Mbmd

MIN_PAGES = {"immutable": 3, "td": 2, "vp": 5}
"""Pages that the list of a NEW call must at least have."""
DEMONSTRATION_LIST_SIZE = 512
"""Puts the immutable TD state on two pages, as CVE-2025-30513 needs; one is enough for it."""


class _State(NamedTuple):
    """What one call exports."""

    link: MigscLink
    scope: Scope
    pages: list[bytes]
    operands: tuple[int, ...]


def page_list(call: Call, minimum: int) -> PageListInfo:
    """R9: reserved bits 0 and at least `minimum` pages."""
    try:
        info = PageListInfo.from_register(call.registers.r9)
    except WireError:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.R9) from None
    if info.count < minimum:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.R9)
    return info


def export_state_immutable(call: Call) -> Steps[int]:
    """TDH.EXPORT.STATE.IMMUTABLE (72, TDX module 1.5.01): begin a session; LIVE_EXPORT.

    In: RCX TDR; R8 MBMD buffer; R9 PAGE_LIST_INFO; R10 command 63 (RESUME).
    Out: RDX pages written, so far if interrupted; MBMD and pages.
    Status: the prologue's; BUSY|MIG; TD_NOT_MIGRATABLE; PREVIOUS_EXPORT_CLEANUP_INCOMPLETE;
        MIN_MIGS_NOT_CREATED; OPERAND_INVALID|R8, |R10; BUSY|MIGSC; OPERAND_INVALID|R9;
        MIGRATION_DECRYPTION_KEY_NOT_SET; RND_NO_ENTROPY; MAX_EXPORTS_EXCEEDED;
        MIGRATION_STREAM_STATE_INCORRECT; INVALID_RESUMPTION;
        OPERAND_INVALID|MIG_BUFF_LIST_ENTRY; INTERRUPTED_RESUMABLE.
    Source: tdh_export_state_immutable.c.

    Repair R15 (hardened): INVALID_MIGRATION_DECRYPTION_KEY for a degenerate key.  Repair R4
    (hardened): OP_STATE_INCORRECT for a NEW call while one is interrupted.
    """
    registers = call.registers
    hpa, registers.rdx = registers.rcx, 0
    tdr, tdcs = yield from call.enter_td(Operand.RCX, hpa, Mode.SHARED, Mode.EXCLUSIVE)
    yield from call.take(tdcs.mig_lock, Mode.EXCLUSIVE, Operand.MIG)
    if not int_field(tdcs, "ATTRIBUTES") & ATTR_MIGRATABLE:
        raise refuse(Status.TDX_TD_NOT_MIGRATABLE)
    if tdcs.mig_count:
        raise refuse(Status.TDX_PREVIOUS_EXPORT_CLEANUP_INCOMPLETE)
    if tdcs.num_migs < 2:
        raise refuse(Status.TDX_MIN_MIGS_NOT_CREATED)
    mbmd_hpa = call.mbmd_buffer(registers.r8)
    call.stream_zero()
    link = yield from call.take_link(tdcs, 1)
    operands = (registers.r9,)
    if call.command:
        record = _resume_stream(call, link, operands, tdcs)
    else:
        call.shared_page(page_list(call, MIN_PAGES["immutable"]).hpa, Operand.R9)
        record = _start_session(call, tdcs, link)
    module = call.module
    list_size = DEMONSTRATION_LIST_SIZE if module.demonstration else module.list_size
    state = _State(link, "immutable", immutable_pages(tdr, tdcs, list_size), operands)
    with _interruptible_start(call, tdcs):
        mac = yield from _export_pages(call, state, record)
    write_mbmd(call, mbmd_hpa, record.mbmd.with_mac(mac))
    tdcs.total_mb_count = 1
    link.migsc.next_mb_counter = 1
    tdcs.op_state = OpState.LIVE_EXPORT
    return Status.TDX_SUCCESS


def _resume_stream(
    call: Call, link: MigscLink, operands: tuple[int, ...], tdcs: Tdcs
) -> Interrupted:
    if not link.initialized:
        raise refuse(Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    return resume(call, link, operands, tdcs)


@contextmanager
def _interruptible_start(call: Call, tdcs: Tdcs) -> Iterator[None]:
    """Repair R4 (hardened): an interrupted start is an OP_STATE, left by RESUME or EXPORT.ABORT."""
    try:
        yield
    except Completion as ended:
        if call.module.hardened and ended.status == Status.TDX_INTERRUPTED_RESUMABLE:
            tdcs.op_state = OpState.START_EXPORT
        raise


def _start_session(call: Call, tdcs: Tdcs, link: MigscLink) -> Interrupted:
    """NEW: keys are consumed and everything of the session is reset; then EXPORT_COUNT + 1."""
    if tdcs.op_state is OpState.START_EXPORT:
        raise refuse(Status.TDX_OP_STATE_INCORRECT)
    if not tdcs.mig_dec_key_set:
        raise refuse(Status.TDX_MIGRATION_DECRYPTION_KEY_NOT_SET)
    rotate_keys(call, tdcs)
    tdcs.dirty_count = 0
    call.ensure_stream(link, tdcs.mig_enc_working_key, 0)
    migsc = link.migsc
    migsc.iv_counter += 1
    mbmd = Mbmd.immutable_state(
        iv_counter=migsc.iv_counter,
        num_forward_streams=tdcs.num_migs - 1,
        mig_version=tdcs.mig_working_version,
    )
    if tdcs.export_count >= MAX_EXPORT_COUNT:
        raise refuse(Status.TDX_MAX_EXPORTS_EXCEEDED)
    tdcs.export_count += 1
    return _new_record(call, migsc, mbmd)


def _new_record(call: Call, migsc: Migsc, mbmd: Mbmd) -> Interrupted:
    context = cipher_of(migsc).start_encryption(mbmd.iv_counter, mbmd.aad())
    return Interrupted(call.leaf, (), ANY_EPOCH, 0, mbmd=mbmd, context=context)


def _export_pages(call: Call, state: _State, record: Interrupted) -> Steps[bytes]:
    """Encrypt the metadata pages into the VMM's pages; returns the tag.  RDX counts pages."""
    registers, memory = call.registers, call.memory
    info = PageListInfo.from_register(registers.r9)
    lists = call.shared_page(info.hpa, Operand.R9) >> 3
    pages = state.pages
    while record.processed < len(pages):
        yield Point.PAGE
        index = record.processed
        target = call.shared_page(memory.words[lists + index], Operand.MIG_BUFF_LIST_ENTRY)
        memory.bytes[target : target + PAGE_SIZE] = record.context.update(pages[index])
        record.processed = index + 1
        if index + 1 == len(pages):
            break
        if index + 1 == info.count:
            raise refuse(Status.TDX_OPERAND_INVALID, Operand.R9)
        if call.interrupted():
            record.operands = state.operands
            state.link.migsc.interrupted = record
            registers.rdx = record.processed
            raise refuse(Status.TDX_INTERRUPTED_RESUMABLE)
    registers.rdx = len(pages)
    record.context.finalize()
    tag: bytes = record.context.tag
    return tag


def immutable_pages(tdr: Tdr, tdcs: Tdcs, list_size: int = PAGE_SIZE) -> list[bytes]:
    """Metadata pages of the immutable TD state, the SYS page first."""
    values: dict[str, Value] = _of_scope(tdcs.fields, "immutable")
    values.update(
        TD_UUID=tdr.uuid, NUM_VCPUS=tdcs.num_vcpus, EXPORT_COUNT=tdcs.export_count, GPAW=0
    )
    return build_lists("immutable", values, list_size=list_size)


def td_pages(tdcs: Tdcs, list_size: int = PAGE_SIZE) -> list[bytes]:
    """Metadata pages of the mutable TD state."""
    values: dict[str, Value] = _of_scope(tdcs.fields, "td")
    values.update(
        IMPORT_COUNT=tdcs.import_count, SERVTD_BINDINGS_TABLE=bindings_table(tdcs.binding)
    )
    return build_lists("td", values, list_size=list_size)


def vcpu_pages(vcpu: Tdvps, list_size: int = PAGE_SIZE) -> list[bytes]:
    """Metadata pages of one vCPU."""
    values = {**vcpu.registers, "VCPU_STATE": int(vcpu.state)}
    return build_lists("vp", values, list_size=list_size)


def _of_scope(fields: dict[str, Value], scope: Scope) -> dict[str, Value]:
    names = _NAMES[scope]
    return {name: value for name, value in fields.items() if name in names}


_NAMES: dict[Scope, frozenset[str]] = {
    "immutable": frozenset(row.name for row in ROWS["sys"] + ROWS["immutable"]),
    "td": frozenset(row.name for row in ROWS["td"]),
}


def export_state_td(call: Call) -> Steps[int]:
    """TDH.EXPORT.STATE.TD (73, TDX module 1.5.01): export the mutable state of the TD on stream 0.

    In: RCX TDR; R8 MBMD buffer; R9 PAGE_LIST_INFO; R10 command 63 (RESUME).
    Out: RDX pages written, so far if interrupted; MBMD and pages.
    Status: the prologue's; OPERAND_INVALID|R10; BUSY|MIGSC; MIGRATION_STREAM_STATE_INCORRECT;
        INVALID_RESUMPTION; OPERAND_INVALID|R9, |MIG_BUFF_LIST_ENTRY, |R8 (last);
        INTERRUPTED_RESUMABLE.
    Source: tdh_export_state_td.c.

    Repair R1 (hardened): INVALID_RESUMPTION for NEW while a memory bundle is unfinished.
    """
    registers = call.registers
    registers.rdx = 0
    _, tdcs = yield from call.enter_td(Operand.RCX, registers.rcx, Mode.SHARED, Mode.EXCLUSIVE)
    call.stream_zero()
    link = yield from call.take_link(tdcs, 1)
    if not link.initialized:
        raise refuse(Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    migsc, operands = link.migsc, (registers.r9,)
    if call.command:
        record = resume(call, link, operands, tdcs)
    else:
        page_list(call, MIN_PAGES["td"])
        begin_new(call, link)
        migsc.iv_counter += 1
        mbmd = Mbmd.td_state(
            mb_counter=migsc.next_mb_counter,
            mig_epoch=tdcs.mig_epoch,
            iv_counter=migsc.iv_counter,
            mig_version=tdcs.mig_working_version,
        )
        record = _new_record(call, migsc, mbmd)
    pages = td_pages(tdcs, call.module.list_size)
    yield from _finish(call, tdcs, _State(link, "td", pages, operands), record)
    return Status.TDX_SUCCESS


def _finish(call: Call, tdcs: Tdcs, state: _State, record: Interrupted) -> Steps[None]:
    """Pages, then the MBMD, whose buffer is looked at only now; then the bundle counts."""
    mac = yield from _export_pages(call, state, record)
    pages, call.registers.rdx = call.registers.rdx, 0
    buffer = call.mbmd_buffer(call.registers.r8)
    call.registers.rdx = pages
    write_mbmd(call, buffer, record.mbmd.with_mac(mac))
    tdcs.total_mb_count += 1
    state.link.migsc.next_mb_counter += 1


def export_state_vp(call: Call) -> Steps[int]:
    """TDH.EXPORT.STATE.VP (74, TDX module 1.5.01): export a vCPU, once in a session.

    In: RCX TDVPR; R8 MBMD buffer; R9 PAGE_LIST_INFO; R10 stream 15:0 and command 63 (RESUME).
    Out: RDX pages written, so far if interrupted; MBMD and pages.
    Status: the prologue's; TDCX_NUM_INCORRECT; VCPU_STATE_INCORRECT; VCPU_ASSOCIATED;
        VCPU_ALREADY_EXPORTED; OPERAND_INVALID|R10; BUSY|MIGSC;
        MIGRATION_STREAM_STATE_INCORRECT; INVALID_RESUMPTION; OPERAND_INVALID|R9,
        |MIG_BUFF_LIST_ENTRY, |R8 (last); INTERRUPTED_RESUMABLE.
    Source: tdh_export_state_vp.c.

    Repair R1 (hardened): INVALID_RESUMPTION for NEW while a memory bundle is unfinished.
    """
    registers = call.registers
    hpa, registers.rdx = registers.rcx, 0
    _, tdcs, vcpu = yield from call.enter_vcpu(hpa, Operand.RCX, Mode.EXCLUSIVE)
    if vcpu.pages < MIN_TDVPS_PAGES:
        raise refuse(Status.TDX_TDCX_NUM_INCORRECT)
    if vcpu.state is not VcpuState.READY:
        raise refuse(Status.TDX_VCPU_STATE_INCORRECT)
    call.associate(tdcs, vcpu)
    if vcpu.export_count == tdcs.export_count:
        raise refuse(Status.TDX_VCPU_ALREADY_EXPORTED)
    index = call.forward_index(tdcs)
    link = yield from call.take_link(tdcs, 1 + index)
    operands = (registers.r9, hpa)
    if call.command:
        record = _resume_stream(call, link, operands, tdcs)
    else:
        page_list(call, MIN_PAGES["vp"])
        call.ensure_stream(link, tdcs.mig_enc_working_key, index)
        begin_new(call, link)
        migsc = link.migsc
        migsc.iv_counter += 1
        mbmd = Mbmd.vcpu_state(
            vp_index=vcpu.vcpu_index,
            mb_counter=migsc.next_mb_counter,
            mig_epoch=tdcs.mig_epoch,
            iv_counter=migsc.iv_counter,
            migs_index=index,
            mig_version=tdcs.mig_working_version,
        )
        record = _new_record(call, migsc, mbmd)
    pages = vcpu_pages(vcpu, call.module.list_size)
    yield from _finish(call, tdcs, _State(link, "vp", pages, operands), record)
    vcpu.export_count = tdcs.export_count
    return Status.TDX_SUCCESS
