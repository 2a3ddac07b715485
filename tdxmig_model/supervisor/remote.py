"""One side of a migration in this process; the other side is another process, on any host.

The source connects twice: for premigration, which exchanges the migration keys, and then for the
migration stream.  To a file it cannot talk: there the keys are sealed for the destination and lie
beside the stream (`sealed`).  Unlike in a supervised run nobody relays an abort token or judges
both traces together; each side judges its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Final

from tdxmig_model.backend.soft.backend import SoftBackend, soft_destination, soft_source
from tdxmig_model.certificates import load_identity
from tdxmig_model.errors import PeerError, PeerLost, TdxmigError, UsageError
from tdxmig_model.premigration import Identity, MigrationKey, Role, Versions, exchange
from tdxmig_model.session import Ending, Hooks, Progress, Side
from tdxmig_model.supervisor.channels import accept_channels, readable
from tdxmig_model.supervisor.child import SideReport
from tdxmig_model.supervisor.digests import Digests
from tdxmig_model.supervisor.options import At, RunOptions, trace_path
from tdxmig_model.supervisor.programs import (
    PREMIGRATION_TIMEOUTS,
    SLICE,
    destination_session,
    module_profile,
    never_began,
    source_session,
    try_what_is_refused,
)
from tdxmig_model.supervisor.result import TraceVerdict
from tdxmig_model.supervisor.run import judge_written
from tdxmig_model.supervisor.signals import StopSignals
from tdxmig_model.supervisor.stored import StoredFile
from tdxmig_model.supervisor.tracefiles import reserved
from tdxmig_model.trace import TraceWriter
from tdxmig_model.transport import Address, Listener, TlsFiles, Transport, connect, secure

LOCAL_NAME: Final = "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where and with whom: the address, our certificates, and how long to wait for the peer.

    `identity` is the directory with the certificates for premigration (see `certificates`).  `tls`
    are those of the stream, none for a plain one; `peer_name` is the name in the server's
    certificate, by default the host of the address.  `wait` is in seconds.
    """

    address: Address
    identity: Path
    tls: TlsFiles | None = None
    peer_name: str | None = None
    wait: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.wait < float("inf"):
            raise UsageError(f"a wait of {self.wait:g} s: it is positive and finite")
        if self.tls is not None and self.address.kind == "file":
            raise UsageError(f"{self.address} is a file: TLS is for connections")

    @property
    def server_name(self) -> str:
        """What the certificate of the server has to bear."""
        return self.peer_name or self.address.host or LOCAL_NAME


@dataclass(slots=True)
class SideRun:
    """How this side ran: its report, its trace, and the verdict on it."""

    side: str
    options: RunOptions
    meeting: Meeting
    report: SideReport
    verdict: TraceVerdict
    trace: Path | None = None
    interrupted: bool = False


@dataclass(slots=True)
class _Watch:
    """What asks this side to stop, and whom it tells."""

    side: str
    options: RunOptions
    signals: StopSignals
    on_progress: Callable[[Progress], None]
    began: float = field(default_factory=monotonic)

    def stopped(self) -> str | None:
        """Why to stop, or None."""
        if self.signals.reason:
            return self.signals.reason
        if monotonic() - self.began > self.options.seconds:
            return f"the {self.side} took longer than {self.options.seconds:g} s"
        return None

    def check(self) -> None:
        """PeerLost: something asks to stop."""
        if (reason := self.stopped()) is not None:
            raise PeerLost(f"the peer never connected: {reason}")


class _RemoteHooks(Hooks):
    def __init__(self, watch: _Watch, exported: Callable[[], None] = lambda: None) -> None:
        self._watch = watch
        self._exported = exported

    def stop_requested(self, event: str | None) -> str | None:
        here = At(self._watch.side, event) if event is not None else None
        if here is not None and here == self._watch.options.stop_at:
            return f"a stop was requested before {here}"
        return self._watch.stopped()

    def progress(self, progress: Progress) -> None:
        self._watch.on_progress(progress)

    def exported(self) -> None:
        self._exported()


def send_td(
    options: RunOptions,
    meeting: Meeting,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    signals: StopSignals | None = None,
) -> SideRun:
    """Build a TD and migrate it to whoever proves to be the destination at the address.

    A migration that fails is a result.  UsageError: it could not be tried.
    """
    return _run_side("source", _send, options, meeting, on_progress, signals)


