"""State bundles, tokens and sessions: every guard of their leaves, by crafted calls."""

from dataclasses import replace

import numpy as np
import pytest
from soft_pair import Forger, Pair

from tdxmig_model.backend.soft.metadata import build_lists
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.state import MAX_EXPORT_COUNT, VcpuState
from tdxmig_model.backend.soft.status import (
    FATAL_BIT,
    LOW_32,
    Operand,
    Status,
    describe_status,
    with_operand,
)
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import Bundle

RESUME = 1 << 63


@pytest.fixture
def pair():
    pair = Pair(6, streams=2)
    pair.start()
    pair.pause()
    pair.move(pair.gpas)
    return pair


def call(backend, leaf, **changes):
    """A leaf by registers, with usable operands unless changed."""
    buffers = backend.host.stream_buffers(0)
    operands = {"rcx": backend.td.tdr, "r8": buffers.mbmd_register, **changes}
    if "r9" not in operands:
        operands["r9"] = buffers.page_list(16)
    return backend.host.seamcall(leaf, **operands).rax


def refused(status, operand=None):
    return int(status) if operand is None else with_operand(status, operand)


R9, R10, R8 = Operand.R9, Operand.R10, Operand.R8
INVALID = Status.TDX_OPERAND_INVALID
NO_STREAM = Status.TDX_MIGRATION_STREAM_STATE_INCORRECT


@pytest.mark.parametrize(
    ("leaf", "changes", "code"),
    [
        (Leaf.EXPORT_TRACK, {"r10": 1}, refused(INVALID, R10)),
        (Leaf.EXPORT_TRACK, {"r8": 0}, refused(INVALID, R8)),
        (Leaf.EXPORT_ABORT, {"r8": 0, "r10": RESUME}, refused(INVALID, R10)),
        (Leaf.EXPORT_STATE_TD, {"r10": 1}, refused(INVALID, R10)),
        (Leaf.EXPORT_STATE_TD, {"r10": RESUME}, refused(Status.TDX_INVALID_RESUMPTION)),
        (Leaf.EXPORT_STATE_TD, {"r9": 1}, refused(INVALID, R9)),
        (Leaf.EXPORT_STATE_TD, {"r9": 0}, refused(INVALID, R9)),
        (Leaf.EXPORT_STATE_TD, {"r9": 1 << 51 | 5 << 55}, refused(INVALID, R9)),
        (Leaf.EXPORT_STATE_TD, {"r8": 0}, refused(INVALID, R8)),
    ],
)
def test_operands_of_source_leaves(pair, leaf, changes, code):
    before = pair.source.observe()
    assert call(pair.source, leaf, **changes) == code
    after = pair.source.observe()
    # A state leaf may have used up an IV when its operands turn out wrong.
    assert {**after, "iv_counter": 0} == {**before, "iv_counter": 0}


def test_operands_of_vcpu_export(pair):
    vcpu = pair.source.td.vcpus[0]
    buffers = pair.source.host.stream_buffers(0)

    def export(**changes):
        return call(pair.source, Leaf.EXPORT_STATE_VP, rcx=vcpu, **changes)

    assert export(r10=2) == refused(INVALID, R10)
    assert export(r10=1 | RESUME) == NO_STREAM
    assert export(r9=buffers.page_list(4)) == refused(INVALID, R9)
    lists = pair.source.host.memory.page_words(buffers.list)
    buffers.page_list(16)
    lists[1] = 1 << 51
    assert export(r9=buffers.list | 15 << 55) == refused(INVALID, Operand.MIG_BUFF_LIST_ENTRY)
    state = pair.source._tdvps(0)
    state.state = VcpuState.DISABLED
    assert export() == Status.TDX_VCPU_STATE_INCORRECT
    state.state = VcpuState.READY
    state.assoc_lp = 3
    assert export() == Status.TDX_VCPU_ASSOCIATED
    state.assoc_lp = 0
    state.pages = 5
    assert export() == Status.TDX_TDCX_NUM_INCORRECT
    state.pages = 6
    assert export() == Status.TDX_SUCCESS


