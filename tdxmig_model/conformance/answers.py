"""What a module answers to one row of the model, and what is kept of a bundle that it made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tdxmig_model.backend.soft.status import FATAL_BIT, LOW_32, Status, is_error, status_name
from tdxmig_model.wire.gpa_list import GpaStatus

INTERRUPTED = int(Status.TDX_INTERRUPTED_RESUMABLE)


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether the call did what the row says, its completion status, and that of its list entry."""

    accepted: bool
    status: int = 0
    entry: GpaStatus = GpaStatus.SUCCESS
    violation: bool = False

    @property
    def word(self) -> str:
        """The class of the status: its name without prefix, operand and FATAL bit.

        The status of the list entry if that is what failed.
        """
        if self.violation:
            return "EPT_VIOLATION"
        if self.entry and (self.status == INTERRUPTED or not is_error(self.status)):
            return self.entry.name
        return status_name(self.status & ~LOW_32 & ~FATAL_BIT).removeprefix("TDX_")

    @property
    def fatal(self) -> bool:
        """Whether the FATAL bit is set."""
        return bool(self.status & FATAL_BIT)

    def __str__(self) -> str:
        return f"{self.word}{' (fatal)' if self.fatal else ''}"


def of_call(status: int) -> Answer:
    """The answer of a call that is one row: any success is acceptance."""
    return Answer(not is_error(status), status)


def of_entry(status: int, entry: GpaStatus) -> Answer:
    """The answer of a call that does one list entry and stops."""
    went_on = status == INTERRUPTED or not is_error(status)
    return Answer(went_on and not entry, status, entry)


@dataclass(slots=True)
class Sent:
    """A bundle as the adversary has it: all that the module has written of it so far."""

    mbmd: bytes = b""
    pages: dict[int, bytes] = field(default_factory=dict)
    entries: dict[int, int] = field(default_factory=dict)
    macs: dict[int, bytes] = field(default_factory=dict)

    def copy(self) -> Sent:
        """The same, independent of what comes later."""
        return Sent(self.mbmd, dict(self.pages), dict(self.entries), dict(self.macs))

    def save(self) -> Callable[[], None]:
        """What puts this bundle back to what it is now."""
        now = self.copy()

        def restore() -> None:
            again = now.copy()
            self.pages, self.entries, self.macs = again.pages, again.entries, again.macs

        return restore


@dataclass(slots=True)
class Unfinished:
    """A memory call that was stopped: its next list entry, RCX for RESUME, and its bundle."""

    slot: int
    rcx: int
    sent: Sent

    def copy(self) -> Unfinished:
        """The same, independent of what comes later; the bundle stays shared."""
        return Unfinished(self.slot, self.rcx, self.sent)
