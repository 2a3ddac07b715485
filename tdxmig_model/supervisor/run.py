"""One supervised run from options to result."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tdxmig_model.engine import Iteration
from tdxmig_model.errors import TdxmigError, UsageError
from tdxmig_model.session import Ending, Progress, SideOutcome
from tdxmig_model.supervisor.child import SideReport, all_refused
from tdxmig_model.supervisor.options import RunOptions, trace_path
from tdxmig_model.supervisor.parent import Child, Watch, run_children, work_directory
from tdxmig_model.supervisor.result import (
    End,
    RunResult,
    TraceVerdict,
    explain,
    took_back_with_token,
)
from tdxmig_model.supervisor.signals import StopSignals
from tdxmig_model.supervisor.tracefiles import reserved, written_traces
from tdxmig_model.trace import read_trace


def run_migration(
    options: RunOptions,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    signals: StopSignals | None = None,
) -> RunResult:
    """Migrate a TD between two new processes and judge what came out.

    A migration that fails, or is stopped by a signal, is a result.  `signals` are those that the
    caller takes already; by default they are taken until this returns.  UsageError: this
    environment cannot run a migration.
    """
    if signals is None:
        with StopSignals() as own:
            return run_migration(options, on_progress, own)
    _check_memory(options)
    with work_directory(options) as (work, traces), reserved(traces):
        watch = run_children(options, work, traces, on_progress, signals)
        for child in watch.children.values():
            if child.failure is not None and child.failure.usage:
                raise UsageError(f"{child.side}: {child.failure.text}")
        return _result(watch, _judge(watch, traces), traces)


def _check_memory(options: RunOptions) -> None:
    """Both TDs are real memory of this host; running out of it would kill somebody else."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 2 * options.memory > there:
        raise UsageError(
            f"two TDs of {options.memory >> 20} MiB do not fit into the {there >> 20} MiB of this "
            "host; choose less memory"
        )


def _judge(watch: Watch, traces: Path) -> TraceVerdict:
    """The model's verdict, unless there is nothing whole to judge or somebody asks to stop."""
    written = written_traces(traces)
    if not written:
        return TraceVerdict(False, False, reason="no trace was written: no session began")
    reports = [child.report for child in watch.children.values() if child.report is not None]
    failures = [one.trace_failure for one in reports if one.trace_failure is not None]
    if failures:
        return TraceVerdict(False, False, reason="; ".join(failures))
    verdict = watch.signals.unless_stopped(lambda: judge_written(written, reports, watch.options))
    return verdict or TraceVerdict(False, False, reason=watch.signals.reason)


def judge_written(
    written: dict[str, Path], reports: list[SideReport], options: RunOptions
) -> TraceVerdict:
    """The model's verdict on the traces, which must also end where the sides say they ended."""
    from tdxmig_model import replay

    try:
        records = {side: list(read_trace(path)) for side, path in written.items()}
        found = replay.judge_records(list(records.values()), options.profile)
    except TdxmigError as error:
        return TraceVerdict(True, False, reason=str(error))
    reason = found.reason
    for report in reports:
        side, seen = report.outcome.side, report.outcome.op_state
        if found.ok and side in records and report.session:
            if records[side][0].session != report.session:
                reason = f"the trace of the {side} is of another session"
            elif found.final.get(f"{side}_op_state") != seen:
                ends = found.final.get(f"{side}_op_state")
                reason = f"the trace of the {side} ends in {ends}, and the {side} reports {seen}"
    return TraceVerdict(True, found.ok and not reason, found.steps, reason)


@dataclass(frozen=True, slots=True)
class _Both:
    """Both reports, whatever there is of them."""

    source: SideReport | None
    destination: SideReport | None

    @property
    def source_outcome(self) -> SideOutcome:
        return self.source.outcome if self.source else SideOutcome("source")

    @property
    def destination_outcome(self) -> SideOutcome:
        return self.destination.outcome if self.destination else SideOutcome("destination")

    @property
    def memory_equal(self) -> bool | None:
        """None unless both sides have their digest."""
        if not (self.source and self.destination):
            return None
        ours, theirs = self.source.memory_digest, self.destination.memory_digest
        return ours == theirs if ours and theirs else None

    @property
    def vcpus_equal(self) -> bool | None:
        """None unless both sides have their digests."""
        if not (self.source and self.destination):
            return None
        ours, theirs = self.source.vcpu_digests, self.destination.vcpu_digests
        return ours == theirs if ours and theirs else None


