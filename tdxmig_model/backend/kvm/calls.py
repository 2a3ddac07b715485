"""The system calls that a stream device is driven by, at raw addresses, and the kernel's own.

Each call returns what the kernel returns in a register: a negative number is an errno.  The other
implementation is `softkvm.SoftKvm`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any, Final, Protocol

from tdxmig_model.errors import UsageError

PROT_READ_WRITE: Final = 0x3
MAP_SHARED: Final = 0x1


class SystemCalls(Protocol):
    """ioctl, mmap, munmap and close on descriptors of KVM; 0 or more, or -errno."""

    def ioctl(self, fd: int, request: int, address: int) -> int: ...

    def mmap(self, fd: int, length: int, offset: int) -> int:
        """Map ``length`` bytes from ``offset`` on, shared, to read and write; the address."""
        ...

    def munmap(self, address: int, length: int) -> int: ...

    def close(self, fd: int) -> int: ...


def libc() -> Any:
    """The C library of this process, with the calls that Python's own modules do not have.

    UsageError where there is none with Linux's ``mremap`` and ``process_vm_readv``.
    """
    library = ctypes.CDLL(None, use_errno=True)
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    try:
        for name, result, arguments in (
            ("ioctl", integer, (integer, ctypes.c_ulong, pointer)),
            ("mmap", pointer, (pointer, size, integer, integer, integer, ctypes.c_int64)),
            ("mremap", pointer, (pointer, size, size, integer, pointer)),
            ("munmap", integer, (pointer, size)),
            ("process_vm_readv", ctypes.c_ssize_t, _VECTORS),
            ("process_vm_writev", ctypes.c_ssize_t, _VECTORS),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except AttributeError as error:
        raise UsageError(f"KVM's interface needs the C library of Linux: {error}") from None
    return library


_VECTORS: Final = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
MAP_FAILED: Final = ctypes.c_void_p(-1).value


def failure() -> int:
    """-errno of the call of the C library that has just failed."""
    return -(ctypes.get_errno() or errno.EIO)


class LinuxCalls:
    """The calls of this host's kernel."""

    def __init__(self) -> None:
        self._libc = libc()

    def ioctl(self, fd: int, request: int, address: int) -> int:
        """ioctl(2) with an address or a number; its result or -errno."""
        result: int = self._libc.ioctl(fd, request, address)
        return result if result >= 0 else failure()

    def mmap(self, fd: int, length: int, offset: int) -> int:
        """mmap(2), shared, to read and write; the address or -errno."""
        address: int = self._libc.mmap(None, length, PROT_READ_WRITE, MAP_SHARED, fd, offset)
        return failure() if address == MAP_FAILED else address

    def munmap(self, address: int, length: int) -> int:
        """munmap(2); 0 or -errno."""
        return failure() if self._libc.munmap(address, length) else 0

    def close(self, fd: int) -> int:
        """close(2); 0 or -errno."""
        try:
            os.close(fd)
        except OSError as error:
            return -(error.errno or errno.EIO)
        return 0
