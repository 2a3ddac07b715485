"""Post-copy, cancelled, removed and pending pages: what arrives, and what never does?"""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from soft_pair import CANCEL, Forger, Pair, flip, tampered

from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.sept import (
    REMOVED_EPOCH_MASK,
    REMOVED_EPOCH_SHIFT,
    REMOVED_EPOCH_VALID,
    SeptState,
)
from tdxmig_model.backend.soft.status import FATAL_BIT, Operand, Status, with_operand
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.constants import PAGE_SIZE, START_EPOCH
from tdxmig_model.wire.gpa_list import (
    GpaEntry,
    GpaOperation,
    GpaStatus,
    entries_from_bytes,
    entry_operations,
)

BOTH_PROFILES = pytest.mark.parametrize("profile", ["hardened", "tdx-1.5.01"])
REMOVED_FOR_GOOD = with_operand(Status.TDX_DISALLOWED_IMPORT_OVER_REMOVED, Operand.GPA_LIST_ENTRY)


def started(profile="hardened", *, early=8, pages=24, **more):
    """After the start token: the first `early` pages were imported in order, the rest not."""
    pair = Pair(pages, profile=profile, **more)
    pair.start()
    pair.pause()
    pair.move(pair.gpas[:early])
    pair.states()
    pair.start_token()
    return pair


def state(backend, gpa):
    return SeptState(backend.page_states(np.array([gpa], dtype=np.uint64))[0])


def operations(bundle):
    found = entry_operations(entries_from_bytes(bundle.gpa_list)).tolist()
    return [GpaOperation(value) for value in found]


def remove(pair, gpa, *, side="destination", running=False):
    """PAGE.REMOVE; where the TD may run, after RANGE.BLOCK and TRACK."""
    backend = getattr(pair, side)
    host, td = backend.host, backend.td
    if running:
        host.require(Leaf.MEM_RANGE_BLOCK, rcx=gpa, rdx=td.tdr)
        host.require(Leaf.MEM_TRACK, rcx=td.tdr)
    hpa = host.require(Leaf.MEM_PAGE_REMOVE, rcx=gpa, rdx=td.tdr).rcx
    assert td.page_hpas.pop(gpa) == hpa
    host.give_back_private_pages([hpa])


def removal_epoch(backend, gpa):
    """The MIG_EPOCH that a REMOVED entry remembers."""
    entry = int(backend._tdcs.sept.entries(np.array([gpa], dtype=np.uint64))[0])
    assert entry & REMOVED_EPOCH_VALID
    return (entry & REMOVED_EPOCH_MASK) >> REMOVED_EPOCH_SHIFT


# --- post-copy -----------------------------------------------------------------------------------


@BOTH_PROFILES
@pytest.mark.parametrize("streams", [1, 3])
def test_post_copy_page_by_page_as_the_guest_asks(profile, streams):
    """The guest runs on the destination, faults, gets that page and goes on; a twin agrees."""
    pair = started(profile, guest="random-writer", streams=streams)
    twin = Pair(24, guest="random-writer", profile=profile)
    pair.on_destination(c.ImportCommit())
    assert pair.state(pair.destination) == "LIVE_IMPORT"
    done, asked = 0, []
    while done < 300:
        ended = pair.on_destination(c.VpEnter(0, 300 - done)).exit
        done += ended.instructions
        if ended.reason == "ept_violation":
            pair.move([ended.gpa], stream=len(asked) % streams)
            asked.append(ended.gpa)
    assert len(set(asked)) == len(asked) > 8
    rest = sorted(set(pair.gpas.tolist()) - set(asked) - set(pair.gpas[:8].tolist()))
    if rest:
        pair.move(rest)
    pair.on_destination(c.ImportEnd())
    twin.run(0, 300)
    assert pair.destination.memory_digest() == twin.source.memory_digest()
    assert pair.destination.vcpu_digest() == twin.source.vcpu_digest()
    assert pair.source.observe()["mig_count"] == 24
    late = pair.source.execute(c.ExportMem(0, pair.gpas[:1], GpaOperation.MIGRATE)).bundle
    refused = pair.destination.execute(c.ImportMem(0, late))
    assert refused.status == Status.TDX_OP_STATE_INCORRECT


