"""Does the software module refuse what would break a migration, with the published status?"""

from dataclasses import replace

import numpy as np
import pytest
from soft_pair import CANCEL, MIGRATE, Pair, flip, tampered

from tdxmig_model.backend.soft.call import NO_PAGE, STREAM_COMMAND_BIT
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.sept import LOCK_BIT, SeptState
from tdxmig_model.backend.soft.status import (
    FATAL_BIT,
    Operand,
    Status,
    describe_status,
    with_operand,
)
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import GpaStatus, build_entries


@pytest.fixture
def pair():
    return Pair(8)


def refused(pair, backend, command, status, *, fatal=False, operand=None):
    """The command ends with exactly this status; nothing that one can see moves unless fatal."""
    before = backend.observe()
    digest = backend.memory_digest()
    result = backend.execute(command)
    code = int(status) if operand is None else with_operand(status, operand)
    expected = code | FATAL_BIT if fatal else code
    assert result.status == expected, describe_status(result.status)
    assert backend.memory_digest() == digest
    if fatal:
        assert pair.state(backend) == "FAILED_IMPORT"
    else:
        assert backend.observe() == before
    return result


def to_start(pair):
    """Everything in order is done on both sides, except for the start token."""
    pair.start()
    pair.pause()
    pair.move(pair.gpas)
    pair.states()


# --- who may run -------------------------------------------------------------------------------


def test_a_paused_source_cannot_run(pair):
    pair.start()
    assert pair.source.execute(c.VpEnter(0, 1)).ok
    pair.pause()
    wrong = Status.TDX_OP_STATE_INCORRECT
    refused(pair, pair.source, c.VpEnter(0, 1), wrong)
    pair.move(pair.gpas)
    pair.states()
    refused(pair, pair.destination, c.VpEnter(0, 1), wrong)
    pair.start_token()
    refused(pair, pair.source, c.VpEnter(0, 1), wrong)
    refused(pair, pair.destination, c.VpEnter(0, 1), wrong)
    pair.on_destination(c.ImportCommit())
    refused(pair, pair.source, c.VpEnter(0, 1), wrong)
    assert pair.destination.execute(c.VpEnter(0, 1)).ok


def test_a_committed_destination_cannot_be_aborted(pair):
    to_start(pair)
    pair.start_token()
    pair.on_destination(c.ImportCommit())
    refused(pair, pair.destination, c.ImportAbort(), Status.TDX_OP_STATE_INCORRECT)
    pair.on_destination(c.ImportEnd())
    refused(pair, pair.destination, c.ImportAbort(), Status.TDX_OP_STATE_INCORRECT)


def test_after_the_start_token_only_an_abort_token_brings_the_source_back(pair):
    to_start(pair)
    pair.start_token()
    no_token = Status.TDX_OPERAND_INVALID
    refused(pair, pair.source, c.ExportAbort(None), no_token, operand=Operand.R8)
    token = pair.on_destination(c.ImportAbort()).bundle.mbmd
    forged = replace(token, mac=flip(token.mac)).pack()
    refused(pair, pair.source, c.ExportAbort(forged), Status.TDX_INCORRECT_MBMD_MAC)
    other = replace(token, mig_version=1).pack()
    refused(pair, pair.source, c.ExportAbort(other), Status.TDX_INVALID_MBMD)
    pair.on_source(c.ExportAbort(token.pack()))
    assert pair.state(pair.source) == "RUNNABLE"


def test_an_abort_token_of_another_session_is_refused(pair):
    pair.start()
    old = pair.on_destination(c.ImportAbort()).bundle.mbmd.pack()
    pair.on_source(c.ExportAbort(None))
    pair.new_destination()
    pair.exchange_keys()
    to_start(pair)
    pair.start_token()
    refused(pair, pair.source, c.ExportAbort(old), Status.TDX_INCORRECT_MBMD_MAC)
    pair.abort_with_token()


def test_before_the_start_token_an_abort_takes_no_token(pair):
    pair.start()
    token = pair.on_destination(c.ImportAbort()).bundle.mbmd.pack()
    status, operand = Status.TDX_OPERAND_INVALID, Operand.R8
    refused(pair, pair.source, c.ExportAbort(token), status, operand=operand)


