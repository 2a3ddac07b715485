"""Streams to their limits, long lists, interruptions, sessions, abort tokens: does it all hold?"""

from dataclasses import replace

import pytest
from soft_calls import export, exported, load
from soft_pair import MIGRATE, Forger, Pair, flip, tampered

from tdxmig_model.backend.soft.backend import SoftBackend
from tdxmig_model.backend.soft.host import Host
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.schedulers import resume_operands
from tdxmig_model.backend.soft.sept import (
    SeptState,
)
from tdxmig_model.backend.soft.snapshot import Snapshot
from tdxmig_model.backend.soft.status import FATAL_BIT, Operand, Status, with_operand
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.constants import PAGE_SIZE

INTERRUPTED, SUCCESS = Status.TDX_INTERRUPTED_RESUMABLE, Status.TDX_SUCCESS
WRONG = Status.TDX_INVALID_RESUMPTION
RESUME = 1 << 63
BOTH_PROFILES = pytest.mark.parametrize("profile", ["hardened", "tdx-1.5.01"])


def after(entries):
    """A host interrupt that comes once, after so many list entries or pages."""
    countdown = iter([*[False] * (entries - 1), True])
    return lambda: next(countdown, False)


def run(host, call, interrupt=None):
    """The call until it is done, resumed as often as needed; statuses of the attempts."""
    operands, statuses = call.operands, []
    while True:
        left = replace(operands)
        statuses.append(host.module.call(call.leaf, left, lp=call.lp, interrupt=interrupt))
        if statuses[-1] != INTERRUPTED:
            return statuses
        operands = resume_operands(call.leaf, operands, left)


def parts(bundle):
    """A bundle as comparable bytes."""
    return bundle.mbmd.pack(), bundle.gpa_list, bundle.macs, *(bytes(page) for page in bundle.pages)


# --- as many streams as there can be -------------------------------------------------------------


def test_five_hundred_and_eleven_forward_streams():
    """512 contexts, one of them backward: a page on each, counters and IVs of their own."""
    pair = Pair(512, streams=511)
    td = pair.source.td
    one_more = pair.source_host.take_private_pages(1)[0]
    refused = pair.source_host.seamcall(Leaf.MIG_STREAM_CREATE, rcx=one_more, rdx=td.tdr).rax
    assert refused == Status.TDX_MAX_MIGS_NUM_EXCEEDED
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    assert bundle.mbmd.num_forward_streams == 511
    pair.on_destination(c.ImportStateImmutable(bundle))
    pair.pause()
    # Streams are independent within an epoch: they arrive in another order than they left.
    sent = {n: pair.export(pair.gpas[n : n + 1], stream=n) for n in range(511)}
    for stream in sorted(sent, key=lambda n: (n * 157) % 511):
        assert not pair.on_destination(c.ImportMem(stream, sent[stream])).statuses.any()
    assert [bundle.mbmd.migs_index for bundle in sent.values()] == list(range(511))
    pair.epoch()
    pair.move(pair.gpas[511:], stream=510)
    pair.on_destination(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))
    vcpu = pair.on_source(c.ExportStateVp(0, 300)).bundle
    assert vcpu.mbmd.migs_index == 300
    pair.on_destination(c.ImportStateVp(vcpu, 0))
    pair.start_token()
    source, destination = pair.source.observe(), pair.destination.observe()
    # Immutable state, 511 bundles, an epoch token, another bundle, TD, vCPU, start token.
    assert source["total_mb_count"] == destination["total_mb_count"] == 1 + 511 + 1 + 1 + 2 + 1
    assert source["next_mb_counter"] == destination["expected_mb_counter"]
    assert source["next_mb_counter"] == [1, *[1] * 299, 2, *[1] * 209, 2]
    assert all(source["initialized"])
    assert source["num_migs"] == 512
    past = pair.source.execute(c.ExportMem(511, pair.gpas[:1], MIGRATE))
    assert past.status == with_operand(Status.TDX_OPERAND_INVALID, Operand.R10)
    pair.assert_equal()
    pair.assert_counts()
    pair.abort_with_token()
    assert not any(pair.source.observe()["initialized"])
    assert len(set(pair.iv_pairs)) == len(pair.iv_pairs)


