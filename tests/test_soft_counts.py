"""Do the counters stay true, and no (key, IV) pair repeat, whatever an honest VMM does?"""

import random

import numpy as np
import pytest
from soft_pair import CANCEL, MIGRATE, Pair

from tdxmig_model.backend.soft.sept import (
    BLOCKW,
    EXPORTED_STATES,
    WRITE_BLOCKED_STATES,
    SeptState,
)
from tdxmig_model.engine import commands as c


def choose(dice, gpas):
    count = dice.randint(1, max(1, len(gpas) // 2))
    return np.array(dice.sample(gpas, count), dtype=np.uint64)


class RandomRun:
    """One source session after the other, of random legal and illegal commands."""

    def __init__(self, seed, profile):
        self.dice = random.Random(seed)
        self.pair = Pair(
            18, vcpus=2, streams=3, guest="random-writer", profile=profile, pending_pages=4
        )
        if self.dice.random() < 0.5:
            self.pair.source.interrupt = lambda: self.dice.random() < 0.3

    def commands(self):
        dice, gpas = self.dice, self.pair.gpas.tolist()
        yield c.VpEnter(dice.randrange(2), dice.randrange(1, 8))
        yield c.ExportBlockw(choose(dice, gpas))
        yield c.MemTrack()
        yield c.ExportUnblockw(dice.choice(gpas))
        yield c.ExportMem(dice.randrange(3), choose(dice, gpas), MIGRATE)
        yield c.ExportMem(dice.randrange(3), choose(dice, gpas), CANCEL)
        yield c.ExportRestore(choose(dice, gpas))
        yield c.ExportTrack()

    def rare(self):
        yield c.ExportPause()
        yield c.ExportTrack(True)
        yield c.ExportStateTd()
        yield c.ExportStateVp(self.dice.randrange(2), self.dice.randrange(3))
        yield c.ExportAbort(None)
        yield c.ExportStateImmutable()

    def step(self):
        """One command; what an exit or a new session needs follows."""
        pair = self.pair
        if pair.state(pair.source) == "RUNNABLE" and self.dice.random() < 0.3:
            pair.restore_all()
            pair.source.write_migration_decryption_key(self.dice.randbytes(32))
        often = self.dice.random() < 0.85
        command = self.dice.choice(list(self.commands() if often else self.rare()))
        result = pair.source.execute(command)
        if result.exit is not None and result.exit.reason == "ept_violation":
            pair.source.execute(c.ExportUnblockw(result.exit.gpa))
        return command, result


@pytest.mark.parametrize("profile", ["hardened", "tdx-1.5.01"])
@pytest.mark.parametrize("seed", range(6))
def test_counts_after_every_step_of_a_random_run(seed, profile):
    run = RandomRun(seed, profile)
    accepted = set()
    for _ in range(250):
        before = run.pair.source.observe()
        command, result = run.step()
        run.pair.assert_counts()
        if result.ok:
            accepted.add(command.name)
        seen = run.pair.source.observe()
        if seen["op_state"] == "POST_EXPORT" and before["op_state"] != "POST_EXPORT":
            assert before["dirty_count"] == 0
        if seen["export_count"] == before["export_count"]:
            assert seen["total_mb_count"] >= before["total_mb_count"]
            columns = (before["initialized"], before["iv_counter"], seen["iv_counter"])
            for initialized, old, new in zip(*columns, strict=True):
                assert new >= old or not initialized
        if seen["op_state"] == "POST_EXPORT":
            break
    assert len(set(run.pair.iv_pairs)) == len(run.pair.iv_pairs)
    assert {"export_state_immutable", "export_blockw"} <= accepted


def test_blocking_and_unblocking_are_inverse_where_nothing_was_exported():
    pair = Pair(6, pending_pages=2)
    pair.start()
    before = pair.source.page_states(pair.gpas).tolist()
    pair.block(pair.gpas)
    blocked = pair.source.page_states(pair.gpas).tolist()
    assert blocked == [BLOCKW[SeptState(state)] for state in before]
    assert set(blocked) <= WRITE_BLOCKED_STATES
    for gpa in pair.gpas.tolist():
        pair.on_source(c.ExportUnblockw(gpa))
    assert pair.source.page_states(pair.gpas).tolist() == before
    assert pair.source.observe()["dirty_count"] == 0


def test_the_counters_of_a_plain_run():
    pair = Pair(10, streams=2)
    pair.start()
    assert pair.source.observe()["total_mb_count"] == 1
    pair.pause()
    pair.move(pair.gpas[:5], stream=1)
    pair.move(pair.gpas[5:], stream=0)
    pair.epoch()
    pair.states()
    pair.start_token()
    source, destination = pair.source.observe(), pair.destination.observe()
    # Immutable state, two memory bundles, epoch token, TD, vCPU, start token.
    assert source["total_mb_count"] == destination["total_mb_count"] == 7
    assert source["next_mb_counter"] == destination["expected_mb_counter"] == [1, 1]
    # A memory bundle takes one IV for its MBMD and one per entry, anything else one.
    assert source["iv_counter"] == [1 + 6 + 1 + 1 + 1 + 1, 6]
    assert source["mig_epoch"] == destination["mig_epoch"] == 0xFFFF_FFFF
    assert source["mig_count"] == 10
    states = set(pair.source.page_states(pair.gpas).tolist())
    assert states <= EXPORTED_STATES
