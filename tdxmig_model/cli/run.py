"""``tdxmig run``: migrate a trust domain between two processes, enforced step by step."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from tdxmig_model.cli import output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from tdxmig_model.session import Progress
    from tdxmig_model.supervisor import At, RunResult

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_SIZE = re.compile(r"(\d+)\s*([a-z]*)")

GUESTS = ("idle", "random-writer", "hot-set", "sequential", "page-converter")
TRANSPORTS = ("unix", "tcp", "tls", "file")
PROFILES = ("hardened", "tdx-1.5.01")


class Size(click.ParamType[int]):
    """Bytes as 64MiB, 8MiB, 1GiB or a plain number: a multiple of 4 KiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip().lower())
        if match is None or match[2] not in _UNITS:
            self.fail(f"{value!r} is not a size; write for example 64MiB", param, ctx)
        size = int(match[1]) * _UNITS[match[2]]
        if size <= 0 or size % 4096:
            self.fail(f"{value!r} is not a positive multiple of 4KiB", param, ctx)
        return size


class Event(click.ParamType["At"]):
    """A lifecycle event: source:EVENT, destination:EVENT, or the bare name if one side has it."""

    name = "event"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> At:
        from tdxmig_model.errors import UsageError
        from tdxmig_model.supervisor import At

        if isinstance(value, At):
            return value
        try:
            return At.parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


class _WithEvents(click.Command):
    """Its help lists the lifecycle events, which are looked up only for that."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from tdxmig_model.supervisor import SIDES, lifecycle_events

        super().format_options(ctx, formatter)
        with formatter.section("Events"):
            formatter.write_dl([(side, ", ".join(lifecycle_events(side))) for side in SIDES])


@click.command(
    name="run",
    cls=_WithEvents,
    epilog="Example: tdxmig run --memory 64MiB --vcpus 2 --trace-dir traces",
)
@click.option("--memory", type=Size(), default="64MiB", show_default=True, help="Private memory.")
@click.option("--vcpus", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option(
    "--streams",
    type=click.IntRange(1, 511),
    default=1,
    show_default=True,
    help="Forward streams, each with a connection of its own.",
)
@click.option(
    "--workers",
    type=click.IntRange(0, 16),
    default=0,
    show_default=True,
    help="Processes on each side that encrypt and decrypt.",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 512),
    default=512,
    show_default=True,
    help="Pages per memory bundle.",
)
@click.option("--profile", type=click.Choice(PROFILES), default=PROFILES[0], show_default=True)
@click.option(
    "--guest",
    type=click.Choice(GUESTS),
    default="hot-set",
    show_default=True,
    help="What the guest does while it is migrated.",
)
@click.option(
    "--post-copy",
    is_flag=True,
    help="After one epoch hand over; what the guest wrote meanwhile follows while it runs there.",
)
@click.option(
    "--max-epochs",
    type=click.IntRange(min=0),
    metavar="N",
    help="Epochs while the guest runs [default: 8; 1 with --post-copy].",
)
@click.option(
    "--downtime-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MS",
    help="Pause once what is left can be sent in so many milliseconds.",
)
@click.option(
    "--bandwidth-limit",
    type=Size(),
    metavar="SIZE",
    help="Bytes per second while the guest runs, for example 32MiB.",
)
@click.option(
    "--not-converging",
    type=click.Choice(("pause", "abort", "post-copy")),
    default="pause",
    show_default=True,
    help="What to do when the epochs are used up and too much is left.",
)
@click.option(
    "--abort-at",
    type=Event(),
    metavar="EVENT",
    help="Ask for a stop just before this lifecycle event, for example source:pause.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 64) - 1),
    default=0,
    show_default="0",
    help="Seed of the guest.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Stop the run after so long [default: 300 s and one more for each MiB].",
)
@click.option(
    "--transport",
    type=click.Choice(TRANSPORTS),
    default="unix",
    show_default=True,
    help="How the stream travels; a file has no return path, so no abort token comes back.",
)
@click.option(
    "--trace-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep both traces there (source.ndjson, destination.ndjson).",
)
@click.option(
    "--capture",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write what passes on each channel there, one file per direction (tdxmig stream inspect).",
)
@output.json_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, **chosen: Any) -> None:
    """Migrate a trust domain between two processes, enforced step by step.

    Source and destination are two processes on this host with a software TDX module each.  They
    exchange keys over TLS and migrate over a socket while the guest keeps writing.  The model
    checks every command before and after; memory and vCPUs are compared; at the end the model
    judges the merged traces of both sides.

    An interrupt (SIGINT, SIGTERM, SIGHUP) asks both sides to give up in order, a second one kills
    them; who has the TD is printed in any case.

    Exits 0 if the migration ended as asked, 1 if not, 2 if it could not be tried, 130 if it was
    interrupted.  With --abort-at what is asked is that the stop happens and the source runs the TD:
    a stop that came too late or never is exit 1, although the TD migrated.
    """
    from tdxmig_model.supervisor import RunOptions, StopSignals, run_migration

    options = RunOptions(stop_at=chosen.pop("abort_at"), **chosen)
    with StopSignals() as signals:
        with progress_lines() as show:
            result = run_migration(options, show, signals)
        if as_json:
            output.emit_json(result.as_json())
        else:
            output.emit_summary(_summary(result), result.sentence)
    ctx.exit(130 if result.interrupted else 0 if result.ok else 1)


@contextmanager
def progress_lines() -> Iterator[Callable[[Progress], None]]:
    """One line per side on stderr, where that is a terminal."""
    console = output.progress_console()
    if console.quiet:
        yield lambda progress: None
        return
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:11} {task.fields[phase]:10} epoch {task.fields[epoch]}"),
        BarColumn(),
        TextColumn("{task.fields[moved]} pages moved, {task.fields[left]} left"),
        TextColumn("{task.fields[speed]:.1f} MiB/s"),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        yield _Lines(bars).show


class _Lines:
    """The lines of both sides; the speed is that since the first bytes of a side."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}

    def show(self, progress: Progress) -> None:
        side = progress.side
        began = self._began.setdefault(side, monotonic())
        left = progress.dirty if side == "source" else max(0, progress.total - progress.pages)
        fields: dict[str, Any] = {
            "phase": progress.phase,
            "epoch": progress.epoch,
            "moved": progress.pages,
            "left": left,
            "speed": progress.bytes / (1 << 20) / max(monotonic() - began, 0.1),
        }
        if side not in self._tasks:
            self._tasks[side] = self._bars.add_task(side, total=progress.total, **fields)
        self._bars.update(self._tasks[side], completed=progress.total - left, **fields)


