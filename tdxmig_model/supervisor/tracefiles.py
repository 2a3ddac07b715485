"""The trace files of a run: its own and nobody else's."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tdxmig_model.errors import UsageError
from tdxmig_model.supervisor.options import SIDES, trace_path


@contextmanager
def reserved(directory: Path) -> Iterator[None]:
    """Keep other runs out of the directory, and remove the traces of earlier ones from it.

    A trace that is found after the run is then of this run.  UsageError: another run uses the
    directory, or something that is no trace has the name of one.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another run writes its traces to {directory}; choose another directory"
            ) from error
        for side in SIDES:
            _remove(trace_path(directory, side))
        yield
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove the trace of an earlier run.  A link stays, and what it leads to is emptied."""
    try:
        if not path.exists():
            return
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path} is no regular file, so no trace; remove it")
        if path.is_symlink():
            os.truncate(path, 0)
        else:
            path.unlink()
    except OSError as error:
        raise UsageError(f"cannot remove the old trace {path}: {error.strerror}") from error


def written_traces(directory: Path) -> dict[str, Path]:
    """The traces that there are, by side; one that is empty says nothing and is not there."""
    paths = {side: trace_path(directory, side) for side in SIDES}
    return {side: path for side, path in paths.items() if path.is_file() and path.stat().st_size}