@BOTH_PROFILES
@pytest.mark.parametrize("phase", ["POST_IMPORT", "LIVE_IMPORT"])
def test_out_of_order_bundles_are_replayed_dropped_and_reordered(profile, phase):
    """A bundle again is skipped whole, its tags not even looked at; a lost one can be made anew."""
    pair = started(profile)
    first, second = pair.export(pair.gpas[8:12]), pair.export(pair.gpas[12:16])
    if phase == "LIVE_IMPORT":
        pair.on_destination(c.ImportCommit())
    for bundle in (second, first):
        assert not pair.on_destination(c.ImportMem(0, bundle)).statuses.any()
    digest = pair.destination.memory_digest()
    for replayed in (first, second, tampered(first, macs=flip(first.macs))):
        result = pair.on_destination(c.ImportMem(0, replayed))
        assert result.status == 4
        assert set(result.statuses.tolist()) == {GpaStatus.SEPT_ENTRY_STATE_INCORRECT}
    assert pair.destination.memory_digest() == digest
    assert pair.state(pair.destination) == phase
    pair.export(pair.gpas[16:20])  # lost
    pair.move(pair.gpas[16:20])
    pair.move(pair.gpas[20:])
    pair.assert_equal()


def test_a_page_written_after_it_arrived_is_not_rolled_back():
    """The replay of a bundle does not undo what the guest wrote on the destination."""
    pair = started(guest="sequential", early=20, pages=20)
    bundle = pair.export(pair.gpas[1:3])
    pair.on_destination(c.ImportCommit())
    pair.on_destination(c.VpEnter(0, 3))
    written = pair.destination.read_page(PAGE_SIZE)
    assert written != pair.source.read_page(PAGE_SIZE)
    assert pair.on_destination(c.ImportMem(0, bundle)).status == 2
    assert pair.destination.read_page(PAGE_SIZE) == written


def test_out_of_order_everything_is_migrate():
    """Whatever the list says, even for pages exported before; CANCEL is not possible any more."""
    pair = started(early=8, pages=8)
    command = c.ExportMem(0, pair.gpas[:2], GpaOperation.REMIGRATE)
    bundle = pair.on_source(command).bundle
    assert operations(bundle) == [GpaOperation.MIGRATE] * 2
    assert bundle.mbmd.mig_epoch == START_EPOCH
    result = pair.on_source(c.ExportMem(0, pair.gpas[:2], CANCEL))
    assert result.statuses.tolist() == [GpaStatus.OP_STATE_INCORRECT] * 2
    pair.assert_counts()


def test_out_of_order_bundles_need_the_start_epoch_but_no_counter():
    pair = started()
    forger, page = Forger(pair), int(pair.gpas[10])
    entry = page | GpaOperation.MIGRATE << 52
    early = forger.memory([entry], mig_epoch=5)
    assert pair.destination.execute(c.ImportMem(0, early)).status == Status.TDX_INVALID_MBMD
    any_counter = forger.memory([entry], mb_counter=77)
    assert not pair.on_destination(c.ImportMem(0, any_counter)).statuses.any()


def export_begun(interrupted):
    """LIVE_IMPORT with the first memory bundle of stream 1 to come, and a new export begun."""
    pair = started("tdx-1.5.01", streams=2)
    pair.on_destination(c.ImportCommit())
    late = pair.export(pair.gpas[8:10], stream=1)
    host, td = pair.destination_host, pair.destination.td
    pair.destination.write_migration_decryption_key(NEXT_KEY)
    buffers = host.stream_buffers(0)
    operands = {"rcx": td.tdr, "r8": buffers.mbmd_register, "r9": buffers.page_list(3)}
    first = host.seamcall(Leaf.EXPORT_STATE_IMMUTABLE, interrupt=lambda: interrupted, **operands)
    return pair, late, first, operands


NEXT_KEY = bytes(range(7, 39))


def test_a_new_export_ends_a_live_import():
    pair, late, begun, _ = export_begun(interrupted=False)
    assert begun.rax == Status.TDX_SUCCESS
    assert pair.state(pair.destination) == "LIVE_EXPORT"
    assert pair.destination.execute(c.ImportMem(1, late)).status == Status.TDX_OP_STATE_INCORRECT


