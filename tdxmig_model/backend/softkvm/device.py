"""SoftKvm: KVM's interface to TDX live migration, served byte for byte over the software module.

A caller, in C or not, finds what it finds on the out-of-tree kernels: descriptors that are
integers, ioctl requests by number, structures at addresses, mappings of the very pages that the
TDX module works on, and -errno where the kernel sets errno.  See `driver` for what the commands do,
and `user` for how addresses are checked.
"""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass
from typing import Final

import numpy as np

from tdxmig_model.backend.kvm.abi import (
    CLEAR_DIRTY_LOG,
    CREATE_DEVICE,
    DEVICE_ATTR,
    DIRTY_LOG,
    DIRTY_LOG_ALIGNMENT,
    GET_MIGRATION_INFO,
    KVM_CAP_DEVICE_CTRL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CHECK_EXTENSION,
    KVM_CLEAR_DIRTY_LOG,
    KVM_CREATE_DEVICE,
    KVM_CREATE_DEVICE_TEST,
    KVM_GET_DEVICE_ATTR,
    KVM_GET_DIRTY_LOG,
    KVM_HAS_DEVICE_ATTR,
    KVM_MEMORY_ENCRYPT_OP,
    KVM_SET_DEVICE_ATTR,
    SET_MIGRATION_INFO,
    STREAM_ATTR,
    STREAM_ATTR_GROUP,
    STREAM_ATTR_VERSION,
    TdxCommand,
    dialect_named,
)
from tdxmig_model.backend.soft.buffers import StreamBuffers
from tdxmig_model.backend.soft.host import Host, HostTd
from tdxmig_model.backend.softkvm.driver import Driver
from tdxmig_model.backend.softkvm.stream import Stream
from tdxmig_model.backend.softkvm.user import ADDRESS_MASK, Fault, Mappings, UserMemory
from tdxmig_model.engine.commands import VcpuExit, VpEnter
from tdxmig_model.errors import BackendError
from tdxmig_model.wire.constants import MAX_STREAMS, PAGE_SIZE

MEMORY_SLOTS: Final = 32764
"""Slots that KVM lets user space have; of this VM's, slot 0 is in use."""
REQUEST_MASK: Final = 0xFFFF_FFFF
_NAME: Final = "kvm-tdx-mig"


@dataclass(slots=True, eq=False)
class _Handle:
    """An open stream: what keeps it are its descriptor and its mappings."""

    fd: int
    stream: Stream


