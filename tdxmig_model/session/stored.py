"""Migration to a file and, later, from it: sessions without a return path.

Where nobody answers, the store does in the destination's place.  It says what a loader of this
version can take; and when everything before the start token is safely on the disk, with room for
the token, it says that the import may begin.  Only then the start token is made.

What is lost without a return path: the destination cannot refuse before the source has given the
TD away, no abort token can come back, and from the start token on the TD is in the file alone.  A
file that is damaged, or whose loading fails, is a TD that is gone.  A stop or a full disk before
the start token leaves the source as it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from tdxmig_model.engine import SourceEngine
from tdxmig_model.engine.commands import Backend
from tdxmig_model.errors import PeerError, TdxmigError
from tdxmig_model.session.common import Ending, Steps
from tdxmig_model.session.destination import DestinationSession
from tdxmig_model.session.source import SourceSession
from tdxmig_model.trace import TraceWriter
from tdxmig_model.transport.file import FileReader, FileWriter
from tdxmig_model.wire.extensions import Capability, Hello, SessionStarted
from tdxmig_model.wire.records import Record

STORED_CAPABILITIES: Final = Capability.BATCH | Capability.CANCEL
"""What the records of a stored stream may use; whoever loads it has no choice."""

TOKEN_ROOM: Final = 1 << 16
"""Bytes that are reserved for the start token and the end of the stream, which need far fewer."""


class StoredSourceSession(SourceSession):
    """Migrates the TD behind `backend` into the file of `transport`; ends as STORED."""

    transport: FileWriter

    def __init__(
        self, backend: Backend, transport: FileWriter, trace: TraceWriter, **options: Any
    ) -> None:
        super().__init__(backend, transport, trace, **options)
        hello = self.engine.hello
        self.engine = SourceEngine(
            self.session_id,
            pages=hello.page_count,
            vcpus=hello.vcpu_count,
            streams=hello.streams,
            capabilities=STORED_CAPABILITIES,
        )

    def _await_hello(self) -> Steps[None]:
        yield from ()
        ours = self.engine.hello
        self.engine.receive(
            Hello(
                self.session_id, STORED_CAPABILITIES, ours.page_count, ours.vcpu_count, ours.streams
            )
        )
        batch = min(self.options.batch, self.engine.max_batch)
        self.precopy.limits = replace(self.precopy.limits, batch=batch)

    def _await_confirmation(self) -> Steps[None]:
        yield from ()  # not yet: it is given for what is stored

    def _await_in_order(self) -> Steps[None]:
        yield from ()
        self.transport.reserve(TOKEN_ROOM)
        self.transport.sync()
        self.trace.note(
            "no return path: what is stored stands for the destination, and no abort token can "
            "come back"
        )
        self._take(SessionStarted())

    def _await_commit(self) -> Steps[None]:
        yield from ()
        self.transport.finish()
        self.outcome.ending = Ending.STORED
        self.outcome.sentence = (
            f"The TD is stored in {self.transport.path}, and whoever loads that file runs it; the "
            "source is in POST_EXPORT, where it can neither run it nor take it back."
        )

    def _read(self) -> None:
        """Nothing can arrive."""

    def _give_up(self, cause: TdxmigError) -> Steps[None]:
        yield from super()._give_up(cause)
        if not self.engine.start_token_sent:
            self.transport.discard()

    def _abort_with_peer(self) -> Steps[None]:
        """After the start token there is nobody to ask."""
        yield from ()
        self.outcome.ending = Ending.UNDECIDED
        self.outcome.sentence = (
            f"The source gave its start token away, and {self.transport.path} is not known to be "
            "stored: the source stays in POST_EXPORT and must not run the TD, because somebody "
            "may load what is on the disk. Without a return path no abort token can come; if "
            "nothing can be loaded, destroy the TD."
        )


class StoredDestinationSession(DestinationSession):
    """Loads a TD from the file of `transport` into the one behind `backend`."""

    transport: FileReader

    def _flush_outbox(self) -> None:
        """There is no way back for what the import makes."""
        if self._outbox:
            self.trace.note("not sent: a file has no return path")
            self._outbox.clear()

    def _import(self, record: Record) -> None:
        super()._import(record)
        if self.engine.agreed & ~STORED_CAPABILITIES:
            raise PeerError(f"{self.transport.peer} was not made for a file: it expects answers")

    def _give_up(self, cause: TdxmigError) -> Steps[None]:
        yield from super()._give_up(cause)
        if not self.runnable:
            self.outcome.sentence = (
                f"Loading {self.transport.path} failed, and the destination cannot run the TD; "
                "the source cannot be told, so this file was the only place where the TD was, "
                "unless the file is whole elsewhere."
            )
