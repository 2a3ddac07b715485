"""The command ``tdxmig``: finds the subcommand, and turns every failure into one line and a code.

A command lives in the module of its name (``tdxmig_model.cli.doctor:command``) and is imported when
it is used, so that ``--help`` and ``doctor`` need neither z3 nor transitions nor NumPy.

Exit codes: 0 it holds; 1 a property, check or migration failed, which is a result; 2 usage or
environment, nothing was decided; 130 interrupted; 141 the reader of stdout went away.  The process
begins in `tdxmig_model.__main__`, which is there before this module and what it imports.
"""

from __future__ import annotations

import importlib
import os
import select
import sys
import traceback
from collections.abc import Sequence

import click

from tdxmig_model import __version__
from tdxmig_model.cli import output
from tdxmig_model.errors import ModelError, TdxmigError, UsageError

HOLDS, NEGATIVE, UNUSABLE, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141

# Every command in the order of the help text.  The line stands here, and not only in the module,
# because the list is printed without importing the modules.
COMMANDS = {
    "run": "Migrate a trust domain between two processes, enforced step by step.",
    "send": "Migrate a trust domain to another process, host or file.",
    "receive": "Take a trust domain over from another process, host or file.",
    "identity": "Make the certificates that send and receive need.",
    "verify": "Prove the properties, or delete a guard and read the counterexample.",
    "explore": "Visit every state of a model at a given size.",
    "show": "Show a step, property, state, leaf, profile or status code.",
    "draw": "Write the diagrams, or compare them with what is there.",
    "export": "Write a model as TLA+ or Promela, or the wire format for Wireshark.",
    "stream": "Decode a captured migration stream and say what is wrong with it.",
    "doctor": "Report what this host can do.",
}


class LazyGroup(click.Group):
    """A group that imports a command only to run it or to print its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"tdxmig_model.cli.{cmd_name}").command
        if not isinstance(command, click.Command):
            raise TypeError(f"tdxmig_model.cli.{cmd_name}.command is not a click command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        # Caught here because click itself would print an empty line for the first, and would exit
        # with 1, which means a negative result, for a closed pipe.
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, OSError) as error:
            ctx.exit(report(error))


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: tdxmig doctor",
)
@click.version_option(__version__, prog_name="tdxmig")
@click.pass_context
def tdxmig(ctx: click.Context) -> None:
    """Intel TDX live migration as a model that is proved, drawn, run and enforced.

    Exit codes: 0 it holds; 1 a property, a check or a migration failed; 2 wrong usage or an
    environment that lacks something; 130 interrupted; 141 the reader of stdout went away.
    """
    if ctx.invoked_subcommand is None:
        raise click.UsageError("no command given", ctx)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tdxmig`` with ``arguments`` (default: those of the process); the exit code.

    With ``--json`` among the arguments, a failure before the command printed its object is printed
    as ``{"ok": false, "error": ..., "kind": ...}``, so that stdout always holds one object.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    output.begin(json_wanted="--json" in words)
    if sys.stdout is None:  # Python has no stream where the descriptor was closed
        click.echo("tdxmig: stdout is closed, so no answer could be printed", err=True)
        return UNUSABLE
    try:
        result = tdxmig.main(words, prog_name="tdxmig", standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        return report(error)
    return result if isinstance(result, int) else HOLDS


def report(error: BaseException) -> int:
    """Print one line about ``error`` to stderr and return the exit code it stands for."""
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return PIPE_CLOSED
    code, line = describe(error)
    click.echo(f"tdxmig: {line}", err=True)
    if os.environ.get("TDXMIG_DEBUG") == "1":
        traceback.print_exception(error)
    output.emit_failure(type(error).__name__, line)
    return code


def _stdout_is_closed() -> bool:
    """Whether the reader of stdout has seen enough, as in ``tdxmig show ... | head``."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:
        return False
    # Asked of the pipe itself: a peer's socket raises the same error, and that one is to be told.
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    # What is still buffered goes nowhere, else the interpreter complains while it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def describe(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line that stand for ``error``."""
    match error:
        case KeyboardInterrupt() | click.Abort():
            return INTERRUPTED, "interrupted"
        case click.ClickException():
            hint = ""
            if isinstance(error, click.UsageError) and error.ctx is not None:
                hint = f" (see {error.ctx.command_path} --help)"
            return UNUSABLE, _one_line(error.format_message()) + hint
        case ModelError():
            return UNUSABLE, _bug(f"the model is wrong: {_one_line(str(error))}")
        case UsageError():
            return UNUSABLE, _one_line(str(error))
        case TdxmigError():
            return NEGATIVE, _one_line(str(error))
        case OSError():
            return UNUSABLE, _one_line(str(error))
        case ModuleNotFoundError(name=str(name)) if name.split(".")[0] != "tdxmig_model":
            return UNUSABLE, f"the Python package {name} is missing (see tdxmig doctor)"
        case _:
            return UNUSABLE, _bug(f"{type(error).__name__}: {_one_line(str(error))}")


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def _bug(what: str) -> str:
    return f"this is a bug in tdxmig: {what} (TDXMIG_DEBUG=1 shows where)"
