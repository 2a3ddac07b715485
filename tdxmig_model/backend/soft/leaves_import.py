"""Destination leaves besides memory: state bundles, tokens, commit, end and abort.

TDX module 1.5.01: TDH.IMPORT.STATE.IMMUTABLE, TD, VP, TRACK, COMMIT, END and ABORT.  Metadata pages
are decrypted, parsed and written into the TD one by one; the tag is compared after the last one,
and only then the first parse error is reported.  The TD cannot run meanwhile, and both are fatal.
"""

from __future__ import annotations

from collections.abc import Callable

from cryptography.exceptions import InvalidTag

from tdxmig_model.backend.soft.call import Call, Completion, Point, Steps, failing_import, refuse
from tdxmig_model.backend.soft.findings import Finding
from tdxmig_model.backend.soft.import_fields import td_writer, vcpu_writer
from tdxmig_model.backend.soft.leaves_build import (
    ATTR_MIGRATABLE,
    ATTR_SEPT_VE_DISABLE,
    initialize_vcpu,
    int_field,
)
from tdxmig_model.backend.soft.leaves_export_state import page_list
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.metadata import ListParser, ParseResult, Scope, Store
from tdxmig_model.backend.soft.op_state import OpState
from tdxmig_model.backend.soft.session import (
    ANY_EPOCH,
    begin_new,
    cipher_of,
    read_mbmd,
    resume,
    rotate_keys,
    write_mbmd,
)
from tdxmig_model.backend.soft.state import (
    MIN_TDVPS_PAGES,
    Interrupted,
    Migsc,
    MigscLink,
    Tdcs,
    Tdvps,
    VcpuState,
)
from tdxmig_model.backend.soft.status import FATAL_BIT, Operand, Status
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import PAGE_SIZE, START_EPOCH
from tdxmig_model.wire.gpa_list import PageListInfo
from tdxmig_model.wire.mbmd import BundleType, Mbmd


def _state_leaf(call: Call, body: Callable[[Call, int], Steps[int]]) -> Steps[int]:
    """RCX and RDX are 0 at the end or say what failed; an interrupted call leaves them alone."""
    registers = call.registers
    operands = registers.rcx, registers.rdx
    registers.rcx = registers.rdx = 0
    try:
        return (yield from body(call, operands[0]))
    except Completion as ended:
        if ended.status == Status.TDX_INTERRUPTED_RESUMABLE:
            registers.rcx, registers.rdx = operands
        raise


def import_state_immutable(call: Call) -> Steps[int]:
    """TDH.IMPORT.STATE.IMMUTABLE (85, TDX module 1.5.01): begin a session; MEMORY_IMPORT.

    In: RCX TDR, exclusive; R8 MBMD; R9 PAGE_LIST_INFO; R10 command 63 (RESUME).
    Out: RCX and RDX details of a metadata error.
    Status: LIMIT_CPUID_MAXVAL_SET; the prologue's; MIN_MIGS_NOT_CREATED; OPERAND_INVALID|R10;
        BUSY|MIGSC; MIGRATION_DECRYPTION_KEY_NOT_SET; RND_NO_ENTROPY;
        MIGRATION_STREAM_STATE_INCORRECT; INVALID_RESUMPTION; INTERRUPTED_RESUMABLE;
        F(OPERAND_INVALID|R8, |R9, |PAGE); F(INVALID_MBMD); F(NUM_MIGS_HIGHER_THAN_CREATED);
        F(INVALID_RESUMPTION); F(INCORRECT_MBMD_MAC); F(INVALID_METADATA_LIST_HEADER, or another
        status of the metadata); F(OPERAND_INVALID|RDX).
    Source: tdh_import_state_immutable.c.

    Repair R5 (hardened): INVALID_MIGRATION_DECRYPTION_KEY for a degenerate key.  Repair R3
    (hardened): OP_STATE_INCORRECT for a NEW call while one is interrupted.

    F() sets FATAL and OP_STATE FAILED_IMPORT.
    """
    return _state_leaf(call, _import_state_immutable)


