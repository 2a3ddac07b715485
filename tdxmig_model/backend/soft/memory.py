"""Flat physical memory of one host, and the physical address metadata table (PAMT) over it.

Memory is one anonymous shared mapping, so that worker processes started by fork see it.  The low
part is ordinary memory of the host; the rest is one trust domain memory region (TDMR) whose 4 KiB
pages have PAMT entries.  Page types and the layout of BEPOCH are facts of TDX module 1.5.01.
"""

from __future__ import annotations

import contextlib
import mmap
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.backend.soft.locks import Lock, Mode
from tdxmig_model.wire.constants import PAGE_SIZE

MAX_PA_BITS = 52
HKID_SHIFT = 46
"""Host key ids occupy the top bits of a physical address, 51:46."""
HKID_FIELD = (1 << MAX_PA_BITS) - (1 << HKID_SHIFT)
FIRST_PRIVATE_HKID = 32
LAST_PRIVATE_HKID = 63
PAGE_MASK = PAGE_SIZE - 1

BEPOCH_MIG_FLAG = 1 << 63
MIG_EPOCH_MASK = 0xFFFF_FFFF


class PageType(IntEnum):
    """PAMT page types (TDX module 1.5.01)."""

    NDA = 0
    RSVD = 1
    REG = 3
    TDR = 4
    TDCX = 5
    TDVPR = 6
    EPT = 8


def migration_bepoch(export_count: int, mig_epoch: int) -> int:
    """BEPOCH of an imported page: mig_flag 63, EXPORT_COUNT 62:32, MIG_EPOCH 31:0."""
    return BEPOCH_MIG_FLAG | export_count << 32 | mig_epoch


class Memory:
    """`shared_pages` of ordinary memory followed by `tdmr_pages` that TDs can own.

    `bytes` and `words` are views over everything; `words[hpa >> 3]` is the 64-bit word at `hpa`.
    `page_type`, `owner` (TDR HPA) and `bepoch` are the PAMT columns, indexed by page number.
    """

    def __init__(self, shared_pages: int, tdmr_pages: int) -> None:
        self.pages = shared_pages + tdmr_pages
        self.size = self.pages * PAGE_SIZE
        self.tdmr_base = shared_pages * PAGE_SIZE
        self._map = mmap.mmap(-1, self.size)
        self.bytes = memoryview(self._map)
        self.words = self.bytes.cast("Q")
        self.array: NDArray[np.uint64] = np.frombuffer(self._map, dtype=np.uint64)
        self.page_type = bytearray(self.pages)
        self.owner = memoryview(bytearray(8 * self.pages)).cast("Q")
        self.bepoch = memoryview(bytearray(8 * self.pages)).cast("Q")
        self._locks: dict[int, Lock] = {}

    def page(self, hpa: int) -> memoryview:
        """The 4096 bytes at `hpa` (4 KiB aligned), writable, not a copy."""
        return self.bytes[hpa : hpa + PAGE_SIZE]

    def page_words(self, hpa: int) -> NDArray[np.uint64]:
        """The 512 words of the page at `hpa`, writable, not a copy."""
        first = hpa >> 3
        return self.array[first : first + 512]

    def zero_page(self, hpa: int) -> None:
        """Clear one page."""
        self.bytes[hpa : hpa + PAGE_SIZE] = _ZERO_PAGE

    def has_pamt(self, hpa: int) -> bool:
        """True if the page lies in the TDMR."""
        return self.tdmr_base <= hpa < self.size

    def shared_ok(self, hpa: int, length: int = PAGE_SIZE, align: int = PAGE_SIZE) -> bool:
        """Can the module use [hpa, hpa + length) as a buffer of the VMM?

        Within memory, aligned, and with a shared key id (an address above memory has one that is
        not, or no memory behind it).  A page that a TD owns is refused too: on hardware a shared
        access to it reads and writes poison, which nothing could tell from data here.
        """
        if hpa & (align - 1) or not 0 <= hpa <= self.size - length:
            return False
        return self.page_type[hpa >> 12] == PageType.NDA

    def prefault(self, hpa: int, pages: int) -> None:
        """Have the kernel back these pages now, so that nobody waits for it later.

        Costs the same time here as there; a kernel that does not know how just leaves it for later.
        """
        with contextlib.suppress(OSError, ValueError):
            self._map.madvise(_MADV_POPULATE_WRITE, hpa, pages * PAGE_SIZE)

    def try_lock(self, hpa: int, mode: Mode) -> bool:
        """Take the lock of the PAMT entry of this page."""
        lock = self._locks.get(hpa)
        if lock is None:
            lock = self._locks[hpa] = Lock()
        return lock.acquire(mode)

    def unlock(self, hpa: int, mode: Mode) -> None:
        """Give back the lock of the PAMT entry of this page."""
        lock = self._locks[hpa]
        lock.release(mode)
        if lock.free:
            del self._locks[hpa]

    def is_locked(self, hpa: int) -> bool:
        """True if anybody holds the PAMT entry of this page."""
        return hpa in self._locks

    @property
    def any_locked(self) -> bool:
        """True if anybody holds any PAMT entry: every leaf in progress holds one."""
        return bool(self._locks)

    def assign(self, hpa: int, page_type: PageType, owner: int) -> None:
        """Hand a free page to a TD, with BEPOCH 0."""
        number = hpa >> 12
        self.page_type[number] = page_type
        self.owner[number] = owner
        self.bepoch[number] = 0

    def free(self, hpa: int) -> None:
        """Return a page to the VMM, with zero content.

        Hardware gives back whatever the old key's ciphertext reads as; zeros keep secrets too.
        """
        self.page_type[hpa >> 12] = PageType.NDA
        self.zero_page(hpa)

    def close(self) -> None:
        """Drop the mapping; views still held elsewhere keep it alive."""
        self.array = np.empty(0, dtype=np.uint64)
        self.words.release()
        self.bytes.release()
        try:
            self._map.close()
        except BufferError:
            # A NumPy view of the caller still refers to the mapping; it goes with the view.
            return

    def __exit__(self, *_exc: Any) -> None:
        self.close()


_ZERO_PAGE = bytes(PAGE_SIZE)
_MADV_POPULATE_WRITE = 23
"""Linux 5.14; Python's mmap has no name for it."""
