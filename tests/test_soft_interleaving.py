"""Do leaves that run at the same time get in each other's way as on hardware?"""

import numpy as np
import pytest
from soft_calls import export
from soft_pair import Pair

from tdxmig_model.backend.soft.call import Point, Registers
from tdxmig_model.backend.soft.guest import GuestImage, Program
from tdxmig_model.backend.soft.locks import Lock, Mode
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.status import Operand, Status, describe_status, with_operand
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import GpaOperation, GpaStatus


def memory_operands(pair, stream, gpas):
    return export(pair, gpas, stream=stream).operands


def until(steps, point):
    """Advance to the next step of this kind."""
    for reached in steps:
        if reached is point:
            return
    raise AssertionError(f"the leaf ended before {point}")


def finish(steps, registers):
    for _ in steps:
        pass
    return registers.rax


@pytest.fixture
def pair():
    pair = Pair(12, streams=3, guest=GuestImage(Program.SEQUENTIAL, PAGE_SIZE, 1))
    pair.start()
    return pair


def busy(operand):
    return with_operand(Status.TDX_OPERAND_BUSY, operand)


def test_a_memory_leaf_in_progress_keeps_others_out(pair):
    pair.pause()
    registers = memory_operands(pair, 0, pair.gpas)
    steps = pair.source_host.module.start(Leaf.EXPORT_MEM, registers, lp=1)
    until(steps, Point.ENTRY)
    before = pair.source.observe()
    for command, operand in (
        (c.ExportTrack(), Operand.OP_STATE),
        (c.ExportAbort(None), Operand.OP_STATE),
        (c.ExportMem(0, pair.gpas, GpaOperation.MIGRATE), Operand.MIGSC),
        (c.ExportStateVp(0), Operand.MIGSC),
        (c.ExportStateTd(), Operand.OP_STATE),
    ):
        result = pair.source.execute(command)
        assert result.status == busy(operand), (command.name, describe_status(result.status))
    assert pair.source.observe() == before
    assert finish(steps, registers) == Status.TDX_SUCCESS
    pair.on_source(c.ExportTrack())


def test_two_streams_export_at_once_and_share_no_iv(pair):
    """Leaves on different streams advance in turn; their bundles are whole and in order."""
    pair.pause()
    halves = np.array_split(pair.gpas, 2)
    calls = [memory_operands(pair, stream, half) for stream, half in enumerate(halves)]
    start = pair.source_host.module.start
    running = {
        stream: start(Leaf.EXPORT_MEM, registers, lp=stream)
        for stream, registers in enumerate(calls)
    }
    while running:
        for stream in list(running):
            if next(running[stream], None) is None:
                del running[stream]
    assert [registers.rax for registers in calls] == [Status.TDX_SUCCESS] * 2
    assert pair.source.observe()["total_mb_count"] == 3
    assert len(set(pair.iv_pairs)) == len(pair.iv_pairs)
    pair.assert_counts()


def test_the_entry_being_worked_on_is_locked(pair):
    pair.block(pair.gpas)
    registers = memory_operands(pair, 0, pair.gpas)
    steps = pair.source_host.module.start(Leaf.EXPORT_MEM, registers, lp=1)
    until(steps, Point.HELD)
    first, second = pair.gpas[:1], pair.gpas[1:2]
    assert pair.source.execute(c.ExportUnblockw(int(first[0]))).status == busy(Operand.RCX)
    on_other_stream = pair.on_source(c.ExportMem(1, first, GpaOperation.MIGRATE))
    assert on_other_stream.statuses.tolist() == [GpaStatus.SEPT_ENTRY_BUSY_HOST_PRIORITY]
    assert pair.source.execute(c.ExportUnblockw(int(second[0]))).ok
    # One page was taken away from the leaf in progress: that is its own entry's problem.
    assert finish(steps, registers) == 1
    pair.assert_counts()