# --- lists of 512 entries ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full():
    """520 pages, paused; the destination has the tables for them.  Put back before each test."""
    pair = Pair(520, streams=2, pending_pages=4)
    pair.start()
    pair.pause()
    pair.destination_host.add_tables(pair.destination.td, pair.gpas)
    pair.pages = pair.destination_host.take_private_pages(512)
    sides = pair.source_host, pair.destination_host
    pair.snapshots = [Snapshot(host.module) for host in sides]
    return pair


@pytest.fixture
def long(full):
    for snapshot in full.snapshots:
        snapshot.restore()
    return full


LIST = slice(8, 520)
"""512 pages, the last four of them pending."""
POINTS = sorted({1, 2, *range(37, 511, 37), 255, 256, 257, 258, 510, 511})


def test_a_full_list_interrupted_anywhere_is_the_same_bundle(long):
    """Both MAC pages are filled, and continued wherever the call stops."""
    source, destination = long.source_host, long.destination_host
    assert run(source, export(long, long.gpas[LIST])) == [SUCCESS]
    plain = exported(long, 512)
    assert len(plain.macs) == 16 * 512
    digests = set()
    for point in POINTS:
        for snapshot in long.snapshots:
            snapshot.restore()
        call = export(long, long.gpas[LIST])
        source.stream_buffers(0).write_macs(bytes(16 * 512))
        assert run(source, call, after(point)) == [INTERRUPTED, SUCCESS]
        assert parts(exported(long, 512)) == parts(plain)
        call = load(long, plain, long.pages)
        assert run(destination, call, after(point)) == [INTERRUPTED, SUCCESS]
        assert long.destination.observe()["total_mb_count"] == 2
        digests.add(long.destination.memory_digest())
    assert len(digests) == 1


def test_a_full_list_interrupted_after_every_entry(long):
    statuses = run(long.source_host, export(long, long.gpas[LIST]), lambda: True)
    assert statuses == [INTERRUPTED] * 511 + [SUCCESS]
    call = load(long, exported(long, 512), long.pages)
    assert run(long.destination_host, call, lambda: True) == statuses
    for gpa in long.gpas[LIST][:508].tolist():
        assert long.source.read_page(gpa) == long.destination.read_page(gpa)
    assert set(long.destination.page_states(long.gpas[516:])) == {SeptState.PENDING}


@pytest.mark.parametrize(("count", "pages"), [(1, 3), (256, 258), (257, 260), (508, 511)])
def test_rdx_counts_list_mac_and_content_pages(long, count, pages):
    left = replace(export(long, long.gpas[8 : 8 + count]).operands)
    assert long.source_host.module.call(Leaf.EXPORT_MEM, left) == SUCCESS
    assert left.rdx == pages


def test_only_the_mac_pages_that_a_list_needs_are_looked_at(long):
    """R11 for entries below 256, R12 for the others; a RESUME at 256 has no need of R11."""
    host, bad = long.source_host, 1 << 51
    short, whole = export(long, long.gpas[8:264]), export(long, long.gpas[LIST])
    module = host.module
    r11 = with_operand(Status.TDX_OPERAND_INVALID, Operand.R11)
    r12 = with_operand(Status.TDX_OPERAND_INVALID, Operand.R12)
    assert module.call(Leaf.EXPORT_MEM, replace(whole.operands, r11=bad)) == r11
    assert module.call(Leaf.EXPORT_MEM, replace(whole.operands, r12=bad)) == r12
    short = export(long, long.gpas[8:264])
    assert module.call(Leaf.EXPORT_MEM, replace(short.operands, r12=bad)) == SUCCESS
    long.snapshots[0].restore()
    whole = export(long, long.gpas[LIST])
    left = replace(whole.operands)
    assert module.call(Leaf.EXPORT_MEM, left, interrupt=after(256)) == INTERRUPTED
    again = resume_operands(Leaf.EXPORT_MEM, whole.operands, left)
    # Not looked at, but still compared with what the call began with.
    assert module.call(Leaf.EXPORT_MEM, replace(again, r11=bad)) == WRONG


