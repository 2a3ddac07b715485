"""Does every command keep the contract: help with an example, exit codes, one line, one object?"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import tdxmig_model
from tdxmig_model import __main__ as entry
from tdxmig_model import cli, errors
from tdxmig_model.cli import catalogue, output
from tdxmig_model.supervisor import SIDES, lifecycle_events

CLI_FOLDER = Path(cli.__file__).parent


def tdxmig(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tdxmig_model", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "100", **variables},
        check=False,
    )


def defines_command(path: Path) -> bool:
    """Whether a module of the package ``cli`` binds the name ``command`` at its top level."""
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef(name="command"):
                return True
            case ast.Assign(targets=[ast.Name(id="command")]):
                return True
            case ast.AnnAssign(target=ast.Name(id="command")):
                return True
    return False


def command_modules() -> set[str]:
    return {path.stem for path in CLI_FOLDER.glob("*.py") if defines_command(path)} | {
        path.parent.name for path in CLI_FOLDER.glob("*/__init__.py") if defines_command(path)
    }


Fake = Callable[[Callable[[], object]], None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Add a command that does what the test says; it is found the way all commands are."""

    def add(action: Callable[[], object]) -> None:
        @click.command(name="fake")
        @output.json_option
        def command(as_json: bool) -> object:
            return action()

        module = types.ModuleType("tdxmig_model.cli.fake")
        module.command = command  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "fake", "Only in this test.")

    return add


