"""A state machine for Hypothesis: source and destination driven at random through leaves.

Interruptions, resumptions right and wrong, calls at the same time on either side, aborts, later
sessions, post-copy, a VMM that drops, repeats, reorders and damages bundles.  A machine begins in
any stage of a migration; its rules are those that fit OP_STATE, and one for leaves that do not.
The judgements are invariants: what stays true after every step?
"""

import contextlib
import copy
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from soft_calls import assert_nothing_is_locked, assert_pages_owned, exported, load
from soft_pair import CANCEL, MIGRATE, Pair, flip, tampered

from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.memory import PageType
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.schedulers import LeafCall, Seeded, resume_operands
from tdxmig_model.backend.soft.sept import FIRST_EXPORT_STATES, SeptState
from tdxmig_model.backend.soft.status import LOW_32, Status
from tdxmig_model.engine import commands as c
from tdxmig_model.errors import BackendError
from tdxmig_model.wire.gpa_list import build_entries

PAGES, PENDING, STREAMS, VCPUS = 8, 2, 2, 2
LISTS = 2
"""Buffers of a stream that is not there, for the lists of BLOCKW and RESTORE."""
RUNS_ON_SOURCE = ("RUNNABLE", "LIVE_EXPORT")
IMPORTING = ("MEMORY_IMPORT", "STATE_IMPORT", "POST_IMPORT", "LIVE_IMPORT")
IMPORTED = ("POST_IMPORT", "LIVE_IMPORT")
EXPORTING = ("LIVE_EXPORT", "PAUSED_EXPORT", "POST_EXPORT")
STAGES = ("live", "paused", "post", "post", "live import")
"""How far a migration is when a machine begins; the abort with a token needs "post"."""
RUNS_ON_DESTINATION = ("RUNNABLE", "LIVE_IMPORT")

seeds = st.integers(0, 1 << 16)
some_pages = st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=4, unique=True)
one_page = st.integers(0, PAGES - 1)
streams = st.integers(0, STREAMS - 1)
vcpus = st.integers(0, VCPUS - 1)
stages = st.sampled_from(STAGES)
processors = st.integers(0, 1)


MORE = ("memory", "track", "commit")
"""What else may be called on the destination while a memory bundle is imported."""


def source_in(*states):
    """Precondition: OP_STATE of the source."""
    return precondition(lambda self: self.state in states)


def destination_in(*states):
    """Precondition: OP_STATE of the destination."""
    return precondition(lambda self: self.state_there in states)


def memory_is_next(self):
    """Is a memory bundle the next to be delivered, and somebody there to take it?"""
    waiting = self.sent and isinstance(self.sent[0], c.ImportMem)
    return waiting and self.state_there in IMPORTING


MISCHIEF = ("reorder", "repeat", "drop", "damage", "abort", "abort import")


OUT_OF_PLACE = {
    Leaf.EXPORT_PAUSE: c.ExportPause(),
    Leaf.EXPORT_TRACK: c.ExportTrack(),
    Leaf.EXPORT_STATE_TD: c.ExportStateTd(),
    Leaf.EXPORT_STATE_VP: c.ExportStateVp(0),
    Leaf.EXPORT_ABORT: c.ExportAbort(None),
    Leaf.EXPORT_BLOCKW: c.ExportBlockw(np.zeros(1, dtype=np.uint64)),
    Leaf.EXPORT_RESTORE: c.ExportRestore(np.zeros(1, dtype=np.uint64)),
    Leaf.EXPORT_UNBLOCKW: c.ExportUnblockw(0),
    Leaf.IMPORT_END: c.ImportEnd(),
}