def test_memory_resume_on_a_stream_that_was_not_used(pair):
    buffers = pair.source.host.stream_buffers(0)
    rcx = buffers.gpa_list(pair.gpas)
    operands = {"rdx": pair.source.td.tdr, "r11": buffers.macs_low, "r9": buffers.list}
    for first, command, code in (
        (0, RESUME | 1, NO_STREAM),
        (1, 0, refused(INVALID, Operand.RCX)),
    ):
        status = call(
            pair.source, Leaf.EXPORT_MEM, **{**operands, "rcx": rcx | first << 3, "r10": command}
        )
        assert status == code, describe_status(status)
    buffers = pair.destination.host.stream_buffers(0)
    operands = {"rdx": pair.destination.td.tdr, "r11": buffers.macs_low, "r9": buffers.list}
    rcx, r10 = buffers.gpa_list(pair.gpas), RESUME | 1
    status = call(
        pair.destination, Leaf.IMPORT_MEM, rcx=rcx, r10=r10, r13=RESUME * 2 - 1, **operands
    )
    assert status == NO_STREAM


def test_counters_at_their_ends():
    pair = Pair(4)
    tdcs = pair.source._tdcs
    tdcs.export_count = MAX_EXPORT_COUNT
    assert call(pair.source, Leaf.EXPORT_STATE_IMMUTABLE) == Status.TDX_MAX_EXPORTS_EXCEEDED
    assert not tdcs.mig_dec_key_set  # the key was consumed before the check
    tdcs.export_count = 5
    pair.exchange_keys()
    assert call(pair.source, Leaf.EXPORT_STATE_IMMUTABLE) == Status.TDX_SUCCESS
    tdcs.mig_epoch = 0xFFFF_FFFE
    assert call(pair.source, Leaf.EXPORT_TRACK) == Status.TDX_MIGRATION_EPOCH_OVERFLOW
    assert tdcs.mig_epoch == 0xFFFF_FFFE


def test_sessions_need_two_streams():
    pair = Pair(4)
    pair.source._tdcs.links.pop()
    pair.destination._tdcs.links.pop()
    few = Status.TDX_MIN_MIGS_NOT_CREATED
    assert call(pair.source, Leaf.EXPORT_STATE_IMMUTABLE) == few
    assert call(pair.destination, Leaf.IMPORT_STATE_IMMUTABLE) == few


# --- immutable state -----------------------------------------------------------------------------


@pytest.fixture
def waiting():
    """The destination waits for the immutable state, which the source has exported."""
    pair = Pair(6, vcpus=2)
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    return pair, Forger(pair), bundle


def fatal(pair, command, code):
    result = pair.destination.execute(command)
    assert result.status == code | FATAL_BIT, describe_status(result.status)
    assert pair.state(pair.destination) == "FAILED_IMPORT"


@pytest.mark.parametrize(
    "fields",
    [{"mb_counter": 1}, {"mig_epoch": 1}, {"type_specific": bytes(8)}, {"mig_version": 1}],
)
def test_mbmd_of_immutable_state(waiting, fields):
    pair, forger, bundle = waiting
    pages = forger.open_state(bundle)
    forged = forger.state(replace(bundle.mbmd, **fields), pages)
    fatal(pair, c.ImportStateImmutable(forged), Status.TDX_INVALID_MBMD)


def changed_values(pair, **changes):
    """Pages of the source's immutable state with other values."""
    tdr = pair.source.host.module.tdrs[pair.source.td.tdr]
    tdcs = pair.source._tdcs
    names = {"TD_UUID": tdr.uuid, "NUM_VCPUS": tdcs.num_vcpus, "EXPORT_COUNT": 1}
    known = {name: value for name, value in tdcs.fields.items() if name in IMMUTABLE}
    return build_lists("immutable", {**known, **names, **changes})


IMMUTABLE = frozenset(
    name
    for name in Pair(2).source._tdcs.fields
    if name
    not in {
        *("VIRTUAL_TSC", "NOTIFY_ENABLES", "HP_LOCK_TIMEOUT", "VM_CTLS", "TD_CTLS", "RTMR"),
        *("IMPORT_COUNT", "SERVTD_BINDINGS_TABLE"),
    }
)


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"NUM_VCPUS": 0}, refused(INVALID, Operand.RDX)),
        ({"NUM_VCPUS": 3}, refused(INVALID, Operand.RDX)),
        ({"NUM_L2_VMS": 1}, Status.TDX_TDCS_NOT_ALLOCATED),
        ({"ATTRIBUTES": 0}, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID),
        ({"ATTRIBUTES": 1 << 29 | 1}, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID),
        ({"XFAM": 1}, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID),
        ({"GPAW": 1}, Status.TDX_METADATA_FIELD_VALUE_NOT_VALID),
    ],
)
def test_values_of_immutable_state(waiting, changes, status):
    pair, forger, bundle = waiting
    forged = forger.state(bundle.mbmd, changed_values(pair, **changes))
    result = pair.destination.execute(c.ImportStateImmutable(forged))
    # The parser puts the number of the sequence into the low half of its status.
    reported = result.status if status & LOW_32 else result.status & ~LOW_32
    assert reported == status | FATAL_BIT, describe_status(result.status)