class SoftKvm:
    """The kernel's side of one TD: a VM descriptor, stream devices, and its vCPUs.

    ``dialect`` is "Gen-1a" or "Gen-1b".  ``vm_fd`` takes KVM_CREATE_DEVICE, KVM_CHECK_EXTENSION,
    the dirty log of slot 0 (guest frames 0 to ``slot_pages``, all dirty at first, cleared by hand
    as with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) and KVM_MEMORY_ENCRYPT_OP with the commands of
    pre-migration.  With ``clear_dirty_log`` a stream clears the log of the pages that it exports by
    itself, as the core of a VMM does just before; a caller that does so through ``vm_fd`` passes
    False.

    Calls of several threads are done one after the other.  UsageError: this is not Linux, or an
    unknown dialect.
    """

    def __init__(
        self, host: Host, td: HostTd, dialect: str = "Gen-1a", *, clear_dirty_log: bool = True
    ) -> None:
        self.dialect = dialect_named(dialect)
        self.host = host
        self._user = UserMemory()
        self._mappings = Mappings()
        self._driver = Driver(host, td, self.dialect, self._user, protect=clear_dirty_log)
        self._handles: dict[int, _Handle] = {}
        self._leaving: list[_Handle] = []
        self._spare: list[StreamBuffers] = []
        self._lock = threading.RLock()
        self.vm_fd = os.memfd_create(_NAME)

    @property
    def slot_pages(self) -> int:
        """Guest frames of memory slot 0; a dirty bitmap has that many bits, in whole 64s."""
        return self._driver.slot_pages

    @property
    def last_status(self) -> int:
        """Status of the module's last leaf, which the interface itself does not tell."""
        return self._driver.last_status

    # --- what a caller of the kernel has ---------------------------------------------------------

    def create_device(self, type: int, test: bool = False) -> int:
        """KVM_CREATE_DEVICE: a descriptor of a new stream, 0 for a test that passes, or -errno.

        ENODEV: no device of that type in this dialect; EIO: the module makes no more streams.
        """
        with self._lock:
            if type != self.dialect.device_type:
                return -errno.ENODEV
            if test:
                return 0
            stream = self._driver.create_stream()
            if isinstance(stream, int):
                return stream
            fd = os.memfd_create(_NAME)
            self._handles[fd] = _Handle(fd, stream)
            return fd

    def ioctl(self, fd: int, request: int, address: int | None) -> int:
        """0 or more, or -errno.  ``request`` counts as 32 bits and ``address`` as 64.

        None is the null pointer, as ctypes hands it over.
        """
        with self._lock:
            request, address = request & REQUEST_MASK, (address or 0) & ADDRESS_MASK
            try:
                if fd == self.vm_fd:
                    return self._vm_ioctl(request, address)
                handle = self._handles.get(fd)
                if handle is None:
                    return -errno.EBADF
                return self._stream_ioctl(handle.stream, request, address)
            except Fault:
                return -errno.EFAULT

    def mmap(self, fd: int, length: int, offset: int) -> int:
        """Map pages of a stream, shared, to read and write: the address or -errno.

        Touching a page that the stream does not have is SIGBUS.  Attributes are to be set before;
        pages that come later do not show in older mappings.
        """
        with self._lock:
            handle = self._handles.get(fd)
            if handle is None:
                return -errno.ENODEV if fd == self.vm_fd else -errno.EBADF
            if offset % PAGE_SIZE or offset < 0:
                return -errno.EINVAL
            first, count = offset // PAGE_SIZE, -(-length // PAGE_SIZE)
            parts = (run.within(first, count) for run in handle.stream.runs())
            shown = [part for part in parts if part is not None]
            return self._mappings.map(handle, fd, length, shown)

    def munmap(self, address: int | None, length: int) -> int:
        """Take a mapping, or pages of it, away: 0 or -errno; EINVAL if it is no mapping of ours."""
        with self._lock:
            code = self._mappings.unmap(address or 0, length)
            self._release_unmapped()
            return code

    def close(self, fd: int) -> int:
        """Close a descriptor: 0 or -errno.  Mappings of it stay, and keep the stream."""
        with self._lock:
            if fd == self.vm_fd:
                self.vm_fd = -1
                os.close(fd)
                return 0
            handle = self._handles.pop(fd, None)
            if handle is None:
                return -errno.EBADF
            os.close(fd)
            self._leaving.append(handle)
            self._release_unmapped()
            return 0

    # --- what stands for the rest of a VMM -------------------------------------------------------

    def run_vcpu(self, vcpu: int, budget: int) -> VcpuExit:
        """Let a vCPU run for ``budget`` guest instructions, as KVM_RUN does.

        A write to a write-blocked page is let through and noted in the dirty log.  BackendError:
        the module does not enter the vCPU.
        """
        with self._lock:
            done = 0
            while True:
                result = self._driver.module.execute(VpEnter(vcpu, budget - done))
                ended = result.exit
                if not result.ok or ended is None:
                    raise BackendError("KVM_RUN", result.status, result.status_name, f"vCPU {vcpu}")
                done += ended.instructions
                if ended.reason != "ept_violation" or not self._driver.written(ended.gpa or 0):
                    return VcpuExit(ended.reason, ended.gpa, done)
                if done >= budget:
                    return VcpuExit("budget", None, done)

    def shut_down(self) -> None:
        """Close every descriptor and take every mapping away.  Idempotent."""
        with self._lock:
            for fd in [*self._handles, *([self.vm_fd] if self.vm_fd >= 0 else [])]:
                self.close(fd)
            self._mappings.unmap_all()
            self._release_unmapped()

    # --- VM descriptor ---------------------------------------------------------------------------

    def _vm_ioctl(self, request: int, address: int) -> int:
        if request == KVM_CHECK_EXTENSION:
            known = (KVM_CAP_DEVICE_CTRL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
            return int(address in known)
        if request == KVM_CREATE_DEVICE:
            return self._create_at(address)
        if request == KVM_GET_DIRTY_LOG:
            return self._get_dirty_log(address)
        if request == KVM_CLEAR_DIRTY_LOG:
            return self._clear_dirty_log(address)
        if request == KVM_MEMORY_ENCRYPT_OP:
            return self._vm_command(address)
        return -errno.ENOTTY

    def _create_at(self, address: int) -> int:
        device_type, _, flags = CREATE_DEVICE.unpack(self._user.read(address, CREATE_DEVICE.size))
        fd = self.create_device(device_type, bool(flags & KVM_CREATE_DEVICE_TEST))
        if fd <= 0:
            return fd
        try:
            self._user.write(address, CREATE_DEVICE.pack(device_type, fd, flags))
        except Fault:
            self.close(fd)
            raise
        return 0

    def _get_dirty_log(self, address: int) -> int:
        """The log as it is; nothing is cleared by reading it."""
        slot, _, bitmap = DIRTY_LOG.unpack(self._user.read(address, DIRTY_LOG.size))
        if slot:
            return -(errno.ENOENT if slot < MEMORY_SLOTS else errno.EINVAL)
        bits = np.packbits(self._driver.dirty, bitorder="little").tobytes()
        self._user.write(bitmap, bits.ljust(-(-len(bits) // 8) * 8, b"\0"))
        return 0

    def _clear_dirty_log(self, address: int) -> int:
        raw = self._user.read(address, CLEAR_DIRTY_LOG.size)
        slot, count, first, bitmap = CLEAR_DIRTY_LOG.unpack(raw)
        if slot:
            return -(errno.ENOENT if slot < MEMORY_SLOTS else errno.EINVAL)
        last = first + count
        aligned = not first % DIRTY_LOG_ALIGNMENT and (
            not count % DIRTY_LOG_ALIGNMENT or last == self.slot_pages
        )
        if not aligned or last > self.slot_pages:
            return -errno.EINVAL
        bits = np.frombuffer(self._user.read(bitmap, -(-count // 8)), dtype=np.uint8)
        chosen = np.flatnonzero(np.unpackbits(bits, count=count, bitorder="little"))
        gfns = chosen.astype(np.uint64) + np.uint64(first)
        self._driver.clear_dirty(gfns[self._driver.dirty[gfns.astype(np.intp)]])
        return 0

    def _vm_command(self, address: int) -> int:
        number, data, _ = self.dialect.unpack(self._user.read(address, self.dialect.command.size))
        if self._driver.td.destroyed:
            return -errno.EIO
        if number == TdxCommand.SET_MIGRATION_INFO:
            raw = self._user.read(data, SET_MIGRATION_INFO.size)
            return -errno.EINVAL if SET_MIGRATION_INFO.unpack(raw)[0] else 0
        if number == TdxCommand.GET_MIGRATION_INFO:
            raw = self._user.read(data, GET_MIGRATION_INFO.size)
            if GET_MIGRATION_INFO.unpack(raw)[0]:
                return -errno.EINVAL
            done = self._driver.module.observe()["mig_dec_key_set"]
            self._user.write(data, GET_MIGRATION_INFO.pack(0, done))
            return 0
        # The VM is there already; everything else builds one.
        return -errno.EINVAL

    # --- stream descriptors ----------------------------------------------------------------------

    def _stream_ioctl(self, stream: Stream, request: int, address: int) -> int:
        """Whatever is no request about attributes is a command: the driver does not look."""
        if request == KVM_HAS_DEVICE_ATTR:
            return -errno.EPERM
        if request in (KVM_SET_DEVICE_ATTR, KVM_GET_DEVICE_ATTR):
            raw = self._user.read(address, DEVICE_ATTR.size)
            _, group, attribute, where = DEVICE_ATTR.unpack(raw)
            if group != STREAM_ATTR_GROUP:
                return -errno.EINVAL
            if request == KVM_SET_DEVICE_ATTR:
                return self._set_attributes(stream, where)
            return self._get_attributes(stream, attribute, where)
        number, data, _ = self.dialect.unpack(self._user.read(address, self.dialect.command.size))
        command = self._driver.commands.get(number)
        if command is None or stream.buffers is None:
            return -errno.EINVAL
        # As KVM answers for a VM that is dead: the TD was taken down.
        return -errno.EIO if self._driver.td.destroyed else command(stream, data)

    def _set_attributes(self, stream: Stream, address: int) -> int:
        version, asked, _ = STREAM_ATTR.unpack(self._user.read(address, STREAM_ATTR.size))
        if version != STREAM_ATTR_VERSION:
            return -errno.EINVAL
        try:
            stream.take(self._buffers(stream.clamped(asked)), stream.clamped(asked))
        except BackendError:
            return -errno.ENOMEM
        return 0

    def _buffers(self, pages: int) -> StreamBuffers:
        """Those of a stream that is gone, or new ones."""
        for spare in self._spare:
            if spare.count >= pages:
                self._spare.remove(spare)
                return spare
        return self.host.new_stream_buffers(pages)

    def _get_attributes(self, stream: Stream, attribute: int, address: int) -> int:
        if attribute != STREAM_ATTR.size:
            return -errno.EINVAL
        found = STREAM_ATTR.pack(STREAM_ATTR_VERSION, stream.buffer_pages, MAX_STREAMS)
        self._user.write(address, found)
        return 0

    def _release_unmapped(self) -> None:
        """A stream goes with its last descriptor and mapping; its buffers serve the next one."""
        for handle in [h for h in self._leaving if not self._mappings.of(h)]:
            self._leaving.remove(handle)
            self._spare += handle.stream.all_buffers()
            self._driver.release_stream(handle.stream)
