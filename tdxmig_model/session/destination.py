"""The destination of a migration session: import in order, end, or give up with a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import ClassVar, Final

from tdxmig_model.engine import DestinationEngine, ImportOutcome, drive
from tdxmig_model.engine.commands import Backend, Send
from tdxmig_model.errors import PeerError, PeerLost, TdxmigError, UsageError
from tdxmig_model.session.channels import Inlets
from tdxmig_model.session.common import (
    RECEIVE_SIZE,
    Activity,
    Ending,
    Hooks,
    PeerGaveUp,
    SessionOptions,
    Side,
    Steps,
)
from tdxmig_model.trace import TraceWriter
from tdxmig_model.transport.base import Readable, Transport
from tdxmig_model.wire.constants import PAGE_SIZE
from tdxmig_model.wire.extensions import (
    AbortToken,
    Committed,
    Failed,
    Hello,
    InOrderDone,
    PageRequest,
    SessionStarted,
    encode_return,
)
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import (
    Bundle,
    EpochRecord,
    MemoryRecord,
    Record,
    StartSection,
)

# Lifecycle event -> what the lifecycle model calls the record that it takes.
_KINDS: Final = {
    "import_immutable": "IMMUTABLE",
    "import_epoch": "EPOCH",
    "import_memory": "MEMORY",
    "import_td_state": "TD_STATE",
    "import_vcpu_state": "VCPU_STATE",
    "import_start_token": "START_TOKEN",
}
_PHASES: Final = {
    "import_td_state": "state",
    "import_vcpu_state": "state",
    "import_start_token": "commit",
}
_WITH_BUNDLE: Final = (StartSection, EpochRecord, MemoryRecord, Bundle)
_RETURN_MESSAGES: Final = (
    *(AbortToken, Committed, Failed, Hello, InOrderDone, PageRequest, SessionStarted),
)

LINGER_SECONDS: Final = 3.0
"""How long a destination stays reachable at its end, so that the source can read how it ended."""


class DestinationSession(Side):
    """Imports a TD from whoever is at the other end of `transport` into the one behind `backend`.

    `pages` and `vcpus` are what the prepared TD can hold; the source says in HELLO what it needs.
    """

    side: ClassVar[str] = "destination"

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
        super().__init__(
            backend,
            transport,
            trace,
            pages=pages,
            vcpus=vcpus,
            streams=streams,
            more_channels=more_channels,
            options=options,
            hooks=hooks,
            clock=clock,
        )
        self.engine = DestinationEngine(pages=pages, vcpus=vcpus, streams=streams)
        self._inlets = Inlets(self.channels, self.engine.ready)
        self._stalled: dict[int, int] = {}
        """vCPUs that wait for a page in post-copy, and the GPA of it."""

    @property
    def _engine(self) -> object:
        return self.engine

    # --- the good run ----------------------------------------------------------------------------

    def _migrate(self) -> Steps[None]:
        yield from self._await_hello()
        while not self.runnable:
            self._import((yield from self._receive()))
            yield Activity.MOVED
        self.outcome.runnable_at = self.clock()
        yield from self._run_post_copy()
        self.outcome.ending = Ending.MIGRATED
        self.outcome.sentence = "The destination has the TD and may run it."

    def _await_hello(self) -> Steps[None]:
        record = yield from self._receive()
        if not isinstance(record, Hello):
            raise PeerError(f"{self.transport.peer} began with {_name(record)} instead of HELLO")
        if record.session_id.hex() != self.trace.session:
            raise PeerError(f"{self.transport.peer} is of another migration session")
        self.engine.accept(record)
        self._fire("setup")

    def _import(self, record: Record) -> None:
        """One record is one lifecycle event; the start token is followed by the end."""
        event = self.engine.accept(record)
        if event == "abort":
            raise PeerGaveUp(f"the source gave up: {self.engine.source_abort}")
        if event is None or not isinstance(record, _WITH_BUNDLE):
            return
        bundle = record if isinstance(record, Bundle) else record.bundle
        mbmd = bundle.mbmd
        params: dict[str, int] = {}
        if event == "import_vcpu_state":
            if mbmd.vp_index >= self.vcpus:
                raise PeerError(f"the source sent vCPU {mbmd.vp_index}, this TD has {self.vcpus}")
            params["vcpu"] = mbmd.vp_index
        self.machine.deliver(_KINDS[event], mbmd.mig_epoch)
        whole = isinstance(record, MemoryRecord)  # its offset is compared with its GPAs
        after = self._fire(event, {"record": record} if whole else {"bundle": bundle}, **params)
        self._account(event, mbmd)
        if event == "import_start_token":
            self._take_over()
        if event == "import_memory" and self.runnable:
            self._note_arrival(after)

    # --- post-copy -------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """End the session, or, if memory is to follow, begin to run the TD without it."""
        if self.engine.memory_complete:
            self._fire("end")
            return
        self.hooks.committing()
        self._fire("commit")
        self._no_way_back = True  # a stop would leave a guest without the rest of its memory

    def _note_arrival(self, outcome: ImportOutcome) -> None:
        self.hooks.arrived(outcome.imported)
        self.outcome.pages_after_start += outcome.imported.size
        here = set(outcome.imported.tolist())
        self._stalled = {vcpu: gpa for vcpu, gpa in self._stalled.items() if gpa not in here}

    def _run_post_copy(self) -> Steps[None]:
        """Run the guest, ask for the pages that it waits for, and end when all are here."""
        if self.engine.memory_complete:
            return
        while not self.engine.memory_complete:
            self._run_what_can_run()
            self._import((yield from self._receive()))
            self._enter("post-copy")
            yield Activity.MOVED
        self._fire("end")

    def _run_what_can_run(self) -> None:
        before = set(self._stalled.values())
        for vcpu in range(self.vcpus):
            if vcpu not in self._stalled:
                self._run_vcpu(vcpu, self.options.guest_budget)
        wanted = set(self._stalled.values()) - before
        if wanted:
            request = self.engine.request_pages(tuple(sorted(wanted)))
            drive(request, self._execute, self._outbox.append)
            self.outcome.pages_requested += len(wanted)
            self._flush_outbox()

    def _on_ept_violation(self, vcpu: int, gpa: int) -> bool:
        """In post-copy: the page is not here yet, and the vCPU waits for it."""
        if self.engine.memory_complete:
            return super()._on_ept_violation(vcpu, gpa)
        self._stalled[vcpu] = gpa & ~(PAGE_SIZE - 1)
        return False

    def _account(self, event: str, mbmd: Mbmd) -> None:
        self.outcome.bundles += 1
        if event == "import_epoch":
            self.outcome.epochs = mbmd.mig_epoch
        if event == "import_memory":
            self.outcome.pages_moved += mbmd.num_gpas
        self._enter(_PHASES.get(event, "pre-copy"))

    def _enter(self, phase: str) -> None:
        self._progress(phase, epoch=self.outcome.epochs)

    # --- both paths ------------------------------------------------------------------------------

    def _receive(self) -> Steps[Record]:
        """The next record.  PeerLost if the source takes `peer_timeout` seconds to begin it, or as
        long to complete it: single bytes now and then are no sign of life."""
        end = self.clock() + self.options.peer_timeout
        begun = not self._inlets.at_boundary
        while (record := self._inlets.take()) is None:
            self._check_stop(None)
            if not self._inlets.read():
                lost = self._inlets.lost()
                if lost is not None:
                    raise lost
                if self.clock() >= end:
                    raise self._too_slow(begun)
                yield Activity.WAITING
                continue
            if not begun:
                begun, end = True, self.clock() + self.options.peer_timeout
        return record

    def _awaited(self) -> list[Transport]:
        return self._inlets.awaited

    def _too_slow(self, begun: bool) -> PeerLost:
        peer, limit = self.transport.peer, f"{self.options.peer_timeout:g} s"
        waiting = self._inlets.held_back()
        if waiting is not None:
            return PeerLost(f"{peer}: {self.engine.missing(waiting)}, and no more within {limit}")
        if not begun:
            return PeerLost(f"{peer} sent nothing for {limit}")
        at = self._inlets.unfinished
        return PeerLost(f"{peer} did not complete the record at byte {at} within {limit}")

    def _encode(self, send: Send) -> Sequence[Readable]:
        if not isinstance(send.record, _RETURN_MESSAGES):
            raise UsageError(f"the destination sends no {type(send.record).__name__}")
        return [encode_return(send.record)]

    # --- giving up -------------------------------------------------------------------------------

    def _give_up(self, cause: TdxmigError) -> Steps[None]:
        yield from ()
        if self.runnable and not self.engine.memory_complete:
            self.outcome.ending = Ending.MIGRATED
            missing = self.engine.announced.page_count - self.engine.pages_imported
            self.outcome.sentence = (
                f"The destination has the TD and runs it, but {missing} of its pages never "
                "arrived: a vCPU that touches one of them waits for ever."
            )
            return
        if self.runnable:
            self.outcome.runnable_at = self.clock()
            self.outcome.ending = Ending.MIGRATED
            self.outcome.sentence = (
                "The destination has the TD and may run it, although the source could not be told."
            )
            return
        if "abort" in self.machine.legal():
            self.outcome.abort_token = self._fire("abort", {"reason": str(cause)})
        self.outcome.sentence = (
            "The migration ended before the destination had imported anything; it cannot run it."
            if self.outcome.abort_token is None
            else "The destination gave the import up for ever and made the abort token that lets "
            "the source go on."
        )

    def _clean_up(self) -> None:
        """A TD that runs with pages missing has no end of its session: only we forget it."""
        if "cleanup" in self.machine.legal():
            super()._clean_up()
            return
        self.trace.note("the session has no end: memory is missing")
        drive(self.engine.cleanup(), self._execute, self._outbox.append)

    def _linger(self) -> Steps[None]:
        """Closing with unread bytes would destroy what the source has not read yet."""
        if self.engine.peer is None or self._peer_lost:
            return  # nothing was said, or nobody is there to read it
        end = self.clock() + LINGER_SECONDS
        try:
            while self.clock() < end:
                if self.transport.poll(0.0):
                    self.transport.recv(RECEIVE_SIZE)
                yield Activity.WAITING
        except PeerLost:
            return


def _name(record: Record) -> str:
    return type(record).__name__
