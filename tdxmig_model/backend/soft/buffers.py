"""The VMM's side of memory: who owns which free page, and the buffers of a migration stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.backend.soft.memory import Memory
from tdxmig_model.errors import BackendError, UsageError
from tdxmig_model.wire.constants import MAX_ENTRIES, MBMD_SIZE, PAGE_SIZE, ByteBuffer
from tdxmig_model.wire.gpa_list import GpaListInfo, PageListInfo

MBMD_BUFFER_SIZE = 128


class PageAllocator:
    """Free pages of one stretch of physical memory, handed out lowest first."""

    def __init__(self, name: str, first_hpa: int, past_hpa: int) -> None:
        self._name = name
        self._next = first_hpa
        self._past = past_hpa
        self._returned: list[int] = []

    def take(self) -> int:
        """HPA of one page."""
        return self._returned.pop() if self._returned else self.take_run(1)

    def take_many(self, count: int) -> list[int]:
        """HPAs of `count` pages."""
        back = self._returned[len(self._returned) - count :] if self._returned else []
        if len(back) == count:
            del self._returned[len(self._returned) - count :]
            return back
        return [self.take() for _ in range(count)]

    def take_run(self, count: int) -> int:
        """HPA of `count` consecutive pages."""
        first = self._next
        if first + count * PAGE_SIZE > self._past:
            raise BackendError(
                "memory allocation",
                0,
                "OUT_OF_MEMORY",
                f"no {count} free pages left in {self._name}; give the Host more memory_bytes "
                "for the TDMR, shared_bytes for shared memory",
            )
        self._next = first + count * PAGE_SIZE
        return first

    def give_back(self, hpa: int) -> None:
        """The page is free again."""
        self._returned.append(hpa)


class StreamBuffers:
    """Lists and `count` migration buffers of one stream, in shared memory.

    Pages: MBMD, GPA list, buffer list, two MAC lists, new-page list, then the buffers.
    """

    def __init__(self, memory: Memory, allocator: PageAllocator, count: int = MAX_ENTRIES) -> None:
        self._memory = memory
        self.count = count
        first = allocator.take_run(6 + count)
        pages = [first + index * PAGE_SIZE for index in range(7)]
        self.mbmd, self.gpas, self.list, self.macs_low, self.macs_high, self.new_pages = pages[:6]
        self.buffers = pages[6]
        self._hpas = np.arange(MAX_ENTRIES, dtype=np.uint64) * np.uint64(PAGE_SIZE) + np.uint64(
            self.buffers
        )

    @property
    def mbmd_register(self) -> int:
        """R8: buffer size 63:52 and HPA."""
        return self.mbmd | MBMD_BUFFER_SIZE << 52

    def offer_buffers(self, count: int) -> None:
        """Write the buffer list: `count` usable pages."""
        self._memory.page_words(self.list)[:count] = self._hpas[:count]

    def page_list(self, count: int) -> int:
        """R9 of a state leaf with `count` pages."""
        self.offer_buffers(count)
        return PageListInfo(self.list, count - 1).to_register()

    def gpa_list(self, entries: NDArray[np.uint64]) -> int:
        """Write the GPA list; RCX of a list leaf."""
        count = entries.size
        if not 1 <= count <= MAX_ENTRIES:
            raise UsageError(f"a GPA list of {count} entries; a leaf takes 1 to {MAX_ENTRIES}")
        self._memory.page_words(self.gpas)[:count] = entries
        return GpaListInfo(self.gpas, count - 1).to_register()

    def entries(self, count: int) -> NDArray[np.uint64]:
        """A copy of the first entries of the GPA list as the leaf left them."""
        return self._memory.page_words(self.gpas)[:count].copy()

    def read_mbmd(self) -> bytes:
        """The 48 bytes that a leaf wrote."""
        return bytes(self._memory.bytes[self.mbmd : self.mbmd + MBMD_SIZE])

    def write_mbmd(self, mbmd: bytes) -> None:
        """The MBMD for an import leaf."""
        self._memory.bytes[self.mbmd : self.mbmd + len(mbmd)] = mbmd

    def read_pages(self, count: int) -> list[memoryview]:
        """The first buffers, copied out in one go so that the next call cannot change them."""
        end = self.buffers + count * PAGE_SIZE
        copy = memoryview(bytes(self._memory.bytes[self.buffers : end]))
        return [copy[at : at + PAGE_SIZE] for at in range(0, count * PAGE_SIZE, PAGE_SIZE)]

    def write_pages(self, pages: Sequence[ByteBuffer]) -> None:
        """Fill the first buffers."""
        target, at = self._memory.bytes, self.buffers
        for page in pages:
            target[at : at + PAGE_SIZE] = page
            at += PAGE_SIZE

    def read_macs(self, count: int) -> bytes:
        """The MAC lists; both pages are adjacent, so they are one run of 16-byte tags."""
        return bytes(self._memory.bytes[self.macs_low : self.macs_low + 16 * count])

    def write_macs(self, macs: bytes) -> None:
        """The MAC lists for an import leaf."""
        self._memory.bytes[self.macs_low : self.macs_low + len(macs)] = macs

    def offer_new_pages(self, hpas: NDArray[np.uint64]) -> None:
        """Write the new-page list."""
        self._memory.page_words(self.new_pages)[: hpas.size] = hpas
