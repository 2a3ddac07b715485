"""The supervisor's side of a run: start two processes, relay, watch, reap, and judge."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Final

from tdxmig_model.certificates import write_certificates
from tdxmig_model.errors import UsageError
from tdxmig_model.premigration import make_identity
from tdxmig_model.session import Progress
from tdxmig_model.supervisor.child import (
    TLS_DIRECTORY,
    Addresses,
    Built,
    Failure,
    PeerEnded,
    Place,
    Program,
    SideReport,
    Stop,
    child_main,
)
from tdxmig_model.supervisor.options import SIDES, RunOptions
from tdxmig_model.supervisor.programs import run_destination, run_source
from tdxmig_model.supervisor.signals import StopSignals, held_back

PROGRAMS: Final[dict[str, Program]] = {
    "source": run_source,
    "destination": run_destination,
}
LONGEST_NAME: Final = "premigration.sock"
"""The longest name that a side gives a socket in the directory of a run."""
UNIX_PATH_BYTES: Final = 107
"""What a sockaddr_un holds on Linux, less the zero at its end (unix(7))."""
GRACE_SECONDS: Final = 4.0
"""How long the process of a side may take to end once its link is closed."""


@dataclass(slots=True)
class Child:
    """One side's process and what is known of it."""

    side: str
    process: BaseProcess
    connection: Connection
    report: SideReport | None = None
    failure: Failure | None = None
    open: bool = True
    killed: str = ""
    """Why the supervisor killed the process."""

    @property
    def gone(self) -> str:
        """How a child that left no report ended."""
        if self.failure is not None:
            return self.failure.text
        if self.killed:
            return f"{self.killed}, and the supervisor killed its process"
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return f"its process ended without a report (exit code {code})"


@dataclass(slots=True)
class Watch:
    """What the supervisor needs while the children run."""

    options: RunOptions
    on_progress: Callable[[Progress], None]
    signals: StopSignals
    children: dict[str, Child] = field(default_factory=dict)
    too_late: str = ""
    """That the deadline passed; empty before."""
    stop_told: bool = False
    deadline: float = 0.0

    @property
    def stop_reason(self) -> str:
        """Why both sides are to stop; empty if they are not."""
        return self.signals.reason or self.too_late


def run_children(
    options: RunOptions,
    work: Path,
    traces: Path,
    on_progress: Callable[[Progress], None],
    signals: StopSignals,
) -> Watch:
    """Run both sides to their ends.  Every child is reaped when this returns or raises."""
    watch = Watch(options, on_progress, signals, deadline=monotonic() + options.seconds)
    context = multiprocessing.get_context("spawn")
    places = _places(work, traces)
    if options.transport == "tls":
        write_certificates(work / TLS_DIRECTORY)
    try:
        for side in SIDES:
            watch.children[side] = _start(context, side, options, places[side])
        while any(child.open for child in watch.children.values()):
            _turn(watch)
    finally:
        for child in watch.children.values():
            _reap(child)
    return watch


def _places(work: Path, traces: Path) -> dict[str, Place]:
    """New identities for this run; each side is given the certificate of the other."""
    identities = {side: make_identity(f"tdxmig {side}") for side in SIDES}
    source, destination = SIDES
    peers = {source: identities[destination], destination: identities[source]}
    return {side: Place(work, traces, identities[side], peers[side].certificate) for side in SIDES}


def _start(
    context: multiprocessing.context.SpawnContext, side: str, options: RunOptions, place: Place
) -> Child:
    ours, theirs = context.Pipe()
    process = context.Process(
        target=child_main,
        args=(PROGRAMS[side], theirs, options, place),
        name=f"tdxmig-{side}",
        daemon=not options.workers,  # a daemon may have no processes of its own
    )
    # A process inherits what is blocked: a signal while it still imports must not kill it.  The
    # tracker is started in a block of its own, because starting it unblocks some signals again.
    with held_back():
        resource_tracker.ensure_running()
    with held_back():
        process.start()
    theirs.close()
    return Child(side, process, ours)