@pytest.mark.parametrize("epoch", [0, START_EPOCH])
def test_while_a_new_export_is_interrupted_no_page_is_imported(epoch):
    """The export resets MIG_EPOCH to 0: neither that epoch nor the start epoch fits."""
    pair, late, begun, _ = export_begun(interrupted=True)
    assert begun.rax == Status.TDX_INTERRUPTED_RESUMABLE
    assert pair.state(pair.destination) == "LIVE_IMPORT"
    if epoch == 0:
        forger = Forger(pair)
        forger.aead = type(forger.aead)(NEXT_KEY)
        word = GpaEntry(int(pair.gpas[8]), GpaOperation.MIGRATE).to_int()
        late = forger.memory([word], migs_index=1, mig_epoch=0)
    result = pair.destination.execute(c.ImportMem(1, late))
    assert result.status == Status.TDX_INVALID_MBMD
    assert pair.state(pair.destination) == "LIVE_IMPORT"
    assert state(pair.destination, int(pair.gpas[8])) is SeptState.FREE


def test_an_import_during_an_interrupted_export_leaves_the_stream_with_the_decryption_key():
    """Stream 1 was started for it, and the resumed export does not start it again."""
    pair, late, _, operands = export_begun(interrupted=True)
    assert pair.destination.execute(c.ImportMem(1, late)).status == Status.TDX_INVALID_MBMD
    host = pair.destination_host
    resumed = host.seamcall(Leaf.EXPORT_STATE_IMMUTABLE, r10=1 << 63, **operands)
    assert resumed.rax == Status.TDX_SUCCESS
    pair.on_destination(c.ExportPause())
    bundle = pair.on_destination(c.ExportMem(1, pair.gpas[:1], GpaOperation.MIGRATE)).bundle
    tag = AESGCM(NEXT_KEY).encrypt(bundle.mbmd.iv(), b"", bundle.mbmd.aad())
    assert bundle.mbmd.mac == tag


@BOTH_PROFILES
def test_a_page_removed_after_the_start_token_never_comes_back(profile):
    """REMOVED(0xFFFFFFFF).  An attempt fails the TD before its commit, not after."""
    for commit in (False, True):
        pair = started(profile)
        gpa = int(pair.gpas[3])
        late = pair.export([gpa])
        if commit:
            pair.on_destination(c.ImportCommit())
        remove(pair, gpa, running=commit)
        assert state(pair.destination, gpa) is SeptState.REMOVED
        assert removal_epoch(pair.destination, gpa) == START_EPOCH
        result = pair.destination.execute(c.ImportMem(0, late))
        assert result.statuses.tolist() == [GpaStatus.DISALLOWED_IMPORT_OVER_REMOVED]
        if commit:
            assert result.status == REMOVED_FOR_GOOD
            assert pair.state(pair.destination) == "RUNNABLE"
            assert pair.on_destination(c.VpEnter(0, 1)).ok
        else:
            assert result.status == REMOVED_FOR_GOOD | FATAL_BIT
            assert pair.state(pair.destination) == "FAILED_IMPORT"


def test_a_removed_page_is_augmented_and_stays_the_guests_own():
    """AUG over REMOVED: the guest accepts an empty page, and a late bundle is skipped."""
    pair = started(early=24)
    gpa = int(pair.gpas[3])
    late = pair.export([gpa])
    pair.on_destination(c.ImportCommit())
    remove(pair, gpa, running=True)
    pair.destination_host.add_pending_page(pair.destination.td, gpa)
    assert state(pair.destination, gpa) is SeptState.PENDING
    assert pair.on_destination(c.ImportMem(0, late)).status == 1
    assert state(pair.destination, gpa) is SeptState.PENDING
    pair.on_destination(c.VpEnter(0, 20))
    assert state(pair.destination, gpa) is SeptState.MAPPED
    assert pair.destination.read_page(gpa).count(0) >= PAGE_SIZE - 8
    assert pair.on_destination(c.ImportMem(0, late)).status == 1


def test_after_the_end_a_removed_page_leaves_nothing_behind():
    pair = started(early=24)
    pair.on_destination(c.ImportEnd())
    gpa = int(pair.gpas[3])
    remove(pair, gpa, running=True)
    assert state(pair.destination, gpa) is SeptState.FREE


# --- cancelled, restored and pending pages -------------------------------------------------------


