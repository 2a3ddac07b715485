"""Does the profile hardened refuse what its repairs say it refuses, and nothing else?

Numbers are those of specs/repairs.toml.  R1 is tested with interruptions, R2 and R8 with the
published weaknesses.  Tests "as published" pin what tdx-1.5.01 documents in the same place.
"""

from dataclasses import replace

import numpy as np
import pytest
from soft_pair import Forger, Pair, flip, tampered

from tdxmig_model.backend.soft.call import NO_PAGE, Point, Registers
from tdxmig_model.backend.soft.guest import GuestImage, Program
from tdxmig_model.backend.soft.leaves_servtd import MIG_DEC_KEY, MIG_ENC_KEY
from tdxmig_model.backend.soft.op_state import (
    ALLOWED,
    HARDENED_ALLOWED,
    PUBLISHED_STATES,
    GuestLeaf,
    Leaf,
)
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.backend.soft.status import FATAL_BIT, Operand, Status, with_operand
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import BackendError
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import entries_from_bytes

RESUME = 1 << 63
WRONG_STATE = Status.TDX_OP_STATE_INCORRECT


def always():
    return True


class Interrupted:
    """An immutable leaf that stopped after its first page."""

    def __init__(self, pair, backend, leaf, bundle=None):
        self.pair, self.backend, self.leaf = pair, backend, leaf
        self.host = backend.host
        buffers = self.host.stream_buffers(0)
        if bundle is not None:
            buffers.write_mbmd(bundle.mbmd.pack())
            buffers.write_pages(bundle.pages)
        self.operands = {"r8": buffers.mbmd_register, "r9": buffers.page_list(3)}
        if bundle is not None:
            self.operands["r9"] = buffers.page_list(len(bundle.pages))
        assert self.call(interrupt=always) == Status.TDX_INTERRUPTED_RESUMABLE

    def call(self, interrupt=None, **changes):
        operands = {"rcx": self.backend.td.tdr, **self.operands, **changes}
        return self.host.seamcall(self.leaf, interrupt=interrupt, **operands).rax

    def other(self, leaf, **operands):
        return self.host.seamcall(leaf, **operands).rax


# --- both states ---------------------------------------------------------------------------------


def test_hardened_permissions_are_the_published_ones_and_those_of_two_more_states():
    assert set(HARDENED_ALLOWED) == set(ALLOWED)
    for leaf, states in HARDENED_ALLOWED.items():
        assert states & set(PUBLISHED_STATES) == ALLOWED[leaf], leaf.name


@pytest.mark.parametrize("profile", ["hardened", "tdx-1.5.01"])
def test_an_uninterrupted_start_passes_through_no_other_state(profile):
    pair = Pair(2, profile=profile)
    pair.start()
    assert pair.state(pair.source) == "LIVE_EXPORT"
    assert pair.state(pair.destination) == "MEMORY_IMPORT"


# --- R3: START_IMPORT ----------------------------------------------------------------------------


def interrupted_import(profile="hardened"):
    pair = Pair(4, profile=profile)
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    return Interrupted(pair, pair.destination, Leaf.IMPORT_STATE_IMMUTABLE, bundle)


@pytest.fixture
def importing():
    stopped = interrupted_import()
    assert stopped.pair.state(stopped.backend) == "START_IMPORT"
    return stopped


def test_r3_as_published_an_interrupted_import_has_no_state_of_its_own():
    stopped = interrupted_import("tdx-1.5.01")
    assert stopped.pair.state(stopped.backend) == "UNINITIALIZED"
    assert stopped.call(r10=RESUME) == Status.TDX_SUCCESS
    assert stopped.pair.state(stopped.backend) == "MEMORY_IMPORT"