def test_a_list_of_restored_pages_is_interrupted_too(long):
    assert run(long.source_host, export(long, long.gpas[LIST])) == [SUCCESS]
    long.on_source(c.ExportAbort(None))
    long.source.interrupt = lambda: True
    try:
        assert not long.on_source(c.ExportRestore(long.gpas[LIST])).statuses.any()
    finally:
        long.source.interrupt = None
    assert long.source.observe()["mig_count"] == 0
    assert set(long.source.page_states(long.gpas[516:])) == {SeptState.PENDING}


# --- wrong resumes and abandoned calls -----------------------------------------------------------


def stopped_export(pair, stream=0):
    """An EXPORT.MEM stopped after its first entry: its host, and the operands that resume it."""
    call = export(pair, pair.gpas, stream=stream)
    left = replace(call.operands)
    host = pair.source_host
    assert host.module.call(call.leaf, left, interrupt=after(1)) == INTERRUPTED
    return host.module, resume_operands(call.leaf, call.operands, left)


def stopped_import(pair):
    """The same for IMPORT.MEM."""
    bundle = pair.export(pair.gpas)
    host = pair.destination_host
    host.add_tables(pair.destination.td, pair.gpas)
    call = load(pair, bundle, host.take_private_pages(pair.gpas.size))
    left = replace(call.operands)
    assert host.module.call(call.leaf, left, interrupt=after(1)) == INTERRUPTED
    return host.module, resume_operands(call.leaf, call.operands, left)


def paused(profile="hardened", **more):
    pair = Pair(6, profile=profile, **more)
    pair.start()
    pair.pause()
    return pair


NEXT_ENTRY, NEXT_PAGE = 1 << 3, PAGE_SIZE


@BOTH_PROFILES
@pytest.mark.parametrize(
    ("register", "change"),
    [("rcx", NEXT_ENTRY), ("r9", NEXT_PAGE), ("r11", NEXT_PAGE), ("r12", NEXT_PAGE)],
)
def test_a_memory_export_resumed_with_another_parameter(profile, register, change):
    """Refused without an effect.  Published: the call is lost; repaired: it can be resumed."""
    pair = paused(profile)
    module, operands = stopped_export(pair)
    before = pair.source.observe()
    other = replace(operands, **{register: getattr(operands, register) + change})
    assert module.call(Leaf.EXPORT_MEM, other) == WRONG
    assert pair.source.observe() == before
    right = module.call(Leaf.EXPORT_MEM, replace(operands))
    assert right == (SUCCESS if profile == "hardened" else WRONG)
    pair.assert_counts()


@pytest.mark.parametrize(
    ("register", "change"),
    [
        ("rcx", NEXT_ENTRY),
        ("r9", NEXT_PAGE),
        ("r11", NEXT_PAGE),
        ("r12", NEXT_PAGE),
        ("r13", NEXT_PAGE),
    ],
)
def test_a_memory_import_resumed_with_another_parameter(register, change):
    """Plain, but the bundle can no longer be finished, and so the epoch cannot either."""
    pair = paused("tdx-1.5.01")
    module, operands = stopped_import(pair)
    other = replace(operands, **{register: getattr(operands, register) + change})
    assert module.call(Leaf.IMPORT_MEM, other) == WRONG
    assert pair.state(pair.destination) == "MEMORY_IMPORT"
    assert module.call(Leaf.IMPORT_MEM, replace(operands)) == WRONG
    token = pair.on_source(c.ExportTrack()).bundle
    result = pair.destination.execute(c.ImportTrack(token))
    assert result.status == Status.TDX_INVALID_MBMD | FATAL_BIT


def test_a_resume_by_another_leaf_or_stream():
    pair = paused("tdx-1.5.01", streams=2)
    module, operands = stopped_export(pair)
    other_stream = replace(operands, r10=RESUME | 1)
    unused = Status.TDX_MIGRATION_STREAM_STATE_INCORRECT
    assert module.call(Leaf.EXPORT_MEM, other_stream) == unused
    vcpu = replace(operands, rcx=pair.source.td.vcpus[0])
    assert module.call(Leaf.EXPORT_STATE_VP, vcpu) == WRONG
    assert module.call(Leaf.EXPORT_MEM, replace(operands)) == WRONG