def test_the_same_values_are_accepted(waiting):
    pair, forger, bundle = waiting
    forged = forger.state(bundle.mbmd, changed_values(pair))
    pair.on_destination(c.ImportStateImmutable(forged))
    uuids = [side.host.module.tdrs[side.td.tdr].uuid for side in (pair.source, pair.destination)]
    assert uuids[0] == uuids[1]


def test_a_parse_error_yields_to_a_wrong_tag(waiting):
    pair, forger, bundle = waiting
    forged = forger.state(bundle.mbmd, [bytes(4096), bytes(4096)])
    wrong = Bundle.of(replace(forged.mbmd, mac=bytes(16)), forged.pages)
    fatal(pair, c.ImportStateImmutable(wrong), Status.TDX_INCORRECT_MBMD_MAC)


def test_a_parse_error_is_reported_if_the_tag_holds(waiting):
    pair, forger, bundle = waiting
    forged = forger.state(bundle.mbmd, [bytes(4096), bytes(4096)])
    result = pair.destination.execute(c.ImportStateImmutable(forged))
    assert result.status_name == "TDX_INVALID_METADATA_LIST_HEADER"
    assert result.status & FATAL_BIT


def test_a_resume_on_an_unused_stream_is_plain(waiting):
    pair, _, _ = waiting
    assert call(pair.destination, Leaf.IMPORT_STATE_IMMUTABLE, r10=RESUME) == NO_STREAM
    assert pair.state(pair.destination) == "UNINITIALIZED"


# --- mutable state and tokens --------------------------------------------------------------------


def test_resume_of_td_state_without_an_interruption(pair):
    resume = call(pair.destination, Leaf.IMPORT_STATE_TD, r10=RESUME)
    assert resume == Status.TDX_INVALID_RESUMPTION
    assert pair.state(pair.destination) == "MEMORY_IMPORT"


@pytest.mark.parametrize("fields", [{"mb_counter": 7}, {"mig_epoch": 1}])
def test_mbmd_of_td_state(pair, fields):
    bundle = pair.on_source(c.ExportStateTd()).bundle
    forger = Forger(pair)
    forged = forger.state(replace(bundle.mbmd, **fields), forger.open_state(bundle))
    fatal(pair, c.ImportStateTd(forged), Status.TDX_INVALID_MBMD)


def test_td_state_of_another_service_td_policy(pair):
    """Type and attributes of the imported binding have to be those of the binding here."""
    pair.source._tdcs.binding.attributes = 1
    bundle = pair.on_source(c.ExportStateTd()).bundle
    result = pair.destination.execute(c.ImportStateTd(bundle))
    assert result.status_name == "TDX_METADATA_FIELD_VALUE_NOT_VALID"
    assert result.status & FATAL_BIT


def with_td_state(pair):
    pair.on_destination(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))


def test_vcpus_are_imported_once_and_no_more_than_there_are(pair):
    with_td_state(pair)
    bundle = pair.on_source(c.ExportStateVp(0)).bundle
    pair.on_destination(c.ImportStateVp(bundle, 0))
    forger = Forger(pair)
    counter = pair.destination.observe()["expected_mb_counter"][0]
    again = forger.state(replace(bundle.mbmd, mb_counter=counter), forger.open_state(bundle))
    second = pair.destination.execute(c.ImportStateVp(again, 1))
    assert second.status == Status.TDX_ALL_VCPUS_IMPORTED | FATAL_BIT


def test_a_vcpu_takes_one_state(pair):
    with_td_state(pair)
    bundle = pair.on_source(c.ExportStateVp(0)).bundle
    pair.on_destination(c.ImportStateVp(bundle, 0))
    fatal(pair, c.ImportStateVp(bundle, 0), Status.TDX_VCPU_STATE_INCORRECT)