def test_r3_no_other_leaf_touches_the_half_imported_td(importing):
    host, tdr = importing.host, importing.backend.td.tdr
    page = host.take_private_pages(1)[0]
    tdcs = importing.backend._tdcs
    before = (dict(tdcs.fields), tdcs.num_vcpus, len(tdcs.links), tdcs.binding.state)
    shared = host.stream_buffers(1).buffers & ~1023
    binding = {"rcx": tdr, "r8": 0, "r9": 0, "r10": 0}
    for leaf, operands in (
        (Leaf.MNG_INIT, {"rcx": tdr, "rdx": shared}),
        (Leaf.MNG_ADDCX, {"rcx": page, "rdx": tdr}),
        (Leaf.MIG_STREAM_CREATE, {"rcx": page, "rdx": tdr}),
        (Leaf.SERVTD_BIND, {**binding, "rdx": host._migration_td.tdr}),
        (Leaf.SERVTD_PREBIND, {**binding, "rdx": shared}),
        (Leaf.VP_CREATE, {"rcx": page, "rdx": tdr}),
        (Leaf.IMPORT_ABORT, {"rcx": tdr, "r8": importing.operands["r8"]}),
        (Leaf.IMPORT_STATE_IMMUTABLE, {"rcx": tdr, **importing.operands}),
    ):
        assert importing.other(leaf, **operands) == WRONG_STATE, leaf.name
    assert (dict(tdcs.fields), tdcs.num_vcpus, len(tdcs.links), tdcs.binding.state) == before
    assert importing.call(r10=RESUME) == Status.TDX_SUCCESS
    assert importing.pair.state(importing.backend) == "MEMORY_IMPORT"


def test_r3_the_migration_td_may_write_the_next_key(importing):
    importing.backend.write_migration_decryption_key(bytes(range(32)))
    assert importing.call() == WRONG_STATE
    assert importing.call(r10=RESUME) == Status.TDX_SUCCESS


def test_r3_a_resume_with_other_operands_fails_the_import(importing):
    assert importing.call(r10=RESUME, r9=importing.operands["r9"] + (1 << 55)) == (
        Status.TDX_INVALID_RESUMPTION | FATAL_BIT
    )
    assert importing.pair.state(importing.backend) == "FAILED_IMPORT"
    assert importing.pair.on_destination(c.ImportAbort()).bundle is not None


def test_r3_a_half_imported_td_can_be_taken_down(importing):
    importing.backend.close()
    assert importing.backend.td.tdr not in importing.host.module.tdrs


# --- R4: START_EXPORT ----------------------------------------------------------------------------


def interrupted_export(profile="hardened"):
    pair = Pair(4, profile=profile)
    return Interrupted(pair, pair.source, Leaf.EXPORT_STATE_IMMUTABLE)


@pytest.fixture
def exporting():
    stopped = interrupted_export()
    assert stopped.pair.state(stopped.backend) == "START_EXPORT"
    return stopped


def test_r4_as_published_the_td_is_runnable_until_its_export_has_started():
    stopped = interrupted_export("tdx-1.5.01")
    assert stopped.pair.state(stopped.backend) == "RUNNABLE"
    assert stopped.pair.source.execute(c.ExportAbort(None)).status == WRONG_STATE
    assert stopped.call(r10=RESUME) == Status.TDX_SUCCESS
    assert stopped.pair.state(stopped.backend) == "LIVE_EXPORT"


def test_r4_as_published_a_resume_that_does_not_match_forgets_the_call():
    stopped = interrupted_export("tdx-1.5.01")
    other = stopped.operands["r9"] + (1 << 55)
    for operands in ({"r9": other}, {}):
        assert stopped.call(r10=RESUME, **operands) == Status.TDX_INVALID_RESUMPTION


def test_r4_the_td_runs_while_the_start_of_its_export_is_interrupted(exporting):
    pair = exporting.pair
    assert pair.on_source(c.VpEnter(0, 5)).exit.reason == "budget"
    pair.on_source(c.MemTrack())
    exporting.host.add_pending_page(exporting.backend.td, 9 * PAGE_SIZE)
    assert exporting.call(r10=RESUME) == Status.TDX_SUCCESS
    assert pair.state(pair.source) == "LIVE_EXPORT"


def test_r4_a_td_whose_vcpu_is_not_flushed_cannot_be_taken_down(exporting):
    tdr = exporting.backend.td.tdr
    exporting.pair.on_source(c.VpEnter(0, 5))
    assert exporting.other(Leaf.MNG_VPFLUSHDONE, rcx=tdr) == Status.TDX_FLUSHVP_NOT_DONE
    exporting.backend.close()
    assert tdr not in exporting.host.module.tdrs


