"""What every command prints: one JSON object on stdout, or text there and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


@dataclass(slots=True)
class _Stdout:
    """Whether stdout belongs to one JSON object, and whether that object is out."""

    json_wanted: bool = False
    json_printed: bool = False


_stdout = _Stdout()


def begin(*, json_wanted: bool) -> None:
    """Start a new command line: nothing is printed yet."""
    _stdout.json_wanted = json_wanted
    _stdout.json_printed = False


def json_option(function: Decorated) -> Decorated:
    """Give a command ``--json``, which it receives as the flag ``as_json``."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON object on stdout and nothing else there.",
    )(function)


def emit_summary(rows: Sequence[tuple[str, str]], sentence: str) -> None:
    """Print what came out, a row each, and what it means."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {value}")
    click.echo(sentence)


def emit_json(value: Mapping[str, object]) -> None:
    """Print ``value`` as the one object on stdout; a second call is a bug.

    Anything but JSON types in it is an error of the command: nothing is turned into a string.
    """
    if _stdout.json_printed:
        raise RuntimeError("a command prints exactly one JSON object, this is the second")
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    _stdout.json_printed = True
    click.echo(text)


class JsonPieces:
    """Writes the members of one JSON object one after the other; see `json_pieces`."""

    def __init__(self) -> None:
        self._between = ""

    def begin_list(self, name: str) -> None:
        """Begin a member that is a list; give its elements to `item`."""
        self._write(f"{json.dumps(name)}: [")
        self._between = ""

    def item(self, value: Mapping[str, object]) -> None:
        """The next element of the list."""
        self._write(json.dumps(value, ensure_ascii=False, allow_nan=False))

    def end_list(self) -> None:
        """End the list."""
        self._between = ""
        self._write("]")

    def members(self, values: Mapping[str, object]) -> None:
        """Members that are whole."""
        for name, value in values.items():
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
            self._write(f"{json.dumps(name)}: {text}")

    def _write(self, text: str) -> None:
        click.echo(self._between + text, nl=False)
        self._between = ", "


@contextmanager
def json_pieces() -> Iterator[JsonPieces]:
    """The one object on stdout, written in pieces because it may not fit into memory.

    What may fail belongs before this: a failure inside leaves an object without an end.
    """
    if _stdout.json_printed:
        raise RuntimeError("a command prints exactly one JSON object, this is the second")
    pieces = JsonPieces()
    _stdout.json_printed = True
    click.echo("{", nl=False)
    yield pieces
    click.echo("}")


def emit_failure(kind: str, line: str) -> None:
    """The object that stands for a command that failed before it printed its own."""
    if _stdout.json_wanted and not _stdout.json_printed:
        emit_json({"ok": False, "error": line, "kind": kind})


def console() -> Console:
    """A console on stdout; its reader going away is a BrokenPipeError, as for all output."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # the error at hand; rich would exit with 1, which means a failed result

    return Plain(highlight=False)


def progress_console() -> Console:
    """A console on stderr that shows something only where stderr is a terminal."""
    from rich.console import Console

    shown = sys.stderr is not None and sys.stderr.isatty()
    return Console(stderr=True, quiet=not shown)
