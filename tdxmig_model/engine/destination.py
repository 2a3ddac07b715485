"""The destination side of a migration session: one generator per lifecycle event.

Records come from a peer that may be anybody.  `accept` judges whether a record may stand where it
stands; the event's generator judges what it holds.  Keys, counters, epochs and MACs are judged by
the TDX module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tdxmig_model.engine.commands import (
    STATUS_FATAL_BIT,
    Command,
    Gpas,
    ImportAbort,
    ImportCommit,
    ImportEnd,
    ImportMem,
    ImportStateImmutable,
    ImportStateTd,
    ImportStateVp,
    ImportTrack,
    Operation,
    Result,
    Send,
)
from tdxmig_model.engine.steps import (
    ALL_CAPABILITIES,
    RamBlock,
    attempt,
    bundle_of,
    check_sizes,
    entry_results,
    perform,
)
from tdxmig_model.errors import BackendError, PeerError, UsageError
from tdxmig_model.wire.extensions import (
    AbortToken,
    Capability,
    Committed,
    Failed,
    Hello,
    InOrderDone,
    PageRequest,
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
    EndOfPass,
    EndSection,
    EpochRecord,
    Footer,
    MemoryRecord,
    MultifdFlush,
    Record,
    SharedPage,
    StartSection,
)


@dataclass(frozen=True, slots=True, eq=False)
class ImportOutcome:
    """What became of a memory bundle: pages ``imported``, pages ``cancelled``, and pages that the
    module passed over (``skipped``), with the GpaStatus (uint8) of each of those."""

    imported: Gpas
    cancelled: Gpas
    skipped: Gpas
    statuses: NDArray[np.uint8]


_EVENTS: Final = {
    BundleType.MUTABLE_TD_STATE: "import_td_state",
    BundleType.MUTABLE_VCPU_STATE: "import_vcpu_state",
    BundleType.EPOCH_TOKEN: "import_start_token",
}


class DestinationEngine:
    """The destination engine of one migration session.

    ``pages``, ``vcpus`` and ``streams`` (forward streams) are the sizes of the TD that was
    prepared.  If the source opens with a HELLO, what it announces bounds what it may send.
    """

    def __init__(
        self,
        *,
        pages: int,
        vcpus: int,
        streams: int = 1,
        capabilities: Capability = ALL_CAPABILITIES,
        ram: RamBlock | None = None,
    ) -> None:
        self._ours = Hello(bytes(16), capabilities, pages, vcpus, streams)
        self.ram = ram or RamBlock()
        self.agreed = Capability(0)
        self.peer: Hello | None = None
        self.session_started = False
        self.start_token_imported = False
        self.source_abort: str | None = None
        self.committed = False
        self.pages_imported = 0
        self._immutable_seen = False
        self._session_open = False
        self._in_end_section = False
        self._end_seen = False
        self._td_seen = False
        self._vcpus_seen: set[int] = set()
        self._answer: Hello | None = None
        self._epoch = -1
        self._bundles = 0

    @property
    def announced(self) -> Hello:
        """Sizes that bound what the source may send: its HELLO's, or else those of our TD."""
        return self.peer or self._ours

    @property
    def memory_complete(self) -> bool:
        """True when every page that the source announced is here, or it announced nothing."""
        return self.peer is None or self.pages_imported >= self.peer.page_count

    # --- what may stand where --------------------------------------------------------------------

    def ready(self, record: Record) -> bool:
        """Whether a record that came on one of several channels has everything before it here.

        A token counts the bundles before it on all streams, and memory is of the epoch of the last
        token: so tokens, which travel on the first channel, are barriers across the channels.
        Source: TOTAL_MB and MIG_EPOCH of the MBMD; TDH.IMPORT.TRACK ends the import if it is short.
        """
        match record:
            case MemoryRecord(bundle=bundle):
                return self._epoch >= 0 and bundle.mbmd.mig_epoch <= self._epoch
            case EpochRecord(bundle) | (Bundle() as bundle):
                token = bundle.mbmd.bundle_type is BundleType.EPOCH_TOKEN
                return not token or bundle.mbmd.total_mb <= self._bundles + 1
            case _:
                return True

    def missing(self, record: Record) -> str:
        """What a record that is not ready waits for, as the end of a sentence."""
        mbmd = record.bundle.mbmd if isinstance(record, MemoryRecord | EpochRecord) else None
        if isinstance(record, Bundle):
            mbmd = record.mbmd
        if mbmd is None or mbmd.bundle_type is BundleType.MEM:
            epoch = "" if mbmd is None else f" {mbmd.mig_epoch}"
            return f"memory of epoch{epoch} waits for the token of its epoch"
        return f"a token counts {mbmd.total_mb - 1} bundles before it, {self._bundles} have arrived"

    def accept(self, record: Record) -> str | None:
        """Judge a record's place in the stream; returns the lifecycle event that it asks for.

        None: the record only frames others.  PeerError: it may not stand here.
        """
        if self.source_abort is not None:
            raise PeerError("the source sent a record after it had aborted")
        match record:
            case SourceAbort(reason):
                self._need(Capability.SOURCE_ABORT, "SOURCE_ABORT")
                self.source_abort = reason
                return "abort"
            case Hello():
                self._accept_hello(record)
                return "setup"
            case StartSection():
                self._expect(not self._immutable_seen, "a second immutable state")
                self._immutable_seen = True
                return "import_immutable"
            case Footer():
                self._expect(self._end_seen and not self._in_end_section, "a footer")
                return None
            case EndSection():
                self._expect(self._immutable_seen and not self._end_seen, "the end section")
                self._end_seen = self._in_end_section = True
                return None
            case Bundle():
                return self._accept_link(record)
            case EpochRecord():
                self._expect(self._immutable_seen and not self._end_seen, "an epoch token")
                return "import_epoch"
            case MemoryRecord():
                self._expect(self._immutable_seen and not self._in_end_section, "memory")
                if self._end_seen:
                    self._need(Capability.POST_COPY, "memory after the start token")
                return "import_memory"
            case SharedPage():
                # Passed over it would be lost without a word.
                raise PeerError(
                    f"the source sent shared memory (offset {record.offset:#x} of "
                    f"{record.block!r}), and this destination takes private memory only"
                )
            case MultifdFlush() | EndOfPass():
                self._expect(not self._in_end_section, "a mark of the RAM section")
                return None

    def _accept_hello(self, hello: Hello) -> None:
        self._expect(self.peer is None and not self._immutable_seen, "HELLO")
        self.agreed = self._ours.capabilities & hello.capabilities
        check_sizes(self._ours, hello, "source")
        self.peer = hello
        self._answer = replace(self._ours, session_id=hello.session_id)

    def _accept_link(self, bundle: Bundle) -> str:
        kind = bundle.mbmd.bundle_type
        self._expect(self._in_end_section, f"{kind.name} outside the end section")
        event = _EVENTS.get(kind)
        if event is None:
            raise PeerError(f"the end section holds {kind.name}, which does not belong there")
        if bundle.header.another_follows == (kind is BundleType.EPOCH_TOKEN):
            raise PeerError(
                f"the end section's {kind.name} says that "
                f"{'another' if bundle.header.another_follows else 'no other'} bundle follows; "
                "the start token ends the section"
            )
        match kind:
            case BundleType.MUTABLE_TD_STATE:
                self._expect(not self._td_seen, "a second TD state")
                self._td_seen = True
            case BundleType.MUTABLE_VCPU_STATE:
                self._expect(self._td_seen, "vCPU state before the TD state")
            case _:
                self._in_end_section = False
        return event

    def _expect(self, possible: bool, what: str) -> None:
        if not possible:
            raise PeerError(f"the source sent {what} {self._where()}")

    def _where(self) -> str:
        if self._in_end_section:
            return "inside the end section"
        if self._end_seen:
            return "after the end section"
        return "after the immutable state" if self._immutable_seen else "before the immutable state"

    def _need(self, capability: Capability, what: str) -> None:
        if capability not in self.agreed:
            raise PeerError(f"the source sent {what}, and {capability.name} is not agreed")

    # --- lifecycle events ------------------------------------------------------------------------

    def setup(self) -> Operation[None]:
        """Answer the source's HELLO, if it sent one, with what this side can do and holds."""
        if self._answer is not None:
            yield Send(self._answer)

    def import_immutable(self, bundle: Bundle) -> Operation[None]:
        """Start the migration session, and say so: from here on an abort token can exist."""
        mbmd = bundle.mbmd
        self._check_type(bundle, BundleType.IMMUTABLE_TD_STATE)
        if self.peer is not None and mbmd.num_forward_streams != self.peer.streams:
            raise PeerError(
                f"the immutable state names {mbmd.num_forward_streams} forward streams, "
                f"the HELLO {self.peer.streams}"
            )
        if mbmd.num_forward_streams > self._ours.streams:
            raise PeerError(
                f"the source has {mbmd.num_forward_streams} forward streams and this side "
                f"{self._ours.streams}; create as many here"
            )
        yield from self._import(
            ImportStateImmutable(bundle),
            hint="both sides need the keys of the same pre-migration",
        )
        self.session_started = True
        if Capability.RETURN_PATH in self.agreed:
            yield Send(SessionStarted())

    def import_epoch(self, bundle: Bundle) -> Operation[None]:
        """Begin an epoch."""
        self._check_type(bundle, BundleType.EPOCH_TOKEN)
        if bundle.mbmd.is_start_token:
            raise PeerError("the source sent the start token outside the end section")
        yield from self._import(ImportTrack(bundle))

    def import_memory(self, record: MemoryRecord) -> Operation[ImportOutcome]:
        """Import a bundle of pages on the stream that its MBMD names."""
        bundle = record.bundle
        self._check_type(bundle, BundleType.MEM)
        entries = entries_from_bytes(bundle.gpa_list)
        operations, gpas = entry_operations(entries), entry_gpas(entries)
        self._check_memory(record, gpas, operations)
        command = ImportMem(bundle.mbmd.migs_index, bundle)
        result = yield from self._import(command)
        statuses = entry_results(command, result, gpas.size)
        done = (statuses == GpaStatus.SUCCESS) & (operations != GpaOperation.NOP)
        cancels = operations == GpaOperation.CANCEL
        outcome = ImportOutcome(
            gpas[done & ~cancels], gpas[done & cancels], gpas[~done], statuses[~done]
        )
        first_time = done & (operations == GpaOperation.MIGRATE)
        self.pages_imported += int(np.count_nonzero(first_time)) - outcome.cancelled.size
        self._check_page_count(self.pages_imported)
        return outcome

    def import_td_state(self, bundle: Bundle) -> Operation[None]:
        """Import the TD state: no in-order page can follow it on the wire."""
        self._check_type(bundle, BundleType.MUTABLE_TD_STATE)
        yield from self._import(ImportStateTd(bundle))

    def import_vcpu_state(self, bundle: Bundle) -> Operation[int]:
        """Import the state of one vCPU; returns its index.  After the last one the source is told
        that nothing but the start token is missing."""
        self._check_type(bundle, BundleType.MUTABLE_VCPU_STATE)
        vcpu, most = bundle.mbmd.vp_index, self.announced.vcpu_count
        self._check_stream(bundle)
        if vcpu >= most:
            raise PeerError(f"the source sent the state of vCPU {vcpu} of {most} vCPUs")
        if vcpu in self._vcpus_seen:
            raise PeerError(f"the source sent the state of vCPU {vcpu} twice")
        yield from self._import(ImportStateVp(bundle, vcpu))
        self._vcpus_seen.add(vcpu)
        if len(self._vcpus_seen) == most and Capability.IN_ORDER_DONE in self.agreed:
            yield Send(InOrderDone())
        return vcpu

    def import_start_token(self, bundle: Bundle) -> Operation[None]:
        """Take the start token: everything of the in-order phase has to be here by now.

        PeerError: vCPU states or pages that the source announced never arrived.
        """
        self._check_type(bundle, BundleType.EPOCH_TOKEN)
        if not bundle.mbmd.is_start_token:
            raise PeerError("the source ended with an epoch token that is not the start token")
        if self.peer is not None:
            self._check_complete(self.peer)
        yield from self._import(ImportTrack(bundle))
        self.start_token_imported = True

    def commit(self) -> Operation[None]:
        """Let the TD run here.  From now on no abort token can be made."""
        yield from perform(ImportCommit())
        self.committed = True

    def end(self, digest: bytes = b"") -> Operation[None]:
        """End the session and say so; ``digest`` is empty or SHA-256 of the private memory.

        PeerError: pages that the source announced are not here; nothing was done.
        """
        if not self.memory_complete:
            raise PeerError(
                f"{self.pages_imported} of {self.announced.page_count} pages have arrived; "
                "the session cannot end before the rest"
            )
        yield from perform(ImportEnd())
        self.committed = True
        if Capability.RETURN_PATH in self.agreed:
            yield Send(Committed(digest))

    def abort(self, reason: str = "") -> Operation[bytes | None]:
        """Give the import up; returns the abort token (48 bytes) or None if there is no session.

        The token and the reason go to the source, unless it was the source that aborted.
        """
        token: bytes | None = None
        told = Capability.RETURN_PATH in self.agreed and self.source_abort is None
        if told:
            yield Send(Failed(reason))
        if self._session_open:
            command = ImportAbort()
            result = yield from perform(command)
            mbmd = bundle_of(command, result, BundleType.ABORT_TOKEN).mbmd
            token = mbmd.pack()
            if told:
                yield Send(AbortToken(mbmd))
        return token

    def cleanup(self) -> Operation[None]:
        """Forget the session.  Nothing is left to tell the module or the peer."""
        self._vcpus_seen.clear()
        yield from ()

    # --- between lifecycle events ----------------------------------------------------------------

    def request_pages(self, gpas: tuple[int, ...]) -> Operation[None]:
        """Ask the source for pages that the guest waits for, after the commit.

        UsageError: the source sends no memory after the start token.
        """
        if Capability.POST_COPY not in self.agreed:
            raise UsageError("the source sends no memory after the start token (POST_COPY)")
        yield Send(PageRequest(gpas))

    # --- parts -----------------------------------------------------------------------------------

    def _import(self, command: Command, *, hint: str = "") -> Operation[Result]:
        """Run an import that has to succeed, and note whether the module has a session after it."""
        result = yield from attempt(command)
        if isinstance(command, ImportStateImmutable):
            self._session_open = result.ok or bool(result.status & STATUS_FATAL_BIT)
        if not result.ok:
            raise BackendError(command.name, result.status, result.status_name, hint)
        self._bundles += 1
        if isinstance(command, ImportStateImmutable):
            self._epoch = 0
        elif isinstance(command, ImportTrack):
            self._epoch = command.bundle.mbmd.mig_epoch
        return result

    def _check_type(self, bundle: Bundle, expected: BundleType) -> None:
        if bundle.mbmd.bundle_type is not expected:
            raise PeerError(
                f"the source sent {bundle.mbmd.bundle_type.name} where {expected.name} belongs"
            )

    def _check_stream(self, bundle: Bundle) -> None:
        stream, streams = bundle.mbmd.migs_index, self.announced.streams
        if stream >= streams:
            raise PeerError(f"a bundle is on stream {stream}; there are {streams} streams")

    def _check_memory(
        self, record: MemoryRecord, gpas: Gpas, operations: NDArray[np.uint8]
    ) -> None:
        self._check_stream(record.bundle)
        if record.block != self.ram.name:
            raise PeerError(f"memory of RAM block {record.block!r}; this TD has {self.ram.name!r}")
        expected = self.ram.gpa(record.offset)
        if not gpas.size or int(gpas[0]) != expected:
            found = f"GPA {int(gpas[0]):#x}" if gpas.size else "no GPA"
            raise PeerError(
                f"a memory record says offset {record.offset:#x} (GPA {expected:#x}), "
                f"its bundle begins with {found}"
            )
        if gpas.size > 1:
            self._need(Capability.BATCH, f"{gpas.size} pages in one bundle")
        if (operations == GpaOperation.CANCEL).any():
            self._need(Capability.CANCEL, "CANCEL")
        if not self._end_seen:
            new = int(np.count_nonzero(operations == GpaOperation.MIGRATE))
            self._check_page_count(self.pages_imported + new)

    def _check_page_count(self, count: int) -> None:
        most = self.announced.page_count
        if count > most:
            raise PeerError(f"the source sent {count} different pages and announced {most}")

    def _check_complete(self, hello: Hello) -> None:
        missing = hello.vcpu_count - len(self._vcpus_seen)
        if missing:
            raise PeerError(f"the start token came before the state of {missing} vCPUs")
        if Capability.POST_COPY not in self.agreed and not self.memory_complete:
            raise PeerError(
                f"the start token came after {self.pages_imported} of {hello.page_count} pages"
            )