def test_r4_blocking_needs_tlb_tracking_there_too(exporting):
    tdr, gpa = exporting.backend.td.tdr, 2 * PAGE_SIZE
    exporting.pair.on_source(c.VpEnter(0, 5))
    assert exporting.other(Leaf.MEM_RANGE_BLOCK, rcx=gpa, rdx=tdr) == Status.TDX_SUCCESS
    for leaf, operand in (
        (Leaf.MEM_PAGE_REMOVE, Operand.RCX),
        (Leaf.MEM_RANGE_UNBLOCK, Operand.SEPT_TREE),
    ):
        untracked = with_operand(Status.TDX_TLB_TRACKING_NOT_DONE, operand)
        assert exporting.other(leaf, rcx=gpa, rdx=tdr) == untracked
    exporting.pair.on_source(c.MemTrack())
    assert exporting.other(Leaf.MEM_RANGE_UNBLOCK, rcx=gpa, rdx=tdr) == Status.TDX_SUCCESS


def test_r4_nothing_that_the_bundle_speaks_of_can_change(exporting):
    host, tdr = exporting.host, exporting.backend.td.tdr
    page = host.take_private_pages(1)[0]
    service = host._migration_td.tdr
    assert exporting.call() == WRONG_STATE
    assert exporting.other(Leaf.MIG_STREAM_CREATE, rcx=page, rdx=tdr) == WRONG_STATE
    assert exporting.other(Leaf.SERVTD_BIND, rcx=tdr, rdx=service) == WRONG_STATE


def test_r4_a_resume_that_does_not_match_leaves_the_call_resumable(exporting):
    other = exporting.operands["r9"] + (1 << 55)
    assert exporting.call(r10=RESUME, r9=other) == Status.TDX_INVALID_RESUMPTION
    assert exporting.call(r10=RESUME) == Status.TDX_SUCCESS


def test_r4_abort_leads_out_and_another_session_begins(exporting):
    pair = exporting.pair
    with_token = pair.source.execute(c.ExportAbort(bytes(48)))
    assert with_token.status == with_operand(Status.TDX_OPERAND_INVALID, Operand.R8)
    pair.on_source(c.ExportAbort(None))
    assert pair.state(pair.source) == "RUNNABLE"
    assert exporting.call(r10=RESUME) == Status.TDX_MIGRATION_STREAM_STATE_INCORRECT
    pair.exchange_keys()
    pair.start()
    pair.finish_in_pause()
    pair.assert_equal()
    assert len(set(pair.iv_pairs)) == len(pair.iv_pairs)


def test_r4_no_import_leaf_uses_the_streams_of_the_new_session():
    pair = Pair(4, streams=2)
    pair.start()
    pair.pause()
    pair.states()
    pair.start_token()
    pair.on_destination(c.ImportCommit())
    late = pair.export(pair.gpas, stream=1)
    pair.destination.read_migration_encryption_key()
    pair.destination.write_migration_decryption_key(bytes(range(32)))
    stopped = Interrupted(pair, pair.destination, Leaf.EXPORT_STATE_IMMUTABLE)
    assert pair.destination.execute(c.ImportMem(1, late)).status == WRONG_STATE
    assert pair.destination.execute(c.ImportEnd()).status == WRONG_STATE
    assert pair.destination.observe()["initialized"] == [1, 0]
    assert stopped.call(r10=RESUME) == Status.TDX_SUCCESS


# --- R5, R15, R6, R7: keys -----------------------------------------------------------------------


DEGENERATE = {
    "zero": lambda tdcs: bytes(32),
    "own": lambda tdcs: tdcs.mig_enc_key,
    "used before": lambda tdcs: tdcs.mig_dec_working_key,
    "own before": lambda tdcs: tdcs.mig_enc_working_key,
}


