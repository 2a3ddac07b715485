"""What both sides of a session share: one event at a time, its records after it, and deadlines.

A side is a generator of activities.  It yields MOVED when it did something and WAITING when it can
go on only after the peer sent something, so that one thread can drive both sides in any order.
`run` drives one side alone and waits on its transport.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

from tdxmig_model.enforcer import Enforcer
from tdxmig_model.engine.commands import Backend, Command, Gpas, Result, Send, VpEnter
from tdxmig_model.engine.precopy import Iteration, WhenNotConverging
from tdxmig_model.engine.steps import drive
from tdxmig_model.errors import BackendError, PeerError, PeerLost, TdxmigError, UsageError
from tdxmig_model.machine import LifecycleMachine
from tdxmig_model.trace import TraceWriter
from tdxmig_model.transport.base import Readable, Transport
from tdxmig_model.wire.constants import MAX_ENTRIES

T = TypeVar("T")

RUNNABLE_STATES: Final = frozenset({"RUNNABLE", "LIVE_EXPORT", "LIVE_IMPORT"})
"""OP_STATEs in which TDH.VP.ENTER is allowed (TDX module 1.5.01)."""

RECEIVE_SIZE: Final = 1 << 20
_POLL_SECONDS: Final = 0.05
_LOOK_SECONDS: Final = 0.001

DECISION_TIMEOUTS: Final = 2
"""Peer timeouts that a source waits for the decision about its start token.