def test_import_abort_can_be_repeated_and_leads_nowhere_else(pair):
    pair.start()
    result = pair.on_destination(c.ImportAbort())
    assert result.status == FATAL_BIT
    again = pair.on_destination(c.ImportAbort())
    assert again.bundle.mbmd.iv_counter == result.bundle.mbmd.iv_counter + 1
    for command in (c.ImportCommit(), c.ImportEnd(), c.VpEnter(0, 1)):
        refused(pair, pair.destination, command, Status.TDX_OP_STATE_INCORRECT)


# --- the start token ---------------------------------------------------------------------------


def test_no_start_token_while_dirty_pages_remain(pair):
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    page = pair.run(0, 10)
    assert page is not None
    refused(pair, pair.source, c.ExportTrack(True), Status.TDX_OP_STATE_INCORRECT)
    pair.pause()
    refused(pair, pair.source, c.ExportTrack(True), Status.TDX_EXPORTED_DIRTY_PAGES_REMAIN)
    pair.epoch()
    pair.move([page])
    pair.states()
    pair.start_token()


def test_the_start_token_needs_all_vcpus():
    pair = Pair(6, vcpus=2)
    pair.start()
    pair.pause()
    pair.move(pair.gpas)
    pair.on_destination(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))
    pair.on_destination(c.ImportStateVp(pair.on_source(c.ExportStateVp(0)).bundle, 0))
    token = pair.on_source(c.ExportTrack(True)).bundle
    status = Status.TDX_SOME_VCPUS_NOT_MIGRATED
    refused(pair, pair.destination, c.ImportTrack(token), status, fatal=True)


def test_a_token_with_a_bundle_missing_is_fatal(pair):
    pair.start()
    pair.pause()
    pair.export(pair.gpas)
    token = pair.on_source(c.ExportTrack()).bundle
    invalid = Status.TDX_INVALID_MBMD
    refused(pair, pair.destination, c.ImportTrack(token), invalid, fatal=True)


def test_a_forged_token_is_fatal(pair):
    pair.start()
    token = pair.on_source(c.ExportTrack()).bundle
    forged = tampered(token, mbmd=replace(token.mbmd, mac=flip(token.mbmd.mac)))
    wrong = Status.TDX_INCORRECT_MBMD_MAC
    refused(pair, pair.destination, c.ImportTrack(forged), wrong, fatal=True)


def test_an_epoch_cannot_be_imported_twice(pair):
    pair.start()
    token = pair.on_source(c.ExportTrack()).bundle
    pair.on_destination(c.ImportTrack(token))
    invalid = Status.TDX_INVALID_MBMD
    refused(pair, pair.destination, c.ImportTrack(token), invalid, fatal=True)


# --- state bundles -----------------------------------------------------------------------------


def test_a_changed_page_of_immutable_state_is_fatal(pair):
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    pages = [bytes(page) for page in bundle.pages]
    pages[1] = flip(pages[1], 100)
    wrong = Status.TDX_INCORRECT_MBMD_MAC
    command = c.ImportStateImmutable(tampered(bundle, pages=pages))
    refused(pair, pair.destination, command, wrong, fatal=True)


def test_a_wrong_key_is_fatal(pair):
    pair.destination.write_migration_decryption_key(bytes(range(32)))
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    wrong = Status.TDX_INCORRECT_MBMD_MAC
    refused(pair, pair.destination, c.ImportStateImmutable(bundle), wrong, fatal=True)


def test_keys_are_used_for_one_session(pair):
    pair.start()
    pair.on_source(c.ExportAbort(None))
    not_set = Status.TDX_MIGRATION_DECRYPTION_KEY_NOT_SET
    refused(pair, pair.source, c.ExportStateImmutable(), not_set)


def test_keys_cannot_be_changed_in_the_blackout(pair):
    pair.start()
    pair.source.write_migration_decryption_key(bytes(32))
    pair.pause()
    with pytest.raises(Exception, match="TDX_OP_STATE_INCORRECT"):
        pair.source.write_migration_decryption_key(bytes(32))


def test_only_version_zero_exists(pair):
    pair.source.write_migration_version(0)
    with pytest.raises(Exception, match="TDX_METADATA_FIELD_VALUE_NOT_VALID"):
        pair.source.write_migration_version(1)


def test_a_td_that_is_not_migratable_stays(pair):
    td = pair.source_host.create_td(4, migratable=False, guest="idle")
    host, buffers = pair.source_host, pair.source_host.stream_buffers(0)
    registers = host.seamcall(
        Leaf.EXPORT_STATE_IMMUTABLE, rcx=td.tdr, r8=buffers.mbmd_register, r9=buffers.page_list(9)
    )
    assert registers.rax == Status.TDX_TD_NOT_MIGRATABLE


