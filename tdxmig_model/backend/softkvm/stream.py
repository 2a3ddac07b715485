"""One migration stream as KVM's driver keeps it: its buffers, its index, its lists.

The pages that a caller maps are the very pages that the TDX module reads and writes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.backend.kvm.abi import (
    BUFFERS_OFFSET,
    GPA_LIST_OFFSET,
    MAC_LIST_OFFSET,
    MACS_PER_PAGE,
    MAX_BUFFER_PAGES,
    MBMD_OFFSET,
)
from tdxmig_model.backend.soft.buffers import StreamBuffers
from tdxmig_model.backend.soft.call import NO_PAGE
from tdxmig_model.backend.soft.gpa_entries import INVALID_BIT
from tdxmig_model.backend.soft.leaves_export_state import MIN_PAGES
from tdxmig_model.backend.soft.memory import Memory
from tdxmig_model.backend.softkvm.user import Run
from tdxmig_model.wire.constants import MAX_ENTRIES, PAGE_SIZE
from tdxmig_model.wire.gpa_list import GpaListInfo, PageListInfo

STATE_PAGES = max(MIN_PAGES.values())
"""Buffers that a stream has at least: the largest of the module's three state sizes."""
MBMD_ROOM = 4095 << 52
"""R8: the size of the MBMD buffer as KVM states it."""


class Stream:
    """A stream of the device; ``buffers`` is None until its attributes were set."""

    def __init__(self, memory: Memory, index: int) -> None:
        self.memory = memory
        self.index = index
        self.buffer_pages = 0
        self.buffers: StreamBuffers | None = None
        self.retired: list[StreamBuffers] = []

    @staticmethod
    def clamped(pages: int) -> int:
        """Buffers that a caller gets who asks for ``pages``."""
        return min(max(pages, STATE_PAGES), MAX_BUFFER_PAGES)

    def take(self, buffers: StreamBuffers, pages: int) -> None:
        """Use these buffers, zeroed, from now on; older ones stay mapped where they are."""
        if self.buffers is not None:
            self.retired.append(self.buffers)
        first = buffers.mbmd
        past = buffers.buffers + buffers.count * PAGE_SIZE
        self.memory.bytes[first:past] = bytes(past - first)
        self.buffers, self.buffer_pages = buffers, pages

    def all_buffers(self) -> list[StreamBuffers]:
        """Everything that is free again when the stream is released."""
        return self.retired + ([] if self.buffers is None else [self.buffers])

    def runs(self) -> list[Run]:
        """The pages that a caller can map, by page offset."""
        buffers = self.buffers
        if buffers is None:
            return []
        base = self.memory.array.ctypes.data
        mac_pages = 1 + (self.buffer_pages > MACS_PER_PAGE)
        return [
            Run(MBMD_OFFSET, 1, base + buffers.mbmd),
            Run(GPA_LIST_OFFSET, 1, base + buffers.gpas),
            Run(MAC_LIST_OFFSET, mac_pages, base + buffers.macs_low),
            Run(BUFFERS_OFFSET, self.buffer_pages, base + buffers.buffers),
        ]

    # --- operands of the module's leaves ---------------------------------------------------------

    def _set(self) -> StreamBuffers:
        assert self.buffers is not None  # commands before SET end before they come here
        return self.buffers

    @property
    def mbmd_register(self) -> int:
        """R8: size and HPA of the MBMD page."""
        return self._set().mbmd | MBMD_ROOM

    @property
    def mbmd(self) -> bytes:
        """The 48 bytes in the MBMD page."""
        return self._set().read_mbmd()

    def page_list(self, count: int | None = None) -> int:
        """R9 of a state leaf with ``count`` pages (9 bits: 0 is 512); None: with all buffers."""
        count = self.buffer_pages if count is None else count
        self._offer(self.buffer_pages)
        return PageListInfo(self._set().list, (count - 1) % MAX_ENTRIES).to_register()

    def gpa_list(self, count: int) -> int:
        """RCX with ``count`` entries (9 bits: 0 is 512)."""
        return GpaListInfo(self._set().gpas, (count - 1) % MAX_ENTRIES).to_register()

    def entries(self, count: int) -> NDArray[np.uint64]:
        """A copy of the first entries of the GPA list."""
        return self._set().entries(count)

    def write_entry(self, entry: int) -> None:
        """A GPA list of one entry, and nothing after it."""
        page = self._set().gpas
        self.memory.zero_page(page)
        self.memory.words[page >> 3] = entry

    def entry(self) -> int:
        """The first entry of the GPA list."""
        return self.memory.words[self._set().gpas >> 3]

    def memory_operands(self, count: int) -> dict[str, int]:
        """R8, R9, R11 and R12 of a leaf that works on ``count`` pages."""
        buffers = self._set()
        self._offer(count)
        second = buffers.macs_high if self.buffer_pages > MACS_PER_PAGE else NO_PAGE
        return {
            "r8": self.mbmd_register,
            "r9": buffers.list,
            "r11": buffers.macs_low,
            "r12": second,
        }

    def _offer(self, count: int) -> None:
        """The buffer list: usable pages first, the rest marked invalid."""
        words = self.memory.page_words(self._set().list)
        words[:] = INVALID_BIT
        self._set().offer_buffers(count)

    def migs_index(self) -> int:
        """MIGS_INDEX of the MBMD page."""
        return int.from_bytes(self.mbmd[4:6], "little")

    def vp_index(self) -> int:
        """The vCPU index that the MBMD page names, if it is that of a vCPU state."""
        return int.from_bytes(self.mbmd[24:26], "little")

    def mig_epoch(self) -> int:
        """MIG_EPOCH of the MBMD page."""
        return int.from_bytes(self.mbmd[12:16], "little")

    def page_bytes(self, index: int) -> memoryview:
        """One of the buffers."""
        return self.memory.page(self._set().buffers + index * PAGE_SIZE)

    def place_in_list(self, index: int, hpa: int) -> None:
        """Let the buffer list name another page."""
        self.memory.page_words(self._set().list)[index] = hpa

    def offer_pages(self, hpas: NDArray[np.uint64]) -> int:
        """R13 of an import: the list of pages that the TD has already."""
        self._set().offer_new_pages(hpas)
        return self._set().new_pages
