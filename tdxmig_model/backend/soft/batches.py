"""Page encryption of whole bundles by worker processes, with the effects of one page at a time.

Nothing else runs during a leaf that goes straight through, so EXPORT.MEM may encrypt its pages at
its end, and IMPORT.MEM may decrypt new pages at its beginning.  What the VMM could tell from the
order, such as a buffer that is also a list, is done page by page.  A lost worker is reported once
the leaf is complete: its pages are then encrypted here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tdxmig_model.backend.soft.call import Call
from tdxmig_model.backend.soft.crypto import StreamCipher
from tdxmig_model.backend.soft.memory import PAGE_MASK, PageType
from tdxmig_model.backend.soft.workers import Column, PageColumns, Workers
from tdxmig_model.errors import BackendError
from tdxmig_model.wire.constants import MAC_SIZE, PAGE_SIZE

SMALLEST_BATCH = 64
"""Pages for which asking workers is worth the way there and back."""


def workers_for(call: Call, entries: int) -> Workers | None:
    """The workers for a list of so many entries, if there are any and nothing can come between."""
    if call.interleaved or call.interrupt is not None or entries < SMALLEST_BATCH:
        return None
    return call.module.workers


def _column(values: list[int]) -> Column:
    return np.array(values, dtype=np.uint64)


@dataclass(slots=True)
class Sealing:
    """Pages of one EXPORT.MEM that are still to be encrypted.

    `reserved` are HPAs of the pages in which its lists are.
    """

    call: Call
    cipher: StreamCipher
    workers: Workers
    reserved: frozenset[int]
    failure: BackendError | None = None
    _rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    _mac_places: list[int] = field(default_factory=list)
    _targets: set[int] = field(default_factory=set)

    def add(self, page: int, target: int, counter: int, entry: int, mac_at: int) -> bool:
        """Encrypt it later; False if that could be told from encrypting it now."""
        if target in self._targets or target in self.reserved:
            self.finish()
            return False
        self._rows.append((page, target, counter, entry))
        self._mac_places.append(mac_at)
        self._targets.add(target)
        self.cipher.observe(counter)
        return True

    def finish(self) -> None:
        """Encrypt what there is, and write the tags."""
        rows, places = self._rows, self._mac_places
        self._rows, self._mac_places, self._targets = [], [], set()
        if not rows:
            return
        columns = [_column(list(values)) for values in zip(*rows, strict=True)]
        pages = PageColumns(self.cipher.key, self.cipher.suffix, *columns)
        memory = self.call.memory
        try:
            tags = self.workers.seal(pages)
        except BackendError as lost:
            self.failure = lost
            tags = b"".join(self._seal_here(*row) for row in rows)
        for number, place in enumerate(places):
            tag = tags[MAC_SIZE * number : MAC_SIZE * (number + 1)]
            memory.bytes[place : place + MAC_SIZE] = tag

    def _seal_here(self, page: int, target: int, counter: int, entry: int) -> bytes:
        """The same page under the same IV: a worker may have done it before it was lost."""
        memory = self.call.memory
        sealed = self.cipher.seal_again(counter, entry.to_bytes(8, "little"), memory.page(page))
        memory.page(target)[:] = sealed[:PAGE_SIZE]
        return bytes(sealed[PAGE_SIZE:])


@dataclass(frozen=True, slots=True)
class NewPage:
    """A MIGRATE entry with content: its place in the list, IV counter, and where the page goes."""

    index: int
    counter: int
    entry: int
    source: int
    target: int
    mac: bytes


@dataclass(slots=True)
class Opening:
    """New pages of one IMPORT.MEM that were decrypted at its beginning."""

    call: Call
    opened: dict[int, tuple[NewPage, bool]] = field(default_factory=dict)
    failure: BackendError | None = None

    def start(
        self, cipher: StreamCipher, workers: Workers, pages: list[NewPage], reserved: set[int]
    ) -> None:
        """Decrypt them all, unless the VMM uses a page for two purposes."""
        sources, targets = {page.source for page in pages}, {page.target for page in pages}
        if len(pages) < SMALLEST_BATCH or len(targets) < len(pages):
            return
        if targets & (sources | reserved) or not all(self._free(hpa) for hpa in targets):
            return
        rows = [(page.source, page.target, page.counter, page.entry) for page in pages]
        columns = [_column(list(values)) for values in zip(*rows, strict=True)]
        try:
            good = workers.open(
                PageColumns(cipher.key, cipher.suffix, *columns),
                b"".join(page.mac for page in pages),
            )
        except BackendError as lost:
            self.failure = lost
            self._clear(targets)
            return
        for page, right in zip(pages, good.tolist(), strict=True):
            self.opened[page.index] = (page, right)

    def _free(self, hpa: int) -> bool:
        memory = self.call.memory
        if hpa & PAGE_MASK or not memory.has_pamt(hpa) or memory.is_locked(hpa):
            return False
        return memory.page_type[hpa >> 12] == PageType.NDA

    def take(self, page: NewPage) -> bool | None:
        """Was its tag right?  None if it was not decrypted, or something of it is different now."""
        found = self.opened.get(page.index)
        if found is None or found[0] != page:
            return None
        return found[1]

    def finish(self) -> None:
        """Clear pages that were decrypted and then not taken: nobody may read them."""
        self._clear({page.target for page, _ in self.opened.values()})

    def _clear(self, targets: set[int]) -> None:
        memory = self.call.memory
        for hpa in targets:
            if memory.page_type[hpa >> 12] == PageType.NDA:
                memory.zero_page(hpa)
