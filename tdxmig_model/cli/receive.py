"""``tdxmig receive``: take a trust domain over from another process, on this host or another."""

from __future__ import annotations

from typing import Any

import click

from tdxmig_model.cli import output
from tdxmig_model.cli.sides import meeting, run_side, shared_options


@click.command(
    name="receive",
    epilog="Example: tdxmig receive tcp:[::]:4711 --identity keys --tls --memory 64MiB",
)
@click.argument("address")
@shared_options
@output.json_option
@click.pass_context
def command(ctx: click.Context, /, address: str, as_json: bool, **chosen: Any) -> None:
    """Take a trust domain over at ADDRESS: tcp:HOST:PORT, tcp:[IPV6]:PORT, unix:PATH or file:PATH.

    This process prepares an empty TD of the given --memory and --vcpus in a software TDX module,
    listens, and imports what tdxmig send migrates to it.  Whoever connects has to prove by its
    certificate that it is the source in --identity.  With --tls the stream is authenticated too.

    With file:PATH it loads what tdxmig send stored there, once: PATH.loaded notes that it did.

    Exits 0 if the TD runs here, 1 if not, 2 if it could not be tried, 130 if it was interrupted.
    """
    from tdxmig_model.supervisor import receive_td

    run_side(ctx, receive_td, meeting("server", address, chosen), as_json, chosen)
