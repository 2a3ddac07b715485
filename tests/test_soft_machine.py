"""Source and destination driven at random through leaves: what stays true after every step?

The machine and its judgements are in soft_migration.py; here it runs, and how deep it came is
counted, for a machine that never gets anywhere finds nothing.
"""

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from soft_migration import HardenedMigration, Migration
from soft_pair import Pair

from tdxmig_model.backend.soft.module import Module
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.status import LOW_32, Status
from tdxmig_model.engine import commands as c

BRIEF = settings(
    max_examples=75,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(
    max_examples=750,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
STATES = [state.name for state in OpState]
MACHINES = [Migration, HardenedMigration]


class Tally(Counter):
    """How often each leaf ended how in which OP_STATE: (OP_STATE at its call, leaf, outcome)."""

    def watch(self, monkeypatch):
        run = Module._run

        def counted(module, call, body):
            before = op_state(module, call.registers)
            yield from run(module, call, body)
            self[before, call.leaf, outcome(call.leaf, call.registers.rax)] += 1

        monkeypatch.setattr(Module, "_run", counted)


def op_state(module, registers):
    """OP_STATE of the TD that RCX or RDX names, itself or by a vCPU; "" if there is none."""
    for page in (registers.rdx, registers.rcx):
        vcpu = module.tdvps.get(page) and module.memory.owner[page >> 12]
        td = module.tdrs.get(vcpu or page)
        if td is not None:
            return td.tdcs.op_state.name if td.tdcs else ""
    return ""


OUTCOMES = {
    Status.TDX_INTERRUPTED_RESUMABLE: "interrupted",
    Status.TDX_OPERAND_BUSY: "busy",
    Status.TDX_INVALID_RESUMPTION: "wrong resume",
}
FATAL = 1 << 61


def outcome(leaf, status):
    """A class of completion status: done, problems with entries, one of OUTCOMES, or refused."""
    if leaf is Leaf.IMPORT_ABORT and status == FATAL | Status.TDX_SUCCESS:
        return "done"
    if status >> 63:
        known = {int(one) | fatal: name for one, name in OUTCOMES.items() for fatal in (0, FATAL)}
        return known.get(status & ~LOW_32, "refused")
    return "problems" if leaf in (Leaf.EXPORT_MEM, Leaf.IMPORT_MEM) and status else "done"


REACHED = {
    "LIVE_EXPORT": {(Leaf.EXPORT_TRACK, "done"): 1},
    "PAUSED_EXPORT": {(Leaf.EXPORT_MEM, "done"): 8, (Leaf.EXPORT_MEM, "interrupted"): 1},
    "POST_EXPORT": {
        (Leaf.EXPORT_MEM, "done"): 13,
        (Leaf.EXPORT_MEM, "interrupted"): 4,
        (Leaf.EXPORT_MEM, "problems"): 1,
        (Leaf.EXPORT_MEM, "wrong resume"): 3,
        (Leaf.EXPORT_ABORT, "done"): 1,
        (Leaf.VP_ENTER, "refused"): 1,
    },
    "MEMORY_IMPORT": {
        (Leaf.IMPORT_MEM, "done"): 6,
        (Leaf.IMPORT_TRACK, "done"): 1,
    },
    "STATE_IMPORT": {
        (Leaf.IMPORT_STATE_VP, "done"): 6,
    },
    "POST_IMPORT": {
        (Leaf.IMPORT_MEM, "done"): 1,
        (Leaf.IMPORT_COMMIT, "done"): 2,
        (Leaf.IMPORT_ABORT, "done"): 1,
    },
    "LIVE_IMPORT": {
        (Leaf.IMPORT_MEM, "done"): 1,
        (Leaf.IMPORT_MEM, "problems"): 1,
        (Leaf.IMPORT_END, "done"): 1,
        (Leaf.VP_ENTER, "done"): 1,
    },
    "RUNNABLE": {(Leaf.VP_ENTER, "done"): 1, (Leaf.EXPORT_RESTORE, "done"): 1},
}
"""What a brief run reaches at least, by OP_STATE: far below what it did when written."""
ANYWHERE = {
    (Leaf.IMPORT_MEM, "interrupted"): 5,
    (Leaf.IMPORT_MEM, "wrong resume"): 1,
    (Leaf.IMPORT_MEM, "busy"): 1,
    (Leaf.IMPORT_END, "done"): 5,
    (Leaf.EXPORT_UNBLOCKW, "done"): 5,
}
"""The same in whatever OP_STATE."""


@pytest.mark.parametrize("machine", MACHINES)
def test_random_migrations(machine, monkeypatch):
    tally = Tally()
    tally.watch(monkeypatch)
    run_state_machine_as_test(machine, settings=BRIEF)
    wanted = {(state, *what): least for state in REACHED for what, least in REACHED[state].items()}
    rare = {what: (tally[what], least) for what, least in wanted.items() if tally[what] < least}
    assert not rare, f"reached too rarely (times, at least): {rare}"
    for (leaf, how), least in ANYWHERE.items():
        assert sum(tally[state, leaf, how] for state in STATES) >= least, (leaf, how)


def test_a_tally_tells_op_state_leaf_and_outcome(monkeypatch):
    tally = Tally()
    tally.watch(monkeypatch)
    pair = Pair(4)
    pair.start()
    pair.source.execute(c.ExportAbort(bytes(48)))
    pair.on_source(c.VpEnter(0, 1))
    assert tally["RUNNABLE", Leaf.EXPORT_STATE_IMMUTABLE, "done"] == 1
    assert tally["UNINITIALIZED", Leaf.IMPORT_STATE_IMMUTABLE, "done"] == 1
    assert tally["LIVE_EXPORT", Leaf.EXPORT_ABORT, "refused"] == 1
    assert tally["LIVE_EXPORT", Leaf.VP_ENTER, "done"] == 1
    assert outcome(Leaf.IMPORT_MEM, Status.TDX_OPERAND_BUSY | FATAL | 1) == "busy"
    assert outcome(Leaf.IMPORT_MEM, Status.TDX_SUCCESS | 3) == "problems"
    assert outcome(Leaf.EXPORT_MEM, Status.TDX_INTERRUPTED_RESUMABLE) == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_random_migrations_for_long(machine):
    run_state_machine_as_test(machine, settings=LONG)
