"""``tdxmig identity``: make the certificates that ``send`` and ``receive`` need."""

from __future__ import annotations

from pathlib import Path

import click

from tdxmig_model.cli import output


@click.command(
    name="identity",
    epilog="Example: tdxmig identity keys --host td7.example.org",
)
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="Name or address of the destination beside localhost; may be repeated.",
)
@output.json_option
def command(directory: Path, hosts: tuple[str, ...], as_json: bool) -> None:
    """Make the certificates and private keys of both sides in DIRECTORY.

    The files source-* and destination-* are for premigration, the others, with the names that QEMU
    gives them, for TLS on the stream.  For two hosts copy the directory and delete the private keys
    (*-key.pem) of the other side: the source keeps source and client, the destination keeps
    destination and server.  Files that are there are never replaced.
    """
    from tdxmig_model.certificates import write_certificates

    files = write_certificates(directory, hosts)
    if as_json:
        output.emit_json({"ok": True, "files": [str(path) for path in files]})
        return
    for path in files:
        click.echo(path)
