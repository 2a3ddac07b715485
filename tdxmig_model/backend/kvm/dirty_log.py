"""The dirty log of a VM's memory slot: read which pages were written, and watch them again.

It works by hand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): reading clears nothing; clearing a page's bit
has the next write to it noticed, which for a private page of a TD is a write-block.
"""

from __future__ import annotations

import ctypes

import numpy as np

from tdxmig_model.backend.kvm.abi import (
    CLEAR_DIRTY_LOG,
    DIRTY_LOG,
    DIRTY_LOG_ALIGNMENT,
    KVM_CLEAR_DIRTY_LOG,
    KVM_GET_DIRTY_LOG,
)
from tdxmig_model.backend.kvm.calls import SystemCalls
from tdxmig_model.engine.commands import Gpas
from tdxmig_model.wire.constants import PAGE_SIZE


class DirtyLog:
    """The log of slot 0 of a VM, whose ``pages`` guest frames begin with frame 0."""

    def __init__(self, calls: SystemCalls, vm_fd: int, pages: int) -> None:
        self._calls = calls
        self._vm_fd = vm_fd
        self.pages = pages

    def read(self) -> Gpas | int:
        """GPAs of the pages that are dirty, ascending, shape ``(n,)``; or -errno."""
        words = -(-self.pages // 64)
        bitmap = np.zeros(words * 8, dtype=np.uint8)
        argument = ctypes.create_string_buffer(DIRTY_LOG.pack(0, 0, bitmap.ctypes.data))
        address = ctypes.addressof(argument)
        code = self._calls.ioctl(self._vm_fd, KVM_GET_DIRTY_LOG, address)
        if code < 0:
            return code
        bits = np.unpackbits(bitmap, count=self.pages, bitorder="little")
        return np.flatnonzero(bits).astype(np.uint64) * np.uint64(PAGE_SIZE)

    def clear(self, gpas: Gpas) -> int:
        """Clear the bits of these pages; those outside of the slot do not matter.  0 or -errno."""
        gfns = np.unique(gpas // np.uint64(PAGE_SIZE))
        inside = gfns[gfns < self.pages].astype(np.intp)
        if not inside.size:
            return 0
        first = int(inside[0]) // DIRTY_LOG_ALIGNMENT * DIRTY_LOG_ALIGNMENT
        past = (int(inside[-1]) // DIRTY_LOG_ALIGNMENT + 1) * DIRTY_LOG_ALIGNMENT
        chosen = np.zeros(past - first, dtype=np.bool_)
        chosen[inside - first] = True
        bitmap = np.packbits(chosen, bitorder="little")
        count = min(past, self.pages) - first
        raw = CLEAR_DIRTY_LOG.pack(0, count, first, bitmap.ctypes.data)
        argument = ctypes.create_string_buffer(raw)
        address = ctypes.addressof(argument)
        return min(self._calls.ioctl(self._vm_fd, KVM_CLEAR_DIRTY_LOG, address), 0)
