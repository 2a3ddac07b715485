"""Source and destination driven at random through leaves: what stays true after every step?

Interruptions, resumptions right and wrong, calls that run at the same time, aborts, later sessions,
a VMM that drops, repeats, reorders and damages bundles.
"""

import contextlib
import copy

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from soft_calls import assert_nothing_is_locked, exported, load
from soft_pair import CANCEL, MIGRATE, Pair, flip, tampered

from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.memory import PageType
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.schedulers import LeafCall, Seeded, resume_operands
from tdxmig_model.backend.soft.sept import HPA_MASK, SeptState
from tdxmig_model.backend.soft.status import Status
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import BackendError
from tdxmig_model.wire.gpa_list import build_entries

PAGES, PENDING, STREAMS, VCPUS = 8, 2, 2, 2
LISTS = 2
"""Buffers of a stream that is not there, for the lists of BLOCKW and RESTORE."""
RUNS_ON_SOURCE = ("RUNNABLE", "LIVE_EXPORT")
IMPORTING = ("MEMORY_IMPORT", "STATE_IMPORT", "POST_IMPORT", "LIVE_IMPORT")
IMPORTED = ("POST_IMPORT", "LIVE_IMPORT")
RUNS_ON_DESTINATION = ("RUNNABLE", "LIVE_IMPORT")

seeds = st.integers(0, 1 << 16)
some_pages = st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=4, unique=True)
one_page = st.integers(0, PAGES - 1)
streams = st.integers(0, STREAMS - 1)
vcpus = st.integers(0, VCPUS - 1)


MISCHIEF = (
    "reorder",
    "repeat",
    "drop",
    "damage",
    "stop",
    "td again",
    "abort",
    "abort import",
    "token",
)


