"""A set of guest pages as bitmap columns: a byte per page, in chunks that exist on demand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.engine.commands import Gpas
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import ADDRESS_BITS, PAGE_SIZE

_PAGE_BITS: Final = 12
_CHUNK_BITS: Final = 15
_CHUNK: Final = 1 << _CHUNK_BITS
_UNUSABLE: Final = np.uint64((PAGE_SIZE - 1) | ((1 << 64) - (1 << ADDRESS_BITS)))

NO_PAGES: Final[Gpas] = np.empty(0, dtype=np.uint64)
NO_PAGES.setflags(write=False)


def page_column(gpas: Gpas | int) -> Gpas:
    """One GPA or a column of them as a column.  UsageError unless each is the GPA of a page."""
    column = np.atleast_1d(np.asarray(gpas, dtype=np.uint64))
    wrong = column[(column & _UNUSABLE) != 0]
    if column.ndim != 1 or wrong.size:
        shown = hex(int(wrong[0])) if wrong.size else f"an array of shape {column.shape}"
        raise UsageError(f"{shown} is not a 4 KiB-aligned GPA below 2**{ADDRESS_BITS}")
    return column


class PageSet:
    """A set of GPAs, ascending when taken.  Adding or removing n pages costs NumPy time."""

    __slots__ = ("_chunks", "_count", "_cursor")

    def __init__(self, gpas: Gpas | int = NO_PAGES) -> None:
        self._chunks: dict[int, NDArray[np.bool_]] = {}
        self._count = 0
        self._cursor = 0
        self.add(gpas)

    def __len__(self) -> int:
        return self._count

    def __contains__(self, gpa: int) -> bool:
        return bool(self.contains(gpa)[0])

    def contains(self, gpas: Gpas | int) -> NDArray[np.bool_]:
        """Which of the pages are in the set, shape (n,)."""
        column = page_column(gpas)
        found = np.zeros(column.size, dtype=np.bool_)
        for chunk, where, pages in self._split(column, create=False):
            found[where] = chunk[pages]
        return found

    def add(self, gpas: Gpas | int) -> None:
        """Put pages in; those that are in already, or twice in the column, count once."""
        for chunk, _, pages in self._split(page_column(gpas), create=True):
            before = int(np.count_nonzero(chunk))
            chunk[pages] = True
            self._count += int(np.count_nonzero(chunk)) - before
        self._cursor = 0

    def discard(self, gpas: Gpas | int) -> None:
        """Take pages out; those that are not in do not matter."""
        for chunk, _, pages in self._split(page_column(gpas), create=False):
            before = int(np.count_nonzero(chunk))
            chunk[pages] = False
            self._count -= before - int(np.count_nonzero(chunk))

    def update(self, other: PageSet) -> None:
        """Put every page of ``other`` in."""
        for number, theirs in other._chunks.items():
            mine = self._chunks.setdefault(number, np.zeros(_CHUNK, dtype=np.bool_))
            self._count += int(np.count_nonzero(theirs & ~mine))
            mine |= theirs
        self._cursor = 0

    def clear(self) -> None:
        """Take every page out."""
        self._chunks.clear()
        self._count = self._cursor = 0

    def take(self, most: int) -> Gpas:
        """Take out and return the ``most`` lowest pages, or as many as there are; shape (n,)."""
        parts: list[Gpas] = []
        wanted = most
        for number in sorted(number for number in self._chunks if number >= self._cursor):
            if wanted <= 0:
                break
            chunk = self._chunks[number]
            pages = np.flatnonzero(chunk)[:wanted]
            if pages.size < wanted:
                del self._chunks[number]
            else:
                chunk[pages] = False
                self._cursor = number
            wanted -= pages.size
            parts.append((pages.astype(np.uint64) + np.uint64(number << _CHUNK_BITS)) << _SHIFT)
        self._count -= most - wanted
        return np.concatenate(parts) if parts else NO_PAGES

    def take_these(self, gpas: Gpas) -> Gpas:
        """Take out and return those of the pages that are in, each once, ascending."""
        column = np.unique(page_column(gpas))
        found = column[self.contains(column)]
        self.discard(found)
        return found

    def gpas(self) -> Gpas:
        """Every page in ascending order, shape (n,)."""
        parts = [
            (np.flatnonzero(chunk).astype(np.uint64) + np.uint64(number << _CHUNK_BITS)) << _SHIFT
            for number, chunk in sorted(self._chunks.items())
        ]
        return np.concatenate(parts) if parts else NO_PAGES

    def _split(
        self, column: Gpas, *, create: bool
    ) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.intp] | slice, NDArray[np.intp]]]:
        """The chunks that the pages are in: chunk, which of the column, which of the chunk."""
        if not column.size:
            return
        numbers = (column >> np.uint64(_PAGE_BITS + _CHUNK_BITS)).astype(np.intp)
        pages = (column >> _SHIFT & np.uint64(_CHUNK - 1)).astype(np.intp)
        first = int(numbers[0])
        alone = bool((numbers == first).all())
        for number in [first] if alone else np.unique(numbers).tolist():
            if create and number not in self._chunks:
                self._chunks[number] = np.zeros(_CHUNK, dtype=np.bool_)
            chunk = self._chunks.get(number)
            if chunk is not None:
                where = slice(None) if alone else np.flatnonzero(numbers == number)
                yield chunk, where, pages[where]


_SHIFT: Final = np.uint64(_PAGE_BITS)