def _import_state_immutable(call: Call, hpa: int) -> Steps[int]:
    operands = (call.registers.r9,)
    if call.lp.limits_cpuid:
        raise refuse(Status.TDX_LIMIT_CPUID_MAXVAL_SET)
    tdr, tdcs = yield from call.enter_td(Operand.RCX, hpa, Mode.EXCLUSIVE, None)
    if tdcs.num_migs < 2:
        raise refuse(Status.TDX_MIN_MIGS_NOT_CREATED)
    call.stream_zero()
    link = yield from call.take_link(tdcs, 1)
    if call.command:
        if not link.initialized:
            raise refuse(Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
        record = _resume_import(call, link, tdcs, operands)
    else:
        _start_import(call, tdcs, link)
        with failing_import(tdcs):
            record = _open_immutable(call, tdcs, link.migsc)
            sys_pages = record.mbmd.num_sys_md_pages
            record.parser = _parser(call, "immutable", td_writer(tdr, tdcs), sys_pages)
    with failing_import(tdcs):
        sys_pages = record.mbmd.num_sys_md_pages
        yield from _import_pages(call, link, record, sys_pages + 1, operands)
        _finish_immutable(tdcs)
    tdcs.total_mb_count = 1
    tdcs.op_state = OpState.MEMORY_IMPORT
    return Status.TDX_SUCCESS


def _start_import(call: Call, tdcs: Tdcs, link: MigscLink) -> None:
    """NEW: keys are consumed and everything of the session is reset.

    Repair R3 (hardened): from here on nothing but this leaf's RESUME may touch the TD.
    """
    if tdcs.op_state is OpState.START_IMPORT:
        raise refuse(Status.TDX_OP_STATE_INCORRECT)
    if not tdcs.mig_dec_key_set:
        raise refuse(Status.TDX_MIGRATION_DECRYPTION_KEY_NOT_SET)
    rotate_keys(call, tdcs)
    call.ensure_stream(link, tdcs.mig_dec_working_key, 0)
    if call.module.hardened:
        tdcs.op_state = OpState.START_IMPORT


def _open_immutable(call: Call, tdcs: Tdcs, migsc: Migsc) -> Interrupted:
    hpa = call.mbmd_buffer(call.registers.r8)
    kind = BundleType.IMMUTABLE_TD_STATE
    mbmd = read_mbmd(call, hpa, kind, tdcs.mig_working_version, 0)
    if mbmd.mb_counter or mbmd.mig_epoch or not mbmd.num_sys_md_pages:
        raise refuse(Status.TDX_INVALID_MBMD)
    if mbmd.num_forward_streams > tdcs.num_migs - 1:
        raise refuse(Status.TDX_NUM_MIGS_HIGHER_THAN_CREATED)
    return _open_message(call, migsc, mbmd)


def _open_message(call: Call, migsc: Migsc, mbmd: Mbmd) -> Interrupted:
    """The bundle's message begins; its counter is used up whatever becomes of it."""
    migsc.iv_counter = mbmd.iv_counter
    context = cipher_of(migsc).start_decryption(mbmd.iv_counter, mbmd.aad())
    migsc.expected_mb_counter = mbmd.mb_counter + 1
    return Interrupted(call.leaf, (), ANY_EPOCH, 0, mbmd=mbmd, context=context)


def _resume_import(
    call: Call, link: MigscLink, tdcs: Tdcs, operands: tuple[int, ...]
) -> Interrupted:
    """Not interrupted is a plain error; other operands than the interrupted call's are fatal."""
    if link.migsc.interrupted is None:
        raise refuse(Status.TDX_INVALID_RESUMPTION)
    with failing_import(tdcs):
        return resume(call, link, operands, tdcs)


def _parser(call: Call, scope: Scope, store: Store, sys_pages: int = 0) -> ListParser:
    return ListParser(scope, hardened=call.module.hardened, sys_pages=sys_pages, store=store)


def _import_pages(
    call: Call, link: MigscLink, record: Interrupted, minimum: int, operands: tuple[int, ...]
) -> Steps[None]:
    """Decrypt and apply the metadata pages; then the tag, then the first parse error."""
    memory = call.memory
    info: PageListInfo = page_list(call, minimum)
    lists = call.shared_page(info.hpa, Operand.R9) >> 3
    while record.processed < info.count:
        yield Point.PAGE
        source = call.shared_page(memory.words[lists + record.processed], Operand.PAGE)
        page = record.context.update(bytes(memory.bytes[source : source + PAGE_SIZE]))
        record.processed += 1
        _parser_of(record).parse_page(page, last=record.processed == info.count)
        if record.processed < info.count and call.interrupted():
            record.operands = operands
            link.migsc.interrupted = record
            raise refuse(Status.TDX_INTERRUPTED_RESUMABLE)
    result = _parser_of(record).result()
    _report_findings(call, result)
    try:
        record.context.finalize_with_tag(record.mbmd.mac)
    except InvalidTag:
        raise refuse(Status.TDX_INCORRECT_MBMD_MAC) from None
    if result.error is not None:
        call.registers.rcx, call.registers.rdx = result.error.extended
        raise Completion(result.error.status)


def _parser_of(record: Interrupted) -> ListParser:
    if record.parser is None:
        raise UsageError("only an import has metadata lists to parse")
    return record.parser


def _report_findings(call: Call, result: ParseResult) -> None:
    """Profile "tdx-1.5.01": what the bundle made the parser do that is not performed here."""
    leaf = f"TDH.{call.leaf.name.replace('_', '.')}"
    findings = call.module.findings
    for read in result.out_of_range_reads:
        detail = (
            f"page {read.page}: {read.length} bytes at offset {read.offset} "
            f"of a list of {read.list_size} bytes"
        )
        findings.append(Finding("out_of_range_read", leaf, detail))
    for name in sorted(result.not_written if result.error is None else ()):
        findings.append(Finding("required_field_not_written", leaf, name))


def _finish_immutable(tdcs: Tdcs) -> None:
    """Cross checks, and the fields that the importer computes."""
    vcpus, most = tdcs.num_vcpus, int_field(tdcs, "MAX_VCPUS")
    partitioned = int_field(tdcs, "ATTRIBUTES") & ATTR_MIGRATABLE and int_field(tdcs, "NUM_L2_VMS")
    if partitioned or not 0 < vcpus <= most:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RDX)
    tdcs.num_assoc_vcpus = 0
    tdcs.td_epoch = 1
    tdcs.refcount = [0, 0]
    pending_ve_disable = bool(int_field(tdcs, "ATTRIBUTES") & ATTR_SEPT_VE_DISABLE)
    tdcs.fields["TD_CTLS"] = int_field(tdcs, "TD_CTLS") & ~1 | pending_ve_disable