def test_cancel_is_remembered_for_its_epoch():
    """REMOVED(epoch): the page comes back with a newer epoch, not with the same one."""
    pair = Pair(6)
    gpa = int(pair.gpas[3])
    pair.start()
    pair.pause()
    pair.move(pair.gpas)
    pair.epoch()
    pair.move([gpa], operation=CANCEL)
    assert removal_epoch(pair.destination, gpa) == 1
    assert pair.destination.td.page_hpas.get(gpa) is None
    for _ in range(2):
        pair.epoch()
        pair.move([gpa])
        pair.epoch()
        pair.move([gpa], operation=CANCEL)
    pair.epoch()
    pair.move([gpa])
    pair.states()
    pair.start_token()
    pair.assert_equal()
    pair.assert_counts()


def test_a_cancelled_page_exported_again_in_its_epoch_is_fatal():
    pair = Pair(6)
    gpa = int(pair.gpas[3])
    pair.start()
    pair.pause()
    pair.move(pair.gpas)
    pair.epoch()
    pair.move([gpa], operation=CANCEL)
    result = pair.destination.execute(c.ImportMem(0, pair.export([gpa])))
    assert result.status == REMOVED_FOR_GOOD | FATAL_BIT


@pytest.mark.parametrize("dirty", [False, True])
def test_cancel_of_a_pending_page(dirty):
    """Exported pending, clean or unblocked since: PENDING again here, REMOVED there."""
    pair = Pair(6, pending_pages=1)
    gpa = int(pair.gpas[5])
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    assert state(pair.destination, gpa) is SeptState.PENDING
    if dirty:
        pair.on_source(c.ExportUnblockw(gpa))
        assert state(pair.source, gpa) is SeptState.PENDING_EXPORTED_DIRTY
        pair.block([gpa])
        assert state(pair.source, gpa) is SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW
    pair.epoch()
    pair.move([gpa], operation=CANCEL)
    assert state(pair.source, gpa) is SeptState.PENDING
    assert state(pair.destination, gpa) is SeptState.REMOVED
    pair.assert_counts()
    assert pair.source.observe()["dirty_count"] == 0
    pair.pause()
    pair.epoch()
    pair.move([gpa])
    pair.states()
    pair.start_token()
    pair.assert_equal()


@BOTH_PROFILES
def test_remigration_of_pending_pages(profile):
    """Pending stays pending; once accepted, its content replaces the pending page there."""
    pair = Pair(6, pending_pages=2, profile=profile, guest="sequential")
    untouched, accepted = pair.gpas[4:].tolist()
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    for gpa in (untouched, accepted):
        pair.on_source(c.ExportUnblockw(gpa))
    pair.block([untouched])
    pair.epoch()
    bundle = pair.export([untouched])
    assert operations(bundle) == [GpaOperation.REMIGRATE]
    assert not pair.on_destination(c.ImportMem(0, bundle)).statuses.any()
    assert state(pair.destination, untouched) is SeptState.PENDING
    assert state(pair.source, untouched) is SeptState.PENDING_EXPORTED_BLOCKEDW
    pair.on_source(c.ExportUnblockw(untouched))
    for _ in range(20):
        pair.run(0, 4)
    assert state(pair.source, accepted) is SeptState.EXPORTED_DIRTY
    pair.assert_counts()
    pair.pause()
    pair.epoch()
    dirty = [
        gpa for gpa in pair.gpas.tolist() if state(pair.source, gpa) is SeptState.EXPORTED_DIRTY
    ]
    assert {untouched, accepted} <= set(dirty)
    pair.move(dirty)
    pair.states()
    pair.start_token()
    pair.assert_equal()


def test_an_accepted_page_does_not_become_pending_again():
    """A REMIGRATE that says pending, over a mapped page: the import ends."""
    pair = Pair(6)
    gpa = int(pair.gpas[3])
    pair.start()
    pair.pause()
    pair.move(pair.gpas)
    pair.epoch()
    entry = gpa | GpaOperation.REMIGRATE << 52 | 1 << 2
    forged = Forger(pair).memory([entry])
    result = pair.destination.execute(c.ImportMem(0, forged))
    mismatch = with_operand(Status.TDX_IMPORT_MISMATCH, Operand.GPA_LIST_ENTRY)
    assert result.status == mismatch | FATAL_BIT


