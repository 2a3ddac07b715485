"""Leaves that build and take down a TD and its vCPUs.

Facts of TDX module 1.5.01 (public source): TDH.MNG.CREATE, KEY.CONFIG, ADDCX, INIT, VPFLUSHDONE,
KEY.FREEID, MR.FINALIZE, VP.CREATE, VP.ADDCX, VP.INIT, VP.FLUSH, PHYMEM.CACHE.WB, PAGE.RECLAIM and
MIG.STREAM.CREATE.  One package, so one KEY.CONFIG and one CACHE.WB are enough.
"""

from __future__ import annotations

import struct

from tdxmig_model.backend.soft.call import Call, Steps, refuse
from tdxmig_model.backend.soft.fields import MAX_L2_VMS
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.memory import (
    FIRST_PRIVATE_HKID,
    LAST_PRIVATE_HKID,
    PageType,
)
from tdxmig_model.backend.soft.metadata import initial_values
from tdxmig_model.backend.soft.op_state import ANY_INITIALIZED, INTERRUPTED_START, OpState
from tdxmig_model.backend.soft.sept import FREE_ENTRY, SeptTree
from tdxmig_model.backend.soft.servtd import servtd_hash
from tdxmig_model.backend.soft.state import (
    MAX_MIGS,
    MAX_TDCS_PAGES,
    MAX_TDVPS_PAGES,
    MIN_TDCS_PAGES,
    MIN_TDVPS_PAGES,
    NO_LP,
    BindingState,
    Lifecycle,
    Migsc,
    MigscLink,
    Tdcs,
    Tdr,
    Tdvps,
    VcpuState,
)
from tdxmig_model.backend.soft.status import Operand, Status

SEPT_ROOT_PAGE_INDEX = 1
"""Which TDCS page holds the root of the Secure EPT."""

# TD_PARAMS: ATTRIBUTES, XFAM, MAX_VCPUS, NUM_L2_VMS, MSR controls, reserved, EPTP controls,
# CONFIG_FLAGS, TSC_FREQUENCY, reserved, MRCONFIGID, MROWNER, MROWNERCONFIG.
TD_PARAMS = struct.Struct("<QQHBB4sQQH38s48s48s48s")
# IA32_ARCH_CAPABILITIES_CONFIG, reserved, CPUID configuration values and what is left.
_TD_PARAMS_TAIL = struct.Struct("<Q24s768s")
TD_PARAMS_SIZE = 1024

ATTR_DEBUG = 1 << 0
ATTR_SEPT_VE_DISABLE = 1 << 28
ATTR_MIGRATABLE = 1 << 29
ATTR_PKS = 1 << 30
ATTR_PERFMON = 1 << 63
ATTRIBUTES_FIXED_0 = ATTR_DEBUG | ATTR_SEPT_VE_DISABLE | ATTR_MIGRATABLE | ATTR_PKS | ATTR_PERFMON
XFAM_FIXED_1 = 0x3
XFAM_FIXED_0 = 0x6_1AE7
EPTP_WRITE_BACK_FOUR_LEVELS = 0x1E
TSC_FREQUENCY_RANGE = range(4, 401)
TDCS_PAGES_PER_L2_VM = 3
DEFAULT_HP_LOCK_TIMEOUT_USEC = 1_000_000
RTMR_WORDS = 24


def mng_create(call: Call) -> Steps[int]:
    """TDH.MNG.CREATE (9, TDX module 1.5.01): make a TD of a free page.

    In: RCX free page, which becomes the TDR; RDX HKID.
    Status: OPERAND_INVALID|RDX; RCX page; BUSY|KOT; HKID_NOT_FREE; RND_NO_ENTROPY.
    Source: tdh_mng_create.c.
    """
    registers, module = call.registers, call.module
    hkid = registers.rdx
    if not FIRST_PRIVATE_HKID <= hkid <= LAST_PRIVATE_HKID:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RDX)
    yield from call.take_new_page(registers.rcx, Operand.RCX)
    yield from call.take(module.kot_lock, Mode.EXCLUSIVE, Operand.KOT)
    if hkid in module.hkids:
        raise refuse(Status.TDX_HKID_NOT_FREE)
    call.memory.zero_page(registers.rcx)
    words = struct.unpack("<4Q", call.fresh_random(32))
    module.hkids[hkid] = Lifecycle.HKID_ASSIGNED
    call.memory.assign(registers.rcx, PageType.TDR, 0)
    module.tdrs[registers.rcx] = Tdr(registers.rcx, hkid, (words[0], words[1], words[2], words[3]))
    return Status.TDX_SUCCESS


