"""What the process of each side does: build, pre-migrate, migrate, show what is refused, report."""

from __future__ import annotations

import socket
from contextlib import closing
from time import monotonic, sleep
from typing import Any, Final

from tdxmig_model.backend.soft.backend import SoftBackend, soft_destination, soft_source
from tdxmig_model.backend.soft.module import PROFILES, Profile
from tdxmig_model.engine.commands import Command, ExportAbort, Gpas, VpEnter
from tdxmig_model.errors import PeerError, PeerLost, Refused, TdxmigError, UsageError
from tdxmig_model.premigration import MigrationKey, Role, Versions, exchange
from tdxmig_model.session import (
    RUNNABLE_STATES,
    DestinationSession,
    Ending,
    Side,
    SideOutcome,
    SourceSession,
    StoredDestinationSession,
    StoredSourceSession,
)
from tdxmig_model.supervisor.channels import (
    Listening,
    accept_channels,
    connect_channels,
    readable,
)
from tdxmig_model.supervisor.child import (
    TLS_NAME,
    Addresses,
    Built,
    ChildHooks,
    Link,
    Place,
    PlainAddress,
    Probe,
    SideReport,
)
from tdxmig_model.supervisor.digests import Digests, PageDigests
from tdxmig_model.supervisor.faults import FaultyTransport
from tdxmig_model.supervisor.options import RunOptions, trace_path
from tdxmig_model.trace import TraceWriter
from tdxmig_model.transport import (
    CapturedTransport,
    FileReader,
    FileWriter,
    Listener,
    SocketTransport,
    Transport,
    secure,
)

PREMIGRATION_TIMEOUTS: Final = 3
"""Peer timeouts that the source gives pre-migration: the destination may have to wait first for
somebody else who connected and says nothing."""
STREAM_FILE: Final = "migration.stream"
_FILE_SECONDS: Final = 0.02
SLICE: Final = 2_000
"""Guest instructions of each vCPU that show that the TD runs."""


def run_source(link: Link, options: RunOptions, place: Place) -> SideReport:
    """The source: its TD runs, is migrated away, and is then shown to be refused."""
    backend = soft_source(
        options.pages,
        vcpus=options.vcpus,
        streams=options.streams,
        workers=options.workers,
        guest=options.guest,
        profile=module_profile(options),
        seed=options.seed,
    )
    link.tell(Built())
    try:
        addresses = link.addresses(options.build_seconds)
        with closing(_connect_plain(addresses.premigration, options.peer_timeout)) as plain:
            limit = PREMIGRATION_TIMEOUTS * options.peer_timeout
            session_id = _premigrate("source", plain, place, backend, link, limit)
        transport, others = _open_streams(addresses.migration, session_id, options, place)
    except TdxmigError as error:
        return never_began("source", backend, error)
    if options.injected.stream is not None:
        transport = FaultyTransport(transport, options.injected.stream)
    captured: list[CapturedTransport] = []
    if options.capture is not None:
        captured = [
            CapturedTransport(one, options.capture, number)
            for number, one in enumerate([transport, *others])
        ]
        transport, others = captured[0], list(captured[1:])
    compared = _comparable(backend, options)

    with TraceWriter(trace_path(place.traces, "source"), "source", session_id) as trace:
        session = source_session(
            backend,
            transport,
            trace,
            gpas=backend.page_gpas(),
            vcpus=options.vcpus,
            streams=options.streams,
            more_channels=others,
            session_id=session_id,
            options=options.session_options(),
            hooks=ChildHooks("source", link, options, compared.begin),
        )
        report = _run(link, session)
        outcome = report.outcome
        if outcome.op_state == "POST_EXPORT":
            report.probes = try_what_is_refused(session)
        report.steps_checked = session.enforcer.steps_checked
    report.trace_failure, report.whole = trace.failure, True
    failures = [one.failure for one in captured if one.failure is not None]
    if failures:
        report.outcome.cause = report.outcome.cause or failures[0]
    report.memory_digest, report.vcpu_digests = compared.memory, compared.vcpus
    return report


def _open_streams(
    address: str, session_id: bytes, options: RunOptions, place: Place
) -> tuple[Transport, list[Transport]]:
    """Channel 0, and those of the further streams."""
    if options.transport == "file":
        return FileWriter(place.work / STREAM_FILE), []

    def secured(plain: SocketTransport) -> SocketTransport:
        if options.transport != "tls":
            return plain
        limit = options.peer_timeout
        return secure(plain, place.tls("client"), server=False, peer_name=TLS_NAME, timeout=limit)

    return connect_channels(address, options.streams, session_id, options.peer_timeout, secured)