def _summary(result: RunResult) -> list[tuple[str, str]]:
    """The rows of the summary: what was moved, how it compares, what the model says."""
    rows = [
        ("outcome", result.ending + ("" if result.ok else " (not as asked)")),
        ("pages", f"{result.pages} ({result.pages_sent} sent in {result.epochs} epochs)"),
        ("bundles", f"{result.bundles}, {result.bytes / (1 << 20):.1f} MiB"),
        ("vCPUs, streams", f"{result.vcpus}, {result.streams}"),
        *_post_copy(result),
        ("downtime", with_unit(result.downtime_ms, "ms")),
        ("throughput", with_unit(result.throughput_mib_s, "MiB/s")),
        ("memory equal", _answer(result.memory_equal)),
        ("vCPUs equal", _answer(result.vcpus_equal)),
        ("source", _state(result.source_state, result.source_runnable)),
        ("destination", _state(result.destination_state, result.destination_runnable)),
    ]
    rows += [
        (
            f"{probe.step} refused",
            f"by the enforcer: {_answer(probe.refused_by_enforcer)}; module: {probe.status_name}",
        )
        for probe in result.refusals
    ]
    rows.append(("steps checked", f"{result.steps_checked} ({result.profile})"))
    rows.append(("merged traces", _verdict(result)))
    if result.cause:
        rows.append(("cause", result.cause))
    return rows


def _post_copy(result: RunResult) -> list[tuple[str, str]]:
    """The row of post-copy, if there was one."""
    if not result.pages_after_start:
        return []
    asked = f"{result.pages_requested} of them asked for"
    return [("after the start", f"{result.pages_after_start} pages, {asked}")]


def _verdict(result: RunResult) -> str:
    trace = result.trace
    if not trace["judged"]:
        return f"not judged: {trace['reason']}"
    verdict = "accepted" if trace["accepted"] else f"refused: {trace['reason']}"
    return f"{verdict} ({trace['steps']} steps)"


def with_unit(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.1f} {unit}"


def _answer(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "NO"


def _state(state: str | None, runnable: bool) -> str:
    return "gone" if state is None else f"{state}, {'can' if runnable else 'cannot'} run the TD"