def start_with(key_name, side, profile):
    """A side that was given such a key, the leaf that begins its session, and the key."""
    pair = Pair(2, profile=profile)
    if side == "source":
        pair.start()
        pair.on_source(c.ExportAbort(None))
        backend, command = pair.source, c.ExportStateImmutable()
    else:
        backend = pair.destination
        backend._tdcs.mig_dec_working_key = bytes(range(1, 33))
        backend._tdcs.mig_enc_working_key = bytes(range(2, 34))
        command = c.ImportStateImmutable(pair.on_source(c.ExportStateImmutable()).bundle)
    key = DEGENERATE[key_name](backend._tdcs)
    backend.write_migration_decryption_key(key)
    return backend, command, key


@pytest.mark.parametrize("key_name", DEGENERATE)
@pytest.mark.parametrize("side", ["source", "destination"])
def test_r5_and_r15_degenerate_keys_are_refused_before_anything_has_changed(key_name, side):
    backend, command, _ = start_with(key_name, side, "hardened")
    before = backend.observe(), backend._tdcs.mig_enc_key
    refused = backend.execute(command)
    assert refused.status == Status.TDX_INVALID_MIGRATION_DECRYPTION_KEY
    assert (backend.observe(), backend._tdcs.mig_enc_key) == before
    backend.write_migration_decryption_key(bytes(range(3, 35)))
    assert backend.execute(command).status_name != refused.status_name


@pytest.mark.parametrize("key_name", DEGENERATE)
@pytest.mark.parametrize(
    ("side", "answer"),
    [
        ("source", Status.TDX_SUCCESS),
        # The bundle of the source has the key that was exchanged.
        ("destination", Status.TDX_INCORRECT_MBMD_MAC | FATAL_BIT),
    ],
)
def test_r5_and_r15_as_published_a_session_takes_the_key_that_was_written(key_name, side, answer):
    backend, command, key = start_with(key_name, side, "tdx-1.5.01")
    assert backend.execute(command).status == answer
    assert backend._tdcs.mig_dec_working_key == key
    assert not key_set(backend)


def access(backend, leaf, field, value=0, mask=(1 << 64) - 1):
    """One access of the Migration TD."""
    host, td = backend.host, backend.td
    registers = Registers(rcx=td.binding_handle, rdx=field, r8=value, r9=mask)
    registers.r10, registers.r11, registers.r12, registers.r13 = td.uuid
    return host.module.tdcall(leaf, registers, host._migration_td.vcpus[0])


def key_set(backend):
    return bool(backend.observe()["mig_dec_key_set"])


def test_r6_a_new_encryption_key_forgets_the_decryption_key():
    pair = Pair(2)
    assert key_set(pair.source)
    for element in (1, 2, 3):
        access(pair.source, GuestLeaf.SERVTD_RD, MIG_ENC_KEY + element)
    assert key_set(pair.source)
    pair.source.read_migration_encryption_key()
    assert not key_set(pair.source)
    not_set = Status.TDX_MIGRATION_DECRYPTION_KEY_NOT_SET
    assert pair.source.execute(c.ExportStateImmutable()).status == not_set
    assert pair.source.observe()["export_count"] == 0


def test_r6_as_published_the_decryption_key_stays_set():
    pair = Pair(2, profile="tdx-1.5.01")
    pair.source.read_migration_encryption_key()
    assert key_set(pair.source)


@pytest.mark.parametrize(("profile", "kept"), [("hardened", True), ("tdx-1.5.01", False)])
def test_r6_without_entropy_the_key_that_was_there_stays(profile, kept):
    pair = Pair(2, profile=profile)
    before = pair.source._tdcs.mig_enc_key
    pair.source_host.module.random = lambda length: None
    with pytest.raises(BackendError, match="TDX_RND_NO_ENTROPY"):
        pair.source.read_migration_encryption_key()
    assert pair.source._tdcs.mig_enc_key == (before if kept else bytes(32))


def test_r7_a_key_is_set_when_its_four_words_have_been_written():
    pair = Pair(2)
    source = pair.source
    source.read_migration_encryption_key()
    for words, mask, is_set in (
        ((0, 1, 2), None, False),
        ((3,), None, True),
        ((0,), None, False),
        ((1, 1, 2, 3), None, False),
        ((0,), 0xFF, False),
        ((1, 2, 3), None, False),
        ((0,), None, True),
        ((2,), 0xFF, False),
    ):
        for word in words:
            full = (1 << 64) - 1 if mask is None else mask
            access(source, GuestLeaf.SERVTD_WR, MIG_DEC_KEY + word, 7 + word, full)
        assert key_set(source) is is_set, (words, mask)