def receive_td(
    options: RunOptions,
    meeting: Meeting,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    signals: StopSignals | None = None,
) -> SideRun:
    """Listen at the address, or load its file, and take a TD over from the source.

    A migration that fails is a result, also if nobody came.  UsageError: it could not be tried.
    """
    return _run_side("destination", _receive, options, meeting, on_progress, signals)


@dataclass(frozen=True, slots=True)
class _Party:
    """Who we are, what we were told to do, and where the trace goes."""

    options: RunOptions
    meeting: Meeting
    identity: Identity
    peer_certificate: bytes
    watch: _Watch
    traces: Path

    def trace(self, side: str, session_id: bytes) -> TraceWriter:
        return TraceWriter(trace_path(self.traces, side), side, session_id)


def _run_side(
    side: Role,
    program: Callable[[_Party], SideReport],
    options: RunOptions,
    meeting: Meeting,
    on_progress: Callable[[Progress], None],
    signals: StopSignals | None,
) -> SideRun:
    _check_offered(options)
    own = StopSignals() if signals is None else None
    with own or nullcontext(), _traces(options.trace_dir) as traces:
        heard = signals or own
        assert heard is not None
        identity, peer_certificate = load_identity(meeting.identity, side)
        if meeting.tls is not None:
            meeting.tls.context(server=side == "destination")  # refused before anything is built
        _check_memory(options)
        watch = _Watch(side, options, heard, on_progress)
        party = _Party(options, meeting, identity, peer_certificate, watch, traces)
        report = program(party)
        path = trace_path(traces, side)
        verdict = _judge(side, path, report, options, heard)
        kept = path if options.trace_dir is not None and report.session else None
        return SideRun(side, options, meeting, report, verdict, kept, bool(heard.count))


def _check_offered(options: RunOptions) -> None:
    """What only a supervised run has: here nobody tells one side what the other was asked for."""
    if options.streams > 1:
        raise UsageError(f"{options.streams} streams: send and receive use one connection")
    if options.may_post_copy:
        raise UsageError("post-copy: send and receive move all memory before the start")


@contextmanager
def _traces(kept: Path | None) -> Iterator[Path]:
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="tdxmig-") as made:
            yield Path(made)
        return
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot use {kept} for traces: {error.strerror}") from error
    with reserved(kept):
        yield kept