def import_state_td(call: Call) -> Steps[int]:
    """TDH.IMPORT.STATE.TD (86, TDX module 1.5.01): import the TD's mutable state; STATE_IMPORT.

    In: RCX TDR, exclusive; R8 MBMD; R9 PAGE_LIST_INFO; R10 command 63 (RESUME).
    Out: RCX and RDX details of a metadata error.
    Status: the prologue's; OPERAND_INVALID|R10; BUSY|MIGSC; MIGRATION_STREAM_STATE_INCORRECT;
        INVALID_RESUMPTION; INTERRUPTED_RESUMABLE; F(OPERAND_INVALID|R8, |R9, |PAGE);
        F(INVALID_MBMD); F(INVALID_RESUMPTION); F(INCORRECT_MBMD_MAC);
        F(INVALID_METADATA_LIST_HEADER, or another status of the metadata).
    Source: tdh_import_state_td.c.

    F() sets FATAL and OP_STATE FAILED_IMPORT.
    """
    return _state_leaf(call, _import_state_td)


def _import_state_td(call: Call, hpa: int) -> Steps[int]:
    operands = (call.registers.r9,)
    tdr, tdcs = yield from call.enter_td(Operand.RCX, hpa, Mode.EXCLUSIVE, None)
    call.stream_zero()
    link = yield from call.take_link(tdcs, 1)
    if not link.initialized:
        raise refuse(Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    if call.command:
        record = _resume_import(call, link, tdcs, operands)
    else:
        with failing_import(tdcs):
            begin_new(call, link)
            record = _open_state(call, tdcs, link.migsc, BundleType.MUTABLE_TD_STATE, 0)
            record.parser = _parser(call, "td", td_writer(tdr, tdcs))
    with failing_import(tdcs):
        yield from _import_pages(call, link, record, 1, operands)
    tdcs.total_mb_count += 1
    tdcs.op_state = OpState.STATE_IMPORT
    return Status.TDX_SUCCESS


def _open_state(call: Call, tdcs: Tdcs, migsc: Migsc, kind: BundleType, index: int) -> Interrupted:
    hpa = call.mbmd_buffer(call.registers.r8)
    mbmd = read_mbmd(call, hpa, kind, tdcs.mig_working_version, index)
    if mbmd.mb_counter != migsc.expected_mb_counter or mbmd.mig_epoch != tdcs.mig_epoch:
        raise refuse(Status.TDX_INVALID_MBMD)
    return _open_message(call, migsc, mbmd)


def import_state_vp(call: Call) -> Steps[int]:
    """TDH.IMPORT.STATE.VP (87, TDX module 1.5.01): import a vCPU; READY.

    In: RCX TDVPR; R8 MBMD; R9 PAGE_LIST_INFO; R10 stream 15:0 and command 63 (RESUME).
    Out: RCX and RDX details of a metadata error.
    Status: the prologue's; TDCX_NUM_INCORRECT; OPERAND_INVALID|R10; BUSY|MIGSC;
        MIGRATION_STREAM_STATE_INCORRECT; INVALID_RESUMPTION; INTERRUPTED_RESUMABLE;
        F(VCPU_STATE_INCORRECT); F(OPERAND_INVALID|R8, |R9, |PAGE); F(INVALID_MBMD);
        F(INVALID_RESUMPTION); F(VCPU_ASSOCIATED); F(INCORRECT_MBMD_MAC);
        F(INVALID_METADATA_LIST_HEADER, or another status of the metadata);
        F(ALL_VCPUS_IMPORTED).
    Source: tdh_import_state_vp.c.

    Repair R12 (hardened): F(METADATA_FIELD_VALUE_NOT_VALID) for another vCPU than the MBMD's.

    F() sets FATAL and OP_STATE FAILED_IMPORT.
    """
    return _state_leaf(call, _import_state_vp)


def _import_state_vp(call: Call, hpa: int) -> Steps[int]:
    _, tdcs, vcpu = yield from call.enter_vcpu(hpa, Operand.RCX, Mode.EXCLUSIVE)
    if vcpu.pages < MIN_TDVPS_PAGES:
        raise refuse(Status.TDX_TDCX_NUM_INCORRECT)
    index = call.forward_index(tdcs)
    link = yield from call.take_link(tdcs, 1 + index)
    operands = (call.registers.r9, hpa)
    if call.command:
        record = _resume_import(call, link, tdcs, operands)
        with failing_import(tdcs):
            if vcpu.state not in (VcpuState.IMPORT, VcpuState.DISABLED):
                raise refuse(Status.TDX_VCPU_STATE_INCORRECT)
            call.associate(tdcs, vcpu)
    else:
        call.ensure_stream(link, tdcs.mig_dec_working_key, index)
        begin_new(call, link)
        with failing_import(tdcs):
            record = _open_vcpu(call, tdcs, vcpu, link.migsc, index)
    with failing_import(tdcs):
        yield from _import_vcpu_pages(call, link, record, vcpu, operands)
        # Counted before it is compared, so that one too many is counted too.
        tdcs.num_migrated_vcpus += 1
        if tdcs.num_migrated_vcpus > tdcs.num_vcpus:
            raise refuse(Status.TDX_ALL_VCPUS_IMPORTED)
        _check_vcpu_index(call, tdcs, vcpu, record.mbmd)
    tdcs.imported_vcpus.add(vcpu.vcpu_index)
    vcpu.state = VcpuState.READY
    tdcs.total_mb_count += 1
    return Status.TDX_SUCCESS


def _import_vcpu_pages(
    call: Call, link: MigscLink, record: Interrupted, vcpu: Tdvps, operands: tuple[int, ...]
) -> Steps[None]:
    """Interrupted, the vCPU is in a state of its own, which nothing but the RESUME accepts."""
    try:
        yield from _import_pages(call, link, record, 4, operands)
    except Completion as ended:
        if ended.status == Status.TDX_INTERRUPTED_RESUMABLE:
            vcpu.state = VcpuState.IMPORT
        raise


def _check_vcpu_index(call: Call, tdcs: Tdcs, vcpu: Tdvps, mbmd: Mbmd) -> None:
    """Repair R12 (hardened): the state is that of the vCPU in the MBMD, which has none so far."""
    index = vcpu.vcpu_index
    if call.module.hardened and (index != mbmd.vp_index or index in tdcs.imported_vcpus):
        raise refuse(Status.TDX_METADATA_FIELD_VALUE_NOT_VALID)


def _open_vcpu(call: Call, tdcs: Tdcs, vcpu: Tdvps, migsc: Migsc, index: int) -> Interrupted:
    if vcpu.state is not VcpuState.UNINITIALIZED:
        raise refuse(Status.TDX_VCPU_STATE_INCORRECT)
    record = _open_state(call, tdcs, migsc, BundleType.MUTABLE_VCPU_STATE, index)
    initialize_vcpu(tdcs, vcpu)
    call.associate(tdcs, vcpu)
    record.parser = _parser(call, "vp", vcpu_writer(tdcs, vcpu))
    return record


def import_track(call: Call) -> Steps[int]:
    """TDH.IMPORT.TRACK (84, TDX module 1.5.01): take an epoch token or the start token.

    In: RCX TDR, exclusive; R8 MBMD; R10 0.
    Status: the prologue's; OPERAND_INVALID|R10, |R8; BUSY|MIGSC;
        MIGRATION_STREAM_STATE_INCORRECT; F(INVALID_MBMD); F(INCORRECT_MBMD_MAC);
        F(SOME_VCPUS_NOT_MIGRATED).
    Source: tdh_import_track.c.

    The start token makes OP_STATE POST_IMPORT.  F() sets FATAL and OP_STATE FAILED_IMPORT.
    """
    registers = call.registers
    _, tdcs = yield from call.enter_td(Operand.RCX, registers.rcx, Mode.EXCLUSIVE, None)
    if registers.r10:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.R10)
    hpa = call.mbmd_buffer(registers.r8)
    link = yield from call.take_link(tdcs, 1)
    if not link.initialized:
        raise refuse(Status.TDX_MIGRATION_STREAM_STATE_INCORRECT)
    migsc = link.migsc
    migsc.interrupted = None
    with failing_import(tdcs):
        token = read_mbmd(call, hpa, BundleType.EPOCH_TOKEN, tdcs.mig_working_version, 0)
        expected_total = tdcs.total_mb_count + 1
        if token.mb_counter or token.mig_epoch <= tdcs.mig_epoch:
            raise refuse(Status.TDX_INVALID_MBMD)
        if token.total_mb != expected_total:
            raise refuse(Status.TDX_INVALID_MBMD)
        if not cipher_of(migsc).tag_ok(token.iv_counter, token.aad(), token.mac):
            raise refuse(Status.TDX_INCORRECT_MBMD_MAC)
        if token.mig_epoch == START_EPOCH:
            if tdcs.num_migrated_vcpus != tdcs.num_vcpus:
                raise refuse(Status.TDX_SOME_VCPUS_NOT_MIGRATED)
            tdcs.op_state = OpState.POST_IMPORT
    migsc.iv_counter = token.iv_counter
    migsc.expected_mb_counter = 1
    tdcs.total_mb_count = expected_total
    tdcs.mig_epoch = token.mig_epoch
    return Status.TDX_SUCCESS