def mng_key_config(call: Call) -> Steps[int]:
    """TDH.MNG.KEY.CONFIG (8, TDX module 1.5.01): give the TD's key id its key.

    In: RCX TDR, exclusive.
    Status: RCX page; TD_FATAL; LIFECYCLE_STATE_INCORRECT.
    Source: tdh_mng_key_config.c.
    """
    yield from call.take_page(call.registers.rcx, Operand.RCX, Mode.EXCLUSIVE, PageType.TDR)
    tdr = call.module.tdrs[call.registers.rcx]
    if tdr.fatal:
        raise refuse(Status.TDX_TD_FATAL)
    if tdr.lifecycle is not Lifecycle.HKID_ASSIGNED:
        raise refuse(Status.TDX_LIFECYCLE_STATE_INCORRECT)
    tdr.lifecycle = Lifecycle.KEYS_CONFIGURED
    return Status.TDX_SUCCESS


def mng_addcx(call: Call) -> Steps[int]:
    """TDH.MNG.ADDCX (1, TDX module 1.5.01): add a TDCS page.

    In: RCX free page; RDX TDR, exclusive.
    Status: the prologue's; TDCX_NUM_INCORRECT; RCX page; RND_NO_ENTROPY.
    Source: tdh_mng_add_cx.c.

    The sixth page completes the TDCS: OP_STATE is UNINITIALIZED, MIG_ENC_KEY random.
    Repair R3 (hardened): OP_STATE_INCORRECT while the start of an import is interrupted.
    """
    registers = call.registers
    yield from call.take_page(registers.rdx, Operand.RDX, Mode.EXCLUSIVE, PageType.TDR)
    tdr = call.module.tdrs[registers.rdx]
    call.check_keys(tdr)
    if len(tdr.tdcx) >= MAX_TDCS_PAGES:
        raise refuse(Status.TDX_TDCX_NUM_INCORRECT)
    yield from call.take_new_page(registers.rcx, Operand.RCX)
    if tdr.tdcs is not None and tdr.tdcs.op_state not in call.module.allowed[call.leaf]:
        raise refuse(Status.TDX_OP_STATE_INCORRECT)
    sixth = len(tdr.tdcx) + 1 == MIN_TDCS_PAGES
    key = call.fresh_random(32) if sixth else b""
    call.adopt_page(tdr, registers.rcx, PageType.TDCX)
    tdr.tdcx.append(registers.rcx)
    if sixth:
        root = tdr.tdcx[SEPT_ROOT_PAGE_INDEX]
        call.memory.page_words(root)[:] = FREE_ENTRY
        fields = {**initial_values("immutable"), **initial_values("td")}
        tdr.tdcs = Tdcs(SeptTree(call.memory, root), key, fields)
    return Status.TDX_SUCCESS


def mng_init(call: Call) -> Steps[int]:
    """TDH.MNG.INIT (21, TDX module 1.5.01): set a TD up by its parameters; INITIALIZED.

    In: RCX TDR, exclusive; RDX TD_PARAMS (1024 bytes, aligned to their size).
    Out: RCX 0.
    Status: the prologue's; OPERAND_INVALID|RDX or the item at fault.
    Source: tdh_mng_init.c.

    TD_PARAMS is read, checked and stored item by item: a call that fails leaves what came
    before.
    """
    registers = call.registers
    tdr_hpa, params_hpa = registers.rcx, registers.rdx
    registers.rcx = 0
    tdr, tdcs = yield from call.enter_td(Operand.RCX, tdr_hpa, Mode.EXCLUSIVE, None)
    if not call.memory.shared_ok(params_hpa, TD_PARAMS_SIZE, TD_PARAMS_SIZE):
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RDX)
    if not call.module.demonstration:
        tdcs.num_vcpus = 0
    tdcs.num_assoc_vcpus = 0
    tdcs.td_epoch = 1
    tdcs.refcount = [0, 0]
    tdcs.fields["HP_LOCK_TIMEOUT"] = DEFAULT_HP_LOCK_TIMEOUT_USEC
    _configure(tdr, tdcs, bytes(call.memory.bytes[params_hpa : params_hpa + TD_PARAMS_SIZE]))
    tdcs.fields["RTMR"] = (0,) * RTMR_WORDS
    tdcs.op_state = OpState.INITIALIZED
    return Status.TDX_SUCCESS


