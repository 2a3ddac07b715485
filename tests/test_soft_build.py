"""Building and taking down TDs, service TD access, running: the guards of those leaves."""

import struct

import numpy as np
import pytest
from soft_pair import Pair

from tdxmig_model.backend.soft.backend import SoftBackend
from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.guest import GuestImage, Program
from tdxmig_model.backend.soft.host import Host
from tdxmig_model.backend.soft.leaves_build import (
    ATTR_DEBUG,
    ATTR_MIGRATABLE,
    ATTR_PERFMON,
    EPTP_WRITE_BACK_FOUR_LEVELS,
    TD_PARAMS,
    TD_PARAMS_SIZE,
)
from tdxmig_model.backend.soft.leaves_servtd import (
    EXPORT_COUNT,
    MIG_DEC_KEY,
    MIG_ENC_KEY,
    MIG_ENC_WORKING_KEY,
    MIG_VERSION,
)
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.op_state import GuestLeaf, Leaf
from tdxmig_model.backend.soft.sept import LOCK_BIT, SeptState
from tdxmig_model.backend.soft.servtd import break_handle, make_handle
from tdxmig_model.backend.soft.state import VcpuState
from tdxmig_model.backend.soft.status import Operand, Status, describe_status, with_operand
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.constants import PAGE_SIZE

INVALID = Status.TDX_OPERAND_INVALID
RCX, RDX, R8, R9 = Operand.RCX, Operand.RDX, Operand.R8, Operand.R9


def code(status, operand=None):
    return int(status) if operand is None else with_operand(status, operand)


@pytest.fixture(scope="module")
def host():
    return Host(memory_bytes=256 * PAGE_SIZE)


def page(host):
    return host.take_private_pages(1)[0]


def status(host, leaf, **operands):
    return host.seamcall(leaf, **operands).rax


def fresh_td(host):
    """A TD whose TDCS exists and is UNINITIALIZED."""
    return host.create_destination_td(streams=0)


PARAMS = {
    "attributes": ATTR_MIGRATABLE,
    "xfam": 3,
    "max_vcpus": 1,
    "l2_vms": 0,
    "msrs": 0,
    "reserved0": b"",
    "eptp": EPTP_WRITE_BACK_FOUR_LEVELS,
    "flags": 0,
    "tsc": 100,
    "reserved1": b"",
    "mrconfigid": b"a",
    "mrowner": b"b",
    "mrownerconfig": b"c",
}


def initialize(host, td, **changes):
    raw = TD_PARAMS.pack(*{**PARAMS, **changes}.values()).ljust(TD_PARAMS_SIZE, b"\0")
    at = 8 * PAGE_SIZE
    host.memory.bytes[at : at + TD_PARAMS_SIZE] = raw
    return status(host, Leaf.MNG_INIT, rcx=td.tdr, rdx=at)


@pytest.mark.parametrize(
    ("changes", "operand"),
    [
        ({"attributes": ATTR_MIGRATABLE | ATTR_DEBUG}, Operand.ATTRIBUTES),
        ({"attributes": ATTR_MIGRATABLE | ATTR_PERFMON}, Operand.ATTRIBUTES),
        ({"attributes": 1 << 40}, Operand.ATTRIBUTES),
        ({"xfam": 1}, Operand.XFAM),
        ({"xfam": 3 | 1 << 40}, Operand.XFAM),
        ({"max_vcpus": 0}, Operand.MAX_VCPUS),
        ({"reserved0": b"\1"}, RDX),
        ({"flags": 1}, Operand.EXEC_CONTROLS),
        ({"eptp": 0}, Operand.EPTP_CONTROLS),
        ({"tsc": 3}, Operand.TSC_FREQUENCY),
        ({"tsc": 401}, Operand.TSC_FREQUENCY),
        ({"reserved1": b"\1"}, RDX),
    ],
)
def test_td_params(host, changes, operand):
    td = fresh_td(host)
    assert initialize(host, td, **changes) == code(INVALID, operand)
    assert SoftBackend(host, td).observe()["op_state"] == "UNINITIALIZED"
    assert initialize(host, td) == Status.TDX_SUCCESS
    assert initialize(host, td) == Status.TDX_OP_STATE_INCORRECT
    host.destroy_td(td)