def import_commit(call: Call) -> Steps[int]:
    """TDH.IMPORT.COMMIT (82, TDX module 1.5.01): let the TD run, to be completed; LIVE_IMPORT.

    In: RCX TDR, exclusive.
    Status: the prologue's.
    Source: tdh_import_commit.c.
    """
    _, tdcs = yield from call.enter_td(Operand.RCX, call.registers.rcx, Mode.EXCLUSIVE, None)
    tdcs.import_count += 1
    tdcs.op_state = OpState.LIVE_IMPORT
    return Status.TDX_SUCCESS


def import_end(call: Call) -> Steps[int]:
    """TDH.IMPORT.END (81, TDX module 1.5.01): end the import; RUNNABLE.

    In: RCX TDR, exclusive.
    Status: the prologue's.
    Source: tdh_import_end.c.
    """
    _, tdcs = yield from call.enter_td(Operand.RCX, call.registers.rcx, Mode.EXCLUSIVE, None)
    if tdcs.op_state is not OpState.LIVE_IMPORT:
        tdcs.import_count += 1
    tdcs.op_state = OpState.RUNNABLE
    return Status.TDX_SUCCESS


def import_abort(call: Call) -> Steps[int]:
    """TDH.IMPORT.ABORT (80, TDX module 1.5.01): give the TD up; FAILED_IMPORT.

    In: RCX TDR, exclusive; R8 MBMD buffer; R10 0.
    Out: an abort token in the MBMD.
    Status: SUCCESS with the FATAL bit; the prologue's; OPERAND_INVALID|R10, |R8; BUSY|MIGSC.
    Source: tdh_import_abort.c.

    It can be repeated, for another token.
    """
    registers = call.registers
    _, tdcs = yield from call.enter_td(Operand.RCX, registers.rcx, Mode.EXCLUSIVE, None)
    if registers.r10:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.R10)
    hpa = call.mbmd_buffer(registers.r8)
    link = yield from call.take_link(tdcs, 0)
    tdcs.op_state = OpState.FAILED_IMPORT
    call.ensure_stream(link, tdcs.mig_enc_working_key, 0)
    migsc = link.migsc
    migsc.interrupted = None
    migsc.iv_counter += 1
    token = Mbmd.abort_token(
        mb_counter=migsc.next_mb_counter,
        iv_counter=migsc.iv_counter,
        mig_version=tdcs.mig_working_version,
    )
    mac = cipher_of(migsc).tag(migsc.iv_counter, token.aad())
    write_mbmd(call, hpa, token.with_mac(mac))
    migsc.next_mb_counter += 1
    return Status.TDX_SUCCESS | FATAL_BIT