def attributes_valid(attributes: int, importing: bool) -> bool:
    """ATTRIBUTES that this platform allows; a migratable TD has neither debug nor perfmon."""
    if attributes & ~ATTRIBUTES_FIXED_0:
        return False
    if attributes & ATTR_MIGRATABLE:
        return not attributes & (ATTR_DEBUG | ATTR_PERFMON)
    return not importing


def xfam_valid(xfam: int) -> bool:
    """XFAM that this platform allows: x87 and SSE always."""
    return not xfam & ~XFAM_FIXED_0 and xfam & XFAM_FIXED_1 == XFAM_FIXED_1


def tdcs_pages_suffice(tdr: Tdr, l2_vms: int) -> bool:
    """Has the TD enough TDCS pages for this number of L2 virtual machines?"""
    return len(tdr.tdcx) >= MIN_TDCS_PAGES + TDCS_PAGES_PER_L2_VM * l2_vms


def int_field(tdcs: Tdcs, name: str) -> int:
    """A TDCS field of one element."""
    value = tdcs.fields[name]
    return value if isinstance(value, int) else value[0]


def _configure(tdr: Tdr, tdcs: Tdcs, params: bytes) -> None:
    """Check and store TD_PARAMS in the published order.  This platform has one configuration: no
    CPUID bit is configurable and IA32_ARCH_CAPABILITIES takes no configuration."""
    fields = TD_PARAMS.unpack_from(params)
    attributes, xfam, max_vcpus, l2_vms, msrs, reserved0, eptp, flags, tsc, reserved1 = fields[:10]
    invalid, values = Status.TDX_OPERAND_INVALID, tdcs.fields
    if not attributes_valid(attributes, importing=False):
        raise refuse(invalid, Operand.ATTRIBUTES)
    values["ATTRIBUTES"] = attributes
    values["TD_CTLS"] = int_field(tdcs, "TD_CTLS") & ~1 | bool(attributes & ATTR_SEPT_VE_DISABLE)
    if not xfam_valid(xfam):
        raise refuse(invalid, Operand.XFAM)
    values["XFAM"] = xfam
    if max_vcpus == 0:
        raise refuse(invalid, Operand.MAX_VCPUS)
    values["MAX_VCPUS"] = max_vcpus
    if l2_vms > MAX_L2_VMS:
        raise refuse(invalid, Operand.NUM_L2_VMS)
    if not tdcs_pages_suffice(tdr, l2_vms):
        raise refuse(Status.TDX_TDCS_NOT_ALLOCATED)
    values["NUM_L2_VMS"] = l2_vms
    if any(reserved0):
        raise refuse(invalid, Operand.RDX)
    if flags:
        raise refuse(invalid, Operand.EXEC_CONTROLS)
    if eptp != EPTP_WRITE_BACK_FOUR_LEVELS:
        raise refuse(invalid, Operand.EPTP_CONTROLS)
    values["EPTP"] = eptp | tdcs.sept.root_hpa
    values["CONFIG_FLAGS"], values["GPAW"] = flags, 0
    if tsc not in TSC_FREQUENCY_RANGE:
        raise refuse(invalid, Operand.TSC_FREQUENCY)
    values["TSC_FREQUENCY"] = tsc
    if any(reserved1):
        raise refuse(invalid, Operand.RDX)
    for name, raw in zip(("MRCONFIGID", "MROWNER", "MROWNERCONFIG"), fields[10:], strict=True):
        values[name] = struct.unpack("<6Q", raw)
    arch_capabilities, reserved2, cpuid = _TD_PARAMS_TAIL.unpack_from(params, TD_PARAMS.size)
    if msrs & ~1 or any(reserved2):
        raise refuse(invalid, Operand.RDX)
    if any(cpuid):
        raise refuse(invalid, Operand.CPUID_CONFIG)
    if arch_capabilities:
        raise refuse(invalid, Operand.IA32_ARCH_CAPABILITIES_CONFIG)
    if attributes & ATTR_MIGRATABLE and l2_vms:
        raise refuse(invalid, Operand.RDX)