def test_r7_as_published_any_word_sets_the_key():
    pair = Pair(2, profile="tdx-1.5.01")
    for word in range(4):
        pair.source._tdcs.mig_dec_key_set = False
        access(pair.source, GuestLeaf.SERVTD_WR, MIG_DEC_KEY + word, 7 + word)
        assert key_set(pair.source)


# --- R9: concurrent imports ----------------------------------------------------------------------


class Importing:
    """An IMPORT.MEM in progress."""

    def __init__(self, pair, stream, bundle):
        backend, host = pair.destination, pair.destination_host
        buffers = host.stream_buffers(stream)
        entries = entries_from_bytes(bundle.gpa_list)
        buffers.write_mbmd(bundle.mbmd.pack())
        buffers.write_pages(bundle.pages)
        buffers.write_macs(bundle.macs)
        buffers.offer_buffers(entries.size)
        host.add_tables(backend.td, pair.gpas)
        fresh = np.array(host.take_private_pages(entries.size), dtype=np.uint64)
        buffers.offer_new_pages(fresh)
        self.registers = Registers(
            rcx=buffers.gpa_list(entries),
            rdx=backend.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.list,
            r10=stream,
            r11=buffers.macs_low,
            r12=NO_PAGE,
            r13=buffers.new_pages,
        )
        self.steps = host.module.start(Leaf.IMPORT_MEM, self.registers)

    def until(self, point):
        while next(self.steps) is not point:
            pass

    def finish(self):
        for _ in self.steps:
            pass
        return self.registers.rax


@pytest.mark.parametrize("point", [Point.ENTRY, Point.HELD])
@pytest.mark.parametrize("second_is_bad", [True, False])
def test_r9_one_import_decides_and_the_other_ends(point, second_is_bad):
    pair = Pair(4, streams=2)
    pair.start()
    pair.pause()
    pair.states()
    pair.start_token()
    pair.on_destination(c.ImportCommit())
    first, second = (pair.export(pair.gpas[2 * i : 2 * i + 2], stream=i) for i in (0, 1))
    if second_is_bad:
        second = tampered(second, macs=flip(second.macs))
    one = Importing(pair, 0, tampered(first, macs=flip(first.macs)))
    two = Importing(pair, 1, second)
    two.until(point)
    assert one.finish() == with_operand(Status.TDX_INVALID_PAGE_MAC, Operand.GPA_LIST_ENTRY)
    assert pair.state(pair.destination) == "RUNNABLE"
    assert two.finish() == WRONG_STATE
    assert pair.state(pair.destination) == "RUNNABLE"
    assert set(pair.destination.page_states(pair.gpas)) == {SeptState.FREE}
    assert pair.destination.execute(c.ImportAbort()).status == WRONG_STATE


# --- R10, R11, R12 -------------------------------------------------------------------------------


def token_of_another_version(profile):
    """An epoch token, made after MIG_VERSION has become another one."""
    pair = Pair(2, profile=profile)
    pair.start()
    # No other version exists in this release, so it is put there by hand.
    pair.source._tdcs.mig_version = 1
    return pair, pair.on_source(c.ExportTrack()).bundle


def test_r10_a_token_carries_the_version_that_the_session_began_with():
    pair, bundle = token_of_another_version("hardened")
    assert bundle.mbmd.mig_version == 0
    pair.on_destination(c.ImportTrack(bundle))


def test_r10_as_published_a_token_carries_mig_version():
    _, bundle = token_of_another_version("tdx-1.5.01")
    assert bundle.mbmd.mig_version == 1


def exported_and_aborted(profile):
    """A TD whose pages were exported in a pause, without having been write-blocked."""
    pair = Pair(2, profile=profile, guest=GuestImage(Program.SEQUENTIAL, PAGE_SIZE, 1))
    pair.run(0, 3)
    pair.start()
    pair.pause()
    pair.move(pair.gpas)
    pair.on_source(c.ExportAbort(None))
    return pair


