"""``tdxmig export``: a model at one size, or the wire format, as text for other tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from tdxmig_model.cli import instance, output


@click.command(name="export", epilog="Example: tdxmig export promela lifecycle --vcpus 2 --out .")
@click.argument("language", type=click.Choice(("tla", "promela", "wireshark")))
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
@click.pass_context
def command(
    ctx: click.Context, /, language: str, model: str, folder: Path, as_json: bool, **sizes: Any
) -> None:
    """Write a model as TLA+ for TLC, or as Promela for SPIN.

    Both have the states that tdxmig explore counts for the same options; the head of each file
    says how to count them.

    \b
    MODEL is one of
      lifecycle, leaf, order, memory, control, keys, key-words, bindings,
      terms, forks, locks, import-locks, calls, guest-pages
    and lifecycle by default.

    wireshark writes a dissector of the wire format in Lua, tdxmig.lua; it takes no MODEL and no
    sizes.
    """
    if language == "wireshark":
        _refuse_sizes(ctx)
        _write({"tdxmig.lua": _dissector()}, (), folder, as_json)
        return
    from tdxmig_model.export import module_name, promela, tla, tla_config

    chosen = instance.choose(model, **sizes)
    given = chosen.system, chosen.instance, chosen.ceilings
    if language == "tla":
        name = module_name(chosen.system)
        texts = {f"{name}.tla": tla(*given), f"{name}.cfg": tla_config(*given)}
    else:
        texts = {f"{chosen.system.name.replace(' ', '_')}.pml": promela(*given)}
    _write(texts, chosen.warnings, folder, as_json)


def _refuse_sizes(ctx: click.Context) -> None:
    """The wire format has no sizes; whoever gives some expects something else."""
    for name in ctx.params.keys() - {"language", "folder", "as_json"}:
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError("wireshark takes no model and no sizes", ctx)


def _dissector() -> str:
    from tdxmig_model.export import wireshark

    return wireshark()


def _write(texts: Mapping[str, str], warnings: Sequence[str], folder: Path, as_json: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    files = [str(folder / file) for file in texts]
    if as_json:
        output.emit_json({"ok": True, "files": files, "warnings": list(warnings)})
    else:
        for warning in warnings:
            click.echo(f"warning: {warning}", err=True)
        for file in files:
            click.echo(file)
