"""Do interrupted leaves resume to the same result, and what may come between?"""

import random

import numpy as np
import pytest
from soft_pair import Pair

from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.status import FATAL_BIT, Operand, Status, with_operand
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.gpa_list import build_entries


def always():
    return True


def test_a_migration_whose_every_leaf_is_interrupted_everywhere():
    pair = Pair(24, vcpus=2, streams=2)
    pair.source.interrupt = pair.destination.interrupt = always
    pair.run(0, 40)
    pair.start()
    pair.block(pair.gpas)
    pair.move(pair.gpas[:10], stream=1)
    pair.move(pair.gpas[10:])
    dirty = sorted({pair.run(vcpu, 5) for _ in range(6) for vcpu in (0, 1)} - {None})
    pair.pause()
    pair.epoch()
    pair.move(dirty, stream=1)
    pair.states()
    pair.start_token()
    pair.assert_equal()
    pair.assert_counts()
    assert len(set(pair.iv_pairs)) == len(pair.iv_pairs)


def test_interruptions_at_random_change_no_byte():
    """The same migration, interrupted or not, sends the same bundles."""
    sent = []
    for interrupted in (False, True):
        pair = Pair(16)
        if interrupted:
            dice = random.Random(7)
            pair.source.interrupt = lambda dice=dice: dice.random() < 0.4
        pair.start()
        pair.pause()
        bundle = pair.export(pair.gpas)
        state = pair.on_source(c.ExportStateTd()).bundle
        vcpu = pair.on_source(c.ExportStateVp(0)).bundle
        sent.append(
            [
                (part.mbmd, [bytes(page) for page in part.pages], part.gpa_list, part.macs)
                for part in (bundle, state, vcpu)
            ]
        )
    assert sent[0] == sent[1]


class Stopped:
    """An EXPORT.MEM of the whole list, interrupted after `entries` entries."""

    def __init__(self, pair, entries=1, stream=0):
        self.pair = pair
        self.host, self.stream = pair.source_host, stream
        buffers = self.host.stream_buffers(stream)
        self.operands = {
            "rcx": buffers.gpa_list(build_entries(pair.gpas)),
            "rdx": pair.source.td.tdr,
            "r8": buffers.mbmd_register,
            "r9": buffers.list,
            "r10": stream,
            "r11": buffers.macs_low,
            "r12": buffers.macs_high,
        }
        buffers.offer_buffers(pair.gpas.size)
        countdown = iter([False] * (entries - 1))
        registers = self.host.seamcall(
            Leaf.EXPORT_MEM, interrupt=lambda: next(countdown, True), **self.operands
        )
        assert registers.rax == Status.TDX_INTERRUPTED_RESUMABLE
        assert registers.rcx >> 3 & 511 == entries
        self.operands["rcx"] = registers.rcx

    def resume(self, **changes):
        operands = {**self.operands, "r10": self.stream | 1 << 63, **changes}
        return self.host.seamcall(Leaf.EXPORT_MEM, **operands)


def paused(profile, *, streams=1):
    pair = Pair(6, profile=profile, streams=streams)
    pair.start()
    pair.pause()
    return pair


def test_hardened_an_unfinished_bundle_blocks_tokens_and_new_bundles():
    pair = paused("hardened", streams=2)
    stopped = Stopped(pair, entries=6 - 1, stream=1)
    assert pair.source.observe()["total_mb_count"] == 2
    assert pair.source.observe()["next_mb_counter"] == [1, 1]
    page = pair.gpas[:1]
    for command in (
        c.ExportTrack(),
        c.ExportTrack(True),
        c.ExportMem(1, page, 1),
        c.ExportStateVp(0, 1),
    ):
        before = pair.source.observe()
        result = pair.source.execute(command)
        assert result.status == Status.TDX_INVALID_RESUMPTION, command.name
        assert pair.source.observe() == before
    # Another stream may go on, and a RESUME that does not match leaves the call resumable.
    assert pair.source.execute(c.ExportStateTd()).ok
    assert stopped.resume(r9=stopped.operands["r8"] & ~(0xFFF << 52)).rax == (
        Status.TDX_INVALID_RESUMPTION
    )
    assert stopped.resume().rax == Status.TDX_SUCCESS
    assert pair.source.execute(c.ExportTrack(True)).ok


def test_1_5_01_an_unfinished_bundle_is_forgotten():
    """The published module counts a bundle at its end, so an abandoned one leaves no trace."""
    pair = paused("tdx-1.5.01")
    Stopped(pair, entries=5)
    seen = pair.source.observe()
    assert (seen["total_mb_count"], seen["mig_count"], seen["dirty_count"]) == (1, 5, 0)
    pair.assert_counts()
    assert pair.source.execute(c.ExportTrack(True)).ok


