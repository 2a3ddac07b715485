"""Shared and exclusive locks that never wait: a conflict is reported to the caller as BUSY.

The TDX module takes its locks without spinning for host-side leaves; a conflict ends the call with
TDX_OPERAND_BUSY and the id of the contended operand (TDX module 1.5.01).
"""

from __future__ import annotations

from enum import Enum


class Mode(Enum):
    """How a lock is held."""

    SHARED = "shared"
    EXCLUSIVE = "exclusive"


class Lock:
    """One lock: any number of shared holders, or one exclusive holder."""

    __slots__ = ("exclusive", "shared")

    def __init__(self) -> None:
        self.shared = 0
        self.exclusive = False

    def acquire(self, mode: Mode) -> bool:
        """Take the lock if that is possible now."""
        if self.exclusive or (mode is Mode.EXCLUSIVE and self.shared):
            return False
        if mode is Mode.EXCLUSIVE:
            self.exclusive = True
        else:
            self.shared += 1
        return True

    def release(self, mode: Mode) -> None:
        """Give back one hold of this mode."""
        if mode is Mode.EXCLUSIVE:
            self.exclusive = False
        else:
            self.shared -= 1

    @property
    def free(self) -> bool:
        """True if nobody holds it."""
        return not self.exclusive and not self.shared