@BOTH_PROFILES
def test_restore_takes_every_exported_state_back(profile):
    """All six exported states, and three that were not exported and are refused."""
    pair = Pair(12, pending_pages=5, profile=profile, guest="idle")
    pair.start()
    gpas = pair.gpas
    clean, dirty, blocked = gpas[1], gpas[2], gpas[3]
    pending_clean, pending_dirty, pending_blocked = gpas[7], gpas[8], gpas[9]
    chosen = [clean, dirty, blocked, pending_clean, pending_dirty, pending_blocked]
    pair.block([*chosen, gpas[4], gpas[10]])
    pair.move(chosen)
    for gpa in (dirty, blocked, pending_dirty, pending_blocked):
        pair.on_source(c.ExportUnblockw(int(gpa)))
    pair.block([blocked, pending_blocked])
    assert pair.source.page_states(np.array(chosen)).tolist() == [7, 8, 9, 13, 14, 15]
    assert pair.source.observe()["dirty_count"] == 4
    in_session = pair.source.execute(c.ExportRestore(gpas))
    assert in_session.status == Status.TDX_OP_STATE_INCORRECT
    pair.on_source(c.ExportAbort(None))
    result = pair.on_source(c.ExportRestore(gpas))
    restored = {int(gpa) for gpa in chosen}
    expected = [0 if int(gpa) in restored else GpaStatus.SEPT_ENTRY_STATE_INCORRECT for gpa in gpas]
    assert result.statuses.tolist() == expected
    assert result.status == 6
    assert pair.source.page_states(np.array(chosen)).tolist() == [4, 4, 4, 10, 10, 10]
    assert pair.source.page_states(gpas[[4, 10]]).tolist() == [6, 12]
    assert pair.source.observe()["mig_count"] == 0
    # Never reset by RESTORE, and without a meaning until a session starts.
    assert pair.source.observe()["dirty_count"] == 4
    for gpa in gpas[[4, 10]].tolist():
        pair.on_source(c.ExportUnblockw(gpa))
    pair.new_destination()
    pair.exchange_keys()
    pair.start()
    assert pair.source.observe()["dirty_count"] == 0
    pair.pause()
    pair.move(gpas)
    pair.states()
    pair.start_token()
    pair.assert_equal()


def test_exported_pages_can_be_neither_blocked_nor_removed():
    pair = Pair(4)
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    host, td = pair.source_host, pair.source.td
    wrong = with_operand(Status.TDX_EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    for leaf in (Leaf.MEM_RANGE_BLOCK, Leaf.MEM_PAGE_REMOVE):
        assert host.seamcall(leaf, rcx=PAGE_SIZE, rdx=td.tdr).rax == wrong
    pair.on_source(c.ExportUnblockw(PAGE_SIZE))
    for leaf in (Leaf.MEM_RANGE_BLOCK, Leaf.MEM_PAGE_REMOVE):
        assert host.seamcall(leaf, rcx=PAGE_SIZE, rdx=td.tdr).rax == wrong
    pair.assert_counts()


def test_a_page_removed_before_its_export_is_only_missed():
    """Its entry is refused in the list; the rest of the bundle goes, and both sides are equal."""
    pair = Pair(6)
    pair.start()
    pair.block(pair.gpas)
    gpa = int(pair.gpas[2])
    remove(pair, gpa, side="source", running=True)
    result = pair.on_source(c.ExportMem(0, pair.gpas, GpaOperation.MIGRATE))
    assert result.status == 1
    assert result.statuses.tolist() == [0, 0, GpaStatus.SEPT_ENTRY_STATE_INCORRECT, 0, 0, 0]
    pair.on_destination(c.ImportMem(0, result.bundle))
    pair.pause()
    pair.states()
    pair.start_token()
    pair.assert_equal()
    pair.on_destination(c.ImportEnd())
    assert pair.on_destination(c.VpEnter(0, 9)).exit == c.VcpuExit("ept_violation", gpa, 2)


def test_replayed_tokens_and_states_out_of_order():
    """After the start token the in-order leaves are closed."""
    pair = Pair(6)
    pair.start()
    pair.pause()
    pair.move(pair.gpas)
    td_state = pair.on_source(c.ExportStateTd()).bundle
    pair.on_destination(c.ImportStateTd(td_state))
    vcpu = pair.on_source(c.ExportStateVp(0)).bundle
    pair.on_destination(c.ImportStateVp(vcpu, 0))
    token = pair.on_source(c.ExportTrack(True)).bundle
    pair.on_destination(c.ImportTrack(token))
    for command in (c.ImportTrack(token), c.ImportStateTd(td_state), c.ImportStateVp(vcpu, 0)):
        assert pair.destination.execute(command).status == Status.TDX_OP_STATE_INCORRECT
    assert pair.state(pair.destination) == "POST_IMPORT"