def mr_finalize(call: Call) -> Steps[int]:
    """TDH.MR.FINALIZE (17, TDX module 1.5.01): close the measurement; RUNNABLE.

    In: RCX TDR, exclusive.
    Status: the prologue's; NO_VCPUS.
    Source: tdh_mr_finalize.c.
    """
    _, tdcs = yield from call.enter_td(Operand.RCX, call.registers.rcx, Mode.EXCLUSIVE, None)
    if tdcs.num_vcpus == 0:
        raise refuse(Status.TDX_NO_VCPUS)
    tdcs.fields["MRTD"] = struct.unpack("<6Q", tdcs.measurement.digest())
    tdcs.fields["SERVTD_HASH"] = servtd_hash(tdcs.binding)
    tdcs.fields["SERVTD_NUM"] = int(tdcs.binding.state is not BindingState.NOT_BOUND)
    tdcs.op_state = OpState.RUNNABLE
    return Status.TDX_SUCCESS


def vp_create(call: Call) -> Steps[int]:
    """TDH.VP.CREATE (10, TDX module 1.5.01): make a vCPU of a free page.

    In: RCX free page, which becomes the TDVPR; RDX TDR.
    Status: the prologue's; RCX page.
    Source: tdh_vp_create.c.
    """
    registers = call.registers
    tdr, _ = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.SHARED, Mode.SHARED)
    yield from call.take_new_page(registers.rcx, Operand.RCX)
    call.adopt_page(tdr, registers.rcx, PageType.TDVPR)
    call.module.tdvps[registers.rcx] = Tdvps(registers.rcx, dict(initial_values("vp")))
    return Status.TDX_SUCCESS


def vp_addcx(call: Call) -> Steps[int]:
    """TDH.VP.ADDCX (4, TDX module 1.5.01): add a TDVPS page.

    In: RCX free page; RDX TDVPR.
    Status: the prologue's; VCPU_STATE_INCORRECT; TDCX_NUM_INCORRECT; RCX page.
    Source: tdh_vp_addcx.c.
    """
    registers = call.registers
    vcpu_hpa = registers.rdx
    tdr, _, vcpu = yield from call.enter_vcpu(vcpu_hpa, Operand.RDX, Mode.EXCLUSIVE)
    if vcpu.state is not VcpuState.UNINITIALIZED:
        raise refuse(Status.TDX_VCPU_STATE_INCORRECT)
    if vcpu.pages >= MAX_TDVPS_PAGES:
        raise refuse(Status.TDX_TDCX_NUM_INCORRECT)
    yield from call.take_new_page(registers.rcx, Operand.RCX)
    call.adopt_page(tdr, registers.rcx, PageType.TDCX)
    vcpu.pages += 1
    return Status.TDX_SUCCESS


def vp_init(call: Call) -> Steps[int]:
    """TDH.VP.INIT (22, TDX module 1.5.01): set a vCPU up; READY.

    In: RCX TDVPR; RDX initial value of the guest's RCX and R8.
    Status: the prologue's; TDCX_NUM_INCORRECT; VCPU_STATE_INCORRECT; MAX_VCPUS_EXCEEDED.
    Source: tdh_vp_init.c.
    """
    registers = call.registers
    _, tdcs, vcpu = yield from call.enter_vcpu(registers.rcx, Operand.RCX, Mode.EXCLUSIVE)
    if vcpu.pages < MIN_TDVPS_PAGES:
        raise refuse(Status.TDX_TDCX_NUM_INCORRECT)
    if vcpu.state is not VcpuState.UNINITIALIZED:
        raise refuse(Status.TDX_VCPU_STATE_INCORRECT)
    max_vcpus = tdcs.fields["MAX_VCPUS"]
    if not isinstance(max_vcpus, int) or tdcs.num_vcpus >= max_vcpus:
        raise refuse(Status.TDX_MAX_VCPUS_EXCEEDED)
    index = tdcs.num_vcpus
    tdcs.num_vcpus += 1
    initialize_vcpu(tdcs, vcpu)
    vcpu.registers.update(RCX=registers.rdx, R8=registers.rdx, RBX=48, RSI=index, VCPU_INDEX=index)
    vcpu.state = VcpuState.READY
    call.associate_initial(tdcs, vcpu)
    return Status.TDX_SUCCESS