def test_r11_an_exported_page_is_not_writable():
    pair = exported_and_aborted("hardened")
    stopped = pair.on_source(c.VpEnter(0, 5)).exit
    assert (stopped.reason, stopped.gpa, stopped.instructions) == ("ept_violation", PAGE_SIZE, 0)
    pair.assert_counts()
    pair.restore_all()
    assert pair.on_source(c.VpEnter(0, 5)).exit.reason == "budget"


def test_r11_as_published_an_exported_page_keeps_its_permissions():
    pair = exported_and_aborted("tdx-1.5.01")
    pair.assert_counts()
    assert pair.on_source(c.VpEnter(0, 5)).exit.reason == "budget"


def test_r11_cancelled_and_restored_pages_are_writable_again():
    pair = Pair(3, guest=GuestImage(Program.SEQUENTIAL, PAGE_SIZE, 2))
    pair.start()
    pair.pause()
    pair.move(pair.gpas)
    pair.epoch()
    pair.move(pair.gpas[1:2], operation=2)
    pair.on_source(c.ExportAbort(None))
    pair.restore_all()
    assert pair.on_source(c.VpEnter(0, 9)).exit.reason == "budget"


def with_vcpus(profile="hardened"):
    """Two vCPUs, TD state imported, and the bundles of both vCPUs."""
    pair = Pair(4, vcpus=2, profile=profile)
    pair.start()
    pair.pause()
    pair.on_destination(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))
    return pair, [pair.on_source(c.ExportStateVp(vcpu)).bundle for vcpu in (0, 1)]


def import_of_another_vcpu(profile):
    """The state of vCPU 0 under an MBMD of vCPU 1, imported as vCPU 0."""
    pair, (first, second) = with_vcpus(profile)
    forger = Forger(pair)
    swapped = replace(first.mbmd, type_specific=second.mbmd.type_specific)
    forged = forger.state(swapped, forger.open_state(first))
    return pair, pair.destination.execute(c.ImportStateVp(forged, 0))


def import_of_the_same_vcpu(profile):
    """The state of vCPU 0 under an MBMD of its own, imported as vCPU 1 after vCPU 0."""
    pair, (first, second) = with_vcpus(profile)
    pair.on_destination(c.ImportStateVp(first, 0))
    forger = Forger(pair)
    again = replace(first.mbmd, mb_counter=second.mbmd.mb_counter)
    forged = forger.state(again, forger.open_state(first))
    return pair, pair.destination.execute(c.ImportStateVp(forged, 1))


def test_r12_vcpu_state_is_that_of_the_vcpu_in_its_mbmd():
    pair, result = import_of_another_vcpu("hardened")
    assert result.status == Status.TDX_METADATA_FIELD_VALUE_NOT_VALID | FATAL_BIT
    assert pair.state(pair.destination) == "FAILED_IMPORT"


def test_r12_each_vcpu_is_imported_once():
    _, result = import_of_the_same_vcpu("hardened")
    assert result.status == Status.TDX_METADATA_FIELD_VALUE_NOT_VALID | FATAL_BIT


@pytest.mark.parametrize("attempt", [import_of_another_vcpu, import_of_the_same_vcpu])
def test_r12_as_published_the_bundle_is_imported(attempt):
    pair, result = attempt("tdx-1.5.01")
    assert result.status == Status.TDX_SUCCESS
    assert pair.state(pair.destination) == "STATE_IMPORT"


def test_r12_vcpus_may_come_in_any_order():
    pair, (first, second) = with_vcpus()
    forger = Forger(pair)
    counters = first.mbmd.mb_counter, second.mbmd.mb_counter
    for bundle, counter in zip((second, first), counters, strict=True):
        mbmd = replace(bundle.mbmd, mb_counter=counter)
        forged = forger.state(mbmd, forger.open_state(bundle))
        pair.on_destination(c.ImportStateVp(forged, mbmd.vp_index))
    assert pair.destination.observe()["num_migrated_vcpus"] == 2
    assert pair.source.vcpu_digest() == pair.destination.vcpu_digest()
