"""Does every backend do what the engine takes for granted, command by command?

Each test runs over the software module itself and over KVM's interface to it, as either end.  What
an interface has no command for is skipped with the name of what is missing.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from ends import exchange_keys
from soft_pair import flip, tampered

from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.gpa_list import (
    GpaOperation,
    GpaStatus,
    entries_from_bytes,
    entry_gpas,
    entry_operations,
)
from tdxmig_model.wire.mbmd import BundleType, Mbmd
from tdxmig_model.wire.records import Bundle

MIGRATE, CANCEL = GpaOperation.MIGRATE, GpaOperation.CANCEL
PAGES = 40


def start(source, destination):
    destination.do(c.ImportStateImmutable(source.do(c.ExportStateImmutable()).bundle))
    epoch(source, destination)


def epoch(source, destination, final=False):
    destination.do(c.ImportTrack(source.do(c.ExportTrack(final)).bundle))


def block(source, gpas):
    assert not source.do(c.ExportBlockw(gpas)).statuses.any()
    source.do(c.MemTrack())


def move(source, destination, gpas, *, stream=0, operation=MIGRATE):
    exported = source.do(c.ExportMem(stream, gpas, operation))
    assert not exported.statuses.any()
    imported = destination.do(c.ImportMem(stream, exported.bundle))
    assert not imported.statuses.any()
    return exported.bundle


def states(source, destination, vcpus=1):
    destination.do(c.ImportStateTd(source.do(c.ExportStateTd()).bundle))
    for vcpu in range(vcpus):
        destination.do(c.ImportStateVp(source.do(c.ExportStateVp(vcpu)).bundle, vcpu))


def assert_equal(source, destination):
    assert source.truth.memory_digest() == destination.truth.memory_digest()
    assert source.truth.vcpu_digest() == destination.truth.vcpu_digest()


def run(source, budget):
    """Let the guest run; the pages that it wrote to although they were write-blocked."""
    if source.kvm is not None:
        before = source.dirty_pages()
        assert source.run(0, budget).reason == "budget"
        return np.setdiff1d(source.dirty_pages(), before)
    written = set()
    while budget > 0:
        ended = source.run(0, budget)
        budget -= ended.instructions
        if ended.reason == "ept_violation":
            source.do(c.ExportUnblockw(ended.gpa))
            written.add(ended.gpa)
    return np.array(sorted(written), dtype=np.uint64)


@pytest.mark.parametrize("streams", [1, 3])
def test_a_running_td_moves_in_epochs_on_all_streams(ends, streams):
    source, destination = ends.pair(PAGES, vcpus=2, streams=streams)
    gpas = source.truth.page_gpas()
    start(source, destination)
    block(source, gpas)
    for number, batch in enumerate(np.array_split(gpas, 5)):
        move(source, destination, batch, stream=number % streams)
    for number in range(3):
        written = run(source, 20)
        assert written.size
        block(source, written)
        epoch(source, destination)
        move(source, destination, written, stream=number % streams)
    source.do(c.ExportPause())
    states(source, destination, 2)
    epoch(source, destination, final=True)
    destination.do(c.ImportCommit())
    assert_equal(source, destination)
    assert (source.state, destination.state) == ("POST_EXPORT", "LIVE_IMPORT")
    destination.do(c.ImportEnd())
    assert destination.state == "RUNNABLE"
    assert destination.run(1, 20).reason == "budget"


def test_a_bundle_is_what_was_asked_for_and_stays_as_it_is(ends):
    source, destination = ends.pair(PAGES)
    gpas = source.truth.page_gpas()
    start(source, destination)
    source.do(c.ExportPause())
    bundle = source.do(c.ExportMem(0, gpas[:6], MIGRATE)).bundle
    kept = Bundle.of(
        bundle.mbmd, [bytes(page) for page in bundle.pages], bundle.gpa_list, bundle.macs
    )
    entries = entries_from_bytes(bundle.gpa_list)
    assert entry_gpas(entries).tolist() == gpas[:6].tolist()
    assert set(entry_operations(entries).tolist()) == {MIGRATE}
    assert (bundle.mbmd.bundle_type, bundle.mbmd.num_gpas) == (BundleType.MEM, 6)
    assert (len(bundle.pages), len(bundle.macs)) == (6, 96)
    assert {len(page) for page in bundle.pages} == {4096}
    source.do(c.ExportMem(0, gpas[6:12], MIGRATE))
    assert [bytes(page) for page in bundle.pages] == kept.pages
    assert not destination.do(c.ImportMem(0, kept)).statuses.any()
    for gpa in gpas[:6].tolist():
        assert source.truth.read_page(gpa) == destination.truth.read_page(gpa)


def test_entries_that_fail_do_not_fail_the_call(ends):
    source, destination = ends.pair(PAGES)
    start(source, destination)
    source.do(c.ExportPause())
    column = np.array([1, PAGES + 3, 2], dtype=np.uint64) << np.uint64(12)
    result = source.do(c.ExportMem(0, column, MIGRATE))
    wrong = GpaStatus.SEPT_ENTRY_STATE_INCORRECT
    assert result.statuses.tolist() == [0, wrong, 0]
    operations = entry_operations(entries_from_bytes(result.bundle.gpa_list))
    assert operations.tolist() == [MIGRATE, GpaOperation.NOP, MIGRATE]
    imported = destination.do(c.ImportMem(0, result.bundle))
    assert imported.statuses.tolist() == [0, GpaStatus.SKIPPED, 0]
    again = source.do(c.ExportMem(0, column[:1], MIGRATE))
    assert again.statuses.tolist() == [wrong]


def test_a_cancelled_page_is_gone_and_comes_back(ends):
    source, destination = ends.pair(PAGES)
    gpas = source.truth.page_gpas()
    start(source, destination)
    block(source, gpas)
    move(source, destination, gpas)
    epoch(source, destination)
    move(source, destination, gpas[3:5], operation=CANCEL)
    there = destination.truth.page_states(gpas[3:5])
    assert set(there.tolist()) == {SeptState.REMOVED}
    source.do(c.ExportPause())
    epoch(source, destination)
    move(source, destination, gpas[3:5])
    states(source, destination)
    epoch(source, destination, final=True)
    assert_equal(source, destination)


def test_pages_follow_the_start_token_while_the_td_runs(ends):
    source, destination = ends.pair(PAGES)
    early, late = np.array_split(source.truth.page_gpas(), 2)
    start(source, destination)
    source.do(c.ExportPause())
    move(source, destination, early)
    states(source, destination)
    epoch(source, destination, final=True)
    destination.do(c.ImportCommit())
    missing = destination.run(0, 2000)
    assert missing.reason == "ept_violation"
    assert missing.gpa is not None
    assert missing.gpa & -4096 in late.tolist()
    move(source, destination, late)
    for gpa in late.tolist():
        assert source.truth.read_page(gpa) == destination.truth.read_page(gpa)
    destination.do(c.ImportEnd())
    assert destination.run(0, 10).reason == "budget"


def test_an_abort_gives_the_td_back_for_another_session(ends):
    source, destination = ends.pair(PAGES)
    gpas = source.truth.page_gpas()
    start(source, destination)
    block(source, gpas)
    move(source, destination, gpas[:30])
    run(source, 15)
    source.do(c.ExportAbort(None))
    assert not source.do(c.ExportRestore(gpas[:30])).statuses.any()
    assert source.state == "RUNNABLE"
    assert source.truth.observe()["mig_count"] == 0
    assert source.backend.execute(c.ExportStateImmutable()).ok is False  # no key yet
    again = ends.destination(PAGES, vcpus=1, streams=1)
    exchange_keys(source, again)
    start(source, again)
    source.do(c.ExportPause())
    move(source, again, gpas)
    states(source, again)
    epoch(source, again, final=True)
    assert_equal(source, again)


def test_an_abort_token_gives_the_td_back_after_the_start_token(ends):
    source, destination = ends.pair(PAGES)
    for end in (source, destination):
        end.need("abort_token")
    start(source, destination)
    source.do(c.ExportPause())
    states(source, destination)
    epoch(source, destination, final=True)
    token = destination.do(c.ImportAbort()).bundle.mbmd
    assert token.bundle_type is BundleType.ABORT_TOKEN
    assert not source.backend.execute(c.ExportAbort(flip(token.pack(), 40))).ok
    source.do(c.ExportAbort(token.pack()))
    assert (source.state, destination.state) == ("RUNNABLE", "FAILED_IMPORT")


def test_without_a_token_nothing_is_aborted_after_the_start_token(ends):
    source, destination = ends.pair(PAGES)
    start(source, destination)
    source.do(c.ExportPause())
    states(source, destination)
    epoch(source, destination, final=True)
    assert not source.backend.execute(c.ExportAbort(None)).ok
    assert source.state == "POST_EXPORT"


@pytest.mark.parametrize("what", ["mbmd", "macs", "page", "entry"])
def test_a_changed_bundle_is_refused_and_the_td_never_runs(ends, what):
    source, destination = ends.pair(PAGES)
    start(source, destination)
    source.do(c.ExportPause())
    bundle = source.do(c.ExportMem(0, source.truth.page_gpas()[:4], MIGRATE)).bundle
    changes = {
        "mbmd": {"mbmd": bundle.mbmd.with_mac(flip(bundle.mbmd.mac))},
        "macs": {"macs": flip(bundle.macs, 33)},
        "page": {"pages": [*bundle.pages[:3], flip(bytes(bundle.pages[3]), 9)]},
        "entry": {"gpa_list": flip(bundle.gpa_list, 2)},
    }
    refused = destination.backend.execute(c.ImportMem(0, tampered(bundle, **changes[what])))
    assert not refused.ok
    assert refused.status_name
    assert not destination.truth.execute(c.VpEnter(0, 1)).ok


@pytest.mark.parametrize("kind", [*get_args(c.SourceCommand), *get_args(c.DestinationCommand)])
def test_a_command_out_of_place_is_a_result_and_changes_nothing(ends, kind):
    """Before a session: every command of the other end's, and every later one of one's own."""
    source, destination = ends.pair(PAGES)
    page = np.array([0x1000], dtype=np.uint64)
    state = Bundle.of(Mbmd.td_state(mb_counter=1, mig_epoch=1, iv_counter=1), [bytes(4096)] * 5)
    memory = Bundle.of(
        Mbmd.memory(num_gpas=1, mb_counter=1, mig_epoch=1, iv_counter=1),
        [bytes(4096)],
        bytes(8),
        bytes(16),
    )
    token = Bundle.of(Mbmd.epoch_token(total_mb=1, mig_epoch=1, iv_counter=1))
    arguments = {
        c.ExportBlockw: (page,),
        c.ExportUnblockw: (0x1000,),
        c.ExportMem: (0, page, MIGRATE),
        c.ExportStateVp: (0,),
        c.ExportRestore: (page,),
        c.ImportStateImmutable: (state,),
        c.ImportMem: (0, memory),
        c.ImportTrack: (token,),
        c.ImportStateTd: (state,),
        c.ImportStateVp: (state, 0),
        c.VpEnter: (0, 1),
    }
    fits = {
        "RUNNABLE": (c.ExportStateImmutable, c.ExportRestore, c.MemTrack, c.VpEnter),
        # It has no vCPU yet, so that naming one is a mistake of the caller.
        "UNINITIALIZED": (c.ImportStateImmutable, c.ExportStateVp),
    }
    for end in (source, destination):
        before = end.truth.observe()
        # A VMM may clear the dirty log, and have TLBs tracked, at any time.
        harmless = end.kvm is not None and kind in (c.ExportBlockw, c.MemTrack)
        if kind in fits[before["op_state"]] or harmless:
            continue
        result = end.backend.execute(kind(*arguments.get(kind, ())))
        assert not result.ok, kind.name
        assert result.status_name
        assert end.truth.observe() == before


def test_what_is_no_command_is_a_mistake_of_the_caller(ends):
    source, _ = ends.pair(PAGES)
    with pytest.raises(UsageError, match="not a command of a migration backend"):
        source.backend.execute("export_pause")


def test_capabilities_are_words_and_stay_the_same(ends):
    for end in ends.pair(PAGES):
        capabilities = end.backend.capabilities
        assert capabilities
        assert all(isinstance(word, str) for word in capabilities)
        assert capabilities == end.backend.capabilities