def test_pausing_needs_every_vcpu_out_of_the_guest(pair):
    host = pair.source_host
    host.module.processors[0].timer = 1000
    registers = Registers(rcx=pair.source.td.vcpus[0])
    steps = host.module.start(Leaf.VP_ENTER, registers, lp=0)
    until(steps, Point.GUEST)
    assert pair.source.execute(c.ExportPause()).status == busy(Operand.RCX)
    assert pair.source.execute(c.ExportStateImmutable()).status_name == "TDX_OP_STATE_INCORRECT"
    finish(steps, registers)
    pair.pause()


def test_a_stale_translation_cannot_change_a_page_that_is_exported(pair):
    """BLOCKW takes effect for a running vCPU only after tracking and an exit; export waits."""
    page = np.array([PAGE_SIZE], dtype=np.uint64)
    host, td = pair.source_host, pair.source.td
    host.module.processors[0].timer = 1 << 20
    registers = Registers(rcx=td.vcpus[0])
    steps = host.module.start(Leaf.VP_ENTER, registers, lp=0)
    for _ in range(8):
        until(steps, Point.GUEST)
    assert pair.source.observe()["refcount"][1] == 1
    pair.on_source(c.ExportBlockw(page))
    written = pair.source.read_page(PAGE_SIZE)
    for _ in range(3):
        until(steps, Point.GUEST)
    assert pair.source.read_page(PAGE_SIZE) != written  # the processor still had it writable
    assert pair.on_source(c.ExportMem(0, page, 1)).statuses.tolist() == [
        GpaStatus.TLB_TRACKING_NOT_DONE
    ]
    pair.on_source(c.MemTrack())
    assert pair.on_source(c.ExportMem(0, page, 1)).statuses.tolist() == [
        GpaStatus.TLB_TRACKING_NOT_DONE
    ]
    # A second TRACK waits for the vCPU that is still in the older epoch.
    waiting = pair.source.execute(c.MemTrack())
    assert waiting.status == Status.TDX_PREVIOUS_TLB_EPOCH_BUSY
    host.module.processors[0].timer = 0
    finish(steps, registers)
    assert pair.on_source(c.VpEnter(0, 5)).exit.reason == "ept_violation"
    assert pair.on_source(c.ExportMem(0, page, 1)).statuses.tolist() == [GpaStatus.SUCCESS]


def test_an_abandoned_leaf_gives_its_locks_back(pair):
    pair.pause()
    registers = memory_operands(pair, 0, pair.gpas)
    steps = pair.source_host.module.start(Leaf.EXPORT_MEM, registers, lp=1)
    until(steps, Point.HELD)
    steps.close()
    assert pair.source.execute(c.ExportTrack()).ok
    assert pair.on_source(c.ExportMem(1, pair.gpas[:1], 1)).statuses.tolist() == [0]


def test_stepwise_and_straight_through_are_the_same_leaf():
    """Every leaf of a migration, run step by step, gives the same bundles and states."""
    results = []
    for stepwise in (False, True):
        pair = Pair(16, seed=5)
        if stepwise:
            for host in (pair.source_host, pair.destination_host):
                step_through(host.module)
        pair.start()
        pair.block(pair.gpas)
        pair.move(pair.gpas)
        dirty = sorted({pair.run(0, 3) for _ in range(5)} - {None})
        pair.pause()
        pair.epoch()
        pair.move(dirty)
        pair.states()
        pair.start_token()
        pair.assert_equal()
        results.append((pair.destination.memory_digest(), pair.source.observe(), pair.iv_pairs))
    assert results[0] == results[1]


def step_through(module):
    """Replace the straight-through runner by one that takes every step."""

    def call(leaf, registers, *, lp=0, interrupt=None):
        for point in module.start(leaf, registers, lp=lp, interrupt=interrupt):
            assert isinstance(point, Point)
        return registers.rax

    module.call = call


def test_locks():
    lock = Lock()
    assert lock.acquire(Mode.SHARED)
    assert lock.acquire(Mode.SHARED)
    assert not lock.acquire(Mode.EXCLUSIVE)
    lock.release(Mode.SHARED)
    lock.release(Mode.SHARED)
    assert lock.free
    assert lock.acquire(Mode.EXCLUSIVE)
    assert not lock.acquire(Mode.SHARED)
    assert not lock.acquire(Mode.EXCLUSIVE)