def test_1_5_01_a_resume_that_does_not_match_destroys_the_interrupted_call():
    pair = paused("tdx-1.5.01")
    stopped = Stopped(pair)
    assert stopped.resume(rcx=stopped.operands["rcx"] ^ 1 << 3).rax
    assert stopped.resume().rax == Status.TDX_INVALID_RESUMPTION


@pytest.mark.parametrize("profile", ["hardened", "tdx-1.5.01"])
def test_aborting_a_session_forgets_what_was_interrupted(profile):
    pair = paused(profile)
    stopped = Stopped(pair)
    pair.on_source(c.ExportAbort(None))
    pair.restore_all()
    pair.new_destination()
    pair.exchange_keys()
    pair.start()
    pair.pause()
    assert stopped.resume().rax == Status.TDX_INVALID_RESUMPTION
    pair.move(pair.gpas)
    pair.states()
    pair.start_token()
    pair.assert_equal()


def test_blockw_is_interrupted_without_state_in_the_module():
    pair = Pair(10)
    pair.start()
    host, buffers = pair.source_host, pair.source_host.stream_buffers(0)
    rcx = buffers.gpa_list(build_entries(pair.gpas))
    for done in range(1, 10):
        registers = host.seamcall(
            Leaf.EXPORT_BLOCKW, interrupt=always, rcx=rcx, rdx=pair.source.td.tdr
        )
        assert registers.rax == Status.TDX_INTERRUPTED_RESUMABLE
        rcx = registers.rcx
        assert rcx >> 3 & 511 == done
    registers = host.seamcall(Leaf.EXPORT_BLOCKW, rcx=rcx, rdx=pair.source.td.tdr)
    assert registers.rax == Status.TDX_SUCCESS
    assert buffers.entries(10).astype(np.uint64).tolist() == build_entries(pair.gpas).tolist()


@pytest.mark.parametrize(
    ("profile", "op_state", "again"),
    [
        ("tdx-1.5.01", "UNINITIALIZED", Status.TDX_MIGRATION_DECRYPTION_KEY_NOT_SET),
        ("hardened", "START_IMPORT", Status.TDX_OP_STATE_INCORRECT),
    ],
)
def test_immutable_state_resumed_with_another_list_is_fatal_on_import_only(
    profile, op_state, again
):
    pair = Pair(4, profile=profile)
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    host, td = pair.destination_host, pair.destination.td
    buffers = host.stream_buffers(0)
    buffers.write_mbmd(bundle.mbmd.pack())
    buffers.write_pages(bundle.pages)
    r9 = buffers.page_list(len(bundle.pages))
    operands = {"rcx": td.tdr, "r8": buffers.mbmd_register}
    leaf = Leaf.IMPORT_STATE_IMMUTABLE
    stopped = host.seamcall(leaf, interrupt=always, r9=r9, **operands)
    assert stopped.rax == Status.TDX_INTERRUPTED_RESUMABLE
    assert pair.state(pair.destination) == op_state
    # A second NEW is refused, for its key is used up, and the first call can still be resumed.
    assert host.seamcall(leaf, r9=r9, **operands).rax == again
    other = host.seamcall(leaf, r9=r9 + (1 << 55), r10=1 << 63, **operands)
    assert other.rax == Status.TDX_INVALID_RESUMPTION | FATAL_BIT
    assert pair.state(pair.destination) == "FAILED_IMPORT"


@pytest.mark.parametrize(
    ("profile", "op_state"), [("tdx-1.5.01", "RUNNABLE"), ("hardened", "START_EXPORT")]
)
def test_export_of_immutable_state_interrupted_and_resumed(profile, op_state):
    pair = Pair(4, profile=profile)
    host, td = pair.source_host, pair.source.td
    buffers = host.stream_buffers(0)
    operands = {"rcx": td.tdr, "r8": buffers.mbmd_register}
    leaf, r9 = Leaf.EXPORT_STATE_IMMUTABLE, buffers.page_list(3)
    short = host.seamcall(leaf, r9=buffers.page_list(2), **operands)
    assert short.rax == with_operand(Status.TDX_OPERAND_INVALID, Operand.R9)
    stopped = host.seamcall(leaf, interrupt=always, r9=r9, **operands)
    assert stopped.rax == Status.TDX_INTERRUPTED_RESUMABLE
    assert stopped.rdx == 1
    assert pair.state(pair.source) == op_state
    assert host.seamcall(leaf, r9=r9, r10=1 << 63, **operands).rax == Status.TDX_SUCCESS
    assert pair.state(pair.source) == "LIVE_EXPORT"
