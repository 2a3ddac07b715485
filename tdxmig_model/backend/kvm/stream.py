"""One stream device as a program of user space sees it: a descriptor and four mappings.

Whatever goes wrong while it is set up or closed, everything that was taken is given back.
"""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.backend.kvm.abi import (
    BUFFERS_OFFSET,
    CREATE_DEVICE,
    DEVICE_ATTR,
    GPA_LIST_OFFSET,
    KVM_CREATE_DEVICE,
    KVM_GET_DEVICE_ATTR,
    KVM_MEMORY_ENCRYPT_OP,
    KVM_SET_DEVICE_ATTR,
    MAC_LIST_OFFSET,
    MACS_PER_PAGE,
    MBMD_OFFSET,
    STREAM_ATTR,
    STREAM_ATTR_GROUP,
    STREAM_ATTR_VERSION,
    Dialect,
    TdxCommand,
)
from tdxmig_model.backend.kvm.calls import SystemCalls
from tdxmig_model.errors import BackendError
from tdxmig_model.wire.constants import PAGE_SIZE


def errno_name(code: int) -> str:
    """The name and meaning of an errno, such as "EIO: Input/output error"."""
    # Linux has two names for one number; the kernel uses this one.
    name = "EOPNOTSUPP" if code == errno.EOPNOTSUPP else errno.errorcode.get(code, str(code))
    return f"{name}: {os.strerror(code)}"


def must(what: str, result: int) -> int:
    """The result of a system call.  BackendError if it is -errno."""
    if result < 0:
        raise BackendError(what, -result, errno_name(-result))
    return result


class StreamDevice:
    """A migration stream of a VM, with ``pages`` buffers or as many as the driver gives.

    ``mbmd``, ``gpa_list``, ``macs`` and ``buffers`` are the mapped bytes, shared with the TDX
    module.  BackendError: the kernel refuses a step; then nothing stays open.
    """

    def __init__(self, calls: SystemCalls, vm_fd: int, dialect: Dialect, pages: int) -> None:
        self._calls = calls
        self._dialect = dialect
        self._mapped: list[tuple[int, int]] = []
        self._word = ctypes.c_uint64()
        self.fd = self._create(vm_fd)
        try:
            self._attributes(KVM_SET_DEVICE_ATTR, pages)
            _, self.pages, self.max_streams = self._attributes(KVM_GET_DEVICE_ATTR, 0)
            mac_pages = 1 + (self.pages > MACS_PER_PAGE)
            self.mbmd = self._map(MBMD_OFFSET, 1)
            self.gpa_list = self._map(GPA_LIST_OFFSET, 1)
            self.macs = self._map(MAC_LIST_OFFSET, mac_pages)
            self.buffers = self._map(BUFFERS_OFFSET, self.pages)
        except BaseException:
            self.close()
            raise

    def command(self, command: TdxCommand, value: int | None = None, data: int = 0) -> int:
        """Issue a command: 0 or -errno.

        With ``value`` the kernel is given the address of a word that holds it, and `value` has what
        the kernel left there; otherwise ``data`` itself.
        """
        if value is not None:
            self._word.value = value
            data = ctypes.addressof(self._word)
        raw = ctypes.create_string_buffer(self._dialect.pack(command, data))
        result = self._calls.ioctl(self.fd, KVM_MEMORY_ENCRYPT_OP, ctypes.addressof(raw))
        # The drivers that are known never fill this in; one that does is listened to.
        self.module_status = self._dialect.unpack(raw.raw[: self._dialect.command.size])[2]
        return result

    @property
    def value(self) -> int:
        """The word that the last command was given, as the kernel left it."""
        return self._word.value

    def close(self) -> None:
        """Unmap everything and close the descriptor.  Idempotent; goes on after a failure."""
        # A view of what is not mapped any more would end the process.
        self.mbmd = self.gpa_list = self.macs = self.buffers = np.empty(0, dtype=np.uint8)
        for address, length in self._mapped:
            self._calls.munmap(address, length)
        self._mapped.clear()
        if self.fd >= 0:
            self._calls.close(self.fd)
        self.fd = -1

    def _create(self, vm_fd: int) -> int:
        device_type = self._dialect.device_type
        argument = ctypes.create_string_buffer(CREATE_DEVICE.pack(device_type, 0, 0))
        code = self._calls.ioctl(vm_fd, KVM_CREATE_DEVICE, ctypes.addressof(argument))
        must(f"KVM_CREATE_DEVICE of type {device_type} ({self._dialect.name})", code)
        fd: int = CREATE_DEVICE.unpack(argument.raw[: CREATE_DEVICE.size])[1]
        return fd

    def _attributes(self, request: int, pages: int) -> tuple[int, int, int]:
        """Set or get them: version, buffers, the module's limit of streams."""
        struct = ctypes.create_string_buffer(STREAM_ATTR.pack(STREAM_ATTR_VERSION, pages, 0))
        address, size = ctypes.addressof(struct), STREAM_ATTR.size
        attribute = ctypes.create_string_buffer(
            DEVICE_ATTR.pack(0, STREAM_ATTR_GROUP, size, address)
        )
        name = "KVM_SET_DEVICE_ATTR" if request == KVM_SET_DEVICE_ATTR else "KVM_GET_DEVICE_ATTR"
        must(name, self._calls.ioctl(self.fd, request, ctypes.addressof(attribute)))
        version, found, streams = STREAM_ATTR.unpack(struct.raw[:size])
        return version, found, streams

    def _map(self, page: int, count: int) -> NDArray[np.uint8]:
        length = count * PAGE_SIZE
        address = must("mmap", self._calls.mmap(self.fd, length, page * PAGE_SIZE))
        self._mapped.append((address, length))
        return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))
