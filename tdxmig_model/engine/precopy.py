"""Which pages are left to send: the pre-copy of RAM as plain data.

The first epoch has every private page.  A page that the guest writes after it was exported, and one
that could not be exported, belongs to the next epoch, because a page is exported at most once in an
epoch (the destination refuses a second import in one MIG_EPOCH, TDX module 1.5.01, TDH.IMPORT.MEM).
The caller says which pages were sent and which were written, and how long an epoch took; nothing
here looks at a clock.  After the start token the pages that are left are sent in any order, and
those that the destination asks for first.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tdxmig_model.engine.commands import Gpas
from tdxmig_model.engine.pages import PageSet, page_column
from tdxmig_model.errors import UsageError
from tdxmig_model.wire.constants import MAX_ENTRIES


class WhenNotConverging(StrEnum):
    """What to do when the epochs are used up and too many pages are left."""

    PAUSE = "pause"
    """Pause the TD anyway and send what is left: the downtime is as long as that takes."""
    ABORT = "abort"
    """Give the migration up; the TD goes on at the source."""
    POST_COPY = "post-copy"
    """Pause the TD, hand it over, and send what is left while it runs at the destination."""


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
    of ``remaining`` pages at which it is paused.  With a ``downtime`` (seconds) it is also paused
    when what is left can be sent in that time, at the speed of the last epoch."""

    batch: int = MAX_ENTRIES
    epochs: int = 30
    remaining: int = 64
    downtime: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= MAX_ENTRIES:
            raise UsageError(f"a batch has 1 to {MAX_ENTRIES} pages, not {self.batch}")
        if self.epochs < 1 or self.remaining < 0:
            raise UsageError(
                f"pre-copy needs at least one epoch and no negative threshold, "
                f"not {self.epochs} epochs and {self.remaining} pages"
            )
        if self.downtime is not None and not self.downtime > 0:
            raise UsageError(
                f"a downtime limit is a positive number of seconds, not {self.downtime}"
            )


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one epoch came to: pages ``sent`` and pages ``left`` for the next one, which the guest
    wrote meanwhile or which could not be exported; ``live`` while the guest ran."""

    epoch: int
    live: bool
    sent: int
    left: int
    bytes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float | None:
        """None if the epoch took no time."""
        return self.bytes / self.seconds if self.seconds > 0 else None

    @property
    def expected_downtime(self) -> float | None:
        """Seconds to send what is left at the speed of this epoch; None if it sent nothing."""
        return self.left * self.seconds / self.sent if self.sent else None


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
        self._urgent = PageSet()
        self.iterations: list[Iteration] = []
        self.total = len(self._later)

    @property
    def remaining(self) -> int:
        """Pages that this epoch still has to send."""
        return len(self._current) + len(self._urgent)

    @property
    def later(self) -> int:
        """Pages that wait for the next epoch."""
        return len(self._later)

    @property
    def done(self) -> bool:
        """True when the newest content of every page was exported."""
        return not self.remaining and not self._later

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

    def end_epoch(self, seconds: float, sent_bytes: int, *, live: bool) -> Iteration:
        """Note how long the epoch took and how much it sent, now that it has no page left."""
        sent = self._sent_in_epoch
        done = Iteration(self.epoch, live, sent, self.later, sent_bytes, seconds)
        self.iterations.append(done)
        return done

    def next_batch(self) -> Gpas | None:
        """The next pages of this epoch, or None when it has no more.

        Lowest first, and before those the ones that were asked for.
        """
        batch = (self._urgent or self._current).take(self.limits.batch)
        return batch if batch.size else None

    def hand_over(self) -> None:
        """The start token was sent: the pages that are left belong to no epoch any more."""
        self._current.update(self._later)
        self._later.clear()

    def requested(self, gpas: Gpas) -> int:
        """The destination asks for pages; those that are still to be sent go first.

        Returns how many: others are on their way or are none of this TD.
        """
        wanted = self._current.take_these(gpas)
        self._urgent.add(wanted)
        return wanted.size

    def withdraw(self, gpas: Gpas) -> Gpas:
        """Pages that wait for the next epoch and are sent at once instead; tell `sent` of them."""
        return self._later.take_these(gpas)

    def waiting(self) -> Gpas:
        """Pages that wait for the next epoch, ascending, shape (n,)."""
        return self._later.gpas()

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
        if self.later <= self.limits.remaining or self._fits_downtime():
            return Decision.CONVERGED
        if self.epoch >= self.limits.epochs:
            return Decision.EPOCH_LIMIT
        return Decision.NEXT_EPOCH

    def _fits_downtime(self) -> bool:
        if self.limits.downtime is None or not self.iterations:
            return False
        expected = self.iterations[-1].expected_downtime
        return expected is not None and expected <= self.limits.downtime
