"""The source side of a migration session: one generator per lifecycle event.

What the module says about each entry of a GPA list is looked at: a page that was not exported is
returned to the caller and never counted as sent.  What the destination says is checked against what
it can know by then.  The order of our own events is the lifecycle's business, not checked here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.engine.commands import (
    ExportAbort,
    ExportBlockw,
    ExportMem,
    ExportPause,
    ExportRestore,
    ExportStateImmutable,
    ExportStateTd,
    ExportStateVp,
    ExportTrack,
    ExportUnblockw,
    Gpas,
    MemTrack,
    Operation,
    Result,
    Send,
)
from tdxmig_model.engine.pages import NO_PAGES, PageSet, page_column
from tdxmig_model.engine.steps import (
    ALL_CAPABILITIES,
    BUSY_ATTEMPTS,
    RamBlock,
    attempt,
    bundle_of,
    check_sizes,
    entry_results,
    perform,
)
from tdxmig_model.errors import BackendError, PeerError, UsageError
from tdxmig_model.wire.constants import MAX_ENTRIES
from tdxmig_model.wire.extensions import (
    AbortToken,
    Capability,
    Committed,
    Failed,
    Hello,
    InOrderDone,
    PageRequest,
    ReturnMessage,
    SessionStarted,
    SourceAbort,
)
from tdxmig_model.wire.gpa_list import (
    GpaOperation,
    GpaStatus,
    entries_from_bytes,
    entry_gpas,
    entry_operations,
)
from tdxmig_model.wire.mbmd import BundleType
from tdxmig_model.wire.records import (
    Bundle,
    EndSection,
    EpochRecord,
    Footer,
    MemoryRecord,
    StartSection,
)


@dataclass(frozen=True, slots=True, eq=False)
class ExportOutcome:
    """What became of a batch: ``sent`` and ``unsent`` pages, and why each unsent one was not.

    ``statuses`` is the GpaStatus (uint8) of each unsent page, in the same order.
    """

    sent: Gpas
    unsent: Gpas
    statuses: NDArray[np.uint8]


class SourceEngine:
    """The source engine of one migration session.

    ``pages``, ``vcpus`` and ``streams`` (forward streams) are the sizes of the TD; ``session_id``
    is 16 bytes.  Without a HELLO from the destination no capability is in force.
    """

    def __init__(
        self,
        session_id: bytes,
        *,
        pages: int,
        vcpus: int,
        streams: int = 1,
        capabilities: Capability = ALL_CAPABILITIES,
        ram: RamBlock | None = None,
    ) -> None:
        self.hello = Hello(session_id, capabilities, pages, vcpus, streams)
        self.ram = ram or RamBlock()
        self.agreed = Capability(0)
        self.peer: Hello | None = None
        self.session_started = False
        self.in_order_done = False
        self.committed: Committed | None = None
        self.failure: str | None = None
        self.abort_token: bytes | None = None
        self.requested: list[Gpas] = []
        """Pages that the destination's guest waits for; who sends them empties the list."""
        self.paused = False
        self.start_token_sent = False
        self._start_sent = False
        self._exporting = False
        self._aborted = False
        self._chain_open = False
        self._vcpus_sent: set[int] = set()
        self._block_named: set[int] = set()
        self._exported = PageSet()
        self._writable = PageSet()
        self._in_flight = NO_PAGES

    @property
    def max_batch(self) -> int:
        """Pages that one bundle may have with this destination."""
        return MAX_ENTRIES if Capability.BATCH in self.agreed else 1

    # --- what the destination says ---------------------------------------------------------------

    def receive(self, message: ReturnMessage) -> str | None:
        """Take a message of the return path; returns the lifecycle event that it asks for, if any.

        PeerError: the destination cannot say this now, or contradicts itself.
        """
        match message:
            case Hello():
                self._receive_hello(message)
                return None
            case SessionStarted():
                first = not self.session_started and self.abort_token is None
                self._expect(self._start_sent and first, "SESSION_STARTED")
                self.session_started = True
                return "confirm_import"
            case InOrderDone():
                agreed = Capability.IN_ORDER_DONE in self.agreed
                complete = len(self._vcpus_sent) >= self.hello.vcpu_count
                decided = self.committed is not None or self.abort_token is not None
                first = not self.in_order_done and not decided
                self._expect(agreed and complete and first, "IN_ORDER_DONE")
                self.in_order_done = True
                return None
            case PageRequest(gpas):
                agreed = Capability.POST_COPY in self.agreed and self.start_token_sent
                self._expect(agreed and not self.committed and not self.abort_token, "PAGE_REQUEST")
                self.requested.append(page_column(np.array(gpas, dtype=np.uint64)))
                return None
            case Committed():
                at_end = self.start_token_sent and self.abort_token is None
                self._expect(at_end and not self.committed, "COMMITTED")
                self.committed = message
                return "cleanup"
            case AbortToken(mbmd):
                self._expect(self._start_sent and not self.committed, "ABORT_TOKEN")
                self.abort_token = mbmd.pack()
                return self._abort_event("abort_with_token")
            case Failed(reason):
                self._expect(self.committed is None and self.failure is None, "FAILED")
                self.failure = reason
                return self._abort_event(None)

    def _abort_event(self, after_start_token: str | None) -> str | None:
        if self.start_token_sent:
            return after_start_token if self._exporting else None
        return None if self._aborted else "abort"

    def _receive_hello(self, hello: Hello) -> None:
        self._expect(self.peer is None, "HELLO")
        if hello.session_id != self.hello.session_id:
            raise PeerError(
                f"the destination answered for session {hello.session_id.hex()}, "
                f"this is {self.hello.session_id.hex()}; connect to the right destination"
            )
        check_sizes(self.hello, hello, "destination")
        self.peer = hello
        self.agreed = self.hello.capabilities & hello.capabilities

    def _expect(self, possible: bool, name: str) -> None:
        if not possible:
            raise PeerError(f"the destination sent {name} {self._where()}")

    def _where(self) -> str:
        if self.committed:
            return "after it had committed"
        if self.abort_token is not None:
            return "after it had sent an abort token"
        if self.start_token_sent:
            return "after the start token"
        if self.session_started:
            return "after it had started the session"
        return "before it imported anything" if self._start_sent else "before the session began"

    # --- lifecycle events ------------------------------------------------------------------------

    def setup(self) -> Operation[None]:
        """Open the forward path.  The answer comes to `receive`; nothing is sent before it."""
        yield Send(self.hello)

    def export_immutable(self) -> Operation[None]:
        """Start the migration session and send the immutable state."""
        command = ExportStateImmutable()
        result = yield from perform(
            command, hint="a migration key has to be set before each session"
        )
        self._exporting = True
        bundle = bundle_of(command, result, BundleType.IMMUTABLE_TD_STATE)
        self._start_sent = True
        yield Send(StartSection(bundle))

    def confirm_import(self) -> Operation[None]:
        """Go on because the destination imported the immutable state, so that an abort token can
        exist from here on.  PeerError: it has not said so."""
        if not self.session_started:
            raise PeerError("the destination has not reported SESSION_STARTED")
        yield from ()

    def start_epoch(self) -> Operation[None]:
        """Begin an epoch: its token tells the destination that the epoch before is complete."""
        command = ExportTrack()
        result = yield from perform(command)
        yield Send(EpochRecord(bundle_of(command, result, BundleType.EPOCH_TOKEN)))

    def export_memory(self, gpas: Gpas, stream: int = 0) -> Operation[ExportOutcome]:
        """Export and send a batch of at most `max_batch` pages.

        While the guest can run the pages are write-blocked first; those that were not exported are
        made writable again, so that a later attempt finds them as this one did.
        """
        batch = self._batch(gpas)
        if self.start_token_sent and Capability.POST_COPY not in self.agreed:
            raise UsageError("the destination takes no memory after the start token (POST_COPY)")
        self._in_flight = batch
        statuses = np.zeros(batch.size, dtype=np.uint8)
        if not self.paused:
            statuses = yield from self._block(batch)
        outcome = yield from self._export(batch, statuses, stream, GpaOperation.MIGRATE)
        if outcome.unsent.size and not self.paused:
            blocked = batch[statuses == GpaStatus.SUCCESS]
            for gpa in blocked[np.isin(blocked, outcome.unsent)].tolist():
                yield from attempt(ExportUnblockw(gpa))  # refused: the guest's write asks again
        self._exported.add(outcome.sent)
        self._writable.discard(outcome.sent)
        self._in_flight = NO_PAGES
        return outcome

    def was_exported(self, gpas: Gpas) -> NDArray[np.bool_]:
        """Which pages the destination has in some version, shape (n,)."""
        return self._exported.contains(gpas)

    def cancel_page(self, gpas: Gpas | int, stream: int = 0) -> Operation[ExportOutcome]:
        """Make the destination drop pages that were exported; they can be exported again later.

        UsageError: the destination does not know CANCEL.
        """
        batch = self._batch(gpas)
        if Capability.CANCEL not in self.agreed:
            raise UsageError("the destination does not know CANCEL; export the page again instead")
        statuses = np.zeros(batch.size, dtype=np.uint8)
        writable = self._writable.contains(batch)
        if not self.paused and writable.any():
            statuses[writable] = yield from self._block(batch[writable])
        outcome = yield from self._export(batch, statuses, stream, GpaOperation.CANCEL)
        self._exported.discard(outcome.sent)
        self._writable.discard(outcome.sent)
        return outcome

    def pause(self) -> Operation[None]:
        """Stop the TD on the source for good, unless the session is aborted."""
        yield from perform(ExportPause())
        self.paused = True

    def export_td_state(self) -> Operation[None]:
        """Send the TD state: the first bundle of the end section."""
        command = ExportStateTd()
        result = yield from perform(command)
        bundle = bundle_of(command, result, BundleType.MUTABLE_TD_STATE)
        if not self._chain_open:
            self._chain_open = True
            yield Send(EndSection())
        yield Send(_link(bundle, another_follows=True))

    def export_vcpu_state(self, vcpu: int, stream: int = 0) -> Operation[None]:
        """Send the state of one vCPU, in the end section."""
        command = ExportStateVp(vcpu, stream)
        result = yield from perform(command)
        bundle = bundle_of(command, result, BundleType.MUTABLE_VCPU_STATE)
        self._vcpus_sent.add(vcpu)
        yield Send(_link(bundle, another_follows=True))

    def finish_epochs(self) -> Operation[None]:
        """Send the start token, which ends the end section.  From here on only the destination's
        abort token gives the TD back to the source."""
        command = ExportTrack(in_order_done=True)
        result = yield from perform(
            command, hint="every page that was written after its export has to be exported again"
        )
        self.start_token_sent = True
        bundle = bundle_of(command, result, BundleType.EPOCH_TOKEN)
        if not bundle.mbmd.is_start_token:
            raise BackendError(command.name, result.status, result.status_name, "no start token")
        self._chain_open = False
        yield Send(_link(bundle, another_follows=False))
        yield Send(Footer())

    def abort(self, reason: str = "") -> Operation[Gpas]:
        """Take the TD back before the start token; it may run again.

        The module comes first, so that a lost connection does not matter.  Returns the pages that
        could not be taken out of the session (none, as a rule): they block the next one.
        """
        left = NO_PAGES
        self._aborted = True
        if self._exporting:
            yield from perform(ExportAbort())
            left = yield from self._restore()
        if Capability.SOURCE_ABORT in self.agreed:
            yield Send(SourceAbort(reason))
        return left

    def abort_with_token(self, token: bytes | None = None) -> Operation[Gpas]:
        """Take the TD back after the start token, with the destination's abort token (48 bytes).

        PeerError: there is none, or the module refuses it; then the TD stays in POST_EXPORT.
        Returns what `abort` returns.
        """
        token = self.abort_token if token is None else token
        if token is None:
            raise PeerError(
                "the start token was sent and no abort token has come back: the TD may not run here"
            )
        command = ExportAbort(token)
        result = yield from attempt(command)
        if not result.ok:
            raise PeerError(
                f"the module refused the abort token with {result.status_name} "
                f"(0x{result.status:016X}); the TD stays in POST_EXPORT until a valid one arrives"
            )
        return (yield from self._restore())

    def cleanup(self) -> Operation[None]:
        """Forget the session.  Nothing is left to tell the module or the peer."""
        self._exported.clear()
        self._writable.clear()
        self._in_flight = NO_PAGES
        yield from ()

    # --- between lifecycle events ----------------------------------------------------------------

    def unblock_page(self, gpa: int) -> Operation[None]:
        """Let the guest write a page again after its write exited; the caller notes it dirty."""
        yield from perform(ExportUnblockw(gpa))
        self._writable.add(gpa)

    # --- parts -----------------------------------------------------------------------------------

    def _batch(self, gpas: Gpas | int) -> Gpas:
        batch = page_column(gpas)
        if not 1 <= batch.size <= self.max_batch:
            raise UsageError(
                f"a batch of {batch.size} pages; this destination takes 1 to {self.max_batch}"
            )
        return batch

    def _block(self, batch: Gpas) -> Operation[NDArray[np.uint8]]:
        """Write-block pages and make stale translations visible; GpaStatus per page."""
        command = ExportBlockw(batch)
        result = yield from perform(command)
        statuses = entry_results(command, result, batch.size)
        if (statuses == GpaStatus.SUCCESS).any():
            yield from perform(MemTrack(), hint="a vCPU has not exited since the last TLB epoch")
        return statuses

    def _export(
        self, batch: Gpas, statuses: NDArray[np.uint8], stream: int, operation: GpaOperation
    ) -> Operation[ExportOutcome]:
        """Export the pages that have no problem yet, and send their bundle whatever became of
        them: the destination counts every bundle."""
        statuses = statuses.copy()
        usable = statuses == GpaStatus.SUCCESS
        if usable.any():
            pages = batch[usable]
            command = ExportMem(stream, pages, operation)
            result = yield from perform(command)
            bundle = bundle_of(command, result, BundleType.MEM)
            statuses[usable] = _export_statuses(command, result, bundle, pages)
            yield Send(self._memory_record(bundle, pages, operation, stream), stream)
        failed = statuses != GpaStatus.SUCCESS
        return ExportOutcome(batch[~failed], batch[failed], statuses[failed])

    def _memory_record(
        self, bundle: Bundle, pages: Gpas, operation: GpaOperation, stream: int
    ) -> MemoryRecord:
        named = stream in self._block_named  # each stream may have a channel of its own
        self._block_named.add(stream)
        cancel = operation is GpaOperation.CANCEL
        return MemoryRecord(
            self.ram.offset(int(pages[0])), self.ram.name, bundle, cancel, same_block=named
        )

    def _restore(self) -> Operation[Gpas]:
        """After an abort: take every exported page out of the session, make every page writable.

        Source of the need: the next TDH.EXPORT.STATE.IMMUTABLE demands MIG_COUNT = 0.
        """
        self._exporting = False
        todo = PageSet(self._in_flight)
        todo.update(self._exported)
        left = PageSet()
        while todo:
            batch = todo.take(MAX_ENTRIES)
            for _ in range(BUSY_ATTEMPTS):
                command = ExportRestore(batch)
                result = yield from perform(command)
                statuses = entry_results(command, result, batch.size)
                left.add(batch[statuses == GpaStatus.SEPT_ENTRY_STATE_INCORRECT])
                batch = batch[
                    (statuses != GpaStatus.SUCCESS)
                    & (statuses != GpaStatus.SEPT_ENTRY_STATE_INCORRECT)
                ]
                if not batch.size:
                    break
            left.add(batch)
        for gpa in self._in_flight[left.contains(self._in_flight)].tolist():
            result = yield from attempt(ExportUnblockw(gpa))
            if result.ok:  # it had been write-blocked and not yet exported
                left.discard(gpa)
        self._exported.clear()
        self._writable.clear()
        self._in_flight = NO_PAGES
        return left.gpas()


def _link(bundle: Bundle, *, another_follows: bool) -> Bundle:
    """The bundle as a link of the end section."""
    return Bundle.of(bundle.mbmd, bundle.pages, another_follows=another_follows)


def _export_statuses(
    command: ExportMem, result: Result, bundle: Bundle, pages: Gpas
) -> NDArray[np.uint8]:
    """GpaStatus per page, from the statuses and from the list that travels: both must say yes."""
    entries = entries_from_bytes(bundle.gpa_list)
    if not np.array_equal(entry_gpas(entries), pages):
        detail = f"the bundle lists other pages than the {pages.size} that were asked for"
        raise BackendError(command.name, result.status, result.status_name, detail)
    statuses = entry_results(command, result, pages.size).copy()
    dropped = entry_operations(entries) == GpaOperation.NOP
    statuses[dropped & (statuses == GpaStatus.SUCCESS)] = GpaStatus.SKIPPED
    return statuses