def _turn(watch: Watch) -> None:
    """Wait for a message, the end of a child, a stop or the deadline, and act on it."""
    if watch.stop_reason and not watch.stop_told:
        watch.stop_told = True
        _tell(watch, Stop(watch.stop_reason))
    if watch.signals.count > 1:
        _kill(watch, "a second signal asked for the end at once")
    if monotonic() >= watch.deadline:
        _on_deadline(watch)
    open_children = {child.connection: child for child in watch.children.values() if child.open}
    for ready in wait(list(open_children), timeout=0.1):
        assert isinstance(ready, Connection)
        _on_message(watch, open_children[ready])


def _on_deadline(watch: Watch) -> None:
    """First ask both sides to stop; a side that is still there after that is killed."""
    alone = any(not child.open for child in watch.children.values())
    if watch.stop_told or alone:
        _kill(watch, "it hung")
        watch.deadline = monotonic() + GRACE_SECONDS
        return
    watch.too_late = f"the run took longer than {watch.options.seconds:g} s"
    watch.deadline = monotonic() + watch.options.patience


def _kill(watch: Watch, why: str) -> None:
    for child in watch.children.values():
        if child.open and not child.killed:
            child.killed = why
            child.process.kill()


def _on_message(watch: Watch, child: Child) -> None:
    try:
        item = child.connection.recv()
    except (EOFError, OSError):
        child.open = False
        child.process.join(GRACE_SECONDS)
        _on_end(watch, child)
        return
    match item:
        case Progress():
            watch.on_progress(item)
        case SideReport():
            child.report = item
            if not (item.whole and item.session):  # told ahead
                _tell_peer(watch, child, PeerEnded(item.outcome.abort_token))
        case Built():
            _tell_peer(watch, child, item)
        case Failure():
            child.failure = item
        case Addresses():
            _tell(watch, item, only="source")


def _on_end(watch: Watch, child: Child) -> None:
    """One side is gone: the other notices by itself, unless it has no connection yet or hangs."""
    watch.deadline = min(watch.deadline, monotonic() + watch.options.patience)
    if child.report is None or not child.report.whole:
        _tell_peer(watch, child, PeerEnded(None))
        _tell(watch, Stop(f"the {child.side} is gone: {child.gone}"))


def _tell_peer(watch: Watch, child: Child, item: object) -> None:
    """Tell the other side: the connection between the two may be gone."""
    for side in watch.children:
        if side != child.side:
            _tell(watch, item, only=side)


def _tell(watch: Watch, item: object, only: str = "") -> None:
    for child in watch.children.values():
        if child.open and only in ("", child.side):
            try:
                child.connection.send(item)
            except OSError:
                continue  # it is gone; its end is noticed by the read


def _reap(child: Child) -> None:
    child.connection.close()
    child.process.join(0 if child.open else GRACE_SECONDS)
    if child.process.is_alive():
        child.process.kill()
        child.process.join()


def _private_directory() -> Path:
    """A new directory that only this user can enter, with a path short enough for its sockets."""
    usual = tempfile.gettempdir()
    for parent in (usual, "/tmp", "/var/tmp", "/dev/shm"):
        try:
            made = Path(tempfile.mkdtemp(prefix="tdxmig-", dir=parent))
        except OSError as error:
            if parent == usual:
                raise UsageError(f"cannot make a temporary directory: {error.strerror}") from error
            continue
        if len(os.fsencode(made / LONGEST_NAME)) <= UNIX_PATH_BYTES:
            return made
        made.rmdir()
    raise UsageError(
        f"the path of {usual} is too long for a Unix socket: "
        "set TMPDIR to a shorter one, or use --transport tcp"
    )


@contextmanager
def work_directory(options: RunOptions) -> Iterator[tuple[Path, Path]]:
    """A private directory for sockets and keys, and the one for traces; the first is removed."""
    work = _private_directory()
    try:
        traces = options.trace_dir or work
        _make_folder(traces, "traces")
        if options.capture is not None:
            _make_folder(options.capture, "the capture")
        yield work, traces
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make_folder(folder: Path, purpose: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot use {folder} for {purpose}: {error.strerror}") from error