def test_td_params_are_a_shared_aligned_buffer(host):
    td = fresh_td(host)
    for rdx in (8, td.tdr, 1 << 51):
        assert status(host, Leaf.MNG_INIT, rcx=td.tdr, rdx=rdx) == code(INVALID, RDX)
    assert initialize(host, td, l2_vms=1) == Status.TDX_TDCS_NOT_ALLOCATED
    host.destroy_td(td)


def test_order_of_the_build(host):
    tdr = page(host)
    assert status(host, Leaf.MNG_CREATE, rcx=tdr, rdx=5) == code(INVALID, RDX)
    used = next(iter(host.module.hkids), None)
    if used is not None:
        in_use = status(host, Leaf.MNG_CREATE, rcx=tdr, rdx=used)
        assert in_use == Status.TDX_HKID_NOT_FREE
    assert status(host, Leaf.MNG_CREATE, rcx=tdr, rdx=63) == Status.TDX_SUCCESS
    again = status(host, Leaf.MNG_CREATE, rcx=tdr, rdx=62)
    assert again == code(Status.TDX_PAGE_METADATA_INCORRECT, RCX)
    more = page(host)
    add = {"rcx": more, "rdx": tdr}
    assert status(host, Leaf.MNG_ADDCX, **add) == Status.TDX_TD_KEYS_NOT_CONFIGURED
    assert status(host, Leaf.MNG_KEY_CONFIG, rcx=tdr) == Status.TDX_SUCCESS
    assert status(host, Leaf.MNG_KEY_CONFIG, rcx=tdr) == Status.TDX_LIFECYCLE_STATE_INCORRECT
    assert status(host, Leaf.MEM_TRACK, rcx=tdr) == Status.TDX_TDCS_NOT_ALLOCATED
    for _ in range(9):
        assert status(host, Leaf.MNG_ADDCX, rcx=page(host), rdx=tdr) == Status.TDX_SUCCESS
    assert status(host, Leaf.MNG_ADDCX, **add) == Status.TDX_TDCX_NUM_INCORRECT
    host.module.tdrs[tdr].fatal = True
    assert status(host, Leaf.MNG_KEY_CONFIG, rcx=tdr) == Status.TDX_TD_FATAL
    assert status(host, Leaf.MEM_TRACK, rcx=tdr) == Status.TDX_TD_FATAL


def test_no_more_control_pages_once_initialized(host):
    td = fresh_td(host)
    assert initialize(host, td) == Status.TDX_SUCCESS
    late = status(host, Leaf.MNG_ADDCX, rcx=page(host), rdx=td.tdr)
    assert late == Status.TDX_OP_STATE_INCORRECT
    assert status(host, Leaf.MR_FINALIZE, rcx=td.tdr) == Status.TDX_NO_VCPUS
    host.destroy_td(td)


def test_vcpus(host):
    td = fresh_td(host)
    assert initialize(host, td) == Status.TDX_SUCCESS
    host.ensure_vcpus(td, 2)
    first, second = td.vcpus
    bare = page(host)
    td.control_pages.append(bare)
    assert status(host, Leaf.VP_CREATE, rcx=bare, rdx=td.tdr) == Status.TDX_SUCCESS
    assert status(host, Leaf.VP_INIT, rcx=bare) == Status.TDX_TDCX_NUM_INCORRECT
    assert status(host, Leaf.VP_FLUSH, rcx=bare) == Status.TDX_TDCX_NUM_INCORRECT
    assert status(host, Leaf.VP_INIT, rcx=first) == Status.TDX_SUCCESS
    assert status(host, Leaf.VP_INIT, rcx=first) == Status.TDX_VCPU_STATE_INCORRECT
    assert status(host, Leaf.VP_INIT, rcx=second) == Status.TDX_MAX_VCPUS_EXCEEDED
    added = status(host, Leaf.VP_ADDCX, rcx=page(host), rdx=first)
    assert added == Status.TDX_VCPU_STATE_INCORRECT
    host.module.tdvps[second].pages = 15
    added = status(host, Leaf.VP_ADDCX, rcx=page(host), rdx=second)
    assert added == Status.TDX_TDCX_NUM_INCORRECT
    host.module.tdvps[second].pages = 6
    assert status(host, Leaf.MNG_VPFLUSHDONE, rcx=td.tdr) == Status.TDX_FLUSHVP_NOT_DONE
    elsewhere = host.seamcall(Leaf.VP_FLUSH, lp=2, rcx=first).rax
    assert elsewhere == Status.TDX_VCPU_NOT_ASSOCIATED
    host.destroy_td(td)


