"""The source of a migration session: live pre-copy, pause, state, start token, every way back."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import monotonic
from typing import ClassVar, Final

from tdxmig_model.engine import (
    Decision,
    ExportOutcome,
    PreCopy,
    PreCopyLimits,
    SourceEngine,
    WhenNotConverging,
    drive,
)
from tdxmig_model.engine.commands import Backend, Command, Gpas, Result, Send
from tdxmig_model.errors import BackendError, PeerError, PeerLost, TdxmigError, UsageError
from tdxmig_model.session.common import (
    DECISION_TIMEOUTS,
    RECEIVE_SIZE,
    Activity,
    Ending,
    Hooks,
    NotConverging,
    PeerGaveUp,
    SessionOptions,
    Side,
    Steps,
)
from tdxmig_model.trace import TraceWriter
from tdxmig_model.transport.base import Readable, Transport
from tdxmig_model.wire.constants import MAX_ENTRIES, PAGE_SIZE
from tdxmig_model.wire.extensions import (
    AbortToken,
    Capability,
    Committed,
    Failed,
    InOrderDone,
    PageRequest,
    ReturnMessage,
    ReturnPathParser,
    SessionStarted,
    SourceAbort,
)
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import encode

_RETURN_ONLY: Final = (AbortToken, Committed, Failed, InOrderDone, PageRequest, SessionStarted)


class SourceSession(Side):
    """Migrates the TD behind `backend` to whoever is at the other end of `transport`.

    `gpas` are its private pages.  `session_id` is 16 bytes, drawn if not given.
    """

    side: ClassVar[str] = "source"

    def __init__(
        self,
        backend: Backend,
        transport: Transport,
        trace: TraceWriter,
        *,
        gpas: Gpas,
        vcpus: int,
        streams: int = 1,
        more_channels: Sequence[Transport] = (),
        session_id: bytes | None = None,
        options: SessionOptions | None = None,
        hooks: Hooks | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        super().__init__(
            backend,
            transport,
            trace,
            pages=len(gpas),
            vcpus=vcpus,
            streams=streams,
            more_channels=more_channels,
            options=options,
            hooks=hooks,
            clock=clock,
        )
        self.session_id = secrets.token_bytes(16) if session_id is None else session_id
        self.engine = SourceEngine(self.session_id, pages=len(gpas), vcpus=vcpus, streams=streams)
        self.precopy = PreCopy(
            gpas,
            PreCopyLimits(
                batch=self.options.batch,
                epochs=max(1, self.options.max_epochs),
                remaining=self.options.converged_pages,
                downtime=self.options.downtime_limit,
            ),
        )
        self.outcome.iterations = self.precopy.iterations
        self._batches = 0
        self._bytes_out = 0
        self._return_path = ReturnPathParser()
        self._messages: deque[ReturnMessage] = deque()
        self._decision_end: float | None = None

    @property
    def _engine(self) -> object:
        return self.engine

    # --- the good run ----------------------------------------------------------------------------

    def _migrate(self) -> Steps[None]:
        self._fire("setup")
        yield from self._await_hello()
        self._fire("export_immutable")
        yield Activity.MOVED
        yield from self._await_confirmation()
        decision = yield from self._export_live()
        self._enter("pause")
        pausing = self.clock()
        self._fire("pause")
        self.outcome.paused_at = pausing
        yield from self._export_paused(decision)
        self._enter("state")
        self._fire("export_td_state")
        for vcpu in range(self.vcpus):
            self._fire("export_vcpu_state", {"vcpu": vcpu}, vcpu=vcpu)
            yield Activity.MOVED
        yield from self._await_in_order()
        self._check_peer()
        self._fire("finish_epochs")
        yield from self._export_after_start()
        self.hooks.exported()
        self._enter("commit")
        yield from self._await_commit()

    def _await_hello(self) -> Steps[None]:
        """Without a return path the destination could never give the TD back."""
        while self.engine.peer is None:
            self._take((yield from self._receive("HELLO")))
        if Capability.RETURN_PATH not in self.engine.agreed:
            raise PeerError(f"{self.transport.peer} has no return path, so it could not give up")
        batch = min(self.options.batch, self.engine.max_batch)
        self.precopy.limits = replace(self.precopy.limits, batch=batch)

    def _export_live(self) -> Steps[Decision]:
        """Epochs while the guest runs, until few enough pages are left."""
        decision = Decision.NEXT_EPOCH if self.options.max_epochs else Decision.EPOCH_LIMIT
        while decision is Decision.NEXT_EPOCH:
            yield from self._export_epoch("pre-copy", live=True)
            decision = self.precopy.decide()
        self.trace.note(f"pre-copy ends: {decision}", left=self.precopy.later)
        gives_up = self.options.not_converging is WhenNotConverging.ABORT
        if decision is Decision.EPOCH_LIMIT and gives_up:
            raise NotConverging(
                f"the pre-copy did not converge: {self.precopy.later} pages are left after "
                f"{self.precopy.epoch} epochs"
            )
        return decision

    def _export_paused(self, decision: Decision) -> Steps[None]:
        """What has to arrive before the start token."""
        post_copy = self.options.not_converging is WhenNotConverging.POST_COPY
        agreed = Capability.POST_COPY in self.engine.agreed
        if decision is Decision.EPOCH_LIMIT and post_copy and agreed:
            yield from self._cancel_stale()
        else:
            yield from self._export_rest()
        if len(self.channels) > 1:
            # The TD state counts no bundles as a token does: no page may be on its way behind it.
            self._start_epoch()

    def _cancel_stale(self) -> Steps[None]:
        """Let the destination drop what it has in an old version; it comes after the start token.

        An epoch of its own, because no page is cancelled in the epoch in which it was exported.
        """
        self._start_epoch()
        self._enter("cancel")
        waiting = self.precopy.waiting()
        stale = waiting[self.engine.was_exported(waiting)]
        size = self.precopy.limits.batch
        can_cancel = Capability.CANCEL in self.engine.agreed
        for at in range(0, stale.size, size):
            self._check_peer()
            batch = stale[at : at + size]
            if can_cancel:
                outcome = self._fire("cancel_page", self._on_a_stream(batch))
                batch = outcome.unsent
            if batch.size:
                self._export_stale(batch)
            yield Activity.MOVED

    def _export_stale(self, batch: Gpas) -> None:
        """What cannot be cancelled has to be sent again before the start token."""
        self._export_batch(self.precopy.withdraw(batch))

    def _export_after_start(self) -> Steps[None]:
        """Post-copy: what is left, and first what the guest at the destination waits for.

        Nothing stops this but the destination: it may run the guest already, which needs the rest.
        """
        self._no_way_back = not self.precopy.done
        before = self.precopy.exports
        round_began = -1
        while not self.precopy.done:
            if not self.precopy.remaining:  # some pages refused export and are tried again
                if self.precopy.exports == round_began:
                    raise _no_progress(self.precopy.later)
                round_began = self.precopy.exports
                self.precopy.hand_over()
            batch = self.precopy.next_batch()
            assert batch is not None
            self._export_batch(batch)
            self.outcome.pages_after_start = self.precopy.exports - before
            self._enter("post-copy")
            yield Activity.MOVED
            self._check_peer()
        self._no_way_back = False

    def _export_rest(self) -> Steps[None]:
        """The last epoch, paused: an epoch of its own even if nothing is left to send."""
        yield from self._export_epoch("last epoch", live=False)
        while not self.precopy.done:
            if self.precopy.stalled:
                raise _no_progress(self.precopy.later)
            yield from self._export_epoch("last epoch", live=False)

    def _export_epoch(self, phase: str, *, live: bool) -> Steps[None]:
        began, before = self.clock(), self._bytes_out
        self.precopy.next_epoch()
        self._start_epoch()
        self._enter(phase)
        while (batch := self.precopy.next_batch()) is not None:
            self._check_peer()
            self._export_batch(batch)
            if live:
                self.run_guest(self._slice(batch))
            self._enter(phase)
            yield Activity.MOVED
            if live:
                yield from self._pace(began, before)
        self.precopy.end_epoch(self.clock() - began, self._bytes_out - before, live=live)

    def _start_epoch(self) -> None:
        self._fire("start_epoch")
        self.outcome.epochs += 1

    def _pace(self, began: float, before: int) -> Steps[None]:
        """Keep to the bandwidth limit since `began`, when `before` bytes had been sent.

        The guest does not run meanwhile: its time is counted in pages (`guest_budget`).
        """
        limit = self.options.bandwidth_limit
        while limit is not None and self._bytes_out - before > limit * (self.clock() - began):
            self._check_stop(None)
            self._check_peer()
            yield Activity.WAITING

    def _slice(self, batch: Gpas) -> int:
        """Guest instructions of each vCPU for this batch, at least one."""
        return -(-self.options.guest_budget * batch.size // MAX_ENTRIES)

    def _export_batch(self, batch: Gpas) -> None:
        outcome: ExportOutcome = self._fire("export_memory", self._on_a_stream(batch))
        self.precopy.sent(batch, outcome.unsent)
        self.outcome.pages_moved = self.precopy.exports

    def _on_a_stream(self, batch: Gpas) -> dict[str, object]:
        """Bundles go to the forward streams in turn."""
        stream = self._batches % self.streams
        self._batches += 1
        return {"gpas": batch, "stream": stream}

    def _on_ept_violation(self, vcpu: int, gpa: int) -> bool:
        """The guest wrote a write-blocked page: let it, and send the page again later."""
        page = gpa & ~(PAGE_SIZE - 1)
        drive(self.engine.unblock_page(page), self._execute, self._outbox.append)
        self.precopy.dirty(page)
        return True

    def _execute(self, command: Command) -> Result:
        result = super()._execute(command)
        if result.ok and result.bundle is not None:
            self.outcome.bundles += 1
        return result

    # --- the return path -------------------------------------------------------------------------

    def _await_confirmation(self) -> Steps[None]:
        """A destination that could not make an abort token must not get the TD."""
        while not self.engine.session_started:
            self._take((yield from self._receive("SESSION_STARTED")))

    def _await_in_order(self) -> Steps[None]:
        """The start token is not given away without a sign that the destination lives and holds
        everything before it."""
        if Capability.IN_ORDER_DONE not in self.engine.agreed:
            return
        while not self.engine.in_order_done:
            self._take((yield from self._receive("IN_ORDER_DONE")))

    def _await_commit(self) -> Steps[None]:
        end = self._decide_by()
        while self.engine.committed is None:
            self._take((yield from self._receive("COMMITTED", end)))
        self.outcome.ending = Ending.MIGRATED
        self.outcome.sentence = (
            "The destination has the TD; the source is in POST_EXPORT, where it can neither run "
            "it nor take it back."
        )

    def _decide_by(self) -> float:
        """Until when the decision about the start token is waited for: one deadline for all of it,
        so that a destination that keeps talking does not keep the source."""
        if self._decision_end is None:
            wait = DECISION_TIMEOUTS * self.options.peer_timeout
            self._decision_end = self.clock() + wait
        return self._decision_end

    def _receive(self, what: str, end: float | None = None) -> Steps[ReturnMessage]:
        """The next message.  PeerLost if there is none by `end`, or for `peer_timeout` seconds."""
        began = self.clock()
        end = began + self.options.peer_timeout if end is None else end
        while True:
            self._read()
            if self._messages:
                return self._messages.popleft()
            self._check_stop(None)
            if self.clock() >= end:
                raise PeerLost(f"{self.transport.peer} sent no {what} within {end - began:g} s")
            yield Activity.WAITING

    def _read(self) -> None:
        """Take in what has arrived, without waiting; what was read is acted on before more."""
        while not self._messages and self.transport.poll(0.0):
            self._messages.extend(self._return_path.records(self.transport.recv(RECEIVE_SIZE)))

    def _check_peer(self) -> None:
        """Between events: did the destination say something, or go away?"""
        self._read()
        while self._messages:
            self._take(self._messages.popleft())
            self._read()

    def _take(self, message: ReturnMessage) -> None:
        """Act on a message; PeerError for what ends the session."""
        event = self.engine.receive(message)
        while self.engine.requested:
            asked = self.precopy.requested(self.engine.requested.pop())
            self.outcome.pages_requested += asked
        if event == "confirm_import":
            self.machine.assume(confirmation=True)
            self._fire(event)
        elif self.engine.failure is not None:
            raise PeerGaveUp(f"the destination failed: {self.engine.failure}")
        elif self.engine.abort_token is not None:
            raise PeerGaveUp("the destination gave up and sent its abort token")

    # --- the forward path ------------------------------------------------------------------------

    def _encode(self, send: Send) -> Sequence[Readable]:
        if isinstance(send.record, _RETURN_ONLY):
            raise UsageError(f"the source sends no {type(send.record).__name__}")
        buffers = encode(send.record)
        self._bytes_out += sum(len(buffer) for buffer in buffers)
        return buffers

    # --- the ways back ---------------------------------------------------------------------------

    def _give_up(self, cause: TdxmigError) -> Steps[None]:
        self._enter("abort")
        if isinstance(cause, PeerLost):
            cause = self._last_word(cause)
            self.outcome.cause = str(cause)
        match self.op_state:
            case "LIVE_EXPORT" | "PAUSED_EXPORT":
                self._abort_alone(cause)
            case "POST_EXPORT":
                yield from self._abort_with_peer()
            case _:
                self._say_farewell(cause)

    def _last_word(self, lost: PeerLost) -> TdxmigError:
        """What the destination said before the connection ended tells more than the end of it."""
        if self.engine.start_token_sent:
            return lost  # its last word is the decision, which is awaited in any case
        try:
            self._check_peer()
        except PeerGaveUp as word:
            return word
        except TdxmigError:
            return lost
        return lost

    def _say_farewell(self, cause: TdxmigError) -> None:
        """Nothing was exported, so there is nothing to take back."""
        self.outcome.sentence = (
            "The migration ended before the source had exported anything; it still runs the TD."
        )
        if Capability.SOURCE_ABORT in self.engine.agreed:
            self._outbox.append(Send(SourceAbort(str(cause))))
            self._flush_outbox()

    def _abort_alone(self, cause: TdxmigError) -> None:
        """Before the start token the source takes the TD back without asking."""
        left: Gpas = self._fire("abort", {"reason": str(cause)})
        self._note_left(left)
        self.run_guest(self.options.guest_budget)
        self.outcome.sentence = (
            "The source aborted the export before its start token and runs the TD again; "
            "nothing that the destination got can become a running TD."
        )

    def _abort_with_peer(self) -> Steps[None]:
        """After the start token the destination decides; wait for what it says."""
        lost = ""
        while self.engine.committed is None and not lost:
            lost = yield from self._await_decision()
            if self.engine.abort_token is not None and self._take_back():
                return
        if self.engine.committed is not None:
            self.outcome.ending = Ending.MIGRATED
            self.outcome.sentence = (
                "The destination had taken the TD over before anything could be stopped; the "
                "source stays in POST_EXPORT."
            )
            return
        self.outcome.ending = Ending.UNDECIDED
        self.outcome.sentence = (
            f"The source gave its start token away and then lost the destination ({lost}): it "
            "stays in POST_EXPORT and must not run the TD, because the destination may. An "
            "abort token of that destination would bring the TD back here; if the destination "
            "runs it, destroy this one."
        )

    def _take_back(self) -> bool:
        """Show the module the abort token; False if it is none, then a genuine one may follow."""
        self.machine.assume(abort_token=True)
        try:
            left: Gpas = self._fire("abort_with_token")
        except PeerError as refused:
            self.engine.abort_token = None
            self.machine.assume(abort_token=False)
            self.trace.note(str(refused))
            return False
        self._note_left(left)
        self.run_guest(self.options.guest_budget)
        self.outcome.sentence = (
            "The destination gave up and proved it with its abort token; the source took the "
            "TD back and runs it again."
        )
        return True

    def _await_decision(self) -> Steps[str]:
        """Wait for COMMITTED or an abort token; why there was neither, or the empty string.

        What cannot be said now is passed over: an abort token after it is as genuine.
        """
        why, end = "", self._decide_by()
        while self.engine.abort_token is None and self.engine.committed is None:
            late = self.clock() >= end  # what has arrived by now is still read
            relays = self.hooks.relays()  # asked first: what it gave until now is read below
            try:
                message = self._last_words()
            except TdxmigError as error:
                why, self._cannot_read = str(error), True
                message = None
            if message is None and (late or (self._cannot_read and not relays)):
                return why or "it sent no decision in time"
            if message is None:
                yield Activity.WAITING
                continue
            try:
                self.engine.receive(message)
            except PeerError as error:
                why = str(error)
                if late:
                    return why
        return ""

    def _last_words(self) -> ReturnMessage | None:
        """What the destination says, or an abort token of it that came another way."""
        token = self.hooks.relayed_abort_token()
        if token is not None:
            return AbortToken(Mbmd.unpack(token))
        if not self._messages and not self._cannot_read:
            self._read()
        return self._messages.popleft() if self._messages else None

    def _note_left(self, left: Gpas) -> None:
        if left.size:
            self.trace.note("pages that could not be restored block the next session", gpas=left)

    def _enter(self, phase: str) -> None:
        self._progress(
            phase,
            epoch=self.precopy.epoch,
            dirty=self.precopy.remaining + self.precopy.later,
        )


def _no_progress(pages: int) -> BackendError:
    return BackendError("export_mem", 0, "NO_PROGRESS", f"{pages} pages refuse export")