def run_destination(link: Link, options: RunOptions, place: Place) -> SideReport:
    """The destination: an empty TD is filled, compared, and then runs."""
    backend = soft_destination(
        options.pages,
        vcpus=options.vcpus,
        streams=options.streams,
        workers=options.workers,
        profile=module_profile(options),
    )
    try:
        session_id, transport, others = _accept_source(link, options, place, backend)
    except TdxmigError as error:
        return never_began("destination", backend, error)
    compared = _comparable(backend, options)
    with TraceWriter(trace_path(place.traces, "destination"), "destination", session_id) as trace:
        session = destination_session(
            backend,
            transport,
            trace,
            pages=options.pages,
            vcpus=options.vcpus,
            streams=options.streams,
            more_channels=others,
            options=options.session_options(),
            hooks=_DestinationHooks(link, options, compared),
        )
        report = _run(link, session)
        if report.outcome.ending is Ending.MIGRATED:
            if not compared.begun:
                compared.begin()
            report.memory_digest, report.vcpu_digests = compared.memory, compared.vcpus
            report.guest_instructions = session.run_guest(SLICE)
        report.steps_checked = session.enforcer.steps_checked
    report.trace_failure, report.whole = trace.failure, True
    return report


def source_session(
    backend: SoftBackend, transport: Transport, trace: TraceWriter, **arguments: Any
) -> SourceSession:
    """The session that fits the transport; `arguments` are those of `SourceSession`."""
    if isinstance(transport, FileWriter):
        return StoredSourceSession(backend, transport, trace, **arguments)
    return SourceSession(backend, transport, trace, **arguments)


def destination_session(
    backend: SoftBackend, transport: Transport, trace: TraceWriter, **arguments: Any
) -> DestinationSession:
    """The session that fits the transport; `arguments` are those of `DestinationSession`."""
    kind = StoredDestinationSession if isinstance(transport, FileReader) else DestinationSession
    return kind(backend, transport, trace, **arguments)


class _DestinationHooks(ChildHooks):
    """In post-copy memory and vCPUs are compared as they were before the guest went on."""

    def __init__(self, link: Link, options: RunOptions, compared: Digests | PageDigests) -> None:
        super().__init__("destination", link, options)
        self._compared = compared

    def committing(self) -> None:
        self._compared.begin()

    def arrived(self, gpas: Gpas) -> None:
        if isinstance(self._compared, PageDigests):
            self._compared.add(gpas)


def _comparable(backend: SoftBackend, options: RunOptions) -> Digests | PageDigests:
    """Digests of the same kind on both sides."""
    return PageDigests(backend) if options.may_post_copy else Digests(backend)


def _run(link: Link, session: Side) -> SideReport:
    """Run the session, and tell how it ended before anything else can go wrong."""
    link.session_began = True
    report = SideReport(session.run(), session=session.trace.session, whole=False)
    link.tell(report)
    return report


def _accept_source(
    link: Link, options: RunOptions, place: Place, backend: SoftBackend
) -> tuple[bytes, Transport, list[Transport]]:
    """Listen, pre-migrate, and take the source's connections; session id and channels."""
    with (
        closing(_listen_plain(options, place)) as plain_listener,
        Listener(_migration_address(options, place)) as listener,
    ):
        link.tell(Addresses(str(listener.address), plain_listener.getsockname()))
        session_id = _premigrate_with_source(plain_listener, link, options, place, backend)
        if options.transport == "file":
            return session_id, _await_file(link, options, place), []
        return session_id, *_accept_streams(listener, session_id, link, options, place)


def _premigrate_with_source(
    listener: socket.socket, link: Link, options: RunOptions, place: Place, backend: SoftBackend
) -> bytes:
    """Pre-migrate with whoever proves to be the source; others may have connected before it."""
    problem: PeerError | None = None
    while True:
        _await_connection(listener, link, options, problem)
        with closing(listener.accept()[0]) as plain:
            try:
                limit = options.peer_timeout
                return _premigrate("destination", plain, place, backend, link, limit)
            except PeerError as error:
                problem = error  # told if the source goes away, because then it was the source


def _await_file(link: Link, options: RunOptions, place: Place) -> FileReader:
    """The stream once the source has stored all of it: nothing is loaded before."""
    end = monotonic() + options.seconds
    while not link.peer_ended:
        if link.stop_reason is not None:
            raise PeerLost(f"nothing was stored yet: {link.stop_reason}")
        if monotonic() >= end:
            raise PeerLost(f"the source did not store the TD within {options.seconds:g} s")
        sleep(_FILE_SECONDS)
    try:
        return FileReader(place.work / STREAM_FILE)
    except UsageError as error:
        raise PeerLost(f"the source ended and stored nothing: {error}") from error