def test_order_of_the_teardown(host):
    td = host.create_td(2, guest="idle", streams=0)
    mapped = td.page_hpas[0]
    wrong = Status.TDX_LIFECYCLE_STATE_INCORRECT
    for leaf, rcx in (
        (Leaf.MNG_KEY_FREEID, td.tdr),
        (Leaf.PHYMEM_PAGE_RECLAIM, mapped),
        (Leaf.PHYMEM_PAGE_RECLAIM, td.tdr),
    ):
        assert status(host, leaf, rcx=rcx) == wrong
    nothing = status(host, Leaf.PHYMEM_CACHE_WB)
    assert nothing == Status.TDX_NO_HKID_READY_TO_WBCACHE
    assert status(host, Leaf.PHYMEM_CACHE_WB, rcx=2) == code(INVALID, RCX)
    host.require(Leaf.VP_FLUSH, rcx=td.vcpus[0])
    host.require(Leaf.MNG_VPFLUSHDONE, rcx=td.tdr)
    assert status(host, Leaf.MNG_VPFLUSHDONE, rcx=td.tdr) == wrong
    assert status(host, Leaf.VP_FLUSH, rcx=td.vcpus[0]) == Status.TDX_TD_KEYS_NOT_CONFIGURED
    assert status(host, Leaf.MNG_KEY_FREEID, rcx=td.tdr) == Status.TDX_WBCACHE_NOT_COMPLETE
    host.require(Leaf.PHYMEM_CACHE_WB)
    host.require(Leaf.MNG_KEY_FREEID, rcx=td.tdr)
    last = status(host, Leaf.PHYMEM_PAGE_RECLAIM, rcx=td.tdr)
    assert last == Status.TDX_TD_ASSOCIATED_PAGES_EXIST
    host.require(Leaf.PHYMEM_PAGE_RECLAIM, rcx=mapped)
    assert not any(host.memory.page(mapped))
    free = status(host, Leaf.PHYMEM_PAGE_RECLAIM, rcx=mapped)
    assert free == code(Status.TDX_PAGE_METADATA_INCORRECT, RCX)


def test_memory_leaves(host):
    td = host.create_td(3, guest="idle", streams=0)
    tdr, new = td.tdr, page(host)
    add = {"rdx": tdr, "r8": new}
    cases = [
        (Leaf.MEM_SEPT_ADD, {"rcx": 0, **add}, code(INVALID, RCX)),
        (Leaf.MEM_SEPT_ADD, {"rcx": PAGE_SIZE | 1, **add}, code(INVALID, RCX)),
        (Leaf.MEM_SEPT_ADD, {"rcx": 1 << 47 | 1, **add}, code(INVALID, RCX)),
        (Leaf.MEM_SEPT_ADD, {"rcx": 1, **add}, code(Status.TDX_EPT_ENTRY_STATE_INCORRECT, RCX)),
        (Leaf.MEM_SEPT_ADD, {"rcx": 1 << 45 | 1, **add}, code(Status.TDX_EPT_WALK_FAILED, RCX)),
        (Leaf.MEM_PAGE_AUG, {"rcx": 1, **add}, code(INVALID, RCX)),
        (Leaf.MEM_PAGE_AUG, {"rcx": 0, **add}, code(Status.TDX_EPT_ENTRY_STATE_INCORRECT, RCX)),
        (Leaf.MEM_PAGE_AUG, {"rcx": 1 << 45, **add}, code(Status.TDX_EPT_WALK_FAILED, RCX)),
        (Leaf.MEM_PAGE_ADD, {"rcx": 8 * PAGE_SIZE, **add}, code(Status.TDX_OP_STATE_INCORRECT)),
        (
            Leaf.MEM_RANGE_BLOCK,
            {"rcx": 9 * PAGE_SIZE, "rdx": tdr},
            code(Status.TDX_EPT_ENTRY_STATE_INCORRECT, RCX),
        ),
        (
            Leaf.MEM_RANGE_UNBLOCK,
            {"rcx": 0, "rdx": tdr},
            code(Status.TDX_EPT_ENTRY_STATE_INCORRECT, RCX),
        ),
    ]
    for leaf, operands, expected in cases:
        seen = status(host, leaf, **operands)
        assert seen == expected, (leaf.name, operands, describe_status(seen))
    host.require(Leaf.MEM_RANGE_BLOCK, rcx=0, rdx=tdr)
    again = status(host, Leaf.MEM_RANGE_BLOCK, rcx=0, rdx=tdr)
    assert again & ~0xFFFF_FFFF == Status.TDX_GPA_RANGE_ALREADY_BLOCKED
    early = status(host, Leaf.MEM_RANGE_UNBLOCK, rcx=0, rdx=tdr)
    assert early == code(Status.TDX_TLB_TRACKING_NOT_DONE, Operand.SEPT_TREE)
    blocked = SoftBackend(host, td).execute(c.VpEnter(0, 5)).exit
    assert (blocked.reason, blocked.gpa, blocked.instructions) == ("ept_violation", 0, 0)
    host.require(Leaf.MEM_TRACK, rcx=tdr)
    assert host.memory.try_lock(td.page_hpas[0], Mode.SHARED)
    held = status(host, Leaf.MEM_PAGE_REMOVE, rcx=0, rdx=tdr)
    assert held == code(Status.TDX_OPERAND_BUSY, RCX)
    host.memory.unlock(td.page_hpas[0], Mode.SHARED)
    host.memory.words[host.module.tdrs[tdr].tdcs.sept.slot(PAGE_SIZE)] |= LOCK_BIT
    busy = status(host, Leaf.MEM_PAGE_REMOVE, rcx=PAGE_SIZE, rdx=tdr)
    assert busy == code(Status.TDX_OPERAND_BUSY, RCX)
    host.destroy_td(td)