class Migration(RuleBasedStateMachine):
    """Two hosts, one TD that moves, and whatever a VMM may do."""

    profile = "tdx-1.5.01"

    @initialize()
    def build(self):
        self.pair = Pair(
            PAGES,
            vcpus=VCPUS,
            streams=STREAMS,
            guest="random-writer",
            profile=self.profile,
            pending_pages=PENDING,
        )
        self.stopped = {}
        self.sent, self.delivered = [], []
        self.session = self.td_sent = False
        self.begin()

    def begin(self):
        """Immutable state, over to the destination."""
        self.td_sent = False
        result = self.source.execute(c.ExportStateImmutable())
        if result.ok:
            self.session = True
            self.pair.on_destination(c.ImportStateImmutable(result.bundle))
        else:
            assert self.source.observe()["mig_count"]

    # --- what is there -------------------------------------------------------------------------

    @property
    def source(self):
        return self.pair.source

    @property
    def module(self):
        return self.pair.source_host.module

    @property
    def state(self):
        return self.pair.state(self.source)

    def gpas(self, pages):
        return np.array([4096 * page for page in pages], dtype=np.uint64)

    def run(self, calls, seed):
        """Leaf calls at the same time; their final registers."""
        return Seeded(self.module, seed).run(calls).registers

    # --- calls ---------------------------------------------------------------------------------

    def export_call(self, pages, stream, operation, lp, resume):
        buffers = self.pair.source_host.stream_buffers(stream)
        buffers.offer_buffers(len(pages))
        operands = Registers(
            rcx=buffers.gpa_list(build_entries(self.gpas(pages), operation)),
            rdx=self.source.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.list,
            r10=stream,
            r11=buffers.macs_low,
            r12=buffers.macs_high,
        )
        return LeafCall(Leaf.EXPORT_MEM, operands, lp=lp, resume=resume)

    def exported(self, call, left, count):
        """What an EXPORT.MEM left behind: a bundle to send, or a call to resume."""
        stream = call.operands.r10 & 0xFFFF
        if left.rax == Status.TDX_INTERRUPTED_RESUMABLE:
            operands = resume_operands(Leaf.EXPORT_MEM, call.operands, left)
            self.stopped[stream] = (operands, count)
        elif not left.rax >> 63:
            self.stopped.pop(stream, None)
            bundle = exported(self.pair, count, stream=stream)
            self.sent.append(c.ImportMem(stream, bundle))

    def list_call(self, leaf, pages, lp, lists=LISTS):
        buffers = self.pair.source_host.stream_buffers(lists)
        rcx = buffers.gpa_list(build_entries(self.gpas(pages)))
        return LeafCall(leaf, Registers(rcx=rcx, rdx=self.source.td.tdr), lp=lp)

    def page_call(self, leaf, page, lp):
        return LeafCall(leaf, Registers(rcx=4096 * page, rdx=self.source.td.tdr), lp=lp)

    def enter_call(self, vcpu, budget):
        lp = self.source.td.processors[vcpu]
        self.module.processors[lp].timer = budget
        return LeafCall(Leaf.VP_ENTER, Registers(rcx=self.source.td.vcpus[vcpu]), lp=lp)

    # --- source: memory ------------------------------------------------------------------------

    @rule(pages=some_pages, stream=streams, cancel=st.booleans(), resume=st.booleans(), seed=seeds)
    def export_memory(self, pages, stream, cancel, resume, seed):
        call = self.export_call(pages, stream, CANCEL if cancel else MIGRATE, 2, resume)
        (left,) = self.run([call], seed)
        self.exported(call, left, len(pages))

    @precondition(lambda self: self.stopped)
    @rule(seed=seeds)
    def resume(self, seed):
        stream, (operands, count) = sorted(self.stopped.items())[seed % len(self.stopped)]
        call = LeafCall(Leaf.EXPORT_MEM, operands, lp=2, resume=bool(seed & 1))
        (left,) = self.run([call], seed)
        if left.rax >> 63 and left.rax != Status.TDX_INTERRUPTED_RESUMABLE:
            del self.stopped[stream]
        self.exported(call, left, count)

    @precondition(lambda self: self.stopped)
    @rule(register=st.sampled_from(["rcx", "r9", "r11", "r12"]), seed=seeds)
    def resume_with_another_operand(self, register, seed):
        stream = sorted(self.stopped)[seed % len(self.stopped)]
        operands = copy.copy(self.stopped[stream][0])
        change = 1 << 3 if register == "rcx" else 4096
        setattr(operands, register, getattr(operands, register) ^ change)
        (left,) = self.run([LeafCall(Leaf.EXPORT_MEM, operands, lp=2)], seed)
        assert left.rax >> 63

    @rule(pages=some_pages, seed=seeds)
    def block_writes(self, pages, seed):
        self.run([self.list_call(Leaf.EXPORT_BLOCKW, pages, 2)], seed)

    @rule(pages=some_pages, seed=seeds)
    def restore(self, pages, seed):
        self.run([self.list_call(Leaf.EXPORT_RESTORE, pages, 2)], seed)

    @rule(page=one_page)
    def unblock_writes(self, page):
        self.source.execute(c.ExportUnblockw(4096 * page))

    @rule()
    def track_tlb(self):
        self.source.execute(c.MemTrack())

    @rule(vcpu=vcpus, budget=st.integers(1, 6), unblock=st.booleans())
    def run_guest(self, vcpu, budget, unblock):
        ended = self.source.execute(c.VpEnter(vcpu, budget)).exit
        if unblock and ended is not None and ended.reason == "ept_violation":
            self.source.execute(c.ExportUnblockw(ended.gpa))

    @rule(
        page=one_page,
        leaf=st.sampled_from([Leaf.MEM_RANGE_BLOCK, Leaf.MEM_RANGE_UNBLOCK]),
    )
    def block_or_unblock(self, page, leaf):
        self.run([self.page_call(leaf, page, 2)], 0)

    @rule(page=st.integers(1, PAGES - 1))
    def take_or_give_a_page(self, page):
        """PAGE.REMOVE, or PAGE.AUG where there is none.  Page 0 is the guest image."""
        gpa, td = 4096 * page, self.source.td
        if gpa in td.page_hpas:
            (left,) = self.run([self.page_call(Leaf.MEM_PAGE_REMOVE, page, 2)], 0)
            if not left.rax:
                self.pair.source_host.give_back_private_pages([td.page_hpas.pop(gpa)])
            return
        with contextlib.suppress(BackendError):
            self.pair.source_host.add_pending_page(td, gpa)

    @rule(
        first=some_pages,
        second=some_pages,
        page=one_page,
        what=st.sets(st.integers(0, 5), min_size=2, max_size=4),
        seed=seeds,
    )
    def at_the_same_time(self, first, second, page, what, seed):
        """Several logical processors with leaves in progress, in some order of their steps."""
        choices = [
            lambda: self.export_call(first, 0, MIGRATE, 2, True),
            lambda: self.export_call(second, 1, MIGRATE, 3, True),
            lambda: self.list_call(Leaf.EXPORT_BLOCKW, second, 3),
            lambda: self.page_call(Leaf.EXPORT_UNBLOCKW, page, 2),
            lambda: self.enter_call(0, 5),
            lambda: self.enter_call(1, 5),
        ]
        calls = [choices[number]() for number in sorted(what)]
        for call, left in zip(calls, self.run(calls, seed), strict=True):
            if call.leaf is Leaf.EXPORT_MEM:
                count = len(second if call.operands.r10 else first)
                self.exported(call, left, count)

    # --- source: session -----------------------------------------------------------------------

    def send(self, result, command):
        if result.ok:
            self.sent.append(command(result.bundle))

    @rule()
    def next_epoch(self):
        self.send(self.source.execute(c.ExportTrack()), c.ImportTrack)

    @rule()
    def pause(self):
        self.source.execute(c.ExportPause())

    @precondition(lambda self: not self.td_sent)
    @rule()
    def export_td(self):
        """Once, for a second one cannot be imported."""
        self.td_sent = self.state == "PAUSED_EXPORT"
        self.send(self.source.execute(c.ExportStateTd()), c.ImportStateTd)

    @rule(vcpu=vcpus, stream=streams)
    def export_vcpu(self, vcpu, stream):
        result = self.source.execute(c.ExportStateVp(vcpu, stream))
        self.send(result, lambda bundle: c.ImportStateVp(bundle, vcpu))

    @rule()
    def start_token(self):
        self.send(self.source.execute(c.ExportTrack(True)), c.ImportTrack)

    @precondition(lambda self: self.state == "RUNNABLE" and not self.session)
    @rule(restore=st.booleans())
    def new_session(self, restore):
        """A session with a fresh destination; refused while exported pages are left over."""
        pair = self.pair
        if restore:
            pair.restore_all()
        pair.new_destination(streams=STREAMS)
        pair.exchange_keys()
        self.stopped.clear()
        self.sent.clear()
        self.delivered.clear()
        self.begin()

    @precondition(lambda self: self.state in ("LIVE_EXPORT", "PAUSED_EXPORT"))
    @rule(seed=seeds)
    def hurry(self, seed):
        """An honest VMM in a hurry: the rest in a pause, up to the start token."""
        for _ in range(len(self.stopped)):
            self.resume(seed | 1)
        self.source.execute(c.ExportPause())
        self.next_epoch()
        for start in range(0, PAGES, 4):
            self.export_memory(list(range(start, start + 4)), 0, False, True, seed)
        if not self.td_sent:
            self.export_td()
        for vcpu in range(VCPUS):
            self.export_vcpu(vcpu, 0)
        self.start_token()
        self.deliver(seed, len(self.sent))

    # --- destination ---------------------------------------------------------------------------

    def give(self, command, seed=0):
        dice = np.random.default_rng(seed)
        self.pair.destination.interrupt = lambda: dice.random() < 0.3
        before = self.pair.state(self.pair.destination)
        result = self.pair.destination.execute(command)
        self.pair.destination.interrupt = None
        after = self.pair.state(self.pair.destination)
        if before != "POST_IMPORT" and after == "POST_IMPORT":
            self.assert_fresh()
        return result

    @precondition(lambda self: self.sent)
    @rule(seed=seeds, count=st.integers(1, 12))
    def deliver(self, seed, count):
        for command in [self.sent.pop(0) for _ in range(min(count, len(self.sent)))]:
            self.give(command, seed)
            self.delivered.append(command)

    @rule(
        what=st.sampled_from(MISCHIEF),
        seed=seeds,
    )
    def mischief(self, what, seed):
        """What a VMM may do that ends a migration, or tries to."""
        if what == "reorder" and len(self.sent) > 1:
            self.delivered.append(self.sent.pop(1))
            self.give(self.delivered[-1], seed)
        elif what == "repeat" and self.delivered:
            self.give(self.delivered[seed % len(self.delivered)], seed)
        elif what == "drop" and self.sent:
            self.sent.pop(0)
        elif what == "damage" and self.sent and isinstance(self.sent[0], c.ImportMem):
            self.damage(self.sent.pop(0), seed & 1)
        elif what == "stop" and self.sent and isinstance(self.sent[0], c.ImportMem):
            self.stop_import(self.sent.pop(0), seed)
        elif what == "td again":
            self.send(self.source.execute(c.ExportStateTd()), c.ImportStateTd)
        elif what == "abort" and self.source.execute(c.ExportAbort(None)).ok:
            self.session = False
        elif what in ("abort import", "token"):
            self.abort_import(use=what == "token")

    def stop_import(self, command, seed):
        """An IMPORT.MEM that is interrupted, and resumed with the right list or another one."""
        pair, count = self.pair, len(command.bundle.pages)
        host, td = pair.destination_host, pair.destination.td
        if pair.state(pair.destination) not in IMPORTING:
            return
        host.add_tables(td, pair.gpas)
        fresh = host.take_private_pages(count)
        call = load(pair, command.bundle, fresh, stream=command.stream, resume=False)
        scheduler = Seeded(host.module, seed, interrupt_rate=0.5)
        (left,) = scheduler.run([call]).registers
        if left.rax == Status.TDX_INTERRUPTED_RESUMABLE:
            again = resume_operands(Leaf.IMPORT_MEM, call.operands, left)
            if seed & 1:
                again.r9 ^= 4096
            (left,) = scheduler.run([LeafCall(Leaf.IMPORT_MEM, again)]).registers
            assert not seed & 1 or left.rax >> 63
        kept = [hpa for hpa in fresh if host.memory.page_type[hpa >> 12] != PageType.NDA]
        td.control_pages += kept
        host.give_back_private_pages(sorted(set(fresh) - set(kept)))

    def damage(self, command, mbmd):
        bundle = command.bundle
        if mbmd:
            bundle = tampered(bundle, mbmd=bundle.mbmd.with_mac(flip(bundle.mbmd.mac)))
        else:
            bundle = tampered(bundle, macs=flip(bundle.macs))
        self.give(c.ImportMem(command.stream, bundle))

    @precondition(lambda self: self.pair.state(self.pair.destination) == "POST_IMPORT")
    @rule()
    def commit(self):
        self.give(c.ImportCommit())

    @precondition(lambda self: self.pair.state(self.pair.destination) in IMPORTED)
    @rule()
    def end(self):
        self.give(c.ImportEnd())

    @precondition(lambda self: self.pair.state(self.pair.destination) == "FAILED_IMPORT")
    @rule()
    def fall_back(self):
        """The source goes on, with a token if one is needed."""
        self.abort_import(use=True)
        if self.state != "RUNNABLE" and self.source.execute(c.ExportAbort(None)).ok:
            self.session = False

    def abort_import(self, use):
        result = self.give(c.ImportAbort())
        if result.bundle is not None and use:
            token = result.bundle.mbmd.pack()
            if self.source.execute(c.ExportAbort(token)).ok:
                self.session = False

    @rule(vcpu=vcpus)
    def run_destination(self, vcpu):
        if vcpu < len(self.pair.destination.td.vcpus):
            self.give(c.VpEnter(vcpu, 3))

    @precondition(lambda self: self.pair.state(self.pair.destination) == "RUNNABLE")
    @rule()
    def the_move_is_over(self):
        """Another TD moves."""
        self.build()

    # --- judgements ----------------------------------------------------------------------------

    def assert_fresh(self):
        """Repair R1: no page that was imported is older than the source's."""
        if self.profile != "hardened":
            return
        there = self.pair.destination.page_states(self.pair.gpas).tolist()
        for gpa, state in zip(self.pair.gpas.tolist(), there, strict=True):
            if state == SeptState.MAPPED:
                assert self.source.read_page(gpa) == self.pair.destination.read_page(gpa)

    @invariant()
    def counts_are_what_the_entries_say(self):
        if hasattr(self, "pair"):
            self.pair.assert_counts()

    @invariant()
    def nothing_stays_locked(self):
        if hasattr(self, "pair"):
            assert_nothing_is_locked(self.pair.source_host.module)
            assert_nothing_is_locked(self.pair.destination_host.module)

    @invariant()
    def only_one_side_can_run(self):
        if hasattr(self, "pair") and self.session:
            runs_here = self.state in RUNS_ON_SOURCE
            runs_there = self.pair.state(self.pair.destination) in RUNS_ON_DESTINATION
            assert not (runs_here and runs_there)

    @invariant()
    def pages_belong_to_their_td(self):
        if hasattr(self, "pair"):
            for backend in (self.pair.source, self.pair.destination):
                assert_pages_owned(backend)

    @invariant()
    def vcpus_are_counted(self):
        if hasattr(self, "pair"):
            seen = self.pair.destination.observe()
            assert seen["num_migrated_vcpus"] <= VCPUS


def assert_pages_owned(backend):
    """Each leaf entry has a page of its own that the PAMT gives to this TD."""
    memory, tdcs = backend.host.memory, backend.host.module.tdrs[backend.td.tdr].tdcs
    pages = [int(entry) & HPA_MASK for entry in tdcs.sept.mapped()[1]]
    assert len(set(pages)) == len(pages)
    for hpa in pages:
        assert memory.page_type[hpa >> 12] == PageType.REG
        assert memory.owner[hpa >> 12] == backend.td.tdr


class HardenedMigration(Migration):
    profile = "hardened"


BRIEF = settings(
    max_examples=20,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
LONG = settings(
    max_examples=600,
    stateful_step_count=80,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
MACHINES = [Migration, HardenedMigration]


@pytest.mark.parametrize("machine", MACHINES)
def test_random_migrations(machine):
    run_state_machine_as_test(machine, settings=BRIEF)


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_random_migrations_for_long(machine):
    run_state_machine_as_test(machine, settings=LONG)
