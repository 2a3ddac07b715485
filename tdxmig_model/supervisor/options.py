"""What a supervised run is asked to do, and the faults that tests inject into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tdxmig_model.engine import WhenNotConverging
from tdxmig_model.errors import UsageError
from tdxmig_model.names import NAMES, Kind
from tdxmig_model.session import DECISION_TIMEOUTS, USUAL_EPOCHS, SessionOptions
from tdxmig_model.transport import Faults
from tdxmig_model.wire.constants import MAX_ENTRIES, MAX_FORWARD_STREAMS, PAGE_SIZE
from tdxmig_model.wire.extensions import MAX_VCPUS

SIDES: Final = ("source", "destination")
TRANSPORTS: Final = ("unix", "tcp", "tls", "file")
LEAST_DEADLINE: Final = 300.0
"""Seconds that a run may take whatever its memory."""
SLOWEST: Final = 1 << 20
"""Bytes of memory for which it may take one second more."""

MAX_WORKERS: Final = 16
"""Processes of one side that encrypt and decrypt."""

LEAST_BUILD: Final = 30.0
"""Seconds that a side may take to build its TD whatever its memory."""
SLOWEST_BUILD: Final = 8 << 20
"""Bytes of memory for which it may take one second more."""


@dataclass(frozen=True, slots=True)
class At:
    """One lifecycle event of one side; as text ``source:pause``."""

    side: str
    event: str

    def __str__(self) -> str:
        return f"{self.side}:{self.event}"

    @classmethod
    def parse(cls, text: str) -> At:
        """``SIDE:EVENT``, or an event that only one side has.  UsageError lists what there is."""
        side, colon, event = text.rpartition(":")
        if colon and side not in SIDES:
            raise UsageError(f"event {text!r}: the side is source or destination")
        sides = (side,) if colon else SIDES
        found = [cls(one, event) for one in sides if event in lifecycle_events(one)]
        if len(found) == 1:
            return found[0]
        if found:
            both = " or ".join(map(str, found))
            raise UsageError(f"event {text!r} is one of both sides; write {both}")
        known = "; ".join(f"{one}: {', '.join(lifecycle_events(one))}" for one in sides)
        raise UsageError(f"no lifecycle event {text!r}; {known}")


def lifecycle_events(side: str) -> list[str]:
    """Names of the lifecycle events of a side, in the order of the name table."""
    return [row.step for row in NAMES if row.kind is Kind.LIFECYCLE and row.side.value == side]


def trace_path(traces: Path, side: str) -> Path:
    """Where the trace of a side is."""
    return traces / f"{side}.ndjson"


@dataclass(frozen=True, slots=True)
class Injected:
    """Faults for tests.

    `kill`: the process of that side is killed (SIGKILL) just before the event.  `hang`: it stops
    (SIGSTOP) there.  `stream`: bytes of the forward path that change or do not arrive.
    """

    kill: At | None = None
    hang: At | None = None
    stream: Faults | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Arguments of a run.  `memory` is bytes of private memory.

    `streams` forward streams have a connection each; `workers` processes on each side encrypt and
    decrypt.  `max_epochs`, `downtime_limit` (milliseconds), `bandwidth_limit` (bytes per second)
    and `not_converging` bound the pre-copy, see `SessionOptions`; `post_copy` stands for one epoch
    and then post-copy, unless they say otherwise.

    `deadline` is seconds for everything; without one the time grows with memory (see `seconds`).
    `stop_at` asks for a stop just before that event would fire.  Traces are kept in `trace_dir`;
    without one they are removed after they have been judged.
    What passes between the sides is written to `capture`, see `transport.CapturedTransport`.
    """

    memory: int = 64 << 20
    vcpus: int = 2
    streams: int = 1
    workers: int = 0
    batch: int = MAX_ENTRIES
    profile: str = "hardened"
    guest: str = "hot-set"
    seed: int = 0
    transport: str = "unix"
    post_copy: bool = False
    max_epochs: int | None = None
    downtime_limit: float | None = None
    bandwidth_limit: float | None = None
    not_converging: str = "pause"
    stop_at: At | None = None
    trace_dir: Path | None = None
    capture: Path | None = None
    peer_timeout: float = 5.0
    deadline: float | None = None
    injected: Injected = field(default_factory=Injected)

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.memory <= 0 or self.memory % PAGE_SIZE:
            raise UsageError(f"memory of {self.memory} bytes: it is a multiple of {PAGE_SIZE}")
        if not 1 <= self.batch <= MAX_ENTRIES:
            raise UsageError(f"batch of {self.batch} pages: it is 1 to {MAX_ENTRIES}")
        if not 1 <= self.vcpus <= MAX_VCPUS:
            raise UsageError(f"{self.vcpus} vCPUs: a TD has 1 to {MAX_VCPUS}")
        if not 1 <= self.streams <= MAX_FORWARD_STREAMS:
            raise UsageError(f"{self.streams} streams: there are 1 to {MAX_FORWARD_STREAMS}")
        if not 0 <= self.workers <= MAX_WORKERS:
            raise UsageError(f"{self.workers} workers: there are 0 to {MAX_WORKERS}")
        if self.max_epochs is not None and self.max_epochs < 0:
            raise UsageError(f"{self.max_epochs} epochs: there are 0 or more")
        if self.not_converging not in tuple(WhenNotConverging):
            known = " or ".join(WhenNotConverging)
            raise UsageError(f"not converging {self.not_converging!r}: it is {known}")
        if self.post_copy and self.not_converging == WhenNotConverging.ABORT:
            raise UsageError("post-copy, or an abort when the pre-copy does not converge: not both")
        for name in ("downtime_limit", "bandwidth_limit"):
            value, shown = getattr(self, name), name.replace("_", " ")
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{shown} of {value:g}: it is positive and finite")
        self.session_options()  # refuses what does not go together
        if self.seed < 0:
            raise UsageError(f"seed {self.seed}: it is 0 or more")
        if not 0 < self.peer_timeout < float("inf"):
            raise UsageError(f"peer timeout of {self.peer_timeout:g} s: it is positive and finite")
        if self.deadline is not None and not 0 < self.deadline < float("inf"):
            raise UsageError(f"deadline of {self.deadline:g} s: it is positive and finite")
        if self.transport not in TRANSPORTS:
            raise UsageError(f"transport {self.transport!r}: it is {' or '.join(TRANSPORTS)}")
        if self.transport == "file":
            self._check_file()

    def _check_file(self) -> None:
        if self.capture or self.injected.stream:
            # The session has to know that nobody answers, which a transport around it would hide.
            raise UsageError("a stream that goes through a file is neither captured nor damaged")
        if self.streams > 1:
            raise UsageError(f"{self.streams} streams: a file holds one stream")
        if self.may_post_copy:
            raise UsageError("post-copy through a file: nobody could ask for a page")

    def _check_numbers(self) -> None:
        for name in ("memory", "vcpus", "streams", "workers", "batch", "seed", "max_epochs"):
            value = getattr(self, name)
            if name == "max_epochs" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"{name} {value!r}: it is a whole number")
        for name in ("peer_timeout", "deadline", "downtime_limit", "bandwidth_limit"):
            value = getattr(self, name)
            if not isinstance(value, int | float | None) or isinstance(value, bool):
                unit = "" if name == "bandwidth_limit" else " of seconds"
                raise UsageError(f"{name} {value!r}: it is a number{unit}")

    @property
    def may_post_copy(self) -> bool:
        """Whether the TD may run at the destination before all memory is there."""
        return self.post_copy or self.not_converging == WhenNotConverging.POST_COPY

    def session_options(self) -> SessionOptions:
        """What a side's session is told."""
        usual = 1 if self.post_copy else USUAL_EPOCHS
        return SessionOptions(
            profile=self.profile,
            batch=self.batch,
            peer_timeout=self.peer_timeout,
            max_epochs=usual if self.max_epochs is None else self.max_epochs,
            downtime_limit=None if self.downtime_limit is None else self.downtime_limit / 1000,
            bandwidth_limit=self.bandwidth_limit,
            not_converging=WhenNotConverging.POST_COPY
            if self.post_copy
            else WhenNotConverging(self.not_converging),
        )

    @property
    def seconds(self) -> float:
        """Seconds after which the run is stopped."""
        if self.deadline is not None:
            return self.deadline
        return LEAST_DEADLINE + self.memory / SLOWEST

    @property
    def patience(self) -> float:
        """Seconds that a side may need to end once its peer has: it may wait for a decision, and
        digests take time with memory."""
        return (DECISION_TIMEOUTS + 1) * self.peer_timeout + self.memory / (100 << 20)

    @property
    def build_seconds(self) -> float:
        """Seconds that a side may need to build its TD."""
        return LEAST_BUILD + self.memory / SLOWEST_BUILD

    @property
    def pages(self) -> int:
        """Private 4 KiB pages of the TD."""
        return self.memory // PAGE_SIZE