def initialize_vcpu(tdcs: Tdcs, vcpu: Tdvps) -> None:
    """Reset values of the vCPU fields that depend on the TD."""
    vcpu.registers["VCPU_XFAM"] = tdcs.fields["XFAM"]


def vp_flush(call: Call) -> Steps[int]:
    """TDH.VP.FLUSH (18, TDX module 1.5.01): flush a vCPU from this logical processor.

    In: RCX TDVPR.
    Status: RCX page; BUSY|TDR; TD_KEYS_NOT_CONFIGURED; TDCX_NUM_INCORRECT; VCPU_NOT_ASSOCIATED.
    Source: tdh_vp_flush.c.
    """
    hpa = call.registers.rcx
    yield from call.take_page(hpa, Operand.RCX, Mode.EXCLUSIVE, PageType.TDVPR)
    tdr = yield from call.take_owner(hpa)
    if tdr.lifecycle is not Lifecycle.KEYS_CONFIGURED or tdr.tdcs is None:
        raise refuse(Status.TDX_TD_KEYS_NOT_CONFIGURED)
    vcpu = call.module.tdvps[hpa]
    if vcpu.pages < MIN_TDVPS_PAGES:
        raise refuse(Status.TDX_TDCX_NUM_INCORRECT)
    if vcpu.assoc_lp != call.lp.index:
        raise refuse(Status.TDX_VCPU_NOT_ASSOCIATED)
    vcpu.tlb.clear()
    vcpu.assoc_lp = NO_LP
    tdr.tdcs.num_assoc_vcpus -= 1
    return Status.TDX_SUCCESS


def mng_vpflushdone(call: Call) -> Steps[int]:
    """TDH.MNG.VPFLUSHDONE (19, TDX module 1.5.01): block the TD, to be reclaimed.

    In: RCX TDR, exclusive.
    Status: RCX page; BUSY|KOT; LIFECYCLE_STATE_INCORRECT; FLUSHVP_NOT_DONE.
    Source: tdh_mng_vpflushdone.c.
    """
    yield from call.take_page(call.registers.rcx, Operand.RCX, Mode.EXCLUSIVE, PageType.TDR)
    yield from call.take(call.module.kot_lock, Mode.EXCLUSIVE, Operand.KOT)
    tdr = call.module.tdrs[call.registers.rcx]
    if tdr.lifecycle not in (Lifecycle.KEYS_CONFIGURED, Lifecycle.HKID_ASSIGNED):
        raise refuse(Status.TDX_LIFECYCLE_STATE_INCORRECT)
    tdcs = tdr.tdcs
    started = ANY_INITIALIZED | INTERRUPTED_START
    if tdcs is not None and tdcs.op_state in started and tdcs.num_assoc_vcpus:
        raise refuse(Status.TDX_FLUSHVP_NOT_DONE)
    tdr.lifecycle = Lifecycle.BLOCKED
    call.module.hkids[tdr.hkid] = Lifecycle.BLOCKED
    return Status.TDX_SUCCESS


def phymem_cache_wb(call: Call) -> Steps[int]:
    """TDH.PHYMEM.CACHE.WB (40, TDX module 1.5.01): write the caches of all flushed key ids back.

    In: RCX 0 or 1 (resume); it is never interrupted here.
    Status: OPERAND_INVALID|RCX; BUSY|KOT; NO_HKID_READY_TO_WBCACHE.
    Source: tdh_phymem_cache_wb.c.
    """
    if call.registers.rcx > 1:
        raise refuse(Status.TDX_OPERAND_INVALID, Operand.RCX)
    yield from call.take(call.module.kot_lock, Mode.SHARED, Operand.KOT)
    hkids = call.module.hkids
    flushed = [hkid for hkid, state in hkids.items() if state is Lifecycle.BLOCKED]
    if not flushed:
        raise refuse(Status.TDX_NO_HKID_READY_TO_WBCACHE)
    for hkid in flushed:
        hkids[hkid] = Lifecycle.TEARDOWN
    return Status.TDX_SUCCESS