The destination gives up after one, and its abort token then has another to arrive.
"""


USUAL_EPOCHS: Final = 8
"""Epochs while the guest runs, unless somebody chooses."""


class Activity(enum.Enum):
    """What a side did since it was last asked."""

    MOVED = enum.auto()
    WAITING = enum.auto()


Steps: TypeAlias = Generator[Activity, None, T]


class Stopped(TdxmigError):
    """Somebody on this side asked the migration to stop."""


class PeerGaveUp(PeerError):
    """The peer says that it failed or stopped; the trouble is told by its side."""


class NotConverging(TdxmigError):
    """The guest writes faster than pages are sent, and the options say to give up then."""


class Ending(enum.StrEnum):
    """How a session ended on one side."""

    MIGRATED = "migrated"
    """The destination may run the TD and the source may not."""
    ABORTED = "aborted"
    """The migration session is over on this side and was given up."""
    STORED = "stored"
    """The TD is in a file that somebody may load; the source may not run it."""
    UNDECIDED = "undecided"
    """The source gave the start token away and does not know what became of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOptions:
    """Choices of whoever runs a session; none of them changes what is allowed.

    `batch` is pages per memory bundle, 1 to 512.  `guest_budget` is guest instructions that each
    vCPU runs while 512 pages are exported.  The pre-copy converges when at most `converged_pages`
    are dirty, or when those that are can be sent within `downtime_limit` seconds; otherwise it ends
    after `max_epochs` epochs, and `not_converging` says how (0 epochs: at once, which needs
    post-copy).  `bandwidth_limit` is bytes per second while the guest runs.  `peer_timeout` is
    seconds that the peer may take to begin a record, and again to complete it; see also
    `DECISION_TIMEOUTS`.
    """

    profile: str = "hardened"
    batch: int = MAX_ENTRIES
    guest_budget: int = 128
    converged_pages: int = 64
    max_epochs: int = USUAL_EPOCHS
    downtime_limit: float | None = None
    bandwidth_limit: float | None = None
    not_converging: WhenNotConverging = WhenNotConverging.PAUSE
    peer_timeout: float = 10.0

    def __post_init__(self) -> None:
        if self.bandwidth_limit is not None and not self.bandwidth_limit > 0:
            raise UsageError(
                f"a bandwidth limit is a positive number of bytes, not {self.bandwidth_limit}"
            )
        at_once = self.max_epochs == 0
        if at_once and self.not_converging is not WhenNotConverging.POST_COPY:
            raise UsageError("without an epoch all memory follows the start: choose post-copy")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a side is.  `pages` were moved so far, `dirty` are known to be left (source only)."""

    side: str
    phase: str
    epoch: int = 0
    pages: int = 0
    total: int = 0
    dirty: int = 0
    bytes: int = 0


@dataclass(slots=True)
class SideOutcome:
    """How one side ended.  Times are seconds of its clock, None if it never came to that."""

    side: str
    ending: Ending = Ending.ABORTED
    op_state: str = ""
    runnable: bool = False
    sentence: str = ""
    cause: str = ""
    epochs: int = 0
    bundles: int = 0
    pages_moved: int = 0
    iterations: list[Iteration] = field(default_factory=list)
    """The epochs with memory, one by one (source)."""
    pages_after_start: int = 0
    """Of `pages_moved`, those that followed the start token."""
    pages_requested: int = 0
    """Of those, the ones that the guest at the destination waited for."""
    abort_token: bytes | None = None
    bytes: int = 0
    started_at: float | None = None
    paused_at: float | None = None
    runnable_at: float | None = None
    stopped: bool = False
    """The cause is a stop that was asked for on this side."""
    heard_of: bool = False
    """The cause lies with the peer: it said that it gave up, or the connection ended."""
    events: list[str] = field(default_factory=list)


class Hooks:
    """What the outside may know and ask while a side runs.  Every method here does nothing."""

    def stop_requested(self, event: str | None) -> str | None:
        """Why to stop now, or None.  Asked before each event (its name) and in waits (None)."""
        return None

    def progress(self, progress: Progress) -> None:
        """Something moved."""

    def relayed_abort_token(self) -> bytes | None:
        """An abort token (48 bytes) that came another way than from the peer; each is given once.
        Asked only after the start token."""
        return None

    def relays(self) -> bool:
        """Whether an abort token may still come another way, so that a source that lost its
        connection has something to wait for."""
        return False

    def exported(self) -> None:
        """The start token has left; memory and vCPUs of the source are as they were at pause."""

    def committing(self) -> None:
        """The destination is about to run the guest before all memory is there."""

    def arrived(self, gpas: Gpas) -> None:
        """Pages that came after that, and that the guest has not seen yet."""


class Side(ABC):
    """One side of a migration session; see `SourceSession` and `DestinationSession`.

    `transport` is channel 0, the only one with a return path; `more_channels` have memory records
    of the further forward streams.
    """

    side: ClassVar[str]

    def __init__(
        self,
        backend: Backend,
        transport: Transport,
        trace: TraceWriter,
        *,
        pages: int,
        vcpus: int,
        streams: int = 1,
        more_channels: Sequence[Transport] = (),
        options: SessionOptions | None = None,
        hooks: Hooks | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.backend = backend
        self.transport = transport
        self._more_channels = more_channels
        self.trace = trace
        self.pages, self.vcpus, self.streams = pages, vcpus, streams
        self.options = options or SessionOptions()
        self.hooks = hooks or Hooks()
        self.clock = clock
        self.enforcer = Enforcer(
            backend,
            self.side,
            profile=self.options.profile,
            pages=pages,
            vcpus=vcpus,
            streams=streams,
            trace=trace,
        )
        self.machine = LifecycleMachine(
            self.side, self._perform, vcpus=vcpus, profile=self.options.profile
        )
        self.outcome = SideOutcome(self.side)
        self._outbox: list[Send] = []
        self._arguments: Mapping[str, object] = {}
        self._performed: object = None
        self._giving_up = False
        self._peer_lost = False
        self._cut_short: set[int] = set()
        """Channels on which a record was not sent whole, by number."""
        self._no_way_back = False
        self._cannot_read = False
        trace.flush()  # a side that dies early has still said what it began from

    # --- driving ---------------------------------------------------------------------------------

    def run(self) -> SideOutcome:
        """Drive this side to its end, waiting on the transport.  A failure is an outcome."""
        for activity in self.steps():
            if activity is Activity.WAITING:
                self._wait()
        return self.outcome

    def _wait(self) -> None:
        """Until something arrives on one of the channels that are read, or for a moment."""
        awaited = [] if self._cannot_read else self._awaited()
        try:
            if len(awaited) == 1:
                awaited[0].poll(_POLL_SECONDS)
                return
            end = monotonic() + _POLL_SECONDS
            while awaited and monotonic() < end:
                if any(channel.poll(0.0) for channel in awaited):
                    return
                sleep(_LOOK_SECONDS)
        except PeerLost:
            pass  # told by the next read, with all that arrived before
        if not awaited:
            sleep(_POLL_SECONDS)

    def _awaited(self) -> list[Transport]:
        """The channels on which something may arrive that this side would take now."""
        return [self.transport]

    def steps(self) -> Steps[None]:
        """The whole session as activities; `outcome` is complete when it is exhausted."""
        self.outcome.started_at = self.clock()
        try:
            try:
                yield from self._migrate()
            except TdxmigError as cause:
                self._giving_up = True
                self.outcome.cause = str(cause)
                self.outcome.stopped = isinstance(cause, Stopped)
                self.outcome.heard_of = isinstance(cause, PeerGaveUp | PeerLost)
                self.trace.note(f"{type(cause).__name__}: {cause}")
                self._peer_lost = isinstance(cause, PeerLost)
                yield from self._give_up(cause)
            self._giving_up = True  # nothing is left that a stop could prevent
            self._clean_up()
            yield from self._linger()
        except TdxmigError as error:
            self._note_failure(error)
        finally:
            self._finish()

    def _clean_up(self) -> None:
        self._fire("cleanup")

    @abstractmethod
    def _migrate(self) -> Steps[None]:
        """The good run."""

    @abstractmethod
    def _give_up(self, cause: TdxmigError) -> Steps[None]:
        """Bring this side to a legal end after `cause` and write the sentence of the outcome."""

    @property
    @abstractmethod
    def _engine(self) -> object:
        """One generator method per lifecycle event."""

    def _note_failure(self, error: TdxmigError) -> None:
        """Giving up failed too.  The module still decides who may run; say what it shows."""
        self.outcome.heard_of = False
        self.outcome.cause = self.outcome.cause or str(error)
        self.outcome.sentence = (
            f"The {self.side} could not be brought to an orderly end and was left in "
            f"{self.op_state}: {error}"
        )
        self.trace.note(f"{type(error).__name__}: {error}")

    def _finish(self) -> None:
        try:
            self.outcome.op_state = self.op_state
            self.outcome.runnable = self.runnable
            sent = sum(channel.bytes_sent for channel in self.channels)
            received = sum(channel.bytes_received for channel in self.channels)
            self.outcome.bytes = sent if self.side == "source" else received
            self.trace.note(self.outcome.sentence, op_state=self.outcome.op_state)
            self.trace.flush()
            if self.trace.failure is not None and not self.outcome.cause:
                self.outcome.cause = self.trace.failure
        finally:
            with ExitStack() as closing:  # each of them, whatever becomes of the others
                for channel in self.channels:
                    closing.callback(channel.close)

    def _linger(self) -> Steps[None]:
        """Stay reachable for what the peer may still want to read."""
        yield from ()

    @property
    def channels(self) -> list[Transport]:
        """All channels by number."""
        return [self.transport, *self._more_channels]

    @property
    def op_state(self) -> str:
        """OP_STATE that the backend shows."""
        return str(self.backend.observe()["op_state"])

    @property
    def runnable(self) -> bool:
        """Whether the module would enter a vCPU of this TD now."""
        return self.op_state in RUNNABLE_STATES

    # --- one event -------------------------------------------------------------------------------

    def _fire(
        self, event: str, arguments: Mapping[str, object] | None = None, **params: int
    ) -> Any:
        """Fire a lifecycle event, then send the records it made; what the engine returned.

        `params` are those of the model's row, `arguments` those of the engine's method.  The
        records leave after the machine moved: a peer never sees the result of an event that this
        side has not accepted, and a connection that breaks leaves machine and module agreed.
        """
        self._check_stop(event)
        self._outbox.clear()
        self._arguments, self._performed = arguments or {}, None
        self.machine.fire(event, **params)
        self.outcome.events.append(event)
        self.trace.lifecycle(event, params, self.machine.phase)
        self._flush_outbox()
        return self._performed

    def _flush_outbox(self) -> None:
        """Send what the event made; a side that gives up does so whether or not anybody listens.

        After a record that was not sent whole nothing is sent on its channel, because it would land
        inside it.
        """
        if not self._outbox:
            return
        self.trace.flush()
        records, self._outbox[:] = self._outbox[:], []
        for send in records:
            self._send(send)

    def _send(self, send: Send) -> None:
        number = send.stream % len(self.channels)
        if number in self._cut_short:
            self.trace.note("not sent: the record before was not sent whole")
            return
        timeout = 0.0 if self._peer_lost else self.options.peer_timeout
        try:
            self.channels[number].send(self._encode(send), timeout)
        except PeerLost as error:
            self._cut_short.add(number)
            if not self._giving_up:
                raise
            self.trace.note(f"not sent: {error}")

    def _check_stop(self, event: str | None) -> None:
        reason = self.hooks.stop_requested(event)
        if self._giving_up or self._no_way_back:
            return
        if reason is not None:
            raise Stopped(reason)
        if self.trace.failure is not None:
            # Steps that nobody can judge afterwards are not to go on.
            raise TdxmigError(self.trace.failure)

    def _perform(self, event: str, params: Mapping[str, object]) -> None:
        """Called by the machine for an accepted event: the only way to the engine."""
        method = getattr(self._engine, event)
        operation = method(**self._arguments)
        self._performed = drive(operation, self._execute, self._outbox.append)

    def _execute(self, command: Command) -> Result:
        return self.enforcer.execute(command)

    @abstractmethod
    def _encode(self, send: Send) -> Sequence[Readable]:
        """A record of this side's path as buffers."""

    # --- the guest -------------------------------------------------------------------------------

    def run_guest(self, budget: int) -> int:
        """Run every vCPU for `budget` guest instructions; the instructions executed.

        BackendError if the module does not enter a vCPU.
        """
        return sum(self._run_vcpu(vcpu, budget) for vcpu in range(self.vcpus))

    def _run_vcpu(self, vcpu: int, budget: int) -> int:
        left = budget
        while left > 0:
            result = self._execute(VpEnter(vcpu, left))
            if not result.ok or result.exit is None:
                raise BackendError("vp_enter", result.status, result.status_name, f"vCPU {vcpu}")
            left -= result.exit.instructions
            if result.exit.reason != "ept_violation":
                break
            assert result.exit.gpa is not None
            if not self._on_ept_violation(vcpu, result.exit.gpa):
                break
        return budget - left

    def _on_ept_violation(self, vcpu: int, gpa: int) -> bool:
        """Deal with it; whether the vCPU can go on."""
        raise BackendError(
            "vp_enter",
            0,
            "EPT_VIOLATION",
            f"vCPU {vcpu} at GPA {gpa:#x}, which nobody write-blocked",
        )

    # --- progress --------------------------------------------------------------------------------

    def _progress(self, phase: str, *, epoch: int = 0, dirty: int = 0) -> None:
        self.hooks.progress(
            Progress(
                self.side,
                phase,
                epoch,
                self.outcome.pages_moved,
                self.pages,
                dirty,
                sum(one.bytes_sent + one.bytes_received for one in self.channels),
            )
        )