def _accept_streams(
    listener: Listener, session_id: bytes, link: Link, options: RunOptions, place: Place
) -> tuple[Transport, list[Transport]]:
    """The connections of this session's channels."""
    return accept_channels(
        listener,
        options.streams,
        session_id,
        patience=options.patience,
        timeout=options.peer_timeout,
        check=lambda: _check_source(link, None),
        tls=place.tls("server") if options.transport == "tls" else None,
    )


def never_began(side: str, backend: SoftBackend, error: TdxmigError) -> SideReport:
    """Premigration failed or the peer was never there: the TD is as it was built."""
    op_state = str(backend.observe()["op_state"])
    return SideReport(
        SideOutcome(
            side,
            op_state=op_state,
            runnable=op_state in RUNNABLE_STATES,
            sentence=f"The migration session never began; the {side} TD is as it was built.",
            cause=str(error),
            heard_of=isinstance(error, PeerLost),
        )
    )


def module_profile(options: RunOptions) -> Profile:
    for profile in PROFILES:
        if profile == options.profile:
            return profile
    raise UsageError(f"profile {options.profile!r}: the module knows {' and '.join(PROFILES)}")


# --- what is refused -----------------------------------------------------------------------------


def try_what_is_refused(session: Side) -> tuple[Probe, ...]:
    """In POST_EXPORT neither running the TD nor taking it back without a token is possible.

    Each is asked of the enforcer, which must not let it through, and then of the module itself.
    """
    return tuple(_probe(session, command) for command in (VpEnter(0, 1), ExportAbort(None)))


def _probe(session: Side, command: Command) -> Probe:
    try:
        session.enforcer.check(command)
    except Refused:
        refused = True
    else:
        refused = False
    result = session.backend.execute(command)
    return Probe(command.name, refused, result.status_name, not result.ok)


# --- pre-migration -------------------------------------------------------------------------------


def _premigrate(
    role: Role, plain: socket.socket, place: Place, backend: SoftBackend, link: Link, limit: float
) -> bytes:
    """Exchange migration keys over TLS and give the peer's to the module; the session id."""
    agreement = exchange(
        role,
        plain,
        place.identity,
        place.peer_certificate,
        MigrationKey(backend.read_migration_encryption_key()),
        Versions(),
        limit,
        lambda: link.stop_reason,
    )
    backend.write_migration_decryption_key(agreement.peer_key.take())
    return agreement.session_id


def _listen_plain(options: RunOptions, place: Place) -> socket.socket:
    """A listening socket for premigration, of the same kind as the migration stream."""
    if options.transport in ("tcp", "tls"):
        return socket.create_server(("127.0.0.1", 0))
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(place.work / "premigration.sock"))
    listening.listen(1)
    return listening


def _connect_plain(address: PlainAddress, timeout: float) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    plain = socket.socket(family, socket.SOCK_STREAM)
    plain.settimeout(timeout)
    try:
        plain.connect(address)
    except OSError as error:
        plain.close()
        raise PeerLost(f"cannot reach the destination for premigration: {error}") from error
    return plain


def _migration_address(options: RunOptions, place: Place) -> str:
    if options.transport in ("tcp", "tls"):
        return "tcp:127.0.0.1:0"
    return f"unix:{place.work / 'migration.sock'}"


def _await_connection(
    listening: Listening, link: Link, options: RunOptions, problem: PeerError | None
) -> None:
    """Wait until somebody connects; the source has to once its TD is built.

    PeerLost: nobody did in time, or the run is stopped.  `problem` is raised if the source is gone.
    """
    limit, built = options.build_seconds, False
    end = monotonic() + limit
    while not readable(listening, 100):
        _check_source(link, problem)
        if link.peer_built and not built:
            limit, built = options.peer_timeout, True
            end = monotonic() + limit
        if monotonic() >= end:
            raise PeerLost(f"the source did not connect within {limit:g} s")


def _check_source(link: Link, problem: PeerError | None) -> None:
    """Raise PeerLost if the run is stopped or the source is gone."""
    if link.stop_reason is not None:
        raise PeerLost(f"the source never connected: {link.stop_reason}")
    if link.peer_ended:
        raise problem or PeerLost("the source ended before it had connected")