def test_more_streams_than_the_destination_has_is_fatal():
    pair = Pair(4, streams=3)
    pair.new_destination(streams=2)
    pair.exchange_keys()
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    status = Status.TDX_NUM_MIGS_HIGHER_THAN_CREATED
    refused(pair, pair.destination, c.ImportStateImmutable(bundle), status, fatal=True)


def test_each_vcpu_is_exported_once(pair):
    to_start(pair)
    refused(pair, pair.source, c.ExportStateVp(0), Status.TDX_VCPU_ALREADY_EXPORTED)


def test_vcpu_state_waits_for_td_state(pair):
    pair.start()
    pair.pause()
    bundle = pair.on_source(c.ExportStateVp(0)).bundle
    refused(pair, pair.destination, c.ImportStateVp(bundle, 0), Status.TDX_OP_STATE_INCORRECT)


# --- memory bundles: source ----------------------------------------------------------------------


def export_statuses(pair, gpas, operation=MIGRATE):
    command = c.ExportMem(0, np.asarray(gpas, dtype=np.uint64), operation)
    return pair.on_source(command).statuses.tolist()


def test_live_export_needs_write_blocking_and_tracking(pair):
    pair.start()
    page = [PAGE_SIZE]
    assert export_statuses(pair, page) == [GpaStatus.SEPT_ENTRY_STATE_INCORRECT]
    pair.on_source(c.ExportBlockw(np.array(page, dtype=np.uint64)))
    assert export_statuses(pair, page) == [GpaStatus.TLB_TRACKING_NOT_DONE]
    pair.on_source(c.MemTrack())
    assert export_statuses(pair, page) == [GpaStatus.SUCCESS]
    assert export_statuses(pair, page) == [GpaStatus.SEPT_ENTRY_STATE_INCORRECT]
    pair.assert_counts()


def test_cancel_needs_an_exported_page_and_the_in_order_phase(pair):
    pair.start()
    pair.block(pair.gpas)
    first = [int(pair.gpas[0])]
    assert export_statuses(pair, first, CANCEL) == [GpaStatus.SEPT_ENTRY_STATE_INCORRECT]
    pair.pause()
    pair.export(pair.gpas)
    pair.on_source(c.ExportTrack(True))
    assert export_statuses(pair, first, CANCEL) == [GpaStatus.OP_STATE_INCORRECT]
    assert export_statuses(pair, first) == [GpaStatus.SUCCESS]
    pair.assert_counts()


def test_a_page_that_is_not_there_is_only_its_own_problem(pair):
    pair.start()
    pair.pause()
    gpas = [0, 1 << 30, PAGE_SIZE]
    command = c.ExportMem(0, np.array(gpas, dtype=np.uint64), MIGRATE)
    result = pair.on_source(command)
    assert result.statuses.tolist() == [0, GpaStatus.SEPT_WALK_FAILED, 0]
    assert result.status == 1
    imported = pair.on_destination(c.ImportMem(0, result.bundle))
    assert imported.statuses.tolist() == [0, GpaStatus.SKIPPED, 0]


def test_a_locked_secure_ept_entry_is_busy(pair):
    pair.start()
    sept = pair.source._tdcs.sept
    pair.source_host.memory.words[sept.slot(PAGE_SIZE)] |= LOCK_BIT
    blocked = pair.on_source(c.ExportBlockw(np.array([PAGE_SIZE], dtype=np.uint64)))
    assert blocked.statuses.tolist() == [GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY]
    busy = with_operand(Status.TDX_OPERAND_BUSY, Operand.RCX)
    assert pair.source.execute(c.ExportUnblockw(PAGE_SIZE)).status == busy


def test_unblocking_what_is_not_blocked(pair):
    wrong = Status.TDX_EPT_ENTRY_STATE_INCORRECT
    refused(pair, pair.source, c.ExportUnblockw(0), wrong, operand=Operand.RCX)
    missing = Status.TDX_EPT_WALK_FAILED
    refused(pair, pair.source, c.ExportUnblockw(1 << 30), missing, operand=Operand.RCX)


def raw_export(pair, entries, **changes):
    """EXPORT.MEM by registers, with single operands changed."""
    buffers = pair.source_host.stream_buffers(0)
    operands = {
        "rcx": buffers.gpa_list(np.asarray(entries, dtype=np.uint64)),
        "rdx": pair.source.td.tdr,
        "r8": buffers.mbmd_register,
        "r9": buffers.list,
        "r10": 0,
        "r11": buffers.macs_low,
        "r12": buffers.macs_high,
    }
    buffers.offer_buffers(len(entries))
    operands.update(changes)
    return pair.source_host.seamcall(Leaf.EXPORT_MEM, **operands)