def failing(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


def test_the_listed_commands_are_those_in_the_tree() -> None:
    unlisted = sorted(command_modules() - set(cli.COMMANDS))
    assert not unlisted, f"add a line for {unlisted} to COMMANDS in tdxmig_model/cli/__init__.py"
    absent = sorted(set(cli.COMMANDS) - command_modules())
    assert not absent, f"COMMANDS lists {absent}, and no module defines them"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_every_command_has_an_example_and_json(name: str) -> None:
    ran = tdxmig(name, "--help")
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert "Example" in ran.stdout
    assert f"tdxmig {name}" in ran.stdout.split("Example", 1)[1]
    assert "--json" in ran.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_bad_flag_is_one_line_and_exit_2(name: str) -> None:
    ran = tdxmig(name, "--no-such-flag")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert len(ran.stderr.splitlines()) == 1
    assert "--no-such-flag" in ran.stderr
    assert f"tdxmig {name} --help" in ran.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_bad_flag_with_json_still_prints_one_object(name: str) -> None:
    ran = tdxmig(name, "--json", "--no-such-flag")
    assert ran.returncode == 2
    answer = json.loads(ran.stdout)
    assert answer["ok"] is False
    assert "--no-such-flag" in answer["error"]


def test_help_and_version() -> None:
    ran = tdxmig("--help")
    assert ran.returncode == 0
    assert "Example: tdxmig" in ran.stdout
    listed = [line.split()[0] for line in ran.stdout.split("Commands:")[1].splitlines() if line]
    assert [name for name in cli.COMMANDS if name not in listed] == []
    version = tdxmig("--version")
    assert (version.returncode, version.stdout) == (
        0,
        f"tdxmig, version {tdxmig_model.__version__}\n",
    )


@pytest.mark.parametrize("arguments", [(), ("no-such-command",), ("--no-such-flag",)])
def test_wrong_usage_of_the_group_is_one_line_and_exit_2(arguments: tuple[str, ...]) -> None:
    ran = tdxmig(*arguments)
    assert (ran.returncode, ran.stdout, len(ran.stderr.splitlines())) == (2, "", 1)
    assert ran.stderr.startswith("tdxmig: ")


@pytest.mark.parametrize("arguments", [["--help"], ["doctor"], ["doctor", "--json"]])
def test_help_and_doctor_import_no_heavy_library(arguments: list[str]) -> None:
    script = (
        "import sys; from tdxmig_model.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'z3', 'transitions', 'numpy', 'graphviz', 'wasmtime'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_doctor_prints_one_object() -> None:
    ran = tdxmig("doctor", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    answer = json.loads(ran.stdout)
    assert answer["ok"] is True
    keys = {"name", "status", "detail", "needed_for", "action", "required"}
    assert all(set(check) == keys for check in answer["checks"])
    assert {check["status"] for check in answer["checks"]} <= {"ok", "missing", "unknown"}


def test_doctor_prints_the_same_checks_as_text() -> None:
    as_json = json.loads(tdxmig("doctor", "--json").stdout)
    as_text = tdxmig("doctor").stdout
    for check in as_json["checks"]:
        assert check["name"] in as_text
    assert "Everything that run and verify need is here." in as_text


FAILURES: dict[type[errors.TdxmigError], tuple[errors.TdxmigError, int]] = {
    errors.TdxmigError: (errors.TdxmigError("it failed"), 1),
    errors.ModelError: (errors.ModelError("row export_pause: bad type"), 2),
    errors.UsageError: (errors.UsageError("--vcpus 0: at least 1"), 2),
    errors.Refused: (
        errors.Refused(
            "pause",
            {"op_state": "RUNNABLE"},
            [errors.Unmet("started", "epoch > 0", {"epoch": 0})],
            legal=["setup"],
        ),
        1,
    ),
    errors.PeerError: (errors.PeerError("the peer sent a start token twice"), 1),
    errors.PeerLost: (errors.PeerLost("connection closed in epoch 2"), 1),
    errors.WireError: (
        errors.WireError("bad MBMD", offset=6, field="mb_type", value=9, bound="0, 1, 2"),
        1,
    ),
    errors.BackendError: (errors.BackendError("export_mem", 0x8000020000000000, "BUSY"), 1),
    errors.ModuleHalted: (errors.ModuleHalted("EXPORT.RESTORE", "RUNNABLE", "MIG_COUNT is 0"), 1),
    errors.ModelMismatch: (errors.ModelMismatch("export_track", {"mig_epoch": (2, 1)}), 1),
}


def all_errors(kind: type[errors.TdxmigError]) -> set[type[errors.TdxmigError]]:
    own = {kind} if kind.__module__ == errors.__name__ else set()
    return own.union(*(all_errors(child) for child in kind.__subclasses__()))


def test_every_error_of_the_tree_has_its_exit_code_here() -> None:
    assert set(FAILURES) == all_errors(errors.TdxmigError)


@pytest.mark.parametrize("kind", FAILURES, ids=lambda kind: kind.__name__)
def test_an_error_of_the_tree_becomes_one_line_and_its_code(
    kind: type[errors.TdxmigError], fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    error, code = FAILURES[kind]
    fake(failing(error))
    assert cli.main(["fake"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    for part in str(error).splitlines():
        assert part.strip() in shown.err


@pytest.mark.parametrize("kind", FAILURES, ids=lambda kind: kind.__name__)
def test_with_json_an_error_is_also_the_one_object(
    kind: type[errors.TdxmigError], fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    error, code = FAILURES[kind]
    fake(failing(error))
    assert cli.main(["fake", "--json"]) == code
    shown = capsys.readouterr()
    answer = json.loads(shown.out)
    assert answer["ok"] is False
    assert answer["kind"] == kind.__name__
    assert shown.err == f"tdxmig: {answer['error']}\n"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "trace.ndjson"), 2, "trace.ndjson"),
        (BrokenPipeError(32, "Broken pipe"), 2, "Broken pipe"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (ModuleNotFoundError("No module named 'z3'", name="z3"), 2, "z3 is missing"),
        (ModuleNotFoundError("no", name="tdxmig_model.gone"), 2, "this is a bug"),
        (ZeroDivisionError("division by zero"), 2, "this is a bug"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_any_other_failure_becomes_one_line_and_its_code(
    error: BaseException, code: int, text: str, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(failing(error))
    assert cli.main(["fake"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert text in shown.err


def test_the_traceback_of_a_bug_is_shown_on_request(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TDXMIG_DEBUG", "1")
    fake(failing(ZeroDivisionError("division by zero")))
    assert cli.main(["fake"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("tdxmig: this is a bug")
    assert "Traceback" in shown


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_command_decides_its_exit_code(code: int, fake: Fake) -> None:
    fake(lambda: click.get_current_context().exit(code))
    assert cli.main(["fake"]) == code
    fake(lambda: code)
    assert cli.main(["fake"]) == code


def test_a_command_that_says_nothing_holds(fake: Fake) -> None:
    fake(lambda: None)
    assert cli.main(["fake"]) == 0


def test_a_second_object_on_stdout_is_a_bug(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def twice() -> None:
        output.emit_json({"ok": True})
        output.emit_json({"ok": False})

    fake(twice)
    assert cli.main(["fake", "--json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"ok": True}
    assert "this is the second" in shown.err


def test_what_json_cannot_hold_is_a_bug_and_not_a_string(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(lambda: output.emit_json({"path": Path("x")}))
    assert cli.main(["fake", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "TypeError"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_no_error(unbuffered: str) -> None:
    script = (
        "import sys; from tdxmig_model.cli import main; sys.stdin.read();sys.exit(main(['doctor']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    # Only now does its stdin end, and it begins.
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (141, b"")


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_closed_stdout_is_one_line_and_exit_2(closed: str) -> None:
    ran = subprocess.run(
        ["bash", "-c", f"exec {sys.executable} -m tdxmig_model doctor {closed}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    complaint = (
        "" if "2>&-" in closed else "tdxmig: stdout is closed, so no answer could be printed\n"
    )
    assert (ran.returncode, ran.stderr) == (2, complaint)


def test_an_interrupt_while_the_program_is_still_imported_is_one_line() -> None:
    script = """
import os, signal, sys
class Interrupting:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting)
from tdxmig_model.__main__ import run
sys.exit(run())
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "tdxmig: interrupted\n")


def test_the_installed_command_is_that_entry_point() -> None:
    scripts = tomllib.loads((CLI_FOLDER.parents[1] / "pyproject.toml").read_text())["project"]
    module, _, name = scripts["scripts"]["tdxmig"].partition(":")
    assert getattr(importlib.import_module(module), name) is entry.run


def test_the_help_names_every_exit_code() -> None:
    told = tdxmig("--help").stdout
    for code in (cli.HOLDS, cli.NEGATIVE, cli.UNUSABLE, cli.INTERRUPTED, cli.PIPE_CLOSED):
        assert re.search(rf"\b{code}\b", told)


def test_the_help_of_run_lists_every_event() -> None:
    told = " ".join(tdxmig("run", "--help").stdout.split())
    for side in SIDES:
        assert f"{side} {', '.join(lifecycle_events(side))}" in told


@pytest.mark.parametrize("side", SIDES)
def test_show_finds_events_by_the_names_that_run_takes(side: str) -> None:
    for event in lifecycle_events(side):
        found = catalogue.find(f"{side}:{event}")
        assert {item["actor"] for item in found} == {side}


def test_progress_is_silent_where_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output.progress_console().print("half way")
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")