def test_streams_have_an_end(host):
    td = host.create_td(2, guest="idle", streams=2)
    links = host.module.tdrs[td.tdr].tdcs.links
    assert len(links) == 3
    create = {"rcx": page(host), "rdx": td.tdr}
    taken = status(host, Leaf.MIG_STREAM_CREATE, rcx=td.tdr, rdx=td.tdr)
    assert taken == code(Status.TDX_OPERAND_BUSY, RCX)
    links += [links[0]] * (512 - len(links))
    assert status(host, Leaf.MIG_STREAM_CREATE, **create) == Status.TDX_MAX_MIGS_NUM_EXCEEDED
    host.destroy_td(td)


def test_page_add_reads_a_page_of_the_vmm(host):
    td = fresh_td(host)
    assert initialize(host, td) == Status.TDX_SUCCESS
    host.add_tables(td, np.array([0], dtype=np.uint64))
    new = page(host)
    add = {"rcx": 0, "rdx": td.tdr, "r8": new}
    for source in (8, td.tdr, 1 << 51):
        assert status(host, Leaf.MEM_PAGE_ADD, r9=source, **add) == code(INVALID, R9)
    taken = code(Status.TDX_PAGE_METADATA_INCORRECT, R8)
    assert status(host, Leaf.MEM_PAGE_ADD, **{**add, "r8": td.tdr}, r9=4096) in (
        taken,
        code(Status.TDX_OPERAND_BUSY, R8),
    )
    host.require(Leaf.MEM_PAGE_ADD, r9=4096, **add)
    td.page_hpas[0] = new
    states = SoftBackend(host, td).page_states(np.array([0], np.uint64))
    assert states.tolist() == [SeptState.MAPPED]
    host.destroy_td(td)


def test_the_measurement_depends_on_what_was_added():
    hashes = []
    for pages in (2, 2, 3):
        host = Host(memory_bytes=16 * PAGE_SIZE)
        td = host.create_td(pages, guest="idle", streams=0, bind=False)
        hashes.append(host.module.tdrs[td.tdr].tdcs.fields["MRTD"])
    assert hashes[0] == hashes[1] != hashes[2]


# --- running -------------------------------------------------------------------------------------


def test_entering_a_vcpu(host):
    td = host.create_td(2, guest="idle", streams=0)
    backend = SoftBackend(host, td)
    assert backend.execute(c.VpEnter(0, 2)).exit == c.VcpuExit("halt", None, 2)
    vcpu = host.module.tdvps[td.vcpus[0]]
    vcpu.pages = 5
    assert backend.execute(c.VpEnter(0, 1)).status == Status.TDX_TDCX_NUM_INCORRECT
    vcpu.pages = 6
    vcpu.state = VcpuState.DISABLED
    assert backend.execute(c.VpEnter(0, 1)).status == Status.TDX_VCPU_STATE_INCORRECT
    vcpu.state = VcpuState.READY
    away = host.seamcall(Leaf.VP_ENTER, lp=1, rcx=td.vcpus[0]).rax
    assert away == Status.TDX_VCPU_ASSOCIATED
    host.destroy_td(td)


