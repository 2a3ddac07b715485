"""Which pages are left to send: the pre-copy of RAM as plain data.

The first epoch has every private page.  A page that the guest writes after it was exported, and one
that could not be exported, belongs to the next epoch, because a page is exported at most once in an
epoch (the destination refuses a second import in one MIG_EPOCH, TDX module 1.5.01, TDH.IMPORT.MEM).
The caller says which pages were sent and which were written; nothing here looks at a clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tdxmig_model.engine.commands import Gpas
from tdxmig_model.engine.pages import PageSet, page_column
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import MAX_ENTRIES


class Decision(StrEnum):
    """What to do when an epoch has no page left."""

    NEXT_EPOCH = "next epoch"
    """Too much was written meanwhile: another epoch with the guest running."""
    CONVERGED = "converged"
    """Few enough pages are left: pause the TD and send them."""
    EPOCH_LIMIT = "epoch limit"
    """The guest writes faster than pages are sent, and the epochs are used up: pause anyway."""


@dataclass(frozen=True, slots=True)
class PreCopyLimits:
    """``batch`` pages at most per bundle, ``epochs`` at most while the guest runs, and the number
    of ``remaining`` pages at which it is paused."""

    batch: int = MAX_ENTRIES
    epochs: int = 30
    remaining: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= MAX_ENTRIES:
            raise UsageError(f"a batch has 1 to {MAX_ENTRIES} pages, not {self.batch}")
        if self.epochs < 1 or self.remaining < 0:
            raise UsageError(
                f"pre-copy needs at least one epoch and no negative threshold, "
                f"not {self.epochs} epochs and {self.remaining} pages"
            )


class PreCopy:
    """The pages of one migration session.

    In an epoch, call `next_batch` until it is None and tell `sent` what became of each; tell
    `dirty` about every write.  Then `decide`, and `next_epoch` in any case: with the guest running,
    or paused for the last pages.
    """

    def __init__(self, gpas: Gpas, limits: PreCopyLimits | None = None) -> None:
        self.limits = limits or PreCopyLimits()
        self.epoch = 0
        self.exports = 0
        self._current = PageSet()
        self._later = PageSet(gpas)
        self._sent_in_epoch = 0
        self.total = len(self._later)

    @property
    def remaining(self) -> int:
        """Pages that this epoch still has to send."""
        return len(self._current)

    @property
    def later(self) -> int:
        """Pages that wait for the next epoch."""
        return len(self._later)

    @property
    def done(self) -> bool:
        """True when the newest content of every page was exported."""
        return not self._current and not self._later

    @property
    def stalled(self) -> bool:
        """True when this epoch has ended with pages to send and without sending any."""
        return bool(self.epoch and self._later and not self._current and not self._sent_in_epoch)

    def next_epoch(self) -> int:
        """Begin an epoch with the pages that wait for one; returns its number, from 1."""
        self._current.update(self._later)
        self._later.clear()
        self._sent_in_epoch = 0
        self.epoch += 1
        return self.epoch

    def next_batch(self) -> Gpas | None:
        """The next pages of this epoch, lowest first, or None when it has no more."""
        batch = self._current.take(self.limits.batch)
        return batch if batch.size else None

    def sent(self, batch: Gpas, unsent: Gpas) -> None:
        """A batch was exported, except the pages ``unsent``: they stay to be sent."""
        self.exports += batch.size - unsent.size
        self._sent_in_epoch += batch.size - unsent.size
        self._later.add(unsent)

    def dirty(self, gpas: Gpas | int) -> None:
        """The guest may have written these pages since they were exported.

        A page that this epoch still has to send is sent with what it holds then.
        """
        column = page_column(gpas)
        self._later.add(column[~self._current.contains(column)])

    def decide(self) -> Decision:
        """What to do now that this epoch has no page left."""
        if self.later <= self.limits.remaining:
            return Decision.CONVERGED
        if self.epoch >= self.limits.epochs:
            return Decision.EPOCH_LIMIT
        return Decision.NEXT_EPOCH