@pytest.mark.parametrize(
    ("changes", "operand"),
    [
        ({"rcx": 1}, Operand.RCX),
        ({"rdx": 0x123}, Operand.RDX),
        ({"r8": 4096}, Operand.R8),
        ({"r8": 48 << 52 | 4096 + 64}, Operand.R8),
        ({"r9": 1}, Operand.R9),
        ({"r9": 1 << 51}, Operand.R9),
        ({"r10": 1}, Operand.R10),
        ({"r10": 1 << 16}, Operand.R10),
        ({"r11": 5}, Operand.R11),
    ],
)
def test_operands_of_a_memory_leaf(pair, changes, operand):
    pair.start()
    pair.pause()
    registers = raw_export(pair, build_entries(pair.gpas), **changes)
    assert registers.rax == with_operand(Status.TDX_OPERAND_INVALID, operand)
    assert pair.source.observe()["mig_count"] == 0


def test_a_private_page_is_no_buffer_for_the_vmm(pair):
    """A VMM list or buffer in a page that a TD owns is refused, so no plaintext gets out."""
    pair.start()
    pair.pause()
    private = pair.source.td.page_hpas[0]
    registers = raw_export(pair, build_entries(pair.gpas), r9=private)
    assert registers.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.R9)


@pytest.mark.parametrize("profile", ["hardened", "tdx-1.5.01"])
def test_malformed_entry_in_mid_list(profile):
    """1.5.01 ends the call after entry 0 was committed; hardened makes it that entry's problem."""
    pair = Pair(4, profile=profile)
    pair.start()
    pair.pause()
    entries = build_entries(pair.gpas)
    entries[1] |= np.uint64(1 << 54)
    registers = raw_export(pair, entries)
    seen = pair.source.observe()
    if profile == "hardened":
        assert registers.rax == 1
        assert (seen["mig_count"], seen["total_mb_count"], seen["next_mb_counter"]) == (3, 2, [2])
    else:
        blamed = with_operand(Status.TDX_OPERAND_INVALID, Operand.GPA_LIST_ENTRY)
        assert registers.rax == blamed
        assert (seen["mig_count"], seen["total_mb_count"], seen["next_mb_counter"]) == (1, 1, [1])
    pair.assert_counts()


@pytest.mark.parametrize("profile", ["hardened", "tdx-1.5.01"])
def test_unusable_migration_buffer_in_mid_list(profile):
    pair = Pair(4, profile=profile)
    pair.start()
    pair.pause()
    buffers = pair.source_host.stream_buffers(0)
    rcx = buffers.gpa_list(build_entries(pair.gpas))
    buffers.offer_buffers(4)
    pair.source_host.memory.page_words(buffers.list)[2] = 1 << 50
    registers = pair.source_host.seamcall(
        Leaf.EXPORT_MEM,
        rcx=rcx,
        rdx=pair.source.td.tdr,
        r8=buffers.mbmd_register,
        r9=buffers.list,
        r11=buffers.macs_low,
    )
    states = pair.source.page_states(pair.gpas).tolist()
    if profile == "hardened":
        assert registers.rax == 1
        assert states[2] == SeptState.MAPPED
        assert pair.source.observe()["mig_count"] == 3
    else:
        blamed = with_operand(Status.TDX_OPERAND_INVALID, Operand.MIG_BUFF_LIST_ENTRY)
        assert registers.rax == blamed
        # Entry 2 is committed although nothing of it was encrypted.
        assert states[2] == SeptState.EXPORTED_BLOCKEDW
        assert pair.source.observe()["mig_count"] == 3
    pair.assert_counts()


# --- memory bundles: destination -----------------------------------------------------------------


def test_wrong_page_mac_in_order_is_fatal(pair):
    pair.start()
    pair.pause()
    bundle = pair.export(pair.gpas)
    command = c.ImportMem(0, tampered(bundle, macs=flip(bundle.macs, 16 * 3)))
    result = pair.destination.execute(command)
    blamed = with_operand(Status.TDX_INVALID_PAGE_MAC, Operand.GPA_LIST_ENTRY)
    assert result.status == blamed | FATAL_BIT
    assert result.statuses.tolist()[:4] == [0, 0, 0, GpaStatus.INVALID_PAGE_MAC]
    assert pair.state(pair.destination) == "FAILED_IMPORT"
    pair.on_destination(c.ImportAbort())
    pair.destination.close()


