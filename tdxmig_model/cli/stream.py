"""``tdxmig stream``: what a captured migration stream holds, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from tdxmig_model.cli import output

if TYPE_CHECKING:
    from tdxmig_model.inspection import CapturedFile, Entry, Summary

_SHOWN_RANGES: Final = 8
# Fields that the columns of a line tell already, or that nobody reads.
_COLUMNS: Final = frozenset({"migs_index", "mb_counter", "mig_epoch", "iv_counter"})
_UNTOLD: Final = frozenset(
    {"size", "bundle_type", "reserved", "mac", "mig_version", "unused", "magic", "type", "length"}
)
_START_EPOCH: Final = 0xFFFFFFFF


@click.command(
    name="stream",
    epilog="Example: tdxmig run --capture capture && tdxmig stream inspect capture/*",
)
@click.argument("action", type=click.Choice(("inspect",)))
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(path_type=Path, dir_okay=False),
)
@click.option("--problems", "only_problems", is_flag=True, help="Show records with a problem only.")
@output.json_option
@click.pass_context
def command(
    ctx: click.Context, action: str, files: tuple[Path, ...], only_problems: bool, as_json: bool
) -> None:
    """Decode captured streams record by record.

    Each FILE holds the bytes of one channel in one direction: single-channel records, multifd
    packets, or the return path; its first bytes tell which.  All files of one capture are to be
    given together, because counters go across channels.

    Offsets, lengths and fields are shown, GPA lists as ranges, and what is wrong: in a record, and
    between records.  Reading goes on after a wrong field, and ends where the length of a record
    cannot be trusted.  The contents of pages are encrypted and not looked at.

    Exits 0 if nothing is wrong, 1 if something is, 2 if a file cannot be read.
    """
    from tdxmig_model.inspection import Summary, inspect

    summary = Summary()
    found = inspect(files, summary)
    if as_json:
        _print_json(found, summary, only_problems)
    else:
        _print_lines(found, summary, only_problems)
    ctx.exit(1 if summary.problems else 0)


def _print_json(
    found: Iterator[tuple[CapturedFile, Entry]], summary: Summary, only_problems: bool
) -> None:
    """One object, written as it is read: a stream may have more records than fit into memory."""
    with output.json_pieces() as pieces:
        pieces.begin_list("bundles")
        for file, entry in found:
            if entry.problems or not only_problems:
                head = {"file": file.name, "framing": str(file.framing)}
                pieces.item(head | entry.as_json())
        pieces.end_list()
        errors = [
            {"file": file, "offset": offset, "text": text} for file, offset, text in summary.errors
        ]
        pieces.members(
            {
                "records": summary.records,
                "pages": summary.pages,
                "bytes": summary.bytes,
                "problems": summary.problems,
                "errors": errors,
                "ok": not summary.problems,
            }
        )


def _print_lines(
    found: Iterator[tuple[CapturedFile, Entry]], summary: Summary, only_problems: bool
) -> None:
    before: CapturedFile | None = None
    for file, entry in found:
        if file is not before:
            click.echo(f"{file.name}: {file.framing}")
            click.echo(_HEAD)
            before = file
        if entry.problems or not only_problems:
            click.echo(_line(entry))
        for problem in entry.problems:
            click.echo(f"{problem.offset:>12}  !! {problem.text}")
    for name, offset, text in summary.errors:
        if offset is None:  # no record shows it
            click.echo(f"!! {name or 'all files'}: {text}")
    problems = "1 problem" if summary.problems == 1 else f"{summary.problems} problems"
    click.echo(
        f"{summary.records} records, {summary.bundles} bundles, {summary.pages} GPA list entries, "
        f"{summary.bytes} bytes: {problems if summary.problems else 'nothing is wrong'}"
    )


_HEAD: Final = (
    f"{'offset':>12} {'length':>8}  {'record':<24} {'stream':>6} {'counter':>8} {'epoch':>6} "
    f"{'iv':>8}  details"
)


def _line(entry: Entry) -> str:
    mbmd = entry.mbmd or {}
    names = ("migs_index", "mb_counter", "mig_epoch", "iv_counter")
    stream, counter, epoch, iv = (str(mbmd.get(name, "")) for name in names)
    if mbmd.get("mig_epoch") == _START_EPOCH:
        epoch = "start"
    columns = (
        f"{entry.offset:>12} {entry.length:>8}  {entry.record:<24} "
        f"{stream:>6} {counter:>8} {epoch:>6} {iv:>8}"
    )
    return f"{columns}  {', '.join(_details(entry))}".rstrip()


def _details(entry: Entry) -> Iterator[str]:
    for name, value in [*entry.fields.items(), *(entry.mbmd or {}).items()]:
        if name in _COLUMNS or name in _UNTOLD:
            continue
        if isinstance(value, bytes):
            shown = value.hex()
        elif isinstance(value, int) and name.endswith(("flags", "offset", "capabilities")):
            shown = hex(value)
        else:
            # Text of a peer ends up on a terminal here.
            shown = "".join(one if one.isprintable() else "?" for one in str(value))
        yield f"{name} {shown}"
    if entry.gpas:
        shown = " ".join(str(one) for one in entry.gpas[:_SHOWN_RANGES])
        more = len(entry.gpas) - _SHOWN_RANGES
        yield f"GPAs {shown}" + (f" and {more} more ranges" if more > 0 else "")
