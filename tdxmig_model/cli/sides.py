"""What ``tdxmig send`` and ``tdxmig receive`` share: their options, and how they end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tdxmig_model.cli import output
from tdxmig_model.cli.run import PROFILES, Event, Size, progress_lines, with_unit

if TYPE_CHECKING:
    from tdxmig_model.supervisor import Meeting, SideResult, SideRun
    from tdxmig_model.transport import TlsFiles

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_DIRECTORY = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)

OPTIONS = (
    click.option(
        "--memory", type=Size(), default="64MiB", show_default=True, help="Private memory."
    ),
    click.option("--vcpus", type=click.IntRange(1, 64), default=2, show_default=True),
    click.option("--profile", type=click.Choice(PROFILES), default=PROFILES[0], show_default=True),
    click.option(
        "--identity",
        type=_DIRECTORY,
        required=True,
        metavar="DIRECTORY",
        help="Certificates of both sides and our private key, as tdxmig identity makes them.",
    ),
    click.option("--tls", is_flag=True, help="TLS on the migration stream too."),
    click.option(
        "--tls-dir",
        type=_DIRECTORY,
        metavar="DIRECTORY",
        help="ca-cert.pem and QEMU's other names [default: that of --identity].",
    ),
    click.option("--tls-ca", type=_FILE, help="The authority, instead of one in the directory."),
    click.option("--tls-cert", type=_FILE, help="Our certificate, likewise."),
    click.option("--tls-key", type=_FILE, help="Our private key, likewise."),
    click.option(
        "--wait",
        type=click.FloatRange(min=0, min_open=True),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for the other side to be there.",
    ),
    click.option(
        "--peer-timeout",
        type=click.FloatRange(min=0, min_open=True),
        default=5.0,
        show_default=True,
        metavar="SECONDS",
        help="How long the other side may be silent later.",
    ),
    click.option(
        "--deadline",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        help="Give up after so long [default: 300 s and one more for each MiB].",
    ),
    click.option(
        "--abort-at",
        type=Event(),
        metavar="EVENT",
        help="Ask for a stop just before this lifecycle event of this side.",
    ),
    click.option("--trace-dir", type=_DIRECTORY, help="Keep the trace of this side there."),
)


def shared_options(function: Decorated) -> Decorated:
    """Give a command the options of both sides."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def meeting(endpoint: str, address: str, chosen: dict[str, Any]) -> Meeting:
    """Where to meet, from the options, which are taken out of `chosen`."""
    from tdxmig_model.supervisor import Meeting
    from tdxmig_model.transport import Address

    identity = chosen.pop("identity")
    tls = _tls(endpoint, identity, chosen)
    return Meeting(
        address=Address.parse(address),
        identity=identity,
        tls=tls,
        peer_name=chosen.pop("tls_hostname", None),
        wait=chosen.pop("wait"),
    )


def _tls(endpoint: str, identity: Path, chosen: dict[str, Any]) -> TlsFiles | None:
    from tdxmig_model.transport import TlsFiles

    wanted = chosen.pop("tls")
    directory = chosen.pop("tls_dir")
    files = [chosen.pop(name) for name in ("tls_ca", "tls_cert", "tls_key")]
    if not (wanted or directory or any(files)):
        return None
    usual = TlsFiles.in_directory(directory or identity, endpoint)
    return TlsFiles(
        files[0] or usual.authority, files[1] or usual.certificate, files[2] or usual.private_key
    )


def run_side(
    ctx: click.Context,
    program: Callable[..., SideRun],
    where: Meeting,
    as_json: bool,
    chosen: dict[str, Any],
) -> None:
    """Run one side, print its result, and exit as ``tdxmig run`` does."""
    from tdxmig_model.supervisor import RunOptions, StopSignals, side_result

    options = RunOptions(stop_at=chosen.pop("abort_at"), **chosen)
    with StopSignals() as signals:
        with progress_lines() as show:
            result = side_result(program(options, where, show, signals))
        if as_json:
            output.emit_json(result.as_json())
        else:
            output.emit_summary(_summary(result), result.sentence)
    ctx.exit(130 if result.interrupted else 0 if result.ok else 1)


def _summary(result: SideResult) -> list[tuple[str, str]]:
    state = result.source_state or result.destination_state
    trace = result.trace
    verdict = "accepted" if trace["accepted"] else f"refused: {trace['reason']}"
    if not trace["judged"]:
        verdict = f"not judged: {trace['reason']}"
    rows = [
        ("outcome", result.ending + ("" if result.ok else " (not as asked)")),
        ("address", result.address + (" (TLS)" if result.tls else "")),
        ("pages", f"{result.pages} ({result.pages_moved} moved in {result.epochs} epochs)"),
        ("bundles", f"{result.bundles}, {result.bytes / (1 << 20):.1f} MiB"),
        ("vCPUs, streams", f"{result.vcpus}, {result.streams}"),
        ("downtime", with_unit(result.downtime_ms, "ms")),
        ("throughput", with_unit(result.throughput_mib_s, "MiB/s")),
        ("memory SHA-256", result.memory_digest or "-"),
        (result.side, f"{state}, {'can' if result.runnable else 'cannot'} run the TD"),
        ("steps checked", f"{result.steps_checked} ({result.profile})"),
        ("trace", f"{verdict} ({trace['steps']} steps)"),
    ]
    if result.cause:
        rows.append(("cause", result.cause))
    return rows
