"""One side of a supervised run in its own process: its link to the supervisor, and its program.

A child ignores the signals that ask to stop: they reach every process of the group, and only the
supervisor may decide what they mean.  It relays a stop over the link.  A supervisor that goes away
is a stop too.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Final, TypeAlias

from tdxmig_model.errors import PeerLost, TdxmigError, UsageError
from tdxmig_model.premigration import Identity
from tdxmig_model.session import Hooks, Progress, SideOutcome
from tdxmig_model.supervisor import signals
from tdxmig_model.supervisor.options import At, RunOptions
from tdxmig_model.transport import TlsFiles

PROGRESS_SECONDS: Final = 0.1

TLS_DIRECTORY: Final = "tls"
TLS_NAME: Final = "localhost"
"""The name of a destination on this host in its certificate."""

PlainAddress: TypeAlias = str | tuple[str, int]
"""A Unix path or host and port, as the standard library's sockets have it."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the destination listens: for the migration stream and for premigration."""

    migration: str
    premigration: PlainAddress


@dataclass(frozen=True, slots=True)
class Place:
    """What a child is given beside its options: directories, and who it is for premigration."""

    work: Path
    traces: Path
    identity: Identity
    peer_certificate: bytes

    def tls(self, endpoint: str) -> TlsFiles:
        """The certificates of this run for TLS on the stream."""
        return TlsFiles.in_directory(self.work / TLS_DIRECTORY, endpoint)


@dataclass(frozen=True, slots=True)
class Stop:
    """The supervisor asks this side to stop; `reason` is for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Built:
    """The source's TD is there: from now on it can connect at once."""


@dataclass(frozen=True, slots=True)
class PeerEnded:
    """The other side's session is over: nothing more comes from it than this, if it made one."""

    abort_token: bytes | None


@dataclass(frozen=True, slots=True)
class Failure:
    """A side could not even run its session.  `usage`: the environment is to blame."""

    text: str
    usage: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """Something that must be refused, tried: what the enforcer and what the module answered."""

    step: str
    refused_by_enforcer: bool
    status_name: str
    refused_by_module: bool


def all_refused(probes: Sequence[Probe]) -> bool:
    """Whether something was tried, and the enforcer and the module refused all of it."""
    return bool(probes) and all(p.refused_by_enforcer and p.refused_by_module for p in probes)


@dataclass(slots=True)
class SideReport:
    """What a side tells the supervisor at its end, beside the outcome of its session."""

    outcome: SideOutcome
    memory_digest: str = ""
    vcpu_digests: tuple[str, ...] = ()
    steps_checked: int = 0
    probes: tuple[Probe, ...] = ()
    guest_instructions: int = 0
    session: str = ""
    """Session id in hexadecimal; empty if no session began."""
    whole: bool = True
    """False: sent ahead, as soon as the session was over; a whole one follows."""
    trace_failure: str | None = None
    """Why the trace of this side is incomplete."""
    ended_at: float | None = None
    """When its session was over, in seconds of its clock."""

    @property
    def seconds(self) -> float | None:
        """How long its session took."""
        began = self.outcome.started_at
        return None if began is None or self.ended_at is None else self.ended_at - began


class Link:
    """The child's end of its link to the supervisor."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.stop_reason: str | None = None
        self.peer_ended = False
        self.peer_built = False
        self.session_began = False
        self._abort_token: bytes | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                item = self._connection.recv()
            except (EOFError, OSError, TypeError):
                # multiprocessing reads from a connection that another thread has just closed as
                # if its descriptor were None: that is a TypeError.
                self.stop_reason = self.stop_reason or "the supervisor went away"
                self.peer_ended = True
                self._inbox.put(None)
                return
            if isinstance(item, Built):
                self.peer_built = True
            if isinstance(item, PeerEnded):
                self._abort_token = item.abort_token or self._abort_token
                self.peer_ended = True
            if isinstance(item, Stop):
                self.stop_reason = self.stop_reason or item.reason
            self._inbox.put(item)

    def tell(self, item: object) -> None:
        """Send something to the supervisor.  One that is gone is not told."""
        with self._sending:
            try:
                self._connection.send(item)
            except (BrokenPipeError, OSError):
                self.stop_reason = self.stop_reason or "the supervisor went away"

    def take_abort_token(self) -> bytes | None:
        """The abort token that the supervisor relayed; once."""
        token, self._abort_token = self._abort_token, None
        return token

    def addresses(self, timeout: float) -> Addresses:
        """Wait for the addresses of the destination.  PeerLost if they do not come."""
        end = monotonic() + timeout
        while True:
            try:
                item = self._inbox.get(timeout=max(0.0, end - monotonic()))
            except queue.Empty:
                raise PeerLost("the destination did not begin to listen in time") from None
            if isinstance(item, Addresses):
                return item
            if self.stop_reason is not None:
                raise PeerLost(self.stop_reason)


class ChildHooks(Hooks):
    """Stops and faults at events, and progress over the link."""

    def __init__(
        self,
        side: str,
        link: Link,
        options: RunOptions,
        exported: Callable[[], None] = lambda: None,
    ) -> None:
        self._side = side
        self._link = link
        self._options = options
        self._exported = exported
        self._told_at = 0.0
        self._told_phase = ""

    def stop_requested(self, event: str | None) -> str | None:
        if event is not None:
            here = At(self._side, event)
            if here == self._options.injected.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if here == self._options.injected.hang:
                os.kill(os.getpid(), signal.SIGSTOP)
            if here == self._options.stop_at:
                return f"a stop was requested before {here}"
        return self._link.stop_reason

    def progress(self, progress: Progress) -> None:
        now = monotonic()
        if progress.phase != self._told_phase or now - self._told_at >= PROGRESS_SECONDS:
            self._told_phase, self._told_at = progress.phase, now
            self._link.tell(progress)

    def relayed_abort_token(self) -> bytes | None:
        return self._link.take_abort_token()

    def relays(self) -> bool:
        return not self._link.peer_ended

    def exported(self) -> None:
        self._exported()


Program: TypeAlias = Callable[[Link, RunOptions, Place], SideReport]


def child_main(program: Program, connection: Connection, options: RunOptions, place: Place) -> None:
    """Entry point of a child: run `program` and tell the supervisor how it ended."""
    signals.ignore()
    link = Link(connection)
    try:
        link.tell(program(link, options, place))
    except TdxmigError as error:
        usage = isinstance(error, UsageError) and not link.session_began
        link.tell(Failure(str(error), usage))
    except (OSError, MemoryError) as error:
        # Once the session began there is an outcome to tell, which a usage error would hide.
        text = f"this host refused: {error or type(error).__name__}"
        link.tell(Failure(text, usage=not link.session_began))
    except Exception as error:
        if os.environ.get("TDXMIG_DEBUG") == "1":
            traceback.print_exc()
        link.tell(Failure(f"a bug in tdxmig: {type(error).__name__}: {error}"))
    finally:
        connection.close()