class Migration(RuleBasedStateMachine):
    """Two hosts, one TD that moves, and whatever a VMM may do."""

    profile = "tdx-1.5.01"

    @initialize(stage=stages)
    def build(self, stage):
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
        self.go_on(stage)

    def go_on(self, stage):
        """By leaves alone, as far as `stage`; bundles of both streams are left to deliver."""
        if stage == "live":
            return
        pair = self.pair
        # After an aborted session the host may have blocked or removed some.
        there = pair.source.page_states(pair.gpas).tolist()
        ready = pair.gpas[[state in FIRST_EXPORT_STATES for state in there]]
        half = ready.size // 2
        pair.pause()
        if half:
            pair.move(ready[:half])
        if stage != "paused":
            self.td_sent = True
            pair.states()
            pair.start_token()
            self.assert_fresh()
        if stage == "live import":
            pair.on_destination(c.ImportCommit())
        for stream in range(STREAMS):
            if (rest := ready[half + stream :: STREAMS]).size:
                bundle = pair.export(rest, stream=stream)
                self.sent.append(c.ImportMem(stream, bundle))

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

    @property
    def state_there(self):
        return self.pair.state(self.pair.destination)

    def gpas(self, pages):
        return np.array([4096 * page for page in pages], dtype=np.uint64)

    def run(self, calls, seed, rate=0.25):
        """Leaf calls at the same time on the source; their final registers."""
        return Seeded(self.module, seed, interrupt_rate=rate).run(calls).registers

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

    @source_in(*EXPORTING)
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

    @source_in(*EXPORTING)
    @rule(stream=streams, register=st.sampled_from(["rcx", "r9", "r11", "r12"]), seed=seeds)
    def resume_with_another_operand(self, stream, register, seed):
        """An EXPORT.MEM is stopped after its first page, and resumed wrongly."""
        if stream not in self.stopped:
            call = self.export_call([0, 1], stream, MIGRATE, 2, False)
            (left,) = self.run([call], seed, rate=1.0)
            self.exported(call, left, 2)
        if stream not in self.stopped:
            return
        operands = copy.copy(self.stopped[stream][0])
        change = 1 << 3 if register == "rcx" else 4096
        setattr(operands, register, getattr(operands, register) ^ change)
        (left,) = self.run([LeafCall(Leaf.EXPORT_MEM, operands, lp=2)], seed)
        assert left.rax >> 63

    @source_in("LIVE_EXPORT")
    @rule(pages=some_pages, seed=seeds)
    def block_writes(self, pages, seed):
        self.run([self.list_call(Leaf.EXPORT_BLOCKW, pages, 2)], seed)

    @source_in("RUNNABLE")
    @rule(pages=some_pages, seed=seeds)
    def restore(self, pages, seed):
        self.run([self.list_call(Leaf.EXPORT_RESTORE, pages, 2)], seed)

    @source_in("LIVE_EXPORT", "PAUSED_EXPORT", "RUNNABLE")
    @rule(page=one_page)
    def unblock_writes(self, page):
        self.source.execute(c.ExportUnblockw(4096 * page))

    @rule()
    def track_tlb(self):
        self.source.execute(c.MemTrack())

    @source_in(*RUNS_ON_SOURCE)
    @rule(vcpu=vcpus, budget=st.integers(1, 6), unblock=st.booleans())
    def run_guest(self, vcpu, budget, unblock):
        ended = self.source.execute(c.VpEnter(vcpu, budget)).exit
        if unblock and ended is not None and ended.reason == "ept_violation":
            self.source.execute(c.ExportUnblockw(ended.gpa))

    @source_in(*RUNS_ON_SOURCE)
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

    @source_in("LIVE_EXPORT", "PAUSED_EXPORT")
    @rule()
    def next_epoch(self):
        self.send(self.source.execute(c.ExportTrack()), c.ImportTrack)

    @source_in("LIVE_EXPORT")
    @rule()
    def pause(self):
        self.source.execute(c.ExportPause())

    @rule(leaf=st.sampled_from(list(OUT_OF_PLACE)))
    def out_of_place(self, leaf):
        """A leaf in an OP_STATE for which it is not: refused, and nothing else."""
        if self.module.allowed[leaf] & {OpState[self.state]}:
            return
        before = self.source.observe()
        result = self.source.execute(OUT_OF_PLACE[leaf])
        assert result.status == Status.TDX_OP_STATE_INCORRECT
        assert self.source.observe() == before

    @precondition(lambda self: self.state == "PAUSED_EXPORT" and not self.td_sent)
    @rule()
    def export_td(self):
        """Once, for a second one cannot be imported."""
        self.td_sent = True
        self.send(self.source.execute(c.ExportStateTd()), c.ImportStateTd)

    @source_in("PAUSED_EXPORT")
    @rule(vcpu=vcpus, stream=streams)
    def export_vcpu(self, vcpu, stream):
        result = self.source.execute(c.ExportStateVp(vcpu, stream))
        self.send(result, lambda bundle: c.ImportStateVp(bundle, vcpu))

    @source_in("PAUSED_EXPORT")
    @rule()
    def start_token(self):
        self.send(self.source.execute(c.ExportTrack(True)), c.ImportTrack)

    @precondition(lambda self: self.state == "RUNNABLE" and not self.session)
    @rule(restore=st.booleans(), stage=stages)
    def new_session(self, restore, stage):
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
        if self.session and restore:
            self.go_on(stage)

    @source_in("LIVE_EXPORT", "PAUSED_EXPORT")
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
        if self.state == "PAUSED_EXPORT":
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
        elif what == "abort" and self.source.execute(c.ExportAbort(None)).ok:
            self.session = False
        elif what == "abort import":
            self.abort_import(use=False)

    def import_call(self, command, lp, resume):
        """IMPORT.MEM of a bundle, and the pages that it is given."""
        pair, host = self.pair, self.pair.destination_host
        host.add_tables(pair.destination.td, pair.gpas)
        fresh = host.take_private_pages(len(command.bundle.pages))
        call = load(pair, command.bundle, fresh, stream=command.stream, lp=lp, resume=resume)
        return call, fresh

    def give_back(self, fresh):
        """The pages that an import did not take."""
        host = self.pair.destination_host
        kept = [hpa for hpa in fresh if host.memory.page_type[hpa >> 12] != PageType.NDA]
        self.pair.destination.td.control_pages += kept
        host.give_back_private_pages(sorted(set(fresh) - set(kept)))

    @precondition(memory_is_next)
    @rule(seed=seeds, wrong=st.booleans(), lp=processors)
    def stop_import(self, seed, wrong, lp):
        """An IMPORT.MEM that is interrupted, and resumed with the right lists or others."""
        call, fresh = self.import_call(self.sent.pop(0), lp, False)
        module = self.pair.destination_host.module
        (left,) = Seeded(module, seed, interrupt_rate=0.8).run([call]).registers
        while left.rax == Status.TDX_INTERRUPTED_RESUMABLE:
            again = resume_operands(Leaf.IMPORT_MEM, call.operands, left)
            if wrong:
                again.r9 ^= 4096
            (left,) = Seeded(module, seed).run([LeafCall(Leaf.IMPORT_MEM, again, lp=lp)]).registers
            assert not wrong or left.rax >> 63
        self.give_back(fresh)

    @precondition(memory_is_next)
    @rule(seed=seeds, more=st.sets(st.sampled_from(MORE)))
    def import_at_the_same_time(self, seed, more):
        """Several logical processors of the destination, two with the same bundle.

        What was BUSY is delivered later.
        """
        commands = [self.sent.pop(0)]
        streams = {commands[0].stream}
        for command in list(self.sent) if "memory" in more else ():
            if isinstance(command, c.ImportMem) and command.stream not in streams:
                self.sent.remove(command)
                commands.append(command)
                streams.add(command.stream)
        calls, fresh = [], []
        for lp, command in enumerate(commands):
            call, pages = self.import_call(command, lp, True)
            calls.append(call)
            fresh += pages
        calls.append(replace(calls[0], lp=len(calls), resume=False))
        calls += self.other_calls(more)
        lefts = Seeded(self.pair.destination_host.module, seed).run(calls).registers
        self.give_back(fresh)
        busy = [left.rax & ~LOW_32 == Status.TDX_OPERAND_BUSY for left in lefts]
        again = [command for command, was_busy in zip(commands, busy, strict=False) if was_busy]
        self.sent[:0] = again

    def other_calls(self, more):
        """TRACK of the next token and COMMIT, each on a logical processor of its own."""
        td, calls = self.pair.destination.td, []
        if "track" in more and self.sent and isinstance(self.sent[0], c.ImportTrack):
            buffers = self.pair.destination_host.stream_buffers(LISTS)
            buffers.write_mbmd(self.sent[0].bundle.mbmd.pack())
            operands = Registers(rcx=td.tdr, r8=buffers.mbmd_register)
            calls.append(LeafCall(Leaf.IMPORT_TRACK, operands, lp=3))
        if "commit" in more and self.state_there == "POST_IMPORT":
            calls.append(LeafCall(Leaf.IMPORT_COMMIT, Registers(rcx=td.tdr), lp=3))
        return calls

    def damage(self, command, mbmd):
        bundle = command.bundle
        if mbmd:
            bundle = tampered(bundle, mbmd=bundle.mbmd.with_mac(flip(bundle.mbmd.mac)))
        else:
            bundle = tampered(bundle, macs=flip(bundle.macs))
        self.give(c.ImportMem(command.stream, bundle))

    @destination_in("POST_IMPORT")
    @rule()
    def commit(self):
        self.give(c.ImportCommit())

    @destination_in(*IMPORTED)
    @rule()
    def end(self):
        self.give(c.ImportEnd())

    @destination_in("POST_IMPORT")
    @rule()
    def go_back_with_a_token(self):
        """The destination gives the TD up, and the source goes on."""
        self.abort_import(use=True)

    @destination_in("FAILED_IMPORT")
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

    @destination_in(*RUNS_ON_DESTINATION)
    @rule(vcpu=vcpus)
    def run_destination(self, vcpu):
        if vcpu < len(self.pair.destination.td.vcpus):
            self.give(c.VpEnter(vcpu, 3))

    @destination_in("RUNNABLE")
    @rule(stage=stages)
    def the_move_is_over(self, stage):
        """Another TD moves."""
        self.build(stage)

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


class HardenedMigration(Migration):
    profile = "hardened"