def test_a_resume_in_another_epoch():
    """Published: EXPORT.TRACK forgets what stream 0 interrupted; on others the epoch differs."""
    for stream in (0, 1):
        pair = paused("tdx-1.5.01", streams=2)
        module, operands = stopped_export(pair, stream)
        bundle = pair.on_source(c.ExportTrack()).bundle
        assert module.call(Leaf.EXPORT_MEM, operands) == WRONG
        # The destination has had every bundle that was counted.
        pair.on_destination(c.ImportTrack(bundle))


@pytest.mark.parametrize("changed", ["r9", "rcx", "leaf"])
def test_vcpu_state_resumed_with_another_parameter(changed):
    pair = paused("tdx-1.5.01", vcpus=2)
    buffers, vcpus = pair.source_host.stream_buffers(0), pair.source.td.vcpus
    module = pair.source_host.module
    operands = {"rcx": vcpus[0], "r8": buffers.mbmd_register, "r9": buffers.page_list(16)}
    stop = pair.source_host.seamcall(Leaf.EXPORT_STATE_VP, interrupt=after(2), **operands)
    assert (stop.rax, stop.rdx) == (INTERRUPTED, 2)
    resumed = {**operands, "r10": RESUME}
    other = {
        "r9": {"r9": buffers.page_list(17)},
        "rcx": {"rcx": vcpus[1]},
        "leaf": {"rcx": pair.source.td.tdr},
    }[changed]
    leaf = Leaf.EXPORT_STATE_TD if changed == "leaf" else Leaf.EXPORT_STATE_VP
    lp = pair.source.td.processors[1] if changed == "rcx" else 0
    assert pair.source_host.seamcall(leaf, lp=lp, **{**resumed, **other}).rax == WRONG
    assert pair.source_host.seamcall(Leaf.EXPORT_STATE_VP, **resumed).rax == WRONG
    assert module.tdvps[vcpus[0]].export_count == 0
    # Not exported, so it can be exported anew, with another IV.
    pair.move(pair.gpas)
    pair.states()
    pair.start_token()
    assert len(set(pair.iv_pairs)) == len(pair.iv_pairs)


@BOTH_PROFILES
def test_a_new_bundle_over_an_unfinished_one(profile):
    pair = paused(profile)
    module, operands = stopped_export(pair)
    result = pair.source.execute(c.ExportMem(0, pair.gpas[1:2], MIGRATE))
    if profile == "hardened":
        assert result.status == WRONG
        export(pair, pair.gpas)  # the list that the refused call overwrote
        assert module.call(Leaf.EXPORT_MEM, replace(operands)) == SUCCESS
        assert pair.source.observe()["total_mb_count"] == 2
        return
    assert result.status == SUCCESS
    assert module.call(Leaf.EXPORT_MEM, replace(operands)) == WRONG
    seen = pair.source.observe()
    # What the discarded bundle carried is marked exported, and nobody counts it.
    assert (seen["total_mb_count"], seen["mig_count"], seen["next_mb_counter"]) == (2, 2, [2])
    pair.assert_counts()


def test_an_import_is_given_up_by_a_new_bundle_even_if_that_is_refused():
    pair = paused("tdx-1.5.01")
    module, operands = stopped_import(pair)
    forged = Forger(pair).memory([0])
    wrong = tampered(forged, mbmd=forged.mbmd.with_mac(bytes(16)))
    bad = load(pair, wrong, pair.destination_host.take_private_pages(1))
    assert module.call(Leaf.IMPORT_MEM, bad.operands) == Status.TDX_INCORRECT_MBMD_MAC
    assert module.call(Leaf.IMPORT_MEM, replace(operands)) == WRONG
    assert pair.state(pair.destination) == "MEMORY_IMPORT"


# --- several sessions and destinations -----------------------------------------------------------


