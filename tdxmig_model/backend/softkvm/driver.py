"""What KVM's migration driver does with one TD, command by command, over the software module.

The behaviour is that of the out-of-tree drivers of kernels 6.2 (Gen-1a) and 6.6 (Gen-1b), odd parts
included, because callers meet them:

* the stream with index 0 is the default one; the module's backward stream is created before it;
* contexts of streams stay in the module until the TD goes, so that a later session reuses them;
* EXPORT_MEM succeeds although entries failed, and marks those pages dirty again; what it returns
  is one too high with a second MAC list, and 0 pages are 512 entries;
* EXPORT_STATE_VP exports the next vCPU, and the count is not taken back by an abort;
* IMPORT_TRACK of a start token commits; EXPORT_ABORT restores pages whether or not the module
  aborted, and its result is that of the restoring alone;
* a failed BLOCKW or UNBLOCKW ends every later EXPORT_MEM with EBADF.

What the driver takes for granted is checked here, and answered with EINVAL: that attributes are set
before the first command, that an import has at most 512 pages, that the VM has the vCPU, that an
abort finds the default stream.  Two things are not told by what is known of the driver and are
chosen here: an abort restores the pages that were exported and leaves those that are only
write-blocked to the guest's next write; and pages are write-blocked only in LIVE_EXPORT.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.backend.kvm.abi import Dialect, TdxCommand
from tdxmig_model.backend.soft.backend import SoftBackend
from tdxmig_model.backend.soft.buffers import StreamBuffers
from tdxmig_model.backend.soft.call import STREAM_COMMAND_BIT, Registers
from tdxmig_model.backend.soft.gpa_entries import INVALID_BIT, OPERATION_SHIFT, STATUS_MASK
from tdxmig_model.backend.soft.host import Host, HostTd
from tdxmig_model.backend.soft.memory import PageType
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.sept import EXPORTED_STATES, WRITE_BLOCKED_STATES
from tdxmig_model.backend.soft.status import Status
from tdxmig_model.backend.softkvm.stream import Stream
from tdxmig_model.backend.softkvm.user import UserMemory
from tdxmig_model.engine.commands import ExportUnblockw, Gpas, MemTrack
from tdxmig_model.errors import BackendError
from tdxmig_model.wire.constants import MAX_ENTRIES, PAGE_SIZE, START_EPOCH
from tdxmig_model.wire.gpa_list import (
    GpaOperation,
    build_entries,
    entry_gpas,
    entry_operations,
    entry_statuses,
)

_LIST_LEAVES = (Leaf.EXPORT_MEM, Leaf.IMPORT_MEM)
_STATELESS = (Leaf.EXPORT_BLOCKW, Leaf.EXPORT_RESTORE)
Operations: TypeAlias = NDArray[np.uint8]
_STATUS_DETAILS = 0xFFFF_FFFF
"""RAX 31:0 of a success: how many entries had a problem."""


class Driver:
    """The migration state of one TD in KVM, and what each command of a stream does to it.

    Commands return 0 or -errno; they raise user.Fault for an address that cannot be used.
    """

    def __init__(
        self, host: Host, td: HostTd, dialect: Dialect, user: UserMemory, *, protect: bool
    ) -> None:
        self.host, self.td, self.dialect, self.user = host, td, dialect, user
        self.module = SoftBackend(host, td)
        self.is_source = self.op_state is not OpState.UNINITIALIZED
        self.protect = protect
        self.streams_created = 0
        self.default_stream: Stream | None = None
        self._blocking: StreamBuffers | None = None
        self.vcpu_export_next = 0
        self.bugged = False
        self.finalized = self.is_source
        self.last_status = 0
        gpas = self.module.page_gpas() if self.is_source else np.empty(0, np.uint64)
        room = host.memory.size - host.memory.tdmr_base
        self.slot_pages = (int(gpas[-1]) if gpas.size else room) // PAGE_SIZE + 1
        self.dirty = np.ones(self.slot_pages, dtype=np.bool_)
        self.commands: dict[int, Callable[[Stream, int], int]] = {
            TdxCommand.MIG_EXPORT_STATE_IMMUTABLE: self.export_immutable,
            TdxCommand.MIG_IMPORT_STATE_IMMUTABLE: self.import_immutable,
            TdxCommand.MIG_EXPORT_MEM: self.export_mem,
            TdxCommand.MIG_IMPORT_MEM: self.import_mem,
            TdxCommand.MIG_EXPORT_TRACK: self.export_track,
            TdxCommand.MIG_IMPORT_TRACK: self.import_track,
            TdxCommand.MIG_EXPORT_PAUSE: lambda _stream, _data: self._plain(Leaf.EXPORT_PAUSE),
            TdxCommand.MIG_EXPORT_STATE_TD: self.export_td,
            TdxCommand.MIG_IMPORT_STATE_TD: self.import_td,
            TdxCommand.MIG_EXPORT_STATE_VP: self.export_vcpu,
            TdxCommand.MIG_IMPORT_STATE_VP: self.import_vcpu,
            TdxCommand.MIG_EXPORT_ABORT: self.export_abort,
            TdxCommand.MIG_IMPORT_END: lambda _stream, _data: self._plain(Leaf.IMPORT_END),
        }

    @property
    def op_state(self) -> OpState:
        """OP_STATE of the TD."""
        tdcs = self.host.module.tdrs[self.td.tdr].tdcs
        assert tdcs is not None  # every HostTd has its TDCS pages
        return tdcs.op_state

    # --- streams ---------------------------------------------------------------------------------

    def create_stream(self) -> Stream | int:
        """A new stream, with the next index; -errno if the module makes no context for it."""
        stream = Stream(self.host.memory, self.streams_created)
        try:
            if self.is_source and self._blocking is None:
                self._blocking = self.host.new_stream_buffers(0)
        except BackendError:
            return -errno.ENOMEM
        try:
            # With the first forward stream the backward one is created, before it.
            missing = stream.index + 1 - self.td.forward_streams
            if missing > 0:
                self.host.create_streams(self.td, missing)
        except BackendError:
            return -errno.EIO
        self.streams_created += 1
        if not stream.index:
            self.default_stream = stream
        return stream

    def release_stream(self, stream: Stream) -> None:
        """A stream's last descriptor and mapping are gone."""
        self.streams_created -= 1
        if self.default_stream is stream:
            self.default_stream = None

    # --- parts of commands -----------------------------------------------------------------------

    def _call(self, leaf: Leaf, *, lp: int = 0, **operands: int) -> Registers:
        """One leaf, resumed until it is no longer interrupted."""
        host, interrupt = self.host, self.module.interrupt
        registers = host.seamcall(leaf, lp=lp, interrupt=interrupt, **operands)
        while registers.rax == Status.TDX_INTERRUPTED_RESUMABLE:
            if leaf in _LIST_LEAVES or leaf in _STATELESS:
                operands["rcx"] = registers.rcx
            if leaf not in _STATELESS:
                operands["r10"] = operands.get("r10", 0) | STREAM_COMMAND_BIT
            registers = host.seamcall(leaf, lp=lp, interrupt=interrupt, **operands)
        self.last_status = registers.rax
        return registers

    def _plain(self, leaf: Leaf) -> int:
        return -errno.EIO if self._call(leaf, rcx=self.td.tdr).rax else 0

    def _export_state(
        self, leaf: Leaf, stream: Stream, data: int, *, rcx: int, lp: int = 0, index: int = 0
    ) -> int:
        """The caller's word gets the number of pages; it is written when all is done."""
        r8, r9 = stream.mbmd_register, stream.page_list()
        registers = self._call(leaf, lp=lp, rcx=rcx, r8=r8, r9=r9, r10=index)
        if registers.rax:
            return -errno.EIO
        if leaf is Leaf.EXPORT_STATE_IMMUTABLE:
            stream.index = stream.migs_index()
        if leaf is Leaf.EXPORT_STATE_VP:
            self.vcpu_export_next += 1
        self.user.write_u64(data, registers.rdx)
        return 0

    def _import_state(self, leaf: Leaf, stream: Stream, pages: int, rcx: int, lp: int = 0) -> int:
        r8, r9 = stream.mbmd_register, stream.page_list(pages)
        return -errno.EIO if self._call(leaf, lp=lp, rcx=rcx, r8=r8, r9=r9).rax else 0

    # --- source ----------------------------------------------------------------------------------

    def export_immutable(self, stream: Stream, data: int) -> int:
        """Begin a session; the caller gets the number of pages.

        Every page counts as dirty: a VMM starts the dirty log with each migration.
        """
        code = self._export_state(Leaf.EXPORT_STATE_IMMUTABLE, stream, data, rcx=self.td.tdr)
        if not code:
            self.dirty[:] = True
        return code

    def export_td(self, stream: Stream, data: int) -> int:
        """The state of the TD; the caller gets the number of pages."""
        return self._export_state(Leaf.EXPORT_STATE_TD, stream, data, rcx=self.td.tdr)

    def export_vcpu(self, stream: Stream, data: int) -> int:
        """The state of the next vCPU; the caller gets the number of pages."""
        vcpu = self.vcpu_export_next
        if vcpu >= len(self.td.vcpus):
            return -errno.EINVAL
        rcx, lp = self.td.vcpus[vcpu], self.td.processors[vcpu]
        leaf = Leaf.EXPORT_STATE_VP
        return self._export_state(leaf, stream, data, rcx=rcx, lp=lp, index=stream.index)

    def export_mem(self, stream: Stream, data: int) -> int:
        """The pages of the GPA list; the caller says how many and gets a number of pages."""
        if self.bugged:
            return -errno.EBADF
        count = self.user.read_u64(data)
        if count > stream.buffer_pages:
            return -errno.EINVAL
        if self.protect:
            self._protect_listed(stream, count)
        registers = self._call(
            Leaf.EXPORT_MEM,
            rcx=stream.gpa_list(count),
            rdx=self.td.tdr,
            r10=stream.index,
            **stream.memory_operands(count),
        )
        if registers.rax & ~_STATUS_DETAILS:
            return -errno.EIO
        if registers.rax:
            entries = stream.entries(count)
            self._mark_dirty(entry_gpas(entries)[entry_statuses(entries) != 0])
        # One page for the GPA list and one for the MACs, even if there are two.
        self.user.write_u64(data, registers.rdx - 2)
        return 0

    def _protect_listed(self, stream: Stream, count: int) -> None:
        """Clear the dirty log of the listed pages, as the core of a VMM does before it exports."""
        entries = stream.entries(count)
        listed = entry_gpas(entries)[entry_operations(entries) == GpaOperation.MIGRATE]
        self.clear_dirty(listed // np.uint64(PAGE_SIZE))

    def export_track(self, stream: Stream, data: int) -> int:
        """An epoch token; the start token if the caller's word is not 0."""
        final = self.user.read_u64(data)
        r10 = STREAM_COMMAND_BIT if final else 0
        registers = self._call(Leaf.EXPORT_TRACK, rcx=self.td.tdr, r8=stream.mbmd_register, r10=r10)
        return -errno.EIO if registers.rax else 0

    def export_abort(self, _stream: Stream, data: int) -> int:
        """End the session and restore pages; whether the module aborted is not told."""
        end = self.user.read_u64(data) if self.dialect.abort_takes_end else self.slot_pages
        if self.default_stream is None or self.default_stream.buffers is None:
            return -errno.EINVAL
        self._call(Leaf.EXPORT_ABORT, rcx=self.td.tdr)
        gpas = self.module.page_gpas()
        states = self.module.page_states(gpas)
        exported = gpas[np.isin(states, [int(state) for state in EXPORTED_STATES])]
        for gpa in exported[exported < np.uint64(min(end, 1 << 40) * PAGE_SIZE)].tolist():
            code = self._restore(self.default_stream, gpa)
            if code:
                return code
        return 0

    def _restore(self, stream: Stream, gpa: int) -> int:
        """One page, by the GPA list that the caller of the default stream sees."""
        stream.write_entry(gpa | GpaOperation.MIGRATE << OPERATION_SHIFT)
        registers = self._call(Leaf.EXPORT_RESTORE, rcx=stream.gpa_list(1), rdx=self.td.tdr)
        if registers.rax & ~_STATUS_DETAILS:
            return -errno.EIO
        return -errno.EPERM if stream.entry() & STATUS_MASK else 0

    # --- dirty log -------------------------------------------------------------------------------

    def _mark_dirty(self, gpas: Gpas) -> None:
        gfns = gpas // np.uint64(PAGE_SIZE)
        self.dirty[gfns[gfns < self.slot_pages].astype(np.intp)] = True

    def clear_dirty(self, gfns: Gpas) -> None:
        """Clear the log of these pages; from then on a write to one of them is noticed."""
        gfns = gfns[gfns < self.slot_pages]
        self.dirty[gfns.astype(np.intp)] = False
        if self.td.destroyed or self.op_state is not OpState.LIVE_EXPORT:
            return
        gpas = gfns * np.uint64(PAGE_SIZE)
        for start in range(0, gpas.size, MAX_ENTRIES):
            assert self._blocking is not None  # it came with the first stream
            rcx = self._blocking.gpa_list(build_entries(gpas[start : start + MAX_ENTRIES]))
            registers = self._call(Leaf.EXPORT_BLOCKW, rcx=rcx, rdx=self.td.tdr)
            if registers.rax & ~_STATUS_DETAILS:
                self.bugged = True
                return
        self.module.execute(MemTrack())

    def written(self, gpa: int) -> bool:
        """The guest stopped at a page; True if it was write-blocked: it is not any more, and the
        page is dirty."""
        page = np.array([gpa & -PAGE_SIZE], dtype=np.uint64)
        if self.module.page_states(page)[0] not in WRITE_BLOCKED_STATES:
            return False
        self.module.execute(MemTrack())
        if not self.module.execute(ExportUnblockw(int(page[0]))).ok:
            self.bugged = True
            return False
        self._mark_dirty(page)
        return True

    # --- destination -----------------------------------------------------------------------------

    def import_immutable(self, stream: Stream, data: int) -> int:
        """Begin a session with the state in the caller's number of buffers."""
        pages = self.user.read_u64(data)
        code = self._import_state(Leaf.IMPORT_STATE_IMMUTABLE, stream, pages, self.td.tdr)
        if not code:
            stream.index = stream.migs_index()
        return code

    def import_td(self, stream: Stream, data: int) -> int:
        """The state of the TD, in the caller's number of buffers."""
        pages = self.user.read_u64(data)
        return self._import_state(Leaf.IMPORT_STATE_TD, stream, pages, self.td.tdr)

    def import_vcpu(self, stream: Stream, data: int) -> int:
        """The state of the vCPU that the MBMD names; its context is made if it is not there."""
        pages, vcpu = self.user.read_u64(data), stream.vp_index()
        if vcpu >= self.td.max_vcpus:
            return -errno.EINVAL
        try:
            self.host.ensure_vcpus(self.td, vcpu + 1)
        except BackendError:
            return -errno.EIO
        rcx, lp = self.td.vcpus[vcpu], self.td.processors[vcpu]
        return self._import_state(Leaf.IMPORT_STATE_VP, stream, pages, rcx, lp)

    def import_mem(self, stream: Stream, data: int) -> int:
        """The caller's number of pages, as the GPA list says."""
        count = self.user.read_u64(data)
        if count > MAX_ENTRIES:
            return -errno.EINVAL
        entries = stream.entries(count)
        gpas, operations = entry_gpas(entries), entry_operations(entries)
        wanted = (operations != GpaOperation.NOP) & (operations != GpaOperation.CANCEL)
        held = self.td.page_hpas
        first = wanted & np.array([gpa not in held for gpa in gpas.tolist()], dtype=np.bool_)
        if (gpas[wanted] >= np.uint64(self.slot_pages * PAGE_SIZE)).any():
            return -errno.EIO
        if (operations[first] != GpaOperation.MIGRATE).any():
            return -errno.EINVAL
        try:
            self.host.add_tables(self.td, gpas[wanted])
            fresh = self.host.take_private_pages(int(first.sum()))
        except BackendError:
            return -errno.EIO
        return self._import(
            stream,
            count,
            gpas,
            operations,
            dict(zip(np.flatnonzero(first).tolist(), fresh, strict=True)),
        )

    def _import(
        self,
        stream: Stream,
        count: int,
        gpas: Gpas,
        operations: Operations,
        fresh: dict[int, int],
    ) -> int:
        """New pages are imported in place: their content is copied first, then decrypted there."""
        operands = stream.memory_operands(min(count, stream.buffer_pages))
        pages = np.full(MAX_ENTRIES, INVALID_BIT, dtype=np.uint64)
        for index, gpa in enumerate(gpas.tolist()):
            if index in fresh and index < stream.buffer_pages:
                self.host.memory.page(fresh[index])[:] = stream.page_bytes(index)
                stream.place_in_list(index, fresh[index])
            elif gpa in self.td.page_hpas:
                pages[index] = self.td.page_hpas[gpa]
        registers = self._call(
            Leaf.IMPORT_MEM,
            rcx=stream.gpa_list(count),
            rdx=self.td.tdr,
            r10=stream.index,
            r13=stream.offer_pages(pages),
            **operands,
        )
        self._settle(gpas, operations, fresh)
        return -errno.EIO if registers.rax else 0

    def _settle(
        self,
        gpas: Gpas,
        operations: Operations,
        fresh: dict[int, int],
    ) -> None:
        """Book the pages that the TD took; what it did not take, or gave up, is free again."""
        memory, held = self.host.memory, self.td.page_hpas
        for index, hpa in fresh.items():
            if memory.page_type[hpa >> 12] == PageType.NDA:
                memory.zero_page(hpa)
                self.host.give_back_private_pages([hpa])
            else:
                held[int(gpas[index])] = hpa
        for gpa in gpas[operations == GpaOperation.CANCEL].tolist():
            if gpa in held and memory.page_type[held[gpa] >> 12] == PageType.NDA:
                self.host.give_back_private_pages([held.pop(gpa)])

    def import_track(self, stream: Stream, _data: int) -> int:
        """An epoch token; after the start token the TD may run."""
        registers = self._call(Leaf.IMPORT_TRACK, rcx=self.td.tdr, r8=stream.mbmd_register)
        if registers.rax:
            return -errno.EIO
        if stream.mig_epoch() == START_EPOCH:
            if self._plain(Leaf.IMPORT_COMMIT):
                return -errno.EIO
            self.finalized = True
        return 0