def test_a_guest_without_an_image_halts():
    pair = Pair(2, guest=GuestImage(Program.HOT_SET, PAGE_SIZE, 0))
    assert pair.on_source(c.VpEnter(0, 9)).exit == c.VcpuExit("halt", None, 2)


def test_a_guest_that_leaves_its_memory_exits():
    for first in (1 << 46, 1 << 47):
        pair = Pair(2, guest=GuestImage(Program.SEQUENTIAL, first, 4))
        assert pair.on_source(c.VpEnter(0, 9)).exit == c.VcpuExit("ept_violation", first, 1)


def test_accepting_waits_for_the_lock_of_the_entry():
    pair = Pair(3, pending_pages=1, guest=GuestImage(Program.SEQUENTIAL, 2 * PAGE_SIZE, 1))
    words, sept = pair.source_host.memory.words, pair.source._tdcs.sept
    slot = sept.slot(2 * PAGE_SIZE)
    words[slot] |= LOCK_BIT
    module = pair.source_host.module
    module.processors[0].timer = 18
    registers = Registers(rcx=pair.source.td.vcpus[0])
    steps = module.start(Leaf.VP_ENTER, registers)
    for _ in range(4 + 16):
        next(steps)
    # Fifteen instructions' time: one was done, the second was tried fourteen times.
    assert module.processors[0].retired == 1
    words[slot] &= ~LOCK_BIT
    for _ in steps:
        pass
    assert module.processors[0].retired == 4
    assert pair.source.page_states(pair.gpas)[2] == SeptState.MAPPED


def test_the_timer_ends_a_guest_that_waits_for_an_entry():
    """Straight through, nobody unlocks the entry: the vCPU comes back all the same."""
    pair = Pair(3, pending_pages=1, guest=GuestImage(Program.SEQUENTIAL, 2 * PAGE_SIZE, 1))
    pair.source_host.memory.words[pair.source._tdcs.sept.slot(2 * PAGE_SIZE)] |= LOCK_BIT
    assert pair.on_source(c.VpEnter(0, 9)).exit == c.VcpuExit("budget", None, 1)


# --- service TD ----------------------------------------------------------------------------------


def access(pair, leaf, field, *, value=0, mask=(1 << 64) - 1, **changes):
    """TDG.SERVTD.RD or WR of the Migration TD with single operands changed."""
    host, td = pair.source_host, pair.source.td
    r10, r11, r12, r13 = td.uuid
    operands = {"rcx": td.binding_handle, "r10": r10, "r11": r11, "r12": r12, "r13": r13}
    registers = Registers(rdx=field, r8=value, r9=mask, **{**operands, **changes})
    host.module.tdcall(leaf, registers, host._migration_td.vcpus[0])
    return registers


READ, WRITE = GuestLeaf.SERVTD_RD, GuestLeaf.SERVTD_WR


def test_fields_of_a_migration_td():
    pair = Pair(2, profile="tdx-1.5.01")
    tdcs = pair.source._tdcs
    assert access(pair, READ, EXPORT_COUNT).r8 == 0
    first = access(pair, READ, MIG_ENC_KEY).r8
    rest = [access(pair, READ, MIG_ENC_KEY + element).r8 for element in (1, 2, 3)]
    assert struct.pack("<4Q", first, *rest) == tdcs.mig_enc_key
    assert access(pair, READ, MIG_ENC_KEY).r8 != first
    tdcs.mig_dec_key_set = False
    access(pair, WRITE, MIG_DEC_KEY + 2, value=0xABCD, mask=0xFF)
    assert tdcs.mig_dec_key_set
    assert tdcs.mig_dec_key[16] == 0xCD
    assert access(pair, WRITE, MIG_VERSION).rax == Status.TDX_SUCCESS
    unwritable = access(pair, WRITE, MIG_ENC_WORKING_KEY).rax
    assert unwritable == Status.TDX_METADATA_FIELD_NOT_WRITABLE
    unknown = access(pair, READ, 0x1234).rax
    assert unknown == Status.TDX_METADATA_FIELD_ID_INCORRECT