def another_destination(pair, key):
    """A host of its own with a TD that waits, and this decryption key."""
    host = Host(memory_bytes=pair.gpas.size * PAGE_SIZE, shared_bytes=4 * 528 * PAGE_SIZE)
    backend = SoftBackend(host, host.create_destination_td(vcpus=pair.vcpus))
    backend.write_migration_decryption_key(key)
    return backend


def test_destinations_with_other_keys_cannot_import():
    pair = Pair(6)
    keys = [bytes(range(1, 33)), flip(pair.source._tdcs.mig_enc_key, 31), bytes(range(32))]
    others = [another_destination(pair, key) for key in keys]
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    for other in others:
        result = other.execute(c.ImportStateImmutable(bundle))
        assert result.status == Status.TDX_INCORRECT_MBMD_MAC | FATAL_BIT
        assert other.observe()["op_state"] == "FAILED_IMPORT"
        token = other.execute(c.ImportAbort()).bundle.mbmd.pack()
        assert pair.source.execute(c.ExportAbort(token)).status == with_operand(
            Status.TDX_OPERAND_INVALID, Operand.R8
        )
    pair.on_destination(c.ImportStateImmutable(bundle))
    pair.finish_in_pause()
    for other in others:
        token = other.execute(c.ImportAbort()).bundle.mbmd.pack()
        refused = pair.source.execute(c.ExportAbort(token))
        assert refused.status == Status.TDX_INCORRECT_MBMD_MAC
    assert pair.state(pair.source) == "POST_EXPORT"
    pair.on_destination(c.ImportEnd())
    pair.assert_equal()


def test_two_destinations_of_one_key_share_no_session():
    """A bundle that went to one is missing at the other; its abort token is not the source's.

    A copy of *every* bundle would be imported by both: that a key is given to one TD alone is what
    the Migration TDs, not the modules, see to.
    """
    pair = Pair(6)
    # Reading the key again would change it.
    other = another_destination(pair, pair.source._tdcs.mig_enc_key)
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    for backend in (pair.destination, other):
        pair.do(backend, c.ImportStateImmutable(bundle))
    pair.pause()
    shared, mine = pair.export(pair.gpas[:3]), pair.export(pair.gpas[3:])
    for backend in (pair.destination, other):
        pair.do(backend, c.ImportMem(0, shared))
    pair.on_destination(c.ImportMem(0, mine))
    td_state = pair.on_source(c.ExportStateTd()).bundle
    vcpu = pair.on_source(c.ExportStateVp(0)).bundle
    missing = other.execute(c.ImportStateTd(td_state))
    assert missing.status == Status.TDX_INVALID_MBMD | FATAL_BIT
    pair.on_destination(c.ImportStateTd(td_state))
    pair.on_destination(c.ImportStateVp(vcpu, 0))
    token = pair.on_source(c.ExportTrack(True)).bundle
    assert other.execute(c.ImportTrack(token)).status == Status.TDX_OP_STATE_INCORRECT
    abort = other.execute(c.ImportAbort()).bundle.mbmd.pack()
    refused = pair.source.execute(c.ExportAbort(abort))
    assert refused.status == Status.TDX_INCORRECT_MBMD_MAC
    pair.on_destination(c.ImportTrack(token))
    pair.on_destination(c.ImportCommit())
    pair.assert_equal()
    assert not other.execute(c.VpEnter(0, 1)).ok
    assert not pair.source.execute(c.VpEnter(0, 1)).ok
    assert pair.on_destination(c.VpEnter(0, 1)).ok


