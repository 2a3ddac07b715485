"""``tdxmig export``: a model at one size as text for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tdxmig_model.cli import instance, output


@click.command(name="export", epilog="Example: tdxmig export promela lifecycle --vcpus 2 --out .")
@click.argument("language", type=click.Choice(("tla", "promela")))
@instance.model_argument
@instance.options
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="The folder to write into [default: the current one].",
)
@output.json_option
def command(language: str, model: str, folder: Path, as_json: bool, **sizes: Any) -> None:
    """Write a model as TLA+ for TLC, or as Promela for SPIN.

    Both have the states that tdxmig explore counts for the same options; the head of each file
    says how to count them.

    \b
    MODEL is one of
      lifecycle, leaf, order, memory, control, keys, key-words, bindings,
      terms, forks, locks, import-locks, calls, guest-pages
    and lifecycle by default.
    """
    from tdxmig_model.export import module_name, promela, tla, tla_config

    chosen = instance.choose(model, **sizes)
    given = chosen.system, chosen.instance, chosen.ceilings
    if language == "tla":
        name = module_name(chosen.system)
        texts = {f"{name}.tla": tla(*given), f"{name}.cfg": tla_config(*given)}
    else:
        texts = {f"{chosen.system.name.replace(' ', '_')}.pml": promela(*given)}
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    files = [str(folder / file) for file in texts]
    if as_json:
        output.emit_json({"ok": True, "files": files, "warnings": list(chosen.warnings)})
    else:
        for warning in chosen.warnings:
            click.echo(f"warning: {warning}", err=True)
        for file in files:
            click.echo(file)
