"""Worker processes for one piece of work, which never outlive it.

An interrupt of the terminal reaches every process of the group.  Here only the process that began
the work takes it, and ends its workers at once; a worker would print a traceback, or go on until
its query is done.  Workers also end with their parent when that is killed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Final

from tdxmig_model.errors import UsageError

_PR_SET_PDEATHSIG: Final = 1
"""prctl(2): the signal that the kernel sends to this process when its parent ends."""


@contextmanager
def pool(
    jobs: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """`jobs` worker processes, each begun with `initializer(*initargs)`; none is left afterwards.

    If the block raises, by an interrupt for instance, what the workers are at is given up.
    UsageError: this host killed a worker.
    """
    older = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(
        jobs, initializer=_begin, initargs=(os.getpid(), initializer, initargs)
    )
    try:
        yield executor
    except BrokenProcessPool as error:
        raise UsageError(
            "a worker process was killed, most likely because memory ran out; use fewer --jobs"
        ) from error
    except BaseException:
        for worker in multiprocessing.active_children():
            if worker not in older:
                worker.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(parent: int, initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    # Blocked and not merely ignored: z3 sets a handler of its own while it decides.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    _end_with_parent(parent)
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends; elsewhere than on Linux, nothing.

    `parent` tells whether that has happened already.
    """
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError, TypeError):
        return
    if os.getppid() != parent:
        os._exit(1)
