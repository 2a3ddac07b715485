"""``tdxmig draw``: the diagrams of the model, written into a folder or compared with it."""

from __future__ import annotations

from pathlib import Path

import click

from tdxmig_model import draw
from tdxmig_model.cli import output
from tdxmig_model.errors import UsageError


@click.command(name="draw", epilog="Example: tdxmig draw diagrams --check")
@click.argument(
    "folder", type=click.Path(file_okay=False, path_type=Path), default=Path("diagrams")
)
@click.option("--check", is_flag=True, help="Write nothing; report the files that are stale.")
@output.json_option
@click.pass_context
def command(ctx: click.Context, folder: Path, check: bool, as_json: bool) -> None:
    """Write every diagram into FOLDER (default: diagrams), as DOT and as SVG.

    With --check nothing is written: exits 1 if a DOT file is not what the model says now, or an SVG
    was drawn from another DOT text.
    """
    if check and not folder.is_dir():
        raise UsageError(f"there is no folder {folder} to check; tdxmig draw {folder} makes it")
    files = draw.files(folder) if check else draw.write_all(folder)
    stale = draw.check(folder) if check else []
    if as_json:
        output.emit_json(
            {"ok": not stale, "files": [str(p) for p in files], "stale": [str(p) for p in stale]}
        )
    elif check:
        for path in stale:
            click.echo(f"stale: {path}")
        click.echo(f"{len(stale)} stale; tdxmig draw {folder} writes them" if stale else "fresh")
    else:
        for path in files:
            click.echo(str(path))
    ctx.exit(1 if stale else 0)
