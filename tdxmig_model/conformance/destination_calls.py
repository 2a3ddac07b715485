"""The rows of the destination as calls of its TDX module.

An import takes any bundle of the log, as the module of the source wrote it.  IMPORT.MEM is several
rows, as EXPORT.MEM is: the host interrupts it after each entry.  Where the model names another page
or operation than the bundle has, the VMM writes that into the list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from tdxmig_model.backend.soft.call import STREAM_COMMAND_BIT, Registers
from tdxmig_model.backend.soft.gpa_entries import INVALID_BIT, OPERATION_SHIFT, PENDING_BIT
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.status import is_error
from tdxmig_model.conformance import keys
from tdxmig_model.conformance.answers import (
    INTERRUPTED,
    Answer,
    Sent,
    Unfinished,
    of_call,
    of_entry,
)
from tdxmig_model.conformance.side import HOST_LP, Side, always
from tdxmig_model.conformance.source_calls import raw_entry
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.gpa_list import GpaListInfo, GpaOperation, GpaStatus, entry_statuses

_BLANK: Final = bytes(PAGE_SIZE)
_NO_MAC: Final = bytes(16)
_STATE_PAGES: Final = 5
"""Pages of a state bundle at least, so that a list is never too short for the leaf."""
FORGED_COUNTER: Final = 1 << 40
"""IV_COUNTER of what nobody sent."""


class DestinationCalls:
    """The destination's side; `log` is the network's, `slots` the entries of each memory bundle."""

    def __init__(self, side: Side, log: list[Sent], slots: int) -> None:
        self.side = side
        self.log = log
        self.slots = slots
        self.importing: dict[int, Unfinished] = {}
        self.abort_token: bytes | None = None
        migrate, cancel, remigrate = (
            GpaOperation.MIGRATE,
            GpaOperation.CANCEL,
            GpaOperation.REMIGRATE,
        )
        self._rows: dict[str, Callable[..., Answer]] = {
            "destination_set_migration_key": lambda: of_call(side.write_key(keys.FORWARD)),
            "destination_mig_stream_create": lambda: of_call(side.create_stream()),
            "import_state_immutable": self._start,
            "import_mem_begin": self._begin,
            "import_mem_migrate": lambda stream, p: self._entry(stream, p, migrate),
            "import_mem_migrate_pending": lambda stream, p: self._entry(
                stream, p, migrate, pending=True
            ),
            "import_mem_remigrate": lambda stream, p: self._entry(stream, p, remigrate),
            "import_mem_remigrate_pending": lambda stream, p: self._entry(
                stream, p, remigrate, pending=True
            ),
            "import_mem_cancel": lambda stream, p: self._entry(stream, p, cancel),
            "import_mem_nop": self._skip,
            "import_mem_end": self._end,
            "import_mem_refused": self._refused,
            "import_track": self._track,
            "import_track_start": self._track,
            "import_state_td": lambda m: self._state(Leaf.IMPORT_STATE_TD, side.td.tdr, m),
            "import_state_vp": self._vcpu,
            "import_commit": lambda: self._td_leaf(Leaf.IMPORT_COMMIT),
            "import_end": lambda: self._td_leaf(Leaf.IMPORT_END),
            "import_abort": self._abort,
            "import_failure": self._fail,
            "import_failure_live": self._fail,
            "destination_vp_enter": self._enter,
        }

    def has(self, row: str) -> bool:
        """Whether the row is one of the destination."""
        return row in self._rows

    def take(self, row: str, values: Mapping[str, int]) -> Answer:
        """The call that a row is."""
        return self._rows[row](**values)

    # --- bundles -------------------------------------------------------------------------------

    def _message(self, m: int) -> Sent:
        """A bundle of the log; behind its end the newest one with another MAC: nobody sent that."""
        if 0 <= m < len(self.log):
            return self.log[m]
        if not self.log:
            raise UsageError("no bundle was sent yet")
        newest = self.log[-1].copy()
        newest.mbmd = newest.mbmd[:-1] + bytes([newest.mbmd[-1] ^ 1])
        return newest

    def _td_leaf(self, leaf: Leaf) -> Answer:
        return of_call(self.side.call(leaf, rcx=self.side.td.tdr).rax)

    def _start(self, m: int) -> Answer:
        keys.begin_import(self.side)
        answer = self._state(Leaf.IMPORT_STATE_IMMUTABLE, self.side.td.tdr, m)
        if answer.accepted:
            self.side.add_tables(len(self.side.page_hpas))
        return answer

    def _state(self, leaf: Leaf, rcx: int, m: int, stream: int = 0, lp: int = HOST_LP) -> Answer:
        buffers, sent = self.side.buffers(), self._message(m)
        pages = [sent.pages[number] for number in sorted(sent.pages)]
        pages += [_BLANK] * (_STATE_PAGES - len(pages)) if sent.entries or not pages else []
        buffers.write_mbmd(sent.mbmd)
        buffers.write_pages(pages)
        operands = {"rcx": rcx, "r8": buffers.mbmd_register, "r9": buffers.page_list(len(pages))}
        status = self.side.call(leaf, operands, lp=lp, r10=stream).rax
        if not is_error(status):
            self.importing.pop(stream, None)
        return of_call(status)

    def _vcpu(self, stream: int, m: int, v: int) -> Answer:
        refused = self.side.create_vcpus()
        if refused:
            return of_call(refused)
        vcpu = self.side.td.vcpus[v]
        return self._state(Leaf.IMPORT_STATE_VP, vcpu, m, stream, lp=v)

    def _track(self, m: int) -> Answer:
        return self._take_token(self._message(m).mbmd)

    def _take_token(self, mbmd: bytes) -> Answer:
        buffers = self.side.buffers()
        buffers.write_mbmd(mbmd)
        tdr = self.side.td.tdr
        status = self.side.call(Leaf.IMPORT_TRACK, rcx=tdr, r8=buffers.mbmd_register).rax
        if not is_error(status):
            self.importing.pop(0, None)
        return of_call(status)

    def _abort(self) -> Answer:
        buffers = self.side.buffers()
        tdr = self.side.td.tdr
        status = self.side.call(Leaf.IMPORT_ABORT, rcx=tdr, r8=buffers.mbmd_register).rax
        if not is_error(status):
            self.abort_token = buffers.read_mbmd()
        return of_call(status)

    def _enter(self) -> Answer:
        if not self.side.td.vcpus:
            raise UsageError("the destination has no vCPU yet")
        self.side.host.module.processors[0].timer = 0
        return of_call(self.side.call(Leaf.VP_ENTER, lp=0, rcx=self.side.td.vcpus[0]).rax)

    # --- failures ------------------------------------------------------------------------------

    def _fail(self) -> Answer:
        """Something that fails for good: a bundle that was damaged on the way."""
        state = self.side.tdcs.op_state
        if state is OpState.UNINITIALIZED:
            answer = self._damaged_start()
        elif state in (OpState.MEMORY_IMPORT, OpState.STATE_IMPORT):
            answer = self._take_token(bytes(48))
        else:
            answer = self._damaged_page()
        after = self.side.tdcs.op_state
        wanted = OpState.RUNNABLE if state is OpState.LIVE_IMPORT else OpState.FAILED_IMPORT
        return replace(answer, accepted=not answer.accepted and after is wanted)

    def _damaged_start(self) -> Answer:
        keys.begin_import(self.side)
        buffers = self.side.buffers()
        buffers.write_mbmd(bytes(48))
        registers = self.side.call(
            Leaf.IMPORT_STATE_IMMUTABLE,
            rcx=self.side.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.page_list(_STATE_PAGES),
        )
        return of_call(registers.rax)

    def _damaged_page(self) -> Answer:
        """A bundle of one page whose MAC is wrong, on stream 0."""
        epoch = self.side.tdcs.mig_epoch
        counter = self.side.tdcs.links[1].migsc.expected_mb_counter
        sent = Sent(keys.memory_bundle(epoch, counter, 0, FORGED_COUNTER))
        sent.entries[0] = raw_entry(0, GpaOperation.NOP)
        rcx = GpaListInfo(self.side.buffers(0).gpas, 0).to_register()
        self._load(0, sent, 0, 1)
        return of_call(self._import(0, rcx, 0).rax)

    # --- IMPORT.MEM ----------------------------------------------------------------------------

    def _load(self, stream: int, sent: Sent, first: int, past: int) -> None:
        """Write the slots `first` to `past` of a bundle where the leaf will read them."""
        buffers, memory = self.side.buffers(stream), self.side.host.memory
        buffers.write_mbmd(sent.mbmd)
        buffers.offer_buffers(self.slots)
        words = memory.page_words(buffers.gpas)
        for slot in range(first, past):
            words[slot] = sent.entries.get(slot, 0)
            at = buffers.buffers + slot * PAGE_SIZE
            memory.bytes[at : at + PAGE_SIZE] = sent.pages.get(slot, _BLANK)
            mac = buffers.macs_low + 16 * slot
            memory.bytes[mac : mac + 16] = sent.macs.get(slot, _NO_MAC)
        buffers.offer_new_pages(np.full(self.slots, INVALID_BIT, dtype=np.uint64))

    def _import(self, stream: int, rcx: int, command: int, *, one_entry: bool = True) -> Registers:
        buffers = self.side.buffers(stream)
        return self.side.call(
            Leaf.IMPORT_MEM,
            interrupt=always if one_entry else None,
            rcx=rcx,
            rdx=self.side.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.list,
            r10=stream | command,
            r11=buffers.macs_low,
            r12=buffers.macs_high,
            r13=buffers.new_pages,
        )

    def _begin(self, stream: int, m: int) -> Answer:
        sent = self._message(m)
        self._load(stream, sent, 0, 1)
        rcx = GpaListInfo(self.side.buffers(stream).gpas, self.slots - 1).to_register()
        registers = self._import(stream, rcx, 0)
        if registers.rax != INTERRUPTED:
            return Answer(False, registers.rax)
        self.importing[stream] = Unfinished(1, registers.rcx, sent)
        return Answer(True, registers.rax)

    def _refused(self, stream: int) -> Answer:
        """A new call whose MBMD is none: that it is refused is what the row says."""
        self.side.buffers(stream).write_mbmd(bytes(48))
        rcx = GpaListInfo(self.side.buffers(stream).gpas, self.slots - 1).to_register()
        answer = of_call(self._import(stream, rcx, 0).rax)
        return replace(answer, accepted=answer.word == "INVALID_MBMD")

    def _resume_at(self, stream: int) -> Unfinished:
        known = self.importing.get(stream)
        if known is not None:
            return known
        gpas = self.side.buffers(stream).gpas
        return Unfinished(1, GpaListInfo(gpas, self.slots - 1, 1).to_register(), Sent())

    def _resume(self, stream: int, raw: int | None, new_page: int) -> Answer:
        """RESUME for one entry, as the bundle has it or as `raw`."""
        known = self._resume_at(stream)
        slot = known.slot
        if slot >= self.slots - 1:
            raise UsageError(f"a bundle has no more than {self.slots - 2} entries here")
        buffers, memory = self.side.buffers(stream), self.side.host.memory
        self._load(stream, known.sent, slot, slot + 1)
        if raw is not None:
            memory.page_words(buffers.gpas)[slot] = raw
        memory.page_words(buffers.new_pages)[slot] = new_page
        registers = self._import(stream, known.rcx, STREAM_COMMAND_BIT)
        if registers.rax == INTERRUPTED:
            known.slot, known.rcx = slot + 1, registers.rcx
        return of_entry(
            registers.rax, GpaStatus(int(entry_statuses(buffers.entries(slot + 1))[slot]))
        )

    def _entry(
        self, stream: int, p: int, operation: GpaOperation, *, pending: bool = False
    ) -> Answer:
        known = self._resume_at(stream)
        here = known.sent.entries.get(known.slot, 0)
        raw = raw_entry(p, operation) | (PENDING_BIT if pending else 0)
        mask = (1 << 52) - 1 & ~(PAGE_SIZE - 1) | 3 << OPERATION_SHIFT
        mask |= PENDING_BIT if operation is not GpaOperation.CANCEL else 0
        same = here & mask == raw & mask
        return self._resume(stream, here if same else raw, self.side.page_hpas[p])

    def _skip(self, stream: int) -> Answer:
        """The next entry does nothing: it is a NOP, or has no page to go to."""
        answer = self._resume(stream, None, self.side.td.tdr)
        nop = answer.status == INTERRUPTED and answer.entry is not GpaStatus.SUCCESS
        return replace(answer, accepted=nop)

    def _end(self, stream: int) -> Answer:
        known = self._resume_at(stream)
        self._load(stream, known.sent, known.slot, self.slots)
        status = self._import(stream, known.rcx, STREAM_COMMAND_BIT, one_entry=False).rax
        if not is_error(status):
            self.importing.pop(stream, None)
        return of_call(status)

    # --- to go back to -------------------------------------------------------------------------

    def save(self) -> Callable[[], None]:
        """What puts the destination back to this moment."""
        host = self.side.save()
        kept = {stream: one.copy() for stream, one in self.importing.items()}
        token = self.abort_token

        def restore() -> None:
            host()
            self.importing = {stream: one.copy() for stream, one in kept.items()}
            self.abort_token = token

        return restore