@pytest.mark.parametrize("what", ["page", "entry", "swap"])
def test_nothing_of_an_entry_can_be_changed(pair, what):
    pair.start()
    pair.pause()
    bundle = pair.export(pair.gpas)
    pages = [bytes(page) for page in bundle.pages]
    changes = {
        "page": {"pages": [flip(pages[0], 4095), *pages[1:]]},
        "entry": {"gpa_list": flip(bundle.gpa_list, 8 * 2 + 1)},
        "swap": {
            "pages": [pages[1], pages[0], *pages[2:]],
            "macs": bundle.macs[16:32] + bundle.macs[:16] + bundle.macs[32:],
        },
    }[what]
    result = pair.destination.execute(c.ImportMem(0, tampered(bundle, **changes)))
    assert result.status & FATAL_BIT
    assert pair.state(pair.destination) == "FAILED_IMPORT"


def test_a_wrong_mbmd_of_memory_can_be_retried(pair):
    pair.start()
    pair.pause()
    bundle = pair.export(pair.gpas)
    mbmd = bundle.mbmd
    # The stream is started and IV_COUNTER taken before the MAC is known, so it is let move here.
    for forged, status in (
        (replace(mbmd, mac=flip(mbmd.mac)), Status.TDX_INCORRECT_MBMD_MAC),
        (replace(mbmd, mb_counter=5), Status.TDX_INVALID_MBMD),
        (replace(mbmd, mig_epoch=1), Status.TDX_INVALID_MBMD),
    ):
        result = pair.destination.execute(c.ImportMem(0, tampered(bundle, mbmd=forged)))
        assert result.status == status
        assert pair.state(pair.destination) == "MEMORY_IMPORT"
    pair.on_destination(c.ImportMem(0, bundle))
    assert pair.source.memory_digest() == pair.destination.memory_digest()


def test_a_bundle_cannot_be_imported_twice_in_order(pair):
    pair.start()
    pair.pause()
    bundle = pair.export(pair.gpas)
    pair.on_destination(c.ImportMem(0, bundle))
    result = pair.destination.execute(c.ImportMem(0, bundle))
    assert result.status == Status.TDX_INVALID_MBMD


def test_a_page_twice_in_one_epoch_is_fatal(pair):
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    page = pair.run(0, 10)
    pair.block([page])
    bundle = pair.export([page])
    result = pair.destination.execute(c.ImportMem(0, bundle))
    blamed = with_operand(Status.TDX_MIGRATED_IN_CURRENT_EPOCH, Operand.GPA_LIST_ENTRY)
    assert result.status == blamed | FATAL_BIT


def out_of_order(pair):
    to_start(pair)
    pair.start_token()


def test_out_of_order_duplicates_are_skipped(pair):
    out_of_order(pair)
    bundle = pair.export(pair.gpas[:2])
    digest = pair.destination.memory_digest()
    result = pair.on_destination(c.ImportMem(0, bundle))
    assert result.status == 2
    assert set(result.statuses.tolist()) == {GpaStatus.SEPT_ENTRY_STATE_INCORRECT}
    assert pair.destination.memory_digest() == digest
    assert pair.state(pair.destination) == "POST_IMPORT"


def test_wrong_page_mac_after_commit_ends_the_import_but_not_the_td(pair):
    pair.start()
    pair.pause()
    pair.move(pair.gpas[:6])
    pair.states()
    pair.start_token()
    pair.on_destination(c.ImportCommit())
    bundle = pair.export(pair.gpas[6:])
    result = pair.destination.execute(c.ImportMem(0, tampered(bundle, macs=flip(bundle.macs))))
    assert result.status == with_operand(Status.TDX_INVALID_PAGE_MAC, Operand.GPA_LIST_ENTRY)
    assert pair.state(pair.destination) == "RUNNABLE"
    assert pair.destination.execute(c.VpEnter(0, 1)).ok


def test_a_page_removed_after_the_start_token_never_comes_back(pair):
    out_of_order(pair)
    td = pair.destination.td
    page = int(pair.gpas[7])
    bundle = pair.export([page])
    hpa = td.page_hpas.pop(page)
    removed = pair.destination_host.require(Leaf.MEM_PAGE_REMOVE, rcx=page, rdx=td.tdr)
    assert removed.rcx == hpa
    result = pair.destination.execute(c.ImportMem(0, bundle))
    status, operand = Status.TDX_DISALLOWED_IMPORT_OVER_REMOVED, Operand.GPA_LIST_ENTRY
    assert result.status == with_operand(status, operand) | FATAL_BIT