def test_who_may_access_a_td():
    pair = Pair(2)
    binding = pair.source._tdcs.binding
    handle = pair.source.td.binding_handle
    assert access(pair, READ, EXPORT_COUNT, rcx=handle + 1).rax == code(INVALID, RCX)
    assert access(pair, READ, EXPORT_COUNT, r10=1).rax == Status.TDX_TARGET_UUID_MISMATCH
    uuid, info_hash = binding.uuid, binding.info_hash
    binding.uuid = (1, 2, 3, 4)
    assert access(pair, READ, EXPORT_COUNT).rax == Status.TDX_SERVTD_UUID_MISMATCH
    binding.uuid, binding.info_hash = uuid, bytes(48)
    assert access(pair, READ, EXPORT_COUNT).rax == Status.TDX_SERVTD_INFO_HASH_MISMATCH
    binding.info_hash, state = info_hash, binding.state
    binding.state = type(state)(1)
    assert access(pair, READ, EXPORT_COUNT).rax == Status.TDX_SERVTD_NOT_BOUND
    binding.state = state
    host = pair.source_host
    host.module.tdvps[host._migration_td.vcpus[0]].state = VcpuState.DISABLED
    assert access(pair, READ, EXPORT_COUNT).rax == Status.TDX_VCPU_STATE_INCORRECT


def test_handles():
    uuid = ((1 << 64) - 5, 0, 0, 0)
    assert break_handle(make_handle(uuid, 0x1234000, 0), uuid) == (0x1234000, 0)


def test_binding(host):
    td = host.create_td(2, guest="idle", streams=0)
    service = host._migration_td.tdr
    bind = {"rcx": td.tdr, "rdx": service}
    assert status(host, Leaf.SERVTD_BIND, **bind) == Status.TDX_SUCCESS
    for changes, expected in (
        ({"rdx": td.tdr}, code(INVALID, RDX)),
        ({"r8": 1}, code(INVALID, R8)),
        ({"r9": 1}, code(INVALID, R9)),
        ({"r10": 1 << 60}, code(INVALID, Operand.R10)),
        ({"r10": 1}, code(Status.TDX_SERVTD_ATTR_MISMATCH)),
    ):
        assert status(host, Leaf.SERVTD_BIND, **{**bind, **changes}) == expected
    tdcs = host.module.tdrs[td.tdr].tdcs
    tdcs.binding.info_hash = bytes(48)
    assert status(host, Leaf.SERVTD_BIND, **bind) == Status.TDX_SERVTD_INFO_HASH_MISMATCH
    tdcs.binding.servtd_type = 3
    assert status(host, Leaf.SERVTD_BIND, **bind) == Status.TDX_SERVTD_TYPE_MISMATCH
    host.destroy_td(td)


def test_a_running_td_is_not_bound_for_the_first_time(host):
    td = host.create_td(2, guest="idle", streams=0, bind=False)
    bind = {"rcx": td.tdr, "rdx": host._migration_td.tdr}
    assert status(host, Leaf.SERVTD_BIND, **bind) == Status.TDX_OP_STATE_INCORRECT
    host.destroy_td(td)


def test_instance_binding_follows_one_service_td(host):
    td = fresh_td(host)
    tdcs = host.module.tdrs[td.tdr].tdcs
    tdcs.binding.attributes = 1
    bind = {"rcx": td.tdr, "rdx": host._migration_td.tdr, "r10": 1}
    tdcs.binding.info_hash = bytes(48)
    assert status(host, Leaf.SERVTD_BIND, **bind) == Status.TDX_SUCCESS
    tdcs.binding.uuid = (9, 9, 9, 9)
    assert status(host, Leaf.SERVTD_BIND, **bind) == Status.TDX_SERVTD_UUID_MISMATCH
    host.destroy_td(td)


def test_prebinding(host):
    td = fresh_td(host)
    tdcs = host.module.tdrs[td.tdr].tdcs
    at = 9 * PAGE_SIZE
    prebind = {"rcx": td.tdr, "rdx": at}
    assert status(host, Leaf.SERVTD_PREBIND, **prebind) == Status.TDX_SERVTD_BOUND
    tdcs.binding.state = type(tdcs.binding.state)(0)
    assert status(host, Leaf.SERVTD_PREBIND, rcx=td.tdr, rdx=at + 1) == code(INVALID, RDX)
    host.memory.bytes[at : at + 48] = tdcs.binding.info_hash
    assert status(host, Leaf.SERVTD_PREBIND, **prebind) == Status.TDX_SUCCESS
    bind = {"rcx": td.tdr, "rdx": host._migration_td.tdr}
    assert status(host, Leaf.SERVTD_BIND, **bind) == Status.TDX_SUCCESS
    host.destroy_td(td)
