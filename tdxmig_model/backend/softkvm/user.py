"""What the kernel does with a caller's memory: checked copies, and mappings of a device's pages.

An address is judged as the kernel judges it: what is not mapped, or may not be written, is a fault
and never a crash.  What cannot be judged is whose a mapped address is: the caller and this module
are one process, so memory that the caller was never given counts as the caller's.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from tdxmig_model.backend.kvm.calls import (
    MAP_FAILED,
    MAP_SHARED,
    PROT_READ_WRITE,
    failure,
    libc,
)
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import PAGE_SIZE

ADDRESS_MASK: Final = (1 << 64) - 1
_LARGEST: Final = 1 << 47
"""No mapping of a process reaches further (x86-64 with four levels of page tables)."""
_MREMAP_MAYMOVE_FIXED: Final = 0x3


class Fault(Exception):
    """An address that the caller cannot read or write: -EFAULT.  Never leaves the package."""


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class UserMemory:
    """Copies from and to addresses of this process, by the kernel's own checks."""

    def __init__(self) -> None:
        self._libc = libc()
        probe = ctypes.create_string_buffer(b"probe")
        try:
            read = self.read(ctypes.addressof(probe), 5)
        except Fault:
            read = b""
        if read != b"probe":
            raise UsageError(
                "this kernel does not let a process read itself (process_vm_readv), so addresses "
                "of C callers cannot be checked; allow that system call"
            )

    def read(self, address: int, length: int) -> bytes:
        """A copy of ``length`` bytes.  Fault if not all of them can be read."""
        buffer = ctypes.create_string_buffer(length)
        self._copy(self._libc.process_vm_readv, ctypes.addressof(buffer), address, length)
        return buffer.raw

    def write(self, address: int, data: bytes) -> None:
        """Fault if not all of it can be written; some of it may have been."""
        buffer = ctypes.create_string_buffer(data, len(data))
        self._copy(self._libc.process_vm_writev, ctypes.addressof(buffer), address, len(data))

    def read_u64(self, address: int) -> int:
        """The 64-bit number at an address.  Fault as `read`."""
        return int.from_bytes(self.read(address, 8), "little")

    def write_u64(self, address: int, value: int) -> None:
        """Fault as `write`."""
        self.write(address, (value & ADDRESS_MASK).to_bytes(8, "little"))

    def _copy(self, call: ctypes._NamedFuncPointer, ours: int, theirs: int, length: int) -> None:
        here, there = _Vector(ours, length), _Vector(theirs & ADDRESS_MASK, length)
        done = call(os.getpid(), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if done != length:
            raise Fault(f"{length} bytes at {theirs:#x}")


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive pages of a device: the number of the first one, how many, and the address at
    which this process has them already, in shared memory."""

    first: int
    count: int
    source: int

    def within(self, first: int, count: int) -> Run | None:
        """The part in ``count`` pages from ``first`` on, numbered from there; None if empty."""
        start, past = max(self.first, first), min(self.first + self.count, first + count)
        if start >= past:
            return None
        moved = self.source + (start - self.first) * PAGE_SIZE
        return Run(start - first, past - start, moved)


class Mappings:
    """Ranges of addresses that show pages of devices."""

    def __init__(self) -> None:
        self._libc = libc()
        self._ranges: dict[int, tuple[int, object]] = {}

    def map(self, owner: object, fd: int, length: int, runs: Iterable[Run]) -> int:
        """Reserve ``length`` bytes and show the pages there; the address or -errno.

        ``fd`` is an empty file: touching a page of the range that is in no run is SIGBUS, as the
        driver's fault handler has it.
        """
        length = rounded(length)
        if not 0 < length <= _LARGEST:
            return -(errno.ENOMEM if length > 0 else errno.EINVAL)
        base = self._libc.mmap(None, length, PROT_READ_WRITE, MAP_SHARED, fd, 0)
        if base == MAP_FAILED:
            return failure()
        for run in runs:
            target = base + run.first * PAGE_SIZE
            # An old size of 0 makes a second mapping of the same shared pages.
            shown = self._libc.mremap(
                run.source, 0, run.count * PAGE_SIZE, _MREMAP_MAYMOVE_FIXED, target
            )
            if shown == MAP_FAILED:
                code = failure()
                self._libc.munmap(base, length)
                return code
        self._ranges[base] = (length, owner)
        return int(base)

    def unmap(self, address: int, length: int) -> int:
        """Take pages away; 0 or -errno.

        Stricter than the kernel: -EINVAL for what `map` did not give, because that is memory of
        this very interpreter.
        """
        length = rounded(length)
        base = self._around(address, length)
        if base is None or length <= 0:
            return -errno.EINVAL
        if self._libc.munmap(address, length):
            return failure()
        whole, owner = self._ranges.pop(base)
        # What is left before and after is still mapped.
        for first, past in ((base, address), (address + length, base + whole)):
            if past > first:
                self._ranges[first] = (past - first, owner)
        return 0

    def _around(self, address: int, length: int) -> int | None:
        for base, (whole, _) in self._ranges.items():
            if base <= address and address + length <= base + whole:
                return base
        return None

    def owner(self, address: int) -> object:
        """Whose pages are mapped at an address, or None."""
        base = self._around(address, 1)
        return None if base is None else self._ranges[base][1]

    def of(self, owner: object) -> bool:
        """Whether anything of this owner is still mapped."""
        return any(other is owner for _, other in self._ranges.values())

    def unmap_all(self) -> None:
        """Take every range away."""
        for base, (length, _) in list(self._ranges.items()):
            self.unmap(base, length)


def rounded(length: int) -> int:
    """Bytes of the whole pages that ``length`` bytes need."""
    return -(-length // PAGE_SIZE) * PAGE_SIZE