def _check_memory(options: RunOptions) -> None:
    """A TD is real memory of this host; running out of it would kill somebody else."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if options.memory > there:
        raise UsageError(
            f"a TD of {options.memory >> 20} MiB does not fit into the {there >> 20} MiB of this "
            "host; choose less memory"
        )


def _judge(
    side: str, path: Path, report: SideReport, options: RunOptions, signals: StopSignals
) -> TraceVerdict:
    if not report.session:
        return TraceVerdict(False, False, reason="no trace was written: no session began")
    if report.trace_failure is not None:
        return TraceVerdict(False, False, reason=report.trace_failure)
    verdict = signals.unless_stopped(lambda: judge_written({side: path}, [report], options))
    return verdict or TraceVerdict(False, False, reason=signals.reason)


# --- the source ----------------------------------------------------------------------------------


def _send(party: _Party) -> SideReport:
    options, meeting = party.options, party.meeting
    stored = StoredFile(Path(meeting.address.path)) if meeting.address.kind == "file" else None
    if stored is not None:
        stored.check_free()
    backend = soft_source(
        options.pages,
        vcpus=options.vcpus,
        workers=options.workers,
        guest=options.guest,
        profile=module_profile(options),
        seed=options.seed,
    )
    transport: Transport
    try:
        if stored is not None:
            transport, session_id = stored.create(backend, party.identity, party.peer_certificate)
        else:
            session_id = _premigrate_as_source(party, backend)
            transport = _connect_stream(party)
    except PeerError as error:
        return never_began("source", backend, error)
    digests = Digests(backend)
    with party.trace("source", session_id) as trace:
        session = source_session(
            backend,
            transport,
            trace,
            gpas=backend.page_gpas(),
            vcpus=options.vcpus,
            session_id=session_id,
            options=options.session_options(),
            hooks=_RemoteHooks(party.watch, digests.begin),
        )
        report = _report(session)
        if report.outcome.op_state == "POST_EXPORT":
            report.probes = try_what_is_refused(session)
        elif stored is not None:
            stored.remove_keys()
        report.steps_checked = session.enforcer.steps_checked
    report.trace_failure = trace.failure
    report.memory_digest, report.vcpu_digests = digests.memory, digests.vcpus
    return report


def _report(session: Side) -> SideReport:
    outcome = session.run()
    return SideReport(outcome, session=session.trace.session, ended_at=monotonic())


def _premigrate_as_source(party: _Party, backend: SoftBackend) -> bytes:
    """Keys go over a connection of their own; the destination may have to begin to listen."""
    meeting, limit = party.meeting, party.options.peer_timeout
    plain = connect(meeting.address, meeting.wait, retry=True)
    with closing(plain.detach()) as connection:
        agreement = exchange(
            "source",
            connection,
            party.identity,
            party.peer_certificate,
            MigrationKey(backend.read_migration_encryption_key()),
            Versions(),
            PREMIGRATION_TIMEOUTS * limit,
            party.watch.stopped,
        )
    backend.write_migration_decryption_key(agreement.peer_key.take())
    return agreement.session_id


def _connect_stream(party: _Party) -> Transport:
    meeting, limit = party.meeting, party.options.peer_timeout
    try:
        plain = connect(meeting.address, limit)
    except UsageError as error:  # it was there a moment ago
        raise PeerLost(str(error)) from error
    if meeting.tls is None:
        return plain
    return secure(
        plain,
        meeting.tls,
        server=False,
        peer_name=meeting.server_name,
        timeout=limit,
        stopped=party.watch.stopped,
    )


# --- the destination -----------------------------------------------------------------------------


def _receive(party: _Party) -> SideReport:
    options, meeting = party.options, party.meeting
    if meeting.address.kind == "file":
        stored = StoredFile(Path(meeting.address.path))
        stored.check_whole()
        backend = _empty_td(options)
        try:
            transport, session_id = stored.open(backend, party.identity, party.peer_certificate)
        except PeerError as error:
            return never_began("destination", backend, error)
        with stored.claimed() as claim:
            report = _import(party, backend, transport, session_id)
            claim.used = report.outcome.ending is Ending.MIGRATED
        return report
    backend = _empty_td(options)  # first, because a source that is accepted does not wait for it
    with Listener(meeting.address) as listener:
        try:
            session_id = _premigrate_as_destination(party, backend, listener)
            found, _ = accept_channels(
                listener,
                1,
                session_id,
                patience=options.patience,
                timeout=options.peer_timeout,
                check=party.watch.check,
                tls=meeting.tls,
            )
        except PeerError as error:
            return never_began("destination", backend, error)
    return _import(party, backend, found, session_id)


def _empty_td(options: RunOptions) -> SoftBackend:
    return soft_destination(
        options.pages,
        vcpus=options.vcpus,
        workers=options.workers,
        profile=module_profile(options),
    )


def _import(
    party: _Party, backend: SoftBackend, transport: Transport, session_id: bytes
) -> SideReport:
    options = party.options
    with party.trace("destination", session_id) as trace:
        session = destination_session(
            backend,
            transport,
            trace,
            pages=options.pages,
            vcpus=options.vcpus,
            options=options.session_options(),
            hooks=_RemoteHooks(party.watch),
        )
        report = _report(session)
        if report.outcome.ending is Ending.MIGRATED:
            digests = Digests(backend)
            digests.begin()
            report.memory_digest, report.vcpu_digests = digests.memory, digests.vcpus
            report.guest_instructions = session.run_guest(SLICE)
        report.steps_checked = session.enforcer.steps_checked
    report.trace_failure = trace.failure
    return report


def _premigrate_as_destination(party: _Party, backend: SoftBackend, listener: Listener) -> bytes:
    """Pre-migrate with whoever proves to be the source; others may have connected before it.

    PeerLost: nobody came in time.  PeerError: somebody came, and this is what was wrong.
    """
    end = monotonic() + party.meeting.wait
    problem: TdxmigError | None = None
    while True:
        party.watch.check()
        if monotonic() >= end:
            raise problem or PeerLost(
                f"{listener.address}: no source came within {party.meeting.wait:g} s; start tdxmig "
                "send there, or allow more time with --wait"
            )
        if not readable(listener, 100):
            continue
        try:
            # A key is used up by each attempt, so each has a new one.
            with closing(listener.accept(0.0).detach()) as plain:
                agreement = exchange(
                    "destination",
                    plain,
                    party.identity,
                    party.peer_certificate,
                    MigrationKey(backend.read_migration_encryption_key()),
                    Versions(),
                    party.options.peer_timeout,
                    party.watch.stopped,
                )
        except PeerError as error:
            problem = error
            continue
        backend.write_migration_decryption_key(agreement.peer_key.take())
        return agreement.session_id
