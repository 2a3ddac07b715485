"""KvmBackend: the engine's commands on the migration stream devices of a VM.

It does what a VMM does with them: a device per stream, lists and bundles through the mappings, the
dirty log to write-block pages.  The kernel tells an errno and keeps the module's status to its log,
so a refusal is a Result whose status is ERROR (bit 63) and the errno.  What the interface cannot
express is a capability that is not there; MISSING names the command that it would need.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.backend.kvm.abi import (
    GET_MIGRATION_INFO,
    IN_ORDER_DONE,
    KVM_MEMORY_ENCRYPT_OP,
    TdxCommand,
    dialect_named,
)
from tdxmig_model.backend.kvm.calls import SystemCalls
from tdxmig_model.backend.kvm.dirty_log import DirtyLog
from tdxmig_model.backend.kvm.stream import StreamDevice, errno_name, must
from tdxmig_model.backend.soft.status import is_error, status_name
from tdxmig_model.engine.commands import (
    STATUS_ERROR_BIT,
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
    VpEnter,
)
from tdxmig_model.errors import BackendError, UsageError
from tdxmig_model.wire.constants import GPA_ENTRY_SIZE, MAC_SIZE, MAX_ENTRIES, MBMD_SIZE, PAGE_SIZE
from tdxmig_model.wire.gpa_list import build_entries, entries_from_bytes, entry_statuses
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import Bundle

CAPABILITIES: Final = frozenset({"cancel", "dirty_log", "post_copy", "restore"})
MISSING: Final[Mapping[str, str]] = MappingProxyType(
    {
        "abort_token": "a command for TDH.IMPORT.ABORT, and a token in EXPORT_ABORT",
        "commit": "a command for TDH.IMPORT.COMMIT (IMPORT_TRACK commits at the start token)",
        "digests": "a command that reads private memory and vCPU registers",
        "key_exchange": "a command for TDG.SERVTD.RD and WR (a Migration TD does that)",
        "observe": "a command for TDH.MNG.RD",
        "page_states": "a command for TDH.MEM.SEPT.RD",
        "unblock": "a command for TDH.EXPORT.UNBLOCKW (KVM does it at the guest's write)",
        "vcpu_order": "a vCPU index in EXPORT_STATE_VP",
        "vcpu_streams": "a stream index in IMPORT_STATE_VP",
        "vp_enter": "TDH.VP.ENTER on a stream (the threads of a VMM use KVM_RUN)",
    }
)
"""Capability -> what the interface would need for it."""

_MEANINGS: Final = {
    errno.EIO: "the TDX module refused; its status is in the kernel log alone",
    errno.EBADF: "a write-block failed before, and the driver exports nothing more for this TD",
    errno.EPERM: "a page could not be restored",
    errno.EOPNOTSUPP: "the TDX module has fewer than two migration streams",
}


def refusal(code: int, more: str = "") -> Result:
    """A Result for -errno ``code`` of a command."""
    meaning = more or _MEANINGS.get(code, "")
    name = errno_name(code) + (f" ({meaning})" if meaning else "")
    return Result(STATUS_ERROR_BIT | code, name)


def not_in_abi(capability: str) -> Result:
    """The Result of a command that the interface does not have."""
    return refusal(errno.EOPNOTSUPP, f"KVM would need {MISSING[capability]}")


_OK: Final = Result(0, "TDX_SUCCESS")


class KvmBackend:
    """The streams of one TD in KVM, as the engine's Backend.

    ``vm_fd`` is the TD's VM descriptor, whose memory slot 0 has ``slot_pages`` guest frames from 0
    on, with the dirty log on and cleared by hand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).  ``streams``
    devices are created, stream 0 first, with ``buffer_pages`` buffers each.
    BackendError: the kernel has no such device, or refuses one; nothing stays open then.
    """

    def __init__(
        self,
        calls: SystemCalls,
        vm_fd: int,
        *,
        slot_pages: int,
        dialect: str = "Gen-1a",
        streams: int = 1,
        buffer_pages: int = MAX_ENTRIES,
    ) -> None:
        if streams < 1 or slot_pages < 1:
            raise UsageError(f"{streams} streams for {slot_pages} pages: at least one of each")
        self.dialect = dialect_named(dialect)
        self.vm_fd = vm_fd
        self._calls = calls
        self._log = DirtyLog(calls, vm_fd, slot_pages)
        self._streams: list[StreamDevice] = []
        self._exported_end = 0
        self._start_token = False
        self._exporting = self._restored = False
        try:
            for _ in range(streams):
                self._streams.append(StreamDevice(calls, vm_fd, self.dialect, buffer_pages))
        except BaseException:
            self.close()
            raise
        self._handlers: dict[type, Callable[[Any], Result]] = {
            ExportStateImmutable: lambda _: self._export_immutable(),
            ExportBlockw: self._block,
            MemTrack: lambda _: _OK,
            ExportUnblockw: lambda _: not_in_abi("unblock"),
            ExportMem: self._export_mem,
            ExportTrack: self._export_track,
            ExportPause: lambda _: self._plain(TdxCommand.MIG_EXPORT_PAUSE),
            ExportStateTd: lambda _: self._export_state(TdxCommand.MIG_EXPORT_STATE_TD, 0),
            ExportStateVp: self._export_vcpu,
            ExportAbort: self._export_abort,
            ExportRestore: self._export_restore,
            ImportStateImmutable: lambda command: self._import_state(
                TdxCommand.MIG_IMPORT_STATE_IMMUTABLE, command.bundle
            ),
            ImportStateTd: lambda command: self._import_state(
                TdxCommand.MIG_IMPORT_STATE_TD, command.bundle
            ),
            ImportStateVp: self._import_vcpu,
            ImportMem: self._import_mem,
            ImportTrack: self._import_track,
            ImportCommit: lambda _: _OK if self._start_token else not_in_abi("commit"),
            ImportEnd: lambda _: self._plain(TdxCommand.MIG_IMPORT_END),
            ImportAbort: lambda _: not_in_abi("abort_token"),
            VpEnter: lambda _: not_in_abi("vp_enter"),
        }

    @property
    def capabilities(self) -> frozenset[str]:
        """What this backend can do beyond the commands themselves; see MISSING for the rest."""
        return CAPABILITIES

    def execute(self, command: Command) -> Result:
        """Run one command.  A refusal by the kernel, or by its interface, is a Result."""
        handler = self._handlers.get(type(command))
        if handler is None:
            raise UsageError(f"{command!r} is not a command of a migration backend")
        if not self._streams:
            raise UsageError(f"{command.name} on streams that are closed")
        return handler(command)

    def observe(self) -> dict[str, int | str | list[int]]:
        """Nothing: the interface shows no protocol state.  An unobserved variable may be any."""
        return {}

    def page_states(self, gpas: Gpas) -> NDArray[np.uint8]:
        """BackendError: the interface shows no Secure EPT entry."""
        needed = MISSING["page_states"]
        raise BackendError("page_states", errno.EOPNOTSUPP, f"needs {needed}", f"{gpas.size} pages")

    def is_ready(self) -> bool:
        """Whether the pre-migration is done.  BackendError: the kernel does not answer."""
        info = ctypes.create_string_buffer(GET_MIGRATION_INFO.pack(0, 0))
        raw = self.dialect.pack(TdxCommand.GET_MIGRATION_INFO, ctypes.addressof(info))
        command = ctypes.create_string_buffer(raw)
        address = ctypes.addressof(command)
        code = self._calls.ioctl(self.vm_fd, KVM_MEMORY_ENCRYPT_OP, address)
        must("KVM_TDX_GET_MIGRATION_INFO", code)
        done: int = GET_MIGRATION_INFO.unpack(info.raw[: GET_MIGRATION_INFO.size])[1]
        return done != 0

    def dirty_pages(self) -> Gpas:
        """GPAs that the dirty log has now; reading does not clear it.  Shape ``(n,)``."""
        found = self._log.read()
        if isinstance(found, int):
            raise BackendError("KVM_GET_DIRTY_LOG", -found, errno_name(-found))
        return found

    def close(self) -> None:
        """Unmap and close every stream; the VM descriptor stays the caller's.  Idempotent."""
        for stream in reversed(self._streams):
            stream.close()
        self._streams.clear()

    # --- calls -----------------------------------------------------------------------------------

    def _stream(self, index: int) -> StreamDevice:
        if not 0 <= index < len(self._streams):
            raise UsageError(f"stream {index} of a backend with {len(self._streams)} streams")
        return self._streams[index]

    def _ended(self, stream: StreamDevice, code: int, **more: Any) -> Result:
        """What became of a command: a kernel that fills in the module's status is believed."""
        if code == 0:
            return Result(0, "TDX_SUCCESS", **more)
        status = stream.module_status
        if is_error(status):
            return Result(status, status_name(status))
        return refusal(-code)

    def _plain(self, command: TdxCommand, data: int = 0) -> Result:
        stream = self._stream(0)
        return self._ended(stream, stream.command(command, data=data))

    def _bundle(self, stream: StreamDevice, pages: int, entries: int = 0) -> Bundle:
        """What the driver left in the mappings, copied out."""
        copy = memoryview(stream.buffers[: pages * PAGE_SIZE].tobytes())
        return Bundle.of(
            Mbmd.unpack(stream.mbmd[:MBMD_SIZE].tobytes()),
            [copy[at : at + PAGE_SIZE] for at in range(0, pages * PAGE_SIZE, PAGE_SIZE)],
            stream.gpa_list[: entries * GPA_ENTRY_SIZE].tobytes(),
            stream.macs[: entries * MAC_SIZE].tobytes(),
        )

    # --- source ----------------------------------------------------------------------------------

    def _export_state(self, command: TdxCommand, index: int) -> Result:
        stream = self._stream(index)
        code = stream.command(command, 0)
        if code:
            return self._ended(stream, code)
        if stream.value > stream.pages:
            told = f"{stream.value} pages in {stream.pages} buffers"
            raise BackendError(command.name, stream.value, "too many pages", told)
        return self._ended(stream, 0, bundle=self._bundle(stream, stream.value))

    def _export_immutable(self) -> Result:
        result = self._export_state(TdxCommand.MIG_EXPORT_STATE_IMMUTABLE, 0)
        if result.ok:
            self._exporting = True
            self._start_token = self._restored = False
            self._exported_end = 0
        return result

    def _export_vcpu(self, command: ExportStateVp) -> Result:
        result = self._export_state(TdxCommand.MIG_EXPORT_STATE_VP, command.stream)
        if result.bundle is not None and result.bundle.mbmd.vp_index != command.vcpu:
            exported = result.bundle.mbmd.vp_index
            raise BackendError(
                command.name,
                0,
                f"vCPU {exported} was exported where vCPU {command.vcpu} was asked for",
                f"KVM would need {MISSING['vcpu_order']}",
            )
        return result

    def _block(self, command: ExportBlockw) -> Result:
        """Clear the dirty log, which write-blocks the pages; the kernel tells nothing of each."""
        code = self._log.clear(command.gpas)
        if code:
            return refusal(-code)
        return Result(0, "TDX_SUCCESS", statuses=np.zeros(command.gpas.size, dtype=np.uint8))

    def _export_mem(self, command: ExportMem) -> Result:
        stream, count = self._stream(command.stream), command.gpas.size
        entries = build_entries(command.gpas, command.operation)
        if not 1 <= count <= stream.pages:
            return refusal(errno.EINVAL, f"{count} pages; stream has {stream.pages} buffers")
        stream.gpa_list[: count * GPA_ENTRY_SIZE] = entries.view(np.uint8)
        code = stream.command(TdxCommand.MIG_EXPORT_MEM, count)
        if code:
            return self._ended(stream, code)
        self._exported_end = max(self._exported_end, int(command.gpas.max()) // PAGE_SIZE + 1)
        bundle = self._bundle(stream, count, count)
        statuses = entry_statuses(entries_from_bytes(bundle.gpa_list))
        return self._ended(stream, 0, bundle=bundle, statuses=statuses)

    def _export_track(self, command: ExportTrack) -> Result:
        stream = self._stream(0)
        code = stream.command(
            TdxCommand.MIG_EXPORT_TRACK, IN_ORDER_DONE if command.in_order_done else 0
        )
        if code:
            return self._ended(stream, code)
        self._start_token |= command.in_order_done
        return self._ended(stream, 0, bundle=self._bundle(stream, 0))

    def _export_abort(self, command: ExportAbort) -> Result:
        """The driver answers 0 whether or not anything was aborted, so it is not asked in vain."""
        if command.token is not None or self._start_token:
            return not_in_abi("abort_token")
        if not self._exporting:
            return refusal(errno.EINVAL, "no session was begun on these streams")
        stream = self._stream(0)
        end = self._exported_end if self.dialect.abort_takes_end else None
        code = stream.command(TdxCommand.MIG_EXPORT_ABORT, end)
        self._restored = code == 0
        self._exporting = code != 0
        return self._ended(stream, code)

    def _export_restore(self, command: ExportRestore) -> Result:
        """EXPORT_ABORT has restored every page already, or has failed."""
        if not self._restored:
            return refusal(errno.EOPNOTSUPP, "pages are restored by EXPORT_ABORT alone")
        return Result(0, "TDX_SUCCESS", statuses=np.zeros(command.gpas.size, dtype=np.uint8))

    # --- destination -----------------------------------------------------------------------------

    def _load(self, stream: StreamDevice, bundle: Bundle) -> Result | None:
        """Put a bundle where the driver reads it; a refusal if it has too many pages."""
        if len(bundle.pages) > stream.pages:
            told = f"{len(bundle.pages)} pages; the stream has {stream.pages} buffers"
            return refusal(errno.EINVAL, told)
        stream.mbmd[:MBMD_SIZE] = np.frombuffer(bundle.mbmd.pack(), dtype=np.uint8)
        for index, page in enumerate(bundle.pages):
            at = index * PAGE_SIZE
            stream.buffers[at : at + PAGE_SIZE] = np.frombuffer(page, dtype=np.uint8)
        return None

    def _import_state(self, command: TdxCommand, bundle: Bundle) -> Result:
        stream = self._stream(0)
        refused = self._load(stream, bundle)
        if refused is not None:
            return refused
        return self._ended(stream, stream.command(command, len(bundle.pages)))

    def _import_vcpu(self, command: ImportStateVp) -> Result:
        if command.bundle.mbmd.migs_index:
            return not_in_abi("vcpu_streams")
        return self._import_state(TdxCommand.MIG_IMPORT_STATE_VP, command.bundle)

    def _import_mem(self, command: ImportMem) -> Result:
        stream, bundle = self._stream(command.stream), command.bundle
        count = len(bundle.gpa_list) // GPA_ENTRY_SIZE
        if len(bundle.pages) != count or len(bundle.macs) != MAC_SIZE * count:
            raise UsageError(
                f"a memory bundle with {count} entries, {len(bundle.pages)} pages "
                f"and {len(bundle.macs)} bytes of MACs"
            )
        refused = self._load(stream, bundle)
        if refused is not None:
            return refused
        gpas = np.frombuffer(bundle.gpa_list, dtype=np.uint8)
        stream.gpa_list[: gpas.size] = gpas
        stream.macs[: MAC_SIZE * count] = np.frombuffer(bundle.macs, dtype=np.uint8)
        code = stream.command(TdxCommand.MIG_IMPORT_MEM, count)
        after = entries_from_bytes(stream.gpa_list[: gpas.size].tobytes())
        return self._ended(stream, code, **({} if code else {"statuses": entry_statuses(after)}))

    def _import_track(self, command: ImportTrack) -> Result:
        stream = self._stream(0)
        self._load(stream, command.bundle)
        code = stream.command(TdxCommand.MIG_IMPORT_TRACK)
        if not code and command.bundle.mbmd.is_start_token:
            self._start_token = True
        return self._ended(stream, code)
