"""Can every model be explored and exported from the command line, by any form of its name?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_instances import SMALL

from tdxmig_model import cli
from tdxmig_model.cli import instance, sizes
from tdxmig_model.cli.sizes import COMPLETION, PROTOCOL
from tdxmig_model.explore import explore
from tdxmig_model.expr import Instance
from tdxmig_model.expr.finite import ceilings
from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.model.words import HARDENED, TDX_1_5_01

MODELS = {system.name: system for system in SYSTEMS}
QUICK = [name for name in MODELS if name not in (*PROTOCOL, "calls")]
"""Explored in a second or two at their default sizes."""


def options(model: str) -> list[str]:
    """The small instance of a model as options."""
    counts, limits = SMALL[model]
    words = [f"--size={name}={count}" for name, count in counts.items()]
    return [
        *words,
        *("--ceiling=" + (f"{name}={n}" if name else str(n)) for name, n in limits.items()),
    ]


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main([*words, "--json"]) in (0, 1)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_explored_at_the_given_sizes(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "explore", model, *options(model))
    system = MODELS[model].under(HARDENED)
    small = Instance.small(system, SMALL[model][0])
    assert told["sizes"] == {k.name: small.bounded(k) for k in system.indexes()}
    given = SMALL[model][1]
    assert given.items() <= {**told["ceilings"], "": given.get("")}.items()
    found = explore(system, small, ceiling=told["ceilings"])
    assert (told["states"], told["digest"]) == (found.states, found.digest)
    assert told["verdict"] == "exhausted"
    assert told["ok"] is True


@pytest.mark.parametrize("model", QUICK)
def test_the_default_sizes_have_room_for_every_goal(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "explore", model)
    assert (told["verdict"], told["not_reached"], told["warnings"]) == ("exhausted", [], [])
    assert told["reached"]
    assert not told["dead_steps"]


@pytest.mark.parametrize("model", [*PROTOCOL, "calls"])
def test_the_default_sizes_of_the_larger_models_are_searched_to_a_limit(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "explore", model, "--limit", "3000")
    assert (told["verdict"], told["limit"], told["warnings"]) == ("bounded", 3000, [])
    assert 3000 <= told["states"] < 20_000
    assert cli.main(["explore", model, "--limit", "3000"]) == 0
    assert "ended by --limit, at 3000 states" in capsys.readouterr().out


def test_a_model_without_goals_has_those_of_the_model_below(
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = answer(capsys, "explore", "order", "--limit", "100000")
    assert {goal["goal"] for goal in told["reached"]} >= {"cold", "re_export"}


@pytest.mark.parametrize("word", ["import locks", "import-locks", "import_locks", "Import-Locks"])
def test_a_name_of_two_words_has_several_forms(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "explore", word)
    assert told["model"] == "import locks"


@pytest.mark.parametrize("command", [["explore"], ["export", "tla"]])
def test_help_and_errors_list_every_model(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = {name.replace(" ", "-").replace("_", "-") for name in MODELS}
    assert cli.main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    block = text.split("MODEL is one of", 1)[1].split("and lifecycle by default", 1)[0]
    assert set(re.findall(r"[\w-]+", block)) == words
    assert cli.main([*command, "import-lock"]) == 2
    line = capsys.readouterr().err
    listed = line.split("is none of ", 1)[1].split(";", 1)[0]
    assert set(listed.split(", ")) == words
    assert "did you mean import-locks?" in line


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_exported(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = MODELS[model].under(HARDENED)
    for language in ("tla", "promela"):
        files = answer(capsys, "export", language, model, "--out", str(tmp_path))["files"]
        texts = [Path(file).read_text() for file in files]
        assert not any(" " in Path(file).name for file in files)
        assert all(step.name in texts[0] for step in system.steps)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["control", "--vcpus", "2"], "--vcpus: the control model has no Vcpu; it has Field"),
        (["keys", "--size", "Feild=2"], "--size: the keys model has no Feild; it has Counter, Key"),
        (["keys", "--size", "Key=99"], "Key=99 is not in the range 1 to 16"),
        (["keys", "--size", "Key=0"], "Key=0 is not in the range 1 to 16"),
        (["keys", "--size", "6"], "6 is not NAME=N"),
        (["keys", "--ceiling", "=3"], "=3 is neither N nor NAME=N"),
        (["keys", "--ceiling", "log_length2=3"], "the keys model has no integer variable"),
    ],
)
def test_what_a_model_does_not_have_is_wrong_usage(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explore", *words]) == 2
    assert says in capsys.readouterr().err


def test_index_names_have_no_case(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "explore", "control", "--size", "field=2")
    assert told["sizes"] == {"Field": 2}
    told = answer(capsys, "explore", "guest pages", "--pages", "1")
    assert told["sizes"] == {"Page": 1}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 3])
def test_no_size_of_all_indexes_breaks_a_command(
    model: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [f"--size={kind.name}={size}" for kind in MODELS[model].indexes()]
    told = answer(capsys, "explore", model, "--limit", "200", *every)
    assert set(told["sizes"].values()) == {size}
    assert answer(capsys, "export", "tla", model, *every, "--out", str(tmp_path))["ok"]


def test_a_public_violation_says_what_repairs_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explore", "guest-pages", "--profile", TDX_1_5_01, "--pages", "1"]
    assert cli.main(words) == 1
    assert "P48 is public: R8 of specs/repairs.toml removes it" in capsys.readouterr().out
    (violation,) = answer(capsys, *words)["violations"]
    assert violation["property"] == "P48"
    assert violation["notice"].startswith("P48 is public: R8 ")


@pytest.mark.parametrize("model", ["control", "terms", "forks", "import-locks"])
def test_every_violation_comes_with_a_notice(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, "explore", model, "--profile", TDX_1_5_01)["violations"]
    assert found
    for violation in found:
        public = " is public: " in violation["notice"]
        assert public or "report to the vendor before publishing" in violation["notice"]


def test_lemmas_are_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    """A lemma that a profile does not keep is no violation."""
    told = answer(capsys, "explore", "terms", "--profile", TDX_1_5_01)
    system = MODELS["terms"].under(TDX_1_5_01)
    lemmas = {p.identifier: p.formula for p in system.properties if p.level == "lemma"}
    small = Instance.small(system, told["sizes"])
    broken = explore(system, small, invariants=lemmas, ceiling=told["ceilings"]).violations
    assert broken
    assert not set(broken) & {violation["property"] for violation in told["violations"]}


def test_the_tables_of_defaults_are_about_the_models() -> None:
    for name, system in MODELS.items():
        chosen = sizes.default_sizes(name, {})
        assert set(chosen) == {kind.name for kind in system.under(HARDENED).indexes()}
        small = Instance.small(system.under(HARDENED), chosen)
        integers = ceilings(system.under(HARDENED), small, 1)
        assert set(sizes.default_ceilings(name, chosen)) <= {"", *integers}
        goal = COMPLETION.get(name)
        goals = instance.choose(name, profile=HARDENED, size={}, ceiling={}).goals()
        assert goal is None or goal in {g.identifier for g in goals}