@pytest.mark.parametrize("after_token", [False, True])
def test_a_second_session_after_an_abort(after_token):
    """Nothing of the first session is taken by the second; the guest runs in between."""
    pair = Pair(12, pending_pages=2, guest="random-writer")
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas)
    written = pair.run(0, 3)
    pair.pause()
    pair.epoch()
    if written is not None:
        pair.move([written])
    first = pair.on_source(c.ExportStateTd()).bundle
    pair.on_destination(c.ImportStateTd(first))
    if after_token:
        pair.on_destination(c.ImportStateVp(pair.on_source(c.ExportStateVp(0)).bundle, 0))
        pair.start_token()
        pair.abort_with_token()
    else:
        pair.on_source(c.ExportAbort(None))
    stale = pair.on_destination(c.ImportAbort()).bundle.mbmd.pack()
    pair.restore_all()
    pair.assert_counts()
    states = pair.source.page_states(pair.gpas).tolist()
    assert set(states) <= {SeptState.MAPPED, SeptState.PENDING}
    assert pair.on_source(c.VpEnter(0, 200)).exit.reason == "budget"
    pair.new_destination()
    pair.exchange_keys()
    pair.start()
    seen = pair.source.observe()
    assert (seen["export_count"], seen["mig_epoch"], seen["dirty_count"]) == (2, 0, 0)
    pair.pause()
    pair.move(pair.gpas)
    replayed = pair.destination.execute(c.ImportStateTd(first))
    assert not replayed.ok
    assert replayed.status & FATAL_BIT
    pair.new_destination()
    pair.on_source(c.ExportAbort(None))
    pair.restore_all()
    pair.exchange_keys()
    pair.start()
    pair.finish_in_pause()
    refused = pair.source.execute(c.ExportAbort(stale))
    assert refused.status == Status.TDX_INCORRECT_MBMD_MAC
    pair.on_destination(c.ImportEnd())
    pair.assert_equal()
    assert len(set(pair.iv_pairs)) == len(pair.iv_pairs)


# --- abort tokens --------------------------------------------------------------------------------


@pytest.fixture
def handed_over():
    """After the start token, with an abort token of the destination."""
    pair = paused(streams=2)
    pair.move(pair.gpas)
    pair.states()
    pair.start_token()
    return pair, pair.on_destination(c.ImportAbort()).bundle.mbmd


def test_every_abort_token_of_the_session_is_good_on_its_own(handed_over):
    """The backward stream counts IVs; any of the tokens brings the source back, once."""
    pair, first = handed_over
    second = pair.on_destination(c.ImportAbort()).bundle.mbmd
    assert [first.iv_counter, second.iv_counter] == [1, 2]
    assert [first.mb_counter, second.mb_counter] == [0, 1]
    assert first.mac != second.mac
    pair.on_source(c.ExportAbort(second.pack()))
    assert pair.state(pair.source) == "RUNNABLE"
    again = pair.source.execute(c.ExportAbort(first.pack()))
    assert again.status == Status.TDX_OP_STATE_INCORRECT


def test_no_bit_of_an_abort_token_can_change(handed_over):
    pair, token = handed_over
    before = pair.source.observe()
    raw = token.pack()
    for position in range(len(raw)):
        result = pair.source.execute(c.ExportAbort(flip(raw, position)))
        assert result.status in (Status.TDX_INVALID_MBMD, Status.TDX_INCORRECT_MBMD_MAC), position
        assert pair.source.observe() == before
    pair.on_source(c.ExportAbort(raw))


def test_a_token_needs_its_own_stream_and_key(handed_over):
    """A forward bundle is no abort token, whatever its type says."""
    pair, token = handed_over
    forged = Forger(pair).seal(token)  # with the key of the forward streams
    assert pair.source.execute(c.ExportAbort(forged.pack())).status == (
        Status.TDX_INCORRECT_MBMD_MAC
    )
    other = replace(token, migs_index=1)
    assert pair.source.execute(c.ExportAbort(other.pack())).status == Status.TDX_INVALID_MBMD
    assert pair.state(pair.source) == "POST_EXPORT"


def test_the_abort_leaf_waits_for_the_backward_stream(handed_over):
    pair, token = handed_over
    lock = pair.source._tdcs.links[0].lock
    assert lock.acquire(Mode.EXCLUSIVE)
    busy = pair.source.execute(c.ExportAbort(token.pack()))
    assert busy.status == with_operand(Status.TDX_OPERAND_BUSY, Operand.MIGSC)
    lock.release(Mode.EXCLUSIVE)
    pair.on_source(c.ExportAbort(token.pack()))