def _result(watch: Watch, verdict: TraceVerdict, traces: Path) -> RunResult:
    options = watch.options
    children = watch.children
    both = _Both(children["source"].report, children["destination"].report)
    ends = {side: _end(child) for side, child in children.items()}
    source, destination = both.source_outcome, both.destination_outcome
    migrated = any(end.migrated for end in ends.values())
    total = _milliseconds(source.started_at, destination.runnable_at)
    sentence = explain(ends["source"], ends["destination"])
    sentence += _about_the_stop(both, options)
    differs = _differs(both)
    sentence += f" But {differs}." if differs else ""
    result_trace: dict[str, object] = {
        **verdict.as_json(),
        **{
            side: str(trace_path(traces, side)) if options.trace_dir is not None else None
            for side in children
        },
    }
    return RunResult(
        ok=verdict.accepted and _as_asked(both, ends, options, migrated),
        ending=_ending(ends, migrated),
        sentence=sentence,
        cause=watch.stop_reason if watch.stop_told else _cause(both, ends) or differs,
        profile=options.profile,
        transport=options.transport,
        pages=options.pages,
        pages_sent=source.pages_moved,
        bytes=source.bytes,
        epochs=source.epochs,
        bundles=source.bundles,
        streams=options.streams,
        workers=options.workers,
        iterations=tuple(map(_iteration, source.iterations)),
        pages_after_start=source.pages_after_start,
        pages_requested=source.pages_requested,
        vcpus=options.vcpus,
        downtime_ms=_milliseconds(source.paused_at, destination.runnable_at),
        total_ms=total,
        throughput_mib_s=round(source.bytes / (1 << 20) / (total / 1000), 1) if total else None,
        memory_equal=both.memory_equal,
        vcpus_equal=both.vcpus_equal,
        source_state=ends["source"].op_state,
        destination_state=ends["destination"].op_state,
        source_runnable=ends["source"].runnable,
        destination_runnable=ends["destination"].runnable,
        abort_token_used=took_back_with_token(ends["source"]),
        refusals=both.source.probes if both.source else (),
        guest_instructions=both.destination.guest_instructions if both.destination else 0,
        steps_checked=sum(
            report.steps_checked for report in (both.source, both.destination) if report
        ),
        interrupted=bool(watch.signals.count),
        trace=result_trace,
    )


def _iteration(done: Iteration) -> dict[str, object]:
    """One epoch as JSON values."""
    speed, expected = done.bytes_per_second, done.expected_downtime
    return {
        "epoch": done.epoch,
        "live": done.live,
        "pages_sent": done.sent,
        "pages_left": done.left,
        "bytes": done.bytes,
        "ms": round(done.seconds * 1000, 3),
        "throughput_mib_s": None if speed is None else round(speed / (1 << 20), 1),
        "expected_downtime_ms": None if expected is None else round(expected * 1000, 3),
    }


def _end(child: Child) -> End:
    """How a side ended.  One that told how its session ended and then failed is gone."""
    report = child.report
    migrated = report is not None and report.outcome.ending is Ending.MIGRATED
    return End(child.side, report if report and report.whole else None, child.gone, migrated)


def _as_asked(both: _Both, ends: dict[str, End], options: RunOptions, migrated: bool) -> bool:
    """Whether the run ended as it should: stopped with one owner, or migrated in every respect."""
    runnable = [end.side for end in ends.values() if end.runnable]
    if options.stop_at is not None:
        return _stopped(both, options) and runnable == ["source"]
    probes = both.source.probes if both.source else ()
    return (
        migrated
        and runnable == ["destination"]
        and both.memory_equal is True
        and both.vcpus_equal is True
        and all_refused(probes)
        and bool(both.destination and both.destination.guest_instructions)
    )


def _stopped(both: _Both, options: RunOptions) -> bool:
    """Whether the stop that the options ask for happened, and nothing else went wrong first."""
    report = (
        both.source if options.stop_at and options.stop_at.side == "source" else both.destination
    )
    return report is not None and report.outcome.stopped


def _differs(both: _Both) -> str:
    """What the destination has otherwise than the source had it at the pause."""
    compared = (("memory", both.memory_equal), ("vCPU state", both.vcpus_equal))
    found = " and ".join(what for what, equal in compared if equal is False)
    return f"the {found} of the destination differs from the source's at its pause" if found else ""


def _about_the_stop(both: _Both, options: RunOptions) -> str:
    """Why a stop that was asked for did not happen."""
    if options.stop_at is None or _stopped(both, options):
        return ""
    report = getattr(both, options.stop_at.side)
    if report is not None and options.stop_at.event in report.outcome.events:
        return f" The stop before {options.stop_at} that was asked for came too late."
    return f" The stop before {options.stop_at} that was asked for never happened: no such event."


def _ending(ends: dict[str, End], migrated: bool) -> str:
    """One word: an ending of a session, or "lost" if the TD is gone with its process."""
    if migrated:
        return str(Ending.MIGRATED)
    if any(end.runnable for end in ends.values()):
        return str(Ending.ABORTED)
    return "lost" if ends["source"].report is None else str(Ending.UNDECIDED)


def _cause(both: _Both, ends: dict[str, End]) -> str:
    """What began it: the side whose trouble is its own says more than the one that heard of it."""
    outcomes = [report.outcome for report in (both.source, both.destination) if report]
    gone = [end.text for end in ends.values() if end.report is None]
    own = [one.cause for one in outcomes if one.cause and not one.heard_of]
    heard = [one.cause for one in outcomes if one.cause]
    return "; ".join(gone or own[:1] or heard[:1])


def _milliseconds(first: float | None, last: float | None) -> float | None:
    return None if first is None or last is None else round((last - first) * 1000, 3)