def test_vcpu_index_beyond_the_td(pair):
    with_td_state(pair)
    pair.source._tdvps(0).registers["VCPU_INDEX"] = 1
    bundle = pair.on_source(c.ExportStateVp(0)).bundle
    result = pair.destination.execute(c.ImportStateVp(bundle, 0))
    assert result.status_name == "TDX_METADATA_FIELD_VALUE_NOT_VALID"


def test_a_vcpu_with_too_few_pages(pair):
    with_td_state(pair)
    pair.destination.host.ensure_vcpus(pair.destination.td, 1)
    pair.destination._tdvps(0).pages = 5
    bundle = pair.on_source(c.ExportStateVp(0)).bundle
    result = pair.destination.execute(c.ImportStateVp(bundle, 0))
    assert result.status == Status.TDX_TDCX_NUM_INCORRECT
    assert pair.state(pair.destination) == "STATE_IMPORT"


def test_a_resumed_vcpu_must_be_the_interrupted_one(pair):
    with_td_state(pair)
    bundle = pair.on_source(c.ExportStateVp(0)).bundle
    host, td = pair.destination.host, pair.destination.td
    host.ensure_vcpus(td, 1)
    buffers = host.stream_buffers(0)
    buffers.write_mbmd(bundle.mbmd.pack())
    buffers.write_pages(bundle.pages)
    r9 = buffers.page_list(len(bundle.pages))
    operands = {"rcx": td.vcpus[0], "r8": buffers.mbmd_register, "r9": r9}
    stopped = host.seamcall(Leaf.IMPORT_STATE_VP, interrupt=lambda: True, **operands)
    assert stopped.rax == Status.TDX_INTERRUPTED_RESUMABLE
    vcpu = pair.destination._tdvps(0)
    assert vcpu.state is VcpuState.IMPORT
    vcpu.state = VcpuState.READY
    resumed = host.seamcall(Leaf.IMPORT_STATE_VP, r10=RESUME, **operands)
    assert resumed.rax == Status.TDX_VCPU_STATE_INCORRECT | FATAL_BIT


@pytest.mark.parametrize("field", ["mb_counter", "mig_epoch", "total_mb"])
def test_tokens(pair, field):
    total = pair.destination.observe()["total_mb_count"] + 1
    values = {"total_mb": total, "mig_epoch": 1, "iv_counter": 0}
    good = Mbmd.epoch_token(**values)
    bad = {
        "mb_counter": replace(good, mb_counter=1),
        "mig_epoch": replace(good, mig_epoch=0),
        "total_mb": Mbmd.epoch_token(**{**values, "total_mb": total + 1}),
    }[field]
    token = Bundle.of(Forger(pair).seal(bad))
    fatal(pair, c.ImportTrack(token), Status.TDX_INVALID_MBMD)


def test_a_good_forged_token_is_taken(pair):
    total = pair.destination.observe()["total_mb_count"] + 1
    token = Forger(pair).seal(Mbmd.epoch_token(total_mb=total, mig_epoch=9, iv_counter=0))
    pair.on_destination(c.ImportTrack(Bundle.of(token)))
    assert pair.destination.observe()["mig_epoch"] == 9


@pytest.mark.parametrize("leaf", [Leaf.IMPORT_TRACK, Leaf.IMPORT_ABORT])
def test_tokens_have_no_stream_operand(pair, leaf):
    assert call(pair.destination, leaf, r10=1) == refused(INVALID, R10)
    assert call(pair.destination, leaf, r8=0) == refused(INVALID, R8)
    assert pair.state(pair.destination) == "MEMORY_IMPORT"


def test_post_copy_bundles_carry_the_start_epoch(pair):
    pair.states()
    pair.start_token()
    late = Forger(pair).memory([0x0010_0000_0010_0000], mig_epoch=0)
    result = pair.destination.execute(c.ImportMem(0, late))
    assert result.status == Status.TDX_INVALID_MBMD
    assert pair.state(pair.destination) == "POST_IMPORT"


def test_a_new_export_from_live_import_ends_the_import(pair):
    pair.states()
    pair.start_token()
    pair.on_destination(c.ImportCommit())
    pair.destination.write_migration_decryption_key(bytes(range(32)))
    result = pair.on_destination(c.ExportStateImmutable())
    assert result.bundle.mbmd.mig_epoch == 0
    seen = pair.destination.observe()
    assert seen["op_state"] == OpState.LIVE_EXPORT.name
    assert seen["export_count"] == 2
    assert np.all(pair.destination.page_states(pair.gpas) == 4)
