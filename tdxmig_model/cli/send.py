"""``tdxmig send``: migrate a trust domain to another process, on this host or another."""

from __future__ import annotations

from typing import Any

import click

from tdxmig_model.cli import output
from tdxmig_model.cli.run import GUESTS
from tdxmig_model.cli.sides import meeting, run_side, shared_options


@click.command(
    name="send",
    epilog="Example: tdxmig send tcp:[2001:db8::7]:4711 --identity keys --tls --memory 64MiB",
)
@click.argument("address")
@shared_options
@click.option(
    "--batch",
    type=click.IntRange(1, 512),
    default=512,
    show_default=True,
    help="Pages per memory bundle.",
)
@click.option(
    "--guest",
    type=click.Choice(GUESTS),
    default="hot-set",
    show_default=True,
    help="What the guest does while it is migrated.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 64) - 1),
    default=0,
    show_default="0",
    help="Seed of the guest.",
)
@click.option(
    "--tls-hostname",
    metavar="NAME",
    help="Name in the other side's certificate [default: the host of the address, or localhost].",
)
@output.json_option
@click.pass_context
def command(ctx: click.Context, /, address: str, as_json: bool, **chosen: Any) -> None:
    """Migrate a trust domain to ADDRESS: tcp:HOST:PORT, tcp:[IPV6]:PORT, unix:PATH or file:PATH.

    This process builds a TD in a software TDX module and migrates it to the process that runs
    tdxmig receive with the same --memory and --vcpus at ADDRESS.  It connects twice: the first
    connection authenticates both sides by the certificates in --identity and exchanges keys, the
    second carries the migration stream, with --tls encrypted and authenticated once more.

    With file:PATH the stream is stored, with its key, sealed for the destination's certificate, in
    PATH.keys.  A file has no return path: the start token is written only when everything before
    it is safely on the disk, and from then on the TD is in the file alone.  A file that is damaged
    is a TD that is gone, and a copy of the file could be loaded twice.

    Exits 0 if the TD was handed over as asked, 1 if not (the sentence says who has it), 2 if it
    could not be tried, 130 if it was interrupted.
    """
    from tdxmig_model.supervisor import send_td

    run_side(ctx, send_td, meeting("client", address, chosen), as_json, chosen)
