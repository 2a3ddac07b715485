"""The rows of the source as calls of its TDX module.

EXPORT.MEM is several rows: begin, its entries, end.  Its list begins and ends with a NOP entry that
the model does not have, and the host interrupts it after each entry: the call of a row does exactly
what the row says.  The VMM writes an entry into the list when its row comes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxmig_model.backend.soft.buffers import StreamBuffers
from tdxmig_model.backend.soft.call import STREAM_COMMAND_BIT, Point, Registers
from tdxmig_model.backend.soft.guest import ALWAYS_OF_256, EptViolation
from tdxmig_model.backend.soft.op_state import GuestLeaf, Leaf
from tdxmig_model.backend.soft.sept import READABLE_STATES, WRITE_BIT
from tdxmig_model.backend.soft.session import unfinished_memory
from tdxmig_model.backend.soft.status import Status, is_error
from tdxmig_model.conformance import keys
from tdxmig_model.conformance.answers import (
    INTERRUPTED,
    Answer,
    Sent,
    Unfinished,
    of_call,
    of_entry,
)
from tdxmig_model.conformance.side import HOST_LP, Side, always, gpa_of
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import MAX_ENTRIES, PAGE_SIZE
from tdxmig_model.wire.gpa_list import (
    GpaListInfo,
    GpaOperation,
    GpaStatus,
    build_entries,
    entry_statuses,
)

LEVEL_1: Final = 1
"""An entry of this level is malformed."""
FOREVER: Final = 1 << 30


@dataclass(slots=True)
class Inside:
    """A vCPU in the guest: VP.ENTER in progress since TD_EPOCH `epoch`."""

    vcpu: int
    epoch: int
    leaf: Generator[Point, None, None]


def raw_entry(page: int, operation: GpaOperation) -> int:
    """A GPA list entry, 64 bits."""
    return int(build_entries(np.array([gpa_of(page)], dtype=np.uint64), operation)[0])


class SourceCalls:
    """The source's side.  `entries` is how many entries of the model a memory bundle has at most.

    `log` is the network's: the bundles of the observed session.
    """

    def __init__(self, side: Side, log: list[Sent], entries: int) -> None:
        self.side = side
        self.log = log
        self.slots = entries + 3
        self.observed = False
        self.unfinished: dict[int, Unfinished] = {}
        self.inside: list[Inside] = []
        self.keys_written = 0
        self.abort_token: bytes | None = None
        self._rows: dict[str, Callable[..., Answer]] = {
            "source_set_migration_key": self._set_key,
            "source_mig_stream_create": lambda: of_call(side.create_stream()),
            "export_state_immutable": lambda: self._start(observed=True),
            "export_state_immutable_other": lambda: self._start(observed=False),
            "export_blockw": lambda p: self._list_leaf(Leaf.EXPORT_BLOCKW, p),
            "export_restore": lambda p: self._list_leaf(Leaf.EXPORT_RESTORE, p),
            "export_unblockw": self._unblock,
            "mem_track": lambda: self._td_leaf(Leaf.MEM_TRACK),
            "export_pause": lambda: self._td_leaf(Leaf.EXPORT_PAUSE),
            "vp_enter": self._enter,
            "vp_exit": lambda: self._exit(current=True),
            "vp_exit_previous": lambda: self._exit(current=False),
            "page_accept": self._accept,
            "guest_write": self._write,
            "export_mem_begin": self._begin,
            "export_mem_migrate": lambda stream, p: self._entry(stream, p, GpaOperation.MIGRATE),
            "export_mem_remigrate": lambda stream, p: self._entry(stream, p, GpaOperation.MIGRATE),
            "export_mem_out_of_order": lambda stream, p: self._entry(
                stream, p, GpaOperation.MIGRATE
            ),
            "export_mem_cancel": lambda stream, p: self._entry(stream, p, GpaOperation.CANCEL),
            "export_mem_failed_entry": lambda stream: self._entry(stream, 0, GpaOperation.NOP),
            "export_mem_end": self._end,
            "export_mem_dropped": self._drop,
            "export_track": lambda: self._track(0),
            "export_track_start": lambda: self._track(STREAM_COMMAND_BIT),
            "export_state_td": lambda: self._state(Leaf.EXPORT_STATE_TD, self.side.td.tdr, 0),
            "export_state_vp": self._vcpu,
            "export_abort": self._abort,
            "export_abort_with_token": self._abort_with_token,
        }

    def has(self, row: str) -> bool:
        """Whether the row is one of the source."""
        return row in self._rows

    def take(self, row: str, values: Mapping[str, int]) -> Answer:
        """The call that a row is."""
        return self._rows[row](**values)

    # --- session -------------------------------------------------------------------------------

    def _set_key(self) -> Answer:
        self.keys_written += 1
        return of_call(self.side.write_key(keys.key_of(self.keys_written)))

    def _start(self, *, observed: bool) -> Answer:
        if observed:
            keys.begin_observed(self.side)
        self.observed, before = observed, self.observed
        answer = self._state(Leaf.EXPORT_STATE_IMMUTABLE, self.side.td.tdr, 0)
        if not answer.accepted:
            self.observed = before
        return answer

    def _td_leaf(self, leaf: Leaf) -> Answer:
        return of_call(self.side.call(leaf, rcx=self.side.td.tdr).rax)

    def _state(self, leaf: Leaf, rcx: int, stream: int, lp: int = HOST_LP) -> Answer:
        buffers = self.side.buffers()
        registers = self.side.call(
            leaf,
            rcx=rcx,
            r8=buffers.mbmd_register,
            r9=buffers.page_list(MAX_ENTRIES),
            r10=stream,
            lp=lp,
        )
        answer = of_call(registers.rax)
        if answer.accepted:
            self._stays(leaf, stream)
            pages = [bytes(page) for page in buffers.read_pages(registers.rdx)]
            self._send(Sent(buffers.read_mbmd(), dict(enumerate(pages))))
        return answer

    def _stays(self, leaf: Leaf, stream: int) -> None:
        """A NEW call of a stream ends the unfinished one there; a session start ends them all."""
        if leaf is Leaf.EXPORT_STATE_IMMUTABLE:
            self.unfinished.clear()
        self.unfinished.pop(stream, None)

    def _send(self, sent: Sent) -> None:
        if self.observed:
            self.log.append(sent)

    def _vcpu(self, stream: int, v: int) -> Answer:
        return self._state(Leaf.EXPORT_STATE_VP, self.side.td.vcpus[v], stream, lp=v)

    def _track(self, command: int) -> Answer:
        buffers = self.side.buffers()
        tdr = self.side.td.tdr
        status = self.side.call(
            Leaf.EXPORT_TRACK, rcx=tdr, r8=buffers.mbmd_register, r10=command
        ).rax
        if not is_error(status):
            self._send(Sent(buffers.read_mbmd()))
        return of_call(status)

    def _abort(self) -> Answer:
        return self._ended(self.side.call(Leaf.EXPORT_ABORT, rcx=self.side.td.tdr))

    def _abort_with_token(self) -> Answer:
        """With the newest abort token; another session of the TD has one of its own peer's."""
        token = self.abort_token or keys.abort_token(bytes(32))
        if not self.observed:
            token = keys.abort_token(self.side.tdcs.mig_dec_working_key)
        buffers = self.side.buffers()
        buffers.write_mbmd(token)
        return self._ended(
            self.side.call(Leaf.EXPORT_ABORT, rcx=self.side.td.tdr, r8=buffers.mbmd_register)
        )

    def _ended(self, registers: Registers) -> Answer:
        if not is_error(registers.rax):
            self.observed = False
            self.unfinished.clear()
        return of_call(registers.rax)

    # --- pages ---------------------------------------------------------------------------------

    def _list_leaf(self, leaf: Leaf, page: int) -> Answer:
        buffers = self.side.buffers()
        rcx = buffers.gpa_list(np.array([raw_entry(page, GpaOperation.MIGRATE)], dtype=np.uint64))
        status = self.side.call(leaf, rcx=rcx, rdx=self.side.td.tdr).rax
        return of_entry(status, GpaStatus(int(entry_statuses(buffers.entries(1))[0])))

    def _unblock(self, p: int) -> Answer:
        leaf = Leaf.EXPORT_UNBLOCKW
        return of_call(self.side.call(leaf, rcx=gpa_of(p), rdx=self.side.td.tdr).rax)

    # --- EXPORT.MEM ----------------------------------------------------------------------------

    def _export(self, stream: int, rcx: int, command: int, *, one_entry: bool = True) -> Registers:
        buffers = self.side.buffers(stream)
        buffers.offer_buffers(self.slots)
        return self.side.call(
            Leaf.EXPORT_MEM,
            interrupt=always if one_entry else None,
            rcx=rcx,
            rdx=self.side.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.list,
            r10=stream | command,
            r11=buffers.macs_low,
            r12=buffers.macs_high,
        )

    def _begin(self, stream: int) -> Answer:
        buffers = self.side.buffers(stream)
        rcx = buffers.gpa_list(np.zeros(self.slots, dtype=np.uint64))
        registers = self._export(stream, rcx, 0)
        if registers.rax != INTERRUPTED:
            return Answer(False, registers.rax)
        sent = Sent(buffers.read_mbmd())
        self._keep(buffers, sent, 0)
        self.unfinished[stream] = Unfinished(1, registers.rcx, sent)
        self._send(sent)
        return Answer(True, registers.rax)

    def _resume_at(self, stream: int) -> tuple[int, int]:
        """The next slot and RCX of a RESUME; entry 1 if there is nothing to resume."""
        known = self.unfinished.get(stream)
        if known is not None:
            return known.slot, known.rcx
        gpas = self.side.buffers(stream).gpas
        return 1, GpaListInfo(gpas, self.slots - 1, 1).to_register()

    def _resume(self, stream: int, raw: int) -> tuple[int, GpaStatus]:
        """RESUME for one entry; its status and that of the entry."""
        slot, rcx = self._resume_at(stream)
        if slot >= self.slots - 1:
            raise UsageError(f"a bundle with more than {self.slots - 2} entries")
        buffers = self.side.buffers(stream)
        words = self.side.host.memory.page_words(buffers.gpas)
        words[slot] = raw
        registers = self._export(stream, rcx, STREAM_COMMAND_BIT)
        status = GpaStatus(int(entry_statuses(buffers.entries(slot + 1))[slot]))
        known = self.unfinished.get(stream)
        if known is not None and registers.rax == INTERRUPTED:
            self._keep(buffers, known.sent, slot)
            known.slot, known.rcx = slot + 1, registers.rcx
        return registers.rax, status

    def _entry(self, stream: int, p: int, operation: GpaOperation) -> Answer:
        raw = 0 if operation is GpaOperation.NOP else raw_entry(p, operation)
        status, entry = self._resume(stream, raw)
        if operation is GpaOperation.NOP and entry is GpaStatus.SKIPPED:
            entry = GpaStatus.SUCCESS
        return of_entry(status, entry)

    def _drop(self, stream: int) -> Answer:
        """A malformed entry ends the call; so does a RESUME that is refused."""
        before = self._can_resume(stream)
        status, entry = self._resume(stream, raw_entry(0, GpaOperation.MIGRATE) | LEVEL_1)
        ended = before and not self._can_resume(stream)
        if ended:
            self.unfinished.pop(stream, None)
        return Answer(ended, status, entry)

    def _can_resume(self, stream: int) -> bool:
        links = self.side.tdcs.links[1:]
        return stream < len(links) and unfinished_memory(links[stream])

    def _end(self, stream: int) -> Answer:
        slot, rcx = self._resume_at(stream)
        buffers = self.side.buffers(stream)
        self.side.host.memory.page_words(buffers.gpas)[slot : self.slots] = 0
        status = self._export(stream, rcx, STREAM_COMMAND_BIT, one_entry=False).rax
        known = self.unfinished.get(stream)
        if known is not None and not is_error(status):
            for number in range(slot, self.slots):
                self._keep(buffers, known.sent, number)
            del self.unfinished[stream]
        return of_call(status)

    def _keep(self, buffers: StreamBuffers, sent: Sent, slot: int) -> None:
        """Copy out what the module wrote for one slot of the list."""
        sent.entries[slot] = int(buffers.entries(slot + 1)[slot])
        sent.macs[slot] = buffers.read_macs(slot + 1)[16 * slot :]
        at = buffers.buffers + slot * PAGE_SIZE
        sent.pages[slot] = bytes(self.side.host.memory.bytes[at : at + PAGE_SIZE])

    # --- the guest -----------------------------------------------------------------------------

    def _enter(self) -> Answer:
        """The next vCPU enters, and reads every page that it can read: its TLB knows them."""
        busy = {one.vcpu for one in self.inside}
        free = [vcpu for vcpu in range(self.side.vcpus) if vcpu not in busy]
        if not free:
            raise UsageError(f"all {self.side.vcpus} vCPUs are in the guest")
        registers = Registers(rcx=self.side.td.vcpus[free[0]])
        leaf = self._started(free[0], registers)
        if leaf is None:
            return of_call(registers.rax)
        self.inside.append(Inside(free[0], self.side.tdcs.td_epoch, leaf))
        for page in range(len(self.side.page_hpas)):
            if self.side.state_of(page) in READABLE_STATES:
                self._run(self.inside[-1], gpa_of(page), write=False)
        return Answer(True, registers.rax)

    def _started(self, vcpu: int, registers: Registers) -> Generator[Point, None, None] | None:
        """VP.ENTER up to the guest's first instruction; None if it was refused."""
        module = self.side.host.module
        module.processors[vcpu].timer = FOREVER
        leaf = module.start(Leaf.VP_ENTER, registers, lp=vcpu)
        for point in leaf:
            if point is Point.GUEST:
                return leaf
        return None

    def _run(self, inside: Inside, gpa: int, *, write: bool) -> bool:
        """One instruction on a page; False if it made the vCPU exit."""
        vcpu = self.side.tdvps(inside.vcpu)
        assert vcpu is not None
        vcpu.registers.update(R13=gpa, R12=1, R9=ALWAYS_OF_256 if write else 0)
        return any(point is Point.GUEST for point in inside.leaf)

    def _exit(self, *, current: bool) -> Answer:
        epoch = self.side.tdcs.td_epoch
        leaving = [one for one in self.inside if (one.epoch == epoch) is current]
        if not leaving:
            raise UsageError("no vCPU that could leave is in the guest")
        self._leave_guest(leaving[0])
        return Answer(True)

    def _leave_guest(self, inside: Inside) -> None:
        """The vCPU exits; its last instruction only reads the page of the program."""
        self.side.host.module.processors[inside.vcpu].timer = 0
        self._run(inside, 0, write=False)
        self.inside.remove(inside)

    def _write(self, p: int) -> Answer:
        """A vCPU that can write the page does; else the first one tries, and exits."""
        if not self.inside:
            raise UsageError("no vCPU is in the guest")
        able = [one for one in self.inside if self.can_write(one, p)]
        chosen = (able or self.inside)[0]
        if self._run(chosen, gpa_of(p), write=True):
            return Answer(True)
        self.inside.remove(chosen)
        return Answer(False, violation=True)

    def can_write(self, inside: Inside, page: int) -> bool:
        """Whether a vCPU has a writable translation of the page, or would find one."""
        vcpu = self.side.tdvps(inside.vcpu)
        assert vcpu is not None
        cached = vcpu.tlb.get(gpa_of(page))
        entry = self.side.entry(page)
        found = self.side.state_of(page) in READABLE_STATES and bool(entry & WRITE_BIT)
        return (cached is not None and cached[1]) or found

    def _accept(self, p: int) -> Answer:
        if not self.inside:
            raise UsageError("no vCPU is in the guest")
        vcpu = self.side.td.vcpus[self.inside[0].vcpu]
        registers = Registers(rcx=gpa_of(p))
        try:
            self.side.host.module.tdcall(GuestLeaf.MEM_PAGE_ACCEPT, registers, vcpu)
        except EptViolation:
            self._leave_guest(self.inside[0])
            return Answer(False, violation=True)
        done = registers.rax == Status.TDX_SUCCESS
        return Answer(done, registers.rax)

    # --- to go back to -------------------------------------------------------------------------

    def save(self) -> Callable[[], None]:
        """What puts the source back to this moment; vCPUs stay in the guest both times."""
        entered = [(one.vcpu, one.epoch, self._leave(one)) for one in self.inside]
        host = self.side.save()
        kept = {stream: one.copy() for stream, one in self.unfinished.items()}
        bundles = [one.sent.save() for one in kept.values()]
        plain = (self.observed, self.keys_written, self.abort_token)
        self._return(entered)

        def restore() -> None:
            for one in self.inside:
                one.leaf.close()
            host()
            self.unfinished = {stream: one.copy() for stream, one in kept.items()}
            for bundle in bundles:
                bundle()
            self.observed, self.keys_written, self.abort_token = plain
            self._return(entered)

        return restore

    def _leave(self, one: Inside) -> dict[int, tuple[int, bool]]:
        """Take the vCPU out for a moment; the translations it had."""
        vcpu = self.side.tdvps(one.vcpu)
        assert vcpu is not None
        cached = dict(vcpu.tlb)
        one.leaf.close()
        return cached

    def _return(self, entered: list[tuple[int, int, dict[int, tuple[int, bool]]]]) -> None:
        """Put vCPUs back into the guest as they were: epoch and translations."""
        tdcs = self.side.tdcs
        self.inside = []
        for number, epoch, cached in entered:
            vcpu = self.side.tdvps(number)
            assert vcpu is not None
            now, tdcs.td_epoch, vcpu.vcpu_epoch = tdcs.td_epoch, epoch, epoch
            leaf = self._started(number, Registers(rcx=self.side.td.vcpus[number]))
            tdcs.td_epoch = now
            if leaf is None:
                raise UsageError(f"vCPU {number} cannot go back into the guest")
            vcpu.tlb.clear()
            vcpu.tlb.update(cached)
            self.inside.append(Inside(number, epoch, leaf))
