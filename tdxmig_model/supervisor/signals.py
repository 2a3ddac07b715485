"""The signals that ask a run to stop: taken by the supervisor, never by the processes of a side.

A terminal and a service manager send them to the whole process group.  What they mean is decided in
one place: the first asks both sides to give up in order, a second kills their processes, and in
every case the outcome is still told.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, TypeVar

T = TypeVar("T")

STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Abandoned(BaseException):
    """Raised by the handler inside `StopSignals.unless_stopped`, and never seen outside."""


class StopSignals:
    """While it is entered, counts the signals that ask to stop instead of dying of them.

    A signal that was ignored before stays ignored (nohup), and in a thread other than the main one
    none is taken, because Python allows handlers nowhere else.
    """

    def __init__(self) -> None:
        self.count = 0
        self.reason = ""
        """Why to stop, in words; empty as long as nobody asked."""
        self._abandon = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.reason = self.reason or f"interrupted ({signal.Signals(number).name})"
        if self._abandon:
            self._abandon = False
            raise _Abandoned

    def unless_stopped(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None, without or in the middle of it, if somebody asks to stop.

        `work` must only read and compute: it is left wherever it is.
        """
        try:
            self._abandon = True
            try:
                return None if self.count else work()
            finally:
                self._abandon = False
        except _Abandoned:
            return None


@contextmanager
def held_back() -> Iterator[None]:
    """Signals that ask to stop arrive only after this; a process started here never sees them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """For the process of a side: its supervisor alone decides what these signals mean."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    # Not left blocked as inherited: processes that a side starts would inherit it in turn.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