def test_in_place_import_turns_the_buffer_into_the_page(pair):
    """R13 all ones: the migration buffer, here a free page of the TDMR, becomes the TD's page."""
    pair.start()
    pair.pause()
    bundle = pair.export(pair.gpas)
    host, td = pair.destination_host, pair.destination.td
    buffers = host.stream_buffers(0)
    pages = host.take_private_pages(len(pair.gpas))
    for hpa, content in zip(pages, bundle.pages, strict=True):
        host.memory.bytes[hpa : hpa + PAGE_SIZE] = content
    host.add_tables(td, pair.gpas)
    host.memory.page_words(buffers.list)[: len(pages)] = pages
    buffers.write_mbmd(bundle.mbmd.pack())
    buffers.write_macs(bundle.macs)
    registers = host.seamcall(
        Leaf.IMPORT_MEM,
        rcx=buffers.gpa_list(np.frombuffer(bundle.gpa_list, dtype=np.uint64)),
        rdx=td.tdr,
        r8=buffers.mbmd_register,
        r9=buffers.list,
        r11=buffers.macs_low,
        r13=NO_PAGE,
    )
    assert registers.rax == Status.TDX_SUCCESS
    assert pair.source.memory_digest() == pair.destination.memory_digest()


# --- build and prologue --------------------------------------------------------------------------


def test_dispatcher_and_prologue(pair):
    host, tdr = pair.source_host, pair.source.td.tdr
    module = host.module
    bad_rax = with_operand(Status.TDX_OPERAND_INVALID, Operand.RAX)
    registers = host.seamcall(Leaf.MEM_TRACK, rcx=tdr)
    for leaf in (0xFFFF, Leaf.MEM_TRACK | 1 << 16, Leaf.MEM_TRACK | 1 << 32):
        assert module.call(leaf, registers) == bad_rax
    for rcx, status in (
        (tdr | 1, Status.TDX_OPERAND_INVALID),
        (tdr | 1 << 50, Status.TDX_OPERAND_INVALID),
        (PAGE_SIZE, Status.TDX_OPERAND_ADDR_RANGE_ERROR),
        (pair.source.td.vcpus[0], Status.TDX_PAGE_METADATA_INCORRECT),
    ):
        result = host.seamcall(Leaf.MEM_TRACK, rcx=rcx)
        assert result.rax == with_operand(status, Operand.RCX)
    module.shut_down = True
    assert host.seamcall(Leaf.MEM_TRACK, rcx=tdr).rax == Status.TDX_SYS_SHUTDOWN


def test_removal_of_a_page_in_use_needs_blocking_and_tracking(pair):
    host, td = pair.source_host, pair.source.td
    operands = {"rcx": PAGE_SIZE, "rdx": td.tdr}
    pair.run(0, 3)
    not_blocked = host.seamcall(Leaf.MEM_PAGE_REMOVE, **operands).rax
    assert not_blocked == with_operand(Status.TDX_GPA_RANGE_NOT_BLOCKED, Operand.RCX)
    host.require(Leaf.MEM_RANGE_BLOCK, **operands)
    not_tracked = host.seamcall(Leaf.MEM_PAGE_REMOVE, **operands).rax
    assert not_tracked == with_operand(Status.TDX_TLB_TRACKING_NOT_DONE, Operand.RCX)
    host.require(Leaf.MEM_RANGE_BLOCK, rcx=2 * PAGE_SIZE, rdx=td.tdr)
    host.require(Leaf.MEM_TRACK, rcx=td.tdr)
    host.require(Leaf.MEM_RANGE_UNBLOCK, rcx=2 * PAGE_SIZE, rdx=td.tdr)
    host.require(Leaf.MEM_PAGE_REMOVE, **operands)
    del td.page_hpas[PAGE_SIZE]
    assert pair.source.page_states(pair.gpas)[1] == SeptState.FREE


def test_a_resume_without_an_interruption(pair):
    pair.start()
    pair.pause()
    registers = raw_export(pair, build_entries(pair.gpas), r10=STREAM_COMMAND_BIT)
    assert registers.rax == Status.TDX_INVALID_RESUMPTION
