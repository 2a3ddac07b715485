"""SoftBackend: the engine's commands on one TD of a Host.

It does what a VMM does around each leaf: lists and buffers, Secure EPT pages and free pages for
imports, resuming what was interrupted.  It knows nothing of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.backend.soft.call import NO_PAGE, STREAM_COMMAND_BIT, Registers
from tdxmig_model.backend.soft.conversion import map_gpa
from tdxmig_model.backend.soft.gpa_entries import INVALID_BIT
from tdxmig_model.backend.soft.guest import MAP_GPA, MAP_GPA_INVALID, MAP_GPA_RETRY
from tdxmig_model.backend.soft.host import Host, HostTd
from tdxmig_model.backend.soft.leaves_run import EXIT_EPT_VIOLATION, EXIT_HLT, EXIT_TDCALL
from tdxmig_model.backend.soft.module import Profile
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.sept import HPA_MASK, PENDING_BIT
from tdxmig_model.backend.soft.state import Interrupt, Tdcs, Tdvps
from tdxmig_model.backend.soft.status import Status, is_error, status_name
from tdxmig_model.engine.commands import (
    Command,
    ExportAbort,
    ExportBlockw,
    ExportMem,
    ExportPause,
    ExportRestore,
    ExportStateImmutable,
    ExportStateTd,
    ExportStateVp,
    ExportTrack,
    ExportUnblockw,
    Gpas,
    ImportAbort,
    ImportCommit,
    ImportEnd,
    ImportMem,
    ImportStateImmutable,
    ImportStateTd,
    ImportStateVp,
    ImportTrack,
    MemTrack,
    Result,
    VcpuExit,
    VpEnter,
)
from tdxmig_model.errors import BackendError, UsageError
from tdxmig_model.wire.constants import MAX_ENTRIES, PAGE_SIZE
from tdxmig_model.wire.gpa_list import (
    GpaOperation,
    build_entries,
    entries_from_bytes,
    entry_gpas,
    entry_operations,
    entry_statuses,
)
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import Bundle

C = TypeVar("C", bound=Command)

CAPABILITIES = frozenset(
    {
        "abort_token",
        "cancel",
        "digests",
        "key_exchange",
        "observe",
        "page_states",
        "post_copy",
        "restore",
        "vp_enter",
    }
)
NO_CONTENT_PAGE = INVALID_BIT


class SoftBackend:
    """One TD on a software TDX module, as the engine's Backend.

    `interrupt` stands for pending host interrupts; interrupted leaves are resumed here.  A guest
    that wants pages converted (MapGPA) is told to try again while the TD is in LIVE_EXPORT, unless
    `convert_while_exporting`: exported pages could not be converted, and the source would have to
    keep account of the others.
    """

    def __init__(self, host: Host, td: HostTd, *, interrupt: Interrupt | None = None) -> None:
        self.host = host
        self.td = td
        self.interrupt = interrupt
        self.convert_while_exporting = False
        self._handlers: dict[type, Callable[[Any], Result]] = {
            ExportStateImmutable: lambda _: self._export_state(Leaf.EXPORT_STATE_IMMUTABLE),
            ExportStateTd: lambda _: self._export_state(Leaf.EXPORT_STATE_TD),
            ExportStateVp: self._export_vcpu,
            ExportBlockw: lambda command: self._list_leaf(Leaf.EXPORT_BLOCKW, command.gpas),
            ExportRestore: lambda command: self._list_leaf(Leaf.EXPORT_RESTORE, command.gpas),
            ExportUnblockw: self._unblock,
            MemTrack: lambda _: self._simple(Leaf.MEM_TRACK),
            ExportPause: lambda _: self._simple(Leaf.EXPORT_PAUSE),
            ExportMem: self._export_mem,
            ExportTrack: self._export_track,
            ExportAbort: self._export_abort,
            ImportStateImmutable: self._import_immutable,
            ImportStateTd: self._import_td,
            ImportStateVp: self._import_vcpu,
            ImportMem: self._import_mem,
            ImportTrack: self._import_track,
            ImportCommit: lambda _: self._simple(Leaf.IMPORT_COMMIT),
            ImportEnd: lambda _: self._simple(Leaf.IMPORT_END),
            ImportAbort: self._import_abort,
            VpEnter: self._enter,
        }

    @property
    def capabilities(self) -> frozenset[str]:
        """What this backend can do beyond the commands themselves."""
        return CAPABILITIES

    def execute(self, command: Command) -> Result:
        """Run one command.  A refusing module is a Result with its status."""
        handler = self._handlers.get(type(command))
        if handler is None:
            raise UsageError(f"{command!r} is not a command of a migration backend")
        return handler(command)

    def close(self) -> None:
        """Take the TD down and give its pages back to the host."""
        self.host.destroy_td(self.td)

    # --- calls ---------------------------------------------------------------------------------

    def _result(self, registers: Registers, **more: Any) -> Result:
        return Result(registers.rax, status_name(registers.rax), **more)

    def _simple(self, leaf: Leaf) -> Result:
        return self._result(self.host.seamcall(leaf, rcx=self.td.tdr))

    def _run(self, leaf: Leaf, *, lp: int = 0, **operands: int) -> Registers:
        """One resumable leaf, until it is no longer interrupted; then a RESUME each time."""
        host, stateless = self.host, leaf in (Leaf.EXPORT_BLOCKW, Leaf.EXPORT_RESTORE)
        registers = host.seamcall(leaf, lp=lp, interrupt=self.interrupt, **operands)
        while registers.rax == Status.TDX_INTERRUPTED_RESUMABLE:
            if "r13" in operands or leaf is Leaf.EXPORT_MEM or stateless:
                operands["rcx"] = registers.rcx
            if not stateless:
                operands["r10"] = operands.get("r10", 0) | STREAM_COMMAND_BIT
            registers = host.seamcall(leaf, lp=lp, interrupt=self.interrupt, **operands)
        return registers

    # --- source --------------------------------------------------------------------------------

    def _list_leaf(self, leaf: Leaf, gpas: Gpas) -> Result:
        buffers = self.host.stream_buffers(0)
        rcx = buffers.gpa_list(build_entries(gpas))
        registers = self._run(leaf, rcx=rcx, rdx=self.td.tdr)
        return self._result(registers, statuses=entry_statuses(buffers.entries(gpas.size)))

    def _unblock(self, command: ExportUnblockw) -> Result:
        leaf = Leaf.EXPORT_UNBLOCKW
        return self._result(self.host.seamcall(leaf, rcx=command.gpa, rdx=self.td.tdr))

    def _export_state(self, leaf: Leaf, *, rcx: int = 0, stream: int = 0, lp: int = 0) -> Result:
        buffers = self.host.stream_buffers(stream)
        registers = self._run(
            leaf,
            lp=lp,
            rcx=rcx or self.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.page_list(MAX_ENTRIES),
            r10=stream,
        )
        if is_error(registers.rax):
            return self._result(registers)
        pages = buffers.read_pages(registers.rdx)
        bundle = Bundle.of(Mbmd.unpack(buffers.read_mbmd()), pages)
        return self._result(registers, bundle=bundle)

    def _export_vcpu(self, command: ExportStateVp) -> Result:
        vcpu, lp = self._vcpu(command.vcpu)
        return self._export_state(Leaf.EXPORT_STATE_VP, rcx=vcpu, stream=command.stream, lp=lp)

    def _vcpu(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self.td.vcpus):
            raise UsageError(f"vCPU {index} of a TD with {len(self.td.vcpus)} vCPUs")
        return self.td.vcpus[index], self.td.processors[index]

    def _export_mem(self, command: ExportMem) -> Result:
        buffers, count = self.host.stream_buffers(command.stream), command.gpas.size
        rcx = buffers.gpa_list(build_entries(command.gpas, command.operation))
        buffers.offer_buffers(count)
        registers = self._run(
            Leaf.EXPORT_MEM,
            rcx=rcx,
            rdx=self.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.list,
            r10=command.stream,
            r11=buffers.macs_low,
            r12=buffers.macs_high,
        )
        entries = buffers.entries(count)
        statuses = entry_statuses(entries)
        if is_error(registers.rax):
            return self._result(registers, statuses=statuses)
        bundle = Bundle.of(
            Mbmd.unpack(buffers.read_mbmd()),
            buffers.read_pages(count),
            entries.tobytes(),
            buffers.read_macs(count),
        )
        return self._result(registers, bundle=bundle, statuses=statuses)

    def _export_track(self, command: ExportTrack) -> Result:
        r10 = STREAM_COMMAND_BIT if command.in_order_done else 0
        return self._token(Leaf.EXPORT_TRACK, r10)

    def _token(self, leaf: Leaf, r10: int = 0) -> Result:
        """A leaf that emits an MBMD and nothing else."""
        buffers = self.host.stream_buffers(0)
        registers = self.host.seamcall(leaf, rcx=self.td.tdr, r8=buffers.mbmd_register, r10=r10)
        if is_error(registers.rax):
            return self._result(registers)
        return self._result(registers, bundle=Bundle.of(Mbmd.unpack(buffers.read_mbmd())))

    def _export_abort(self, command: ExportAbort) -> Result:
        r8 = 0
        if command.token is not None:
            buffers = self.host.stream_buffers(0)
            buffers.write_mbmd(command.token)
            r8 = buffers.mbmd_register
        return self._result(self.host.seamcall(Leaf.EXPORT_ABORT, rcx=self.td.tdr, r8=r8))

    # --- destination ---------------------------------------------------------------------------

    def _import_state(
        self, leaf: Leaf, bundle: Bundle, *, rcx: int = 0, stream: int = 0, lp: int = 0
    ) -> Result:
        buffers = self.host.stream_buffers(stream)
        if not 1 <= len(bundle.pages) <= MAX_ENTRIES:
            raise UsageError(f"a state bundle of {len(bundle.pages)} pages; 1 to {MAX_ENTRIES}")
        buffers.write_mbmd(bundle.mbmd.pack())
        buffers.write_pages(bundle.pages)
        registers = self._run(
            leaf,
            lp=lp,
            rcx=rcx or self.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.page_list(len(bundle.pages)),
            r10=stream,
        )
        return self._result(registers)

    def _import_immutable(self, command: ImportStateImmutable) -> Result:
        return self._import_state(Leaf.IMPORT_STATE_IMMUTABLE, command.bundle)

    def _import_td(self, command: ImportStateTd) -> Result:
        return self._import_state(Leaf.IMPORT_STATE_TD, command.bundle)

    def _import_vcpu(self, command: ImportStateVp) -> Result:
        """vCPUs are created when the first state arrives: VP.CREATE is allowed from then on."""
        try:
            self.host.ensure_vcpus(self.td, command.vcpu + 1)
        except BackendError as refused:
            return Result(refused.status, status_name(refused.status))
        vcpu, lp = self._vcpu(command.vcpu)
        stream = command.bundle.mbmd.migs_index
        return self._import_state(
            Leaf.IMPORT_STATE_VP, command.bundle, rcx=vcpu, stream=stream, lp=lp
        )

    def _import_mem(self, command: ImportMem) -> Result:
        bundle, host = command.bundle, self.host
        buffers = host.stream_buffers(command.stream)
        entries = entries_from_bytes(bundle.gpa_list)
        count = entries.size
        if len(bundle.pages) > count or len(bundle.macs) != 16 * count:
            raise UsageError(
                f"a memory bundle with {count} entries, {len(bundle.pages)} pages "
                f"and {len(bundle.macs)} bytes of MACs"
            )
        rcx = buffers.gpa_list(entries)
        buffers.write_mbmd(bundle.mbmd.pack())
        buffers.write_pages(bundle.pages)
        buffers.write_macs(bundle.macs)
        buffers.offer_buffers(count)
        gpas, operations = entry_gpas(entries), entry_operations(entries)
        missing = self._add_tables(gpas[operations != GpaOperation.NOP])
        if missing is not None:
            return missing
        fresh = self._offer_pages(command.stream, operations)
        registers = self._run(
            Leaf.IMPORT_MEM,
            rcx=rcx,
            rdx=self.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.list,
            r10=command.stream,
            r11=buffers.macs_low,
            r12=buffers.macs_high,
            r13=buffers.new_pages if fresh.size else NO_PAGE,
        )
        after = buffers.entries(count)
        done = entry_operations(after) != GpaOperation.NOP
        reached = (registers.rcx >> 3 & (MAX_ENTRIES - 1)) if is_error(registers.rax) else count
        done[reached:] = False
        self._settle_pages(gpas, operations, done, fresh)
        return self._result(registers, statuses=entry_statuses(after))

    def _add_tables(self, gpas: Gpas) -> Result | None:
        try:
            self.host.add_tables(self.td, gpas[gpas < np.uint64(1 << 47)])
        except BackendError as refused:
            return Result(refused.status, status_name(refused.status))
        return None

    def _offer_pages(self, stream: int, operations: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """A free page per MIGRATE entry, in the new-page list; INVALID elsewhere."""
        wanted = operations == GpaOperation.MIGRATE
        count = int(wanted.sum())
        fresh = np.full(operations.size, INVALID_BIT, dtype=np.uint64)
        if count == 0:
            return np.empty(0, dtype=np.uint64)
        fresh[wanted] = self.host.take_private_pages(count)
        self.host.stream_buffers(stream).offer_new_pages(fresh)
        return fresh

    def _settle_pages(
        self,
        gpas: Gpas,
        operations: NDArray[np.uint8],
        done: NDArray[np.bool_],
        fresh: NDArray[np.uint64],
    ) -> None:
        """Book pages that the TD took, and take back those that it did not take or gave up."""
        hpas = self.td.page_hpas
        if fresh.size:
            migrated = operations == GpaOperation.MIGRATE
            taken = migrated & done
            hpas.update(zip(gpas[taken].tolist(), fresh[taken].tolist(), strict=True))
            self.host.give_back_private_pages(fresh[migrated & ~done].tolist())
        cancelled = gpas[done & (operations == GpaOperation.CANCEL)].tolist()
        self.host.give_back_private_pages([hpas.pop(gpa) for gpa in cancelled])

    def _import_track(self, command: ImportTrack) -> Result:
        buffers = self.host.stream_buffers(0)
        buffers.write_mbmd(command.bundle.mbmd.pack())
        rcx, r8 = self.td.tdr, buffers.mbmd_register
        return self._result(self.host.seamcall(Leaf.IMPORT_TRACK, rcx=rcx, r8=r8))

    def _import_abort(self, _command: ImportAbort) -> Result:
        return self._token(Leaf.IMPORT_ABORT)

    # --- guest ---------------------------------------------------------------------------------

    def _enter(self, command: VpEnter) -> Result:
        if not self.td.vcpus:
            # A destination has no vCPU before its state arrives, and OP_STATE refuses it then too.
            return self._result(Registers(rax=int(Status.TDX_OP_STATE_INCORRECT)))
        vcpu, lp = self._vcpu(command.vcpu)
        processor = self.host.module.processors[lp]
        done, registers = 0, Registers(rcx=vcpu)
        while True:
            processor.timer = command.budget - done
            self.host.module.call(Leaf.VP_ENTER, registers, lp=lp)
            if is_error(registers.rax):
                return self._result(registers)
            done += processor.retired
            exit_reason = registers.rax & 0xFFFF
            if exit_reason != EXIT_TDCALL:
                break
            # Answered in any case, even if the budget is used up: a VMCALL is not left open.
            self._answer_vmcall(registers)
            registers.rcx = vcpu
        reason: Literal["budget", "ept_violation", "halt"] = "budget"
        gpa = None
        if exit_reason == EXIT_EPT_VIOLATION:
            reason, gpa = "ept_violation", registers.r8
        elif exit_reason == EXIT_HLT:
            reason = "halt"
        return self._result(registers, exit=VcpuExit(reason, gpa, done))

    def _answer_vmcall(self, registers: Registers) -> None:
        """R10 and R11 for the entry after a VMCALL.  MapGPA is the only one that is known."""
        status, resume = MAP_GPA_INVALID, registers.r12
        if (registers.r10, registers.r11) == (0, MAP_GPA):
            deferred = self._tdcs.op_state is OpState.LIVE_EXPORT
            if deferred and not self.convert_while_exporting:
                status = MAP_GPA_RETRY
            else:
                status, resume = map_gpa(self.host, self.td, registers.r12, registers.r13)
        registers.r10, registers.r11 = status, resume

    # --- keys ----------------------------------------------------------------------------------

    def read_migration_encryption_key(self) -> bytes:
        """A fresh MIG_ENC_KEY, 32 bytes, through the Migration TD; the peer's decryption key.

        Read it before the peer's key is written here (`Host.read_migration_encryption_key`).
        """
        return self.host.read_migration_encryption_key(self.td)

    def write_migration_decryption_key(self, key: bytes) -> None:
        """Give this TD the peer's encryption key, 32 bytes, through the Migration TD."""
        self.host.write_migration_decryption_key(self.td, key)

    def write_migration_version(self, version: int) -> None:
        """Set MIG_VERSION through the Migration TD."""
        self.host.write_migration_version(self.td, version)

    # --- what one can see ----------------------------------------------------------------------

    @property
    def _tdcs(self) -> Tdcs:
        tdcs = self.host.module.tdrs[self.td.tdr].tdcs
        if tdcs is None:
            raise UsageError("the TD has no TDCS yet")
        return tdcs

    def observe(self) -> dict[str, int | str | list[int]]:
        """The protocol state of the TD, by the model's variable names."""
        tdcs = self._tdcs
        forward = tdcs.links[1:]
        return {
            "op_state": tdcs.op_state.name,
            "mig_epoch": tdcs.mig_epoch,
            "total_mb_count": tdcs.total_mb_count,
            "export_count": tdcs.export_count,
            "mig_count": tdcs.mig_count,
            "dirty_count": tdcs.dirty_count,
            "td_epoch": tdcs.td_epoch,
            "bw_epoch": tdcs.bw_epoch,
            "refcount": list(tdcs.refcount),
            "next_mb_counter": [link.migsc.next_mb_counter for link in forward],
            "expected_mb_counter": [link.migsc.expected_mb_counter for link in forward],
            "iv_counter": [link.migsc.iv_counter for link in forward],
            "num_vcpus": tdcs.num_vcpus,
            "num_migrated_vcpus": tdcs.num_migrated_vcpus,
            "mig_dec_key_set": int(tdcs.mig_dec_key_set),
            "num_migs": tdcs.num_migs,
            "initialized": [int(link.initialized) for link in forward],
        }

    def page_states(self, gpas: Gpas) -> NDArray[np.uint8]:
        """Secure EPT entry state index (0..15) of each page, shape ``(n,)``."""
        return self._tdcs.sept.states(np.asarray(gpas, dtype=np.uint64))

    def page_gpas(self) -> Gpas:
        """GPAs of all private pages of the TD, ascending, shape ``(n,)``."""
        return self._tdcs.sept.mapped()[0]

    def memory_digest(self) -> str:
        """SHA-256 over all private pages in GPA order: GPA, pending or not, content if not."""
        digest = hashlib.sha256()
        memory = self.host.memory
        gpas, entries = self._tdcs.sept.mapped()
        for gpa, entry in zip(gpas.tolist(), entries.tolist(), strict=True):
            pending = bool(entry & PENDING_BIT)
            digest.update((gpa | pending).to_bytes(8, "little"))
            if not pending:
                digest.update(memory.page(entry & HPA_MASK))
        return digest.hexdigest()

    def read_page(self, gpa: int) -> bytes:
        """Content of one private page, 4096 bytes; UsageError if there is none."""
        slot = self._tdcs.sept.slot(gpa & ~(PAGE_SIZE - 1))
        entry = self.host.memory.words[slot] if slot >= 0 else 0
        if not entry & HPA_MASK:
            raise UsageError(f"no private page at GPA 0x{gpa:X}")
        return bytes(self.host.memory.page(entry & HPA_MASK))

    def _tdvps(self, index: int) -> Tdvps:
        return self.host.module.tdvps[self._vcpu(index)[0]]

    def read_vcpu(self, index: int) -> Mapping[str, Any]:
        """The registers of one vCPU by field name."""
        return MappingProxyType(self._tdvps(index).registers)

    def vcpu_digest(self) -> list[str]:
        """SHA-256 per vCPU over its registers."""
        digests = []
        for index in range(len(self.td.vcpus)):
            vcpu = self._tdvps(index)
            text = repr(sorted(vcpu.registers.items()))
            digests.append(hashlib.sha256(text.encode()).hexdigest())
        return digests


