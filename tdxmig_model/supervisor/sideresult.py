"""What one side of a migration came to, where the other side is another process on any host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from tdxmig_model.session import Ending
from tdxmig_model.supervisor.child import Probe, all_refused
from tdxmig_model.supervisor.remote import SideRun


@dataclass(frozen=True, slots=True, kw_only=True)
class SideResult:
    """The object that ``send --json`` and ``receive --json`` print: that of ``run``, for one side.

    What only the other side can know is None.  `memory_equal` is None too: compare `memory_digest`
    and `vcpu_digests` of both sides, which are those of the source at its pause and those of the
    destination before its first instruction.  `downtime_ms` of a source is the time from its pause
    until it heard that the destination runs the TD; of a stored one it is unknown.

    `ok`: this side ended as asked, and the model accepts its trace.
    """

    ok: bool
    side: str
    address: str
    tls: bool
    ending: str
    sentence: str
    cause: str
    profile: str
    pages: int
    pages_moved: int
    bytes: int
    epochs: int
    bundles: int
    streams: int
    vcpus: int
    downtime_ms: float | None
    throughput_mib_s: float | None
    memory_equal: bool | None
    memory_digest: str
    vcpu_digests: tuple[str, ...]
    source_state: str | None
    destination_state: str | None
    runnable: bool
    abort_token_used: bool
    refusals: tuple[Probe, ...]
    guest_instructions: int
    steps_checked: int
    interrupted: bool
    trace: Mapping[str, object] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)


def side_result(run: SideRun) -> SideResult:
    """The result of a side from how it ran."""
    outcome, options, verdict = run.report.outcome, run.options, run.verdict
    states = {run.side: outcome.op_state}
    seconds = run.report.seconds
    return SideResult(
        ok=verdict.accepted and _as_asked(run),
        side=run.side,
        address=str(run.meeting.address),
        tls=run.meeting.tls is not None,
        ending=str(outcome.ending),
        sentence=outcome.sentence,
        cause=outcome.cause,
        profile=options.profile,
        pages=options.pages,
        pages_moved=outcome.pages_moved,
        bytes=outcome.bytes,
        epochs=outcome.epochs,
        bundles=outcome.bundles,
        streams=1,
        vcpus=options.vcpus,
        downtime_ms=_downtime(run),
        throughput_mib_s=round(outcome.bytes / (1 << 20) / seconds, 1) if seconds else None,
        memory_equal=None,
        memory_digest=run.report.memory_digest,
        vcpu_digests=run.report.vcpu_digests,
        source_state=states.get("source"),
        destination_state=states.get("destination"),
        runnable=outcome.runnable,
        abort_token_used="abort_with_token" in outcome.events,
        refusals=run.report.probes,
        guest_instructions=run.report.guest_instructions,
        steps_checked=run.report.steps_checked,
        interrupted=run.interrupted,
        trace={
            **verdict.as_json(),
            "path": None if run.trace is None else str(run.trace),
        },
    )


def _as_asked(run: SideRun) -> bool:
    """Stopped with the TD where it was, or migrated in every respect that this side can see."""
    outcome, probes = run.report.outcome, run.report.probes
    stop = run.options.stop_at
    if stop is not None and stop.side == run.side:
        return outcome.stopped and outcome.runnable is (run.side == "source")
    if run.side == "destination":
        ran = outcome.runnable and run.report.guest_instructions > 0
        return ran and outcome.ending is Ending.MIGRATED
    gone = outcome.ending in (Ending.MIGRATED, Ending.STORED) and not outcome.runnable
    return gone and all_refused(probes)


def _downtime(run: SideRun) -> float | None:
    outcome, ended = run.report.outcome, run.report.ended_at
    if run.side != "source" or outcome.ending is not Ending.MIGRATED:
        return None
    if outcome.paused_at is None or ended is None:
        return None
    return round((ended - outcome.paused_at) * 1000, 3)