def mng_key_freeid(call: Call) -> Steps[int]:
    """TDH.MNG.KEY.FREEID (20, TDX module 1.5.01): free the TD's key id.

    In: RCX TDR, exclusive.
    Status: RCX page; LIFECYCLE_STATE_INCORRECT; BUSY|KOT; WBCACHE_NOT_COMPLETE.
    Source: tdh_mng_key_freeid.c.
    """
    yield from call.take_page(call.registers.rcx, Operand.RCX, Mode.EXCLUSIVE, PageType.TDR)
    tdr = call.module.tdrs[call.registers.rcx]
    if tdr.lifecycle is not Lifecycle.BLOCKED:
        raise refuse(Status.TDX_LIFECYCLE_STATE_INCORRECT)
    yield from call.take(call.module.kot_lock, Mode.EXCLUSIVE, Operand.KOT)
    if call.module.hkids[tdr.hkid] is not Lifecycle.TEARDOWN:
        raise refuse(Status.TDX_WBCACHE_NOT_COMPLETE)
    del call.module.hkids[tdr.hkid]
    tdr.lifecycle = Lifecycle.TEARDOWN
    return Status.TDX_SUCCESS


def phymem_page_reclaim(call: Call) -> Steps[int]:
    """TDH.PHYMEM.PAGE.RECLAIM (28, TDX module 1.5.01): take a page of a TD in teardown back.

    In: RCX page; the TDR goes last.
    Out: RCX page type; RDX owner TDR; R8 page size 0.
    Status: RCX page; PAGE_METADATA_INCORRECT|RCX; LIFECYCLE_STATE_INCORRECT;
        TD_ASSOCIATED_PAGES_EXIST.
    Source: tdh_phymem_page_reclaim.c.
    """
    registers, memory, module = call.registers, call.memory, call.module
    hpa = registers.rcx
    call.check_private(hpa, Operand.RCX)
    kind = PageType(memory.page_type[hpa >> 12])
    yield from call.take_page(hpa, Operand.RCX, Mode.EXCLUSIVE, kind)
    if kind in (PageType.NDA, PageType.RSVD):
        raise refuse(Status.TDX_PAGE_METADATA_INCORRECT, Operand.RCX)
    registers.rcx, registers.rdx, registers.r8 = kind, memory.owner[hpa >> 12], 0
    if kind is PageType.TDR:
        tdr = module.tdrs[hpa]
        if tdr.lifecycle is not Lifecycle.TEARDOWN:
            raise refuse(Status.TDX_LIFECYCLE_STATE_INCORRECT)
        if tdr.child_count:
            raise refuse(Status.TDX_TD_ASSOCIATED_PAGES_EXIST)
        del module.tdrs[hpa]
    else:
        tdr = yield from call.take_owner(hpa)
        if tdr.lifecycle is not Lifecycle.TEARDOWN:
            raise refuse(Status.TDX_LIFECYCLE_STATE_INCORRECT)
        tdr.child_count -= 1
        module.tdvps.pop(hpa, None)
    memory.free(hpa)
    return Status.TDX_SUCCESS


def mig_stream_create(call: Call) -> Steps[int]:
    """TDH.MIG.STREAM.CREATE (96, TDX module 1.5.01): make a free page a migration stream context.

    In: RCX free page; RDX TDR.  The first stream is the backward one.
    Status: the prologue's; BUSY|MIG; MAX_MIGS_NUM_EXCEEDED; RCX page: OPERAND_INVALID,
        OPERAND_ADDR_RANGE_ERROR, BUSY, PAGE_METADATA_INCORRECT.
    Source: tdh_mig_stream_create.c.
    """
    registers = call.registers
    tdr, tdcs = yield from call.enter_td(Operand.RDX, registers.rdx, Mode.SHARED, Mode.EXCLUSIVE)
    yield from call.take(tdcs.mig_lock, Mode.EXCLUSIVE, Operand.MIG)
    if tdcs.num_migs >= MAX_MIGS:
        raise refuse(Status.TDX_MAX_MIGS_NUM_EXCEEDED)
    yield from call.take_new_page(registers.rcx, Operand.RCX)
    call.adopt_page(tdr, registers.rcx, PageType.TDCX)
    tdcs.links.append(MigscLink(Migsc(registers.rcx)))
    return Status.TDX_SUCCESS