def soft_source(
    pages: int,
    *,
    vcpus: int = 1,
    streams: int = 1,
    workers: int = 0,
    guest: str = "hot-set",
    profile: Profile = "hardened",
    seed: int = 1,
    write_rate: float = 1.0,
) -> SoftBackend:
    """A RUNNABLE TD of `pages` private pages on a host of its own."""
    host = _host(pages, streams, workers, profile)
    td = host.create_td(
        pages, vcpus=vcpus, streams=streams, guest=guest, seed=seed, write_rate=write_rate
    )
    return SoftBackend(host, td)


def soft_destination(
    pages: int,
    *,
    vcpus: int = 1,
    streams: int = 1,
    workers: int = 0,
    profile: Profile = "hardened",
) -> SoftBackend:
    """A TD that waits for its immutable state, on a host with room for `pages` private pages."""
    host = _host(pages, streams, workers, profile)
    backend = SoftBackend(host, host.create_destination_td(vcpus=vcpus, streams=streams))
    host.memory.prefault(host.memory.tdmr_base, pages)
    return backend


def _host(pages: int, streams: int, workers: int, profile: Profile) -> Host:
    """A host with shared memory for that many streams' buffers, and staging."""
    shared = (streams + 2) * (MAX_ENTRIES + 16) * PAGE_SIZE
    memory = pages * PAGE_SIZE
    return Host(profile=profile, memory_bytes=memory, shared_bytes=shared, workers=workers)
