"""What the process of each side does: build, pre-migrate, migrate, show what is refused, report."""

from __future__ import annotations

import select
import socket
from contextlib import closing
from time import monotonic
from typing import Final, Protocol

from tdxmig_model.backend.soft.backend import SoftBackend, soft_destination, soft_source
from tdxmig_model.backend.soft.module import PROFILES, Profile
from tdxmig_model.engine.commands import Command, ExportAbort, VpEnter
from tdxmig_model.errors import PeerLost, Refused, TdxmigError, UsageError
from tdxmig_model.premigration import MigrationKey, Role, Versions, exchange
from tdxmig_model.session import (
    RUNNABLE_STATES,
    DestinationSession,
    Ending,
    SessionOptions,
    Side,
    SideOutcome,
    SourceSession,
)
from tdxmig_model.supervisor.child import (
    Addresses,
    ChildHooks,
    Link,
    Place,
    PlainAddress,
    Probe,
    SideReport,
)
from tdxmig_model.supervisor.faults import FaultyTransport
from tdxmig_model.supervisor.options import RunOptions, trace_path
from tdxmig_model.trace import TraceWriter
from tdxmig_model.transport import Listener, Transport, connect

CONNECT_SECONDS: Final = 30.0
SLICE: Final = 2_000
"""Guest instructions of each vCPU that show that the TD runs."""


def run_source(link: Link, options: RunOptions, place: Place) -> SideReport:
    """The source: its TD runs, is migrated away, and is then shown to be refused."""
    backend = soft_source(
        options.pages,
        vcpus=options.vcpus,
        guest=options.guest,
        profile=_module_profile(options),
        seed=options.seed,
    )
    try:
        addresses = link.addresses(CONNECT_SECONDS)
        with closing(_connect_plain(addresses.premigration)) as plain:
            session_id = _premigrate("source", plain, place, backend)
        transport: Transport = connect(addresses.migration, CONNECT_SECONDS)
    except TdxmigError as error:
        return _never_began("source", backend, error)
    if options.injected.stream is not None:
        transport = FaultyTransport(transport, options.injected.stream)
    digests: list[tuple[str, tuple[str, ...]]] = []

    with TraceWriter(trace_path(place.traces, "source"), "source", session_id) as trace:
        session = SourceSession(
            backend,
            transport,
            trace,
            gpas=backend.page_gpas(),
            vcpus=options.vcpus,
            session_id=session_id,
            options=_session_options(options),
            hooks=ChildHooks("source", link, options, lambda: digests.append(_digests(backend))),
        )
        report = _run(link, session)
        outcome = report.outcome
        if outcome.op_state == "POST_EXPORT":
            report.probes = _try_what_is_refused(session)
        report.steps_checked = session.enforcer.steps_checked
    report.trace_failure, report.whole = trace.failure, True
    if digests:
        report.memory_digest, report.vcpu_digests = digests[-1]
    return report


def run_destination(link: Link, options: RunOptions, place: Place) -> SideReport:
    """The destination: an empty TD is filled, compared, and then runs."""
    backend = soft_destination(options.pages, vcpus=options.vcpus, profile=_module_profile(options))
    try:
        session_id, transport = _accept_source(link, options, place, backend)
    except TdxmigError as error:
        return _never_began("destination", backend, error)
    with TraceWriter(trace_path(place.traces, "destination"), "destination", session_id) as trace:
        session = DestinationSession(
            backend,
            transport,
            trace,
            pages=options.pages,
            vcpus=options.vcpus,
            options=_session_options(options),
            hooks=ChildHooks("destination", link, options),
        )
        report = _run(link, session)
        if report.outcome.ending is Ending.MIGRATED:
            report.memory_digest, report.vcpu_digests = _digests(backend)
            report.guest_instructions = session.run_guest(SLICE)
        report.steps_checked = session.enforcer.steps_checked
    report.trace_failure, report.whole = trace.failure, True
    return report


def _run(link: Link, session: Side) -> SideReport:
    """Run the session, and tell how it ended before anything else can go wrong."""
    link.session_began = True
    report = SideReport(session.run(), session=session.trace.session, whole=False)
    link.tell(report)
    return report


def _accept_source(
    link: Link, options: RunOptions, place: Place, backend: SoftBackend
) -> tuple[bytes, Transport]:
    """Listen, pre-migrate, and take the source's connection; session id and transport."""
    with (
        closing(_listen_plain(options, place)) as plain_listener,
        Listener(_migration_address(options, place)) as listener,
    ):
        link.tell(Addresses(str(listener.address), plain_listener.getsockname()))
        _await_connection(plain_listener, link)
        with closing(plain_listener.accept()[0]) as plain:
            session_id = _premigrate("destination", plain, place, backend)
        _await_connection(listener, link)
        return session_id, listener.accept(CONNECT_SECONDS)


def _never_began(side: str, backend: SoftBackend, error: TdxmigError) -> SideReport:
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


def _module_profile(options: RunOptions) -> Profile:
    for profile in PROFILES:
        if profile == options.profile:
            return profile
    raise UsageError(f"profile {options.profile!r}: the module knows {' and '.join(PROFILES)}")


def _digests(backend: SoftBackend) -> tuple[str, tuple[str, ...]]:
    """Of memory and of each vCPU."""
    return backend.memory_digest(), tuple(backend.vcpu_digest())


def _session_options(options: RunOptions) -> SessionOptions:
    return SessionOptions(
        profile=options.profile, batch=options.batch, peer_timeout=options.peer_timeout
    )


# --- what is refused -----------------------------------------------------------------------------


def _try_what_is_refused(session: Side) -> tuple[Probe, ...]:
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


def _premigrate(role: Role, plain: socket.socket, place: Place, backend: SoftBackend) -> bytes:
    """Exchange migration keys over TLS and give the peer's to the module; the session id."""
    agreement = exchange(
        role,
        plain,
        place.identity,
        place.peer_certificate,
        MigrationKey(backend.read_migration_encryption_key()),
        Versions(),
        CONNECT_SECONDS,
    )
    backend.write_migration_decryption_key(agreement.peer_key.take())
    return agreement.session_id


def _listen_plain(options: RunOptions, place: Place) -> socket.socket:
    """A listening socket for premigration, of the same kind as the migration stream."""
    if options.transport == "tcp":
        return socket.create_server(("127.0.0.1", 0))
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(place.work / "premigration.sock"))
    listening.listen(1)
    return listening


def _connect_plain(address: PlainAddress) -> socket.socket:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    plain = socket.socket(family, socket.SOCK_STREAM)
    plain.settimeout(CONNECT_SECONDS)
    try:
        plain.connect(address)
    except OSError as error:
        plain.close()
        raise PeerLost(f"cannot reach the destination for premigration: {error}") from error
    return plain


def _migration_address(options: RunOptions, place: Place) -> str:
    if options.transport == "tcp":
        return "tcp:127.0.0.1:0"
    return f"unix:{place.work / 'migration.sock'}"


class _Listening(Protocol):
    def fileno(self) -> int: ...


def _await_connection(listening: _Listening, link: Link) -> None:
    """Wait until somebody connects.  PeerLost: nobody did in time, or the run is stopped."""
    end = monotonic() + CONNECT_SECONDS
    poller = select.poll()
    poller.register(listening.fileno(), select.POLLIN)
    while not poller.poll(100):
        if link.stop_reason is not None:
            raise PeerLost(f"the source never connected: {link.stop_reason}")
        if monotonic() >= end:
            raise PeerLost(f"the source did not connect within {CONNECT_SECONDS:g} s")
