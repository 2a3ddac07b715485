"""Do the exported texts have the states of our own search, in SPIN and in TLC where these run?"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from expectations import MODELS
from random_models import VARIABLES, Terms
from small_instances import small

from tdxmig_model import cli
from tdxmig_model.explore import explore
from tdxmig_model.export import module_name, promela, tla, tla_config
from tdxmig_model.expr import (
    BOOL,
    INT,
    Goal,
    Instance,
    Property,
    System,
    all_of,
    choose,
    count,
    enum,
    forall,
    implies,
    index,
    lookup,
    mapping,
    member,
    need,
    not_,
    param,
    scalar,
    sort,
    step,
)
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.model.words import PROFILES, TDX_1_5_01

# --- a toy with every kind of term --------------------------------------------------------------

LAMP = enum("Lamp", "OFF", "DIM", "BRIGHT")
OFF, DIM, BRIGHT = (member(LAMP, m) for m in LAMP.members)
FLOOR = index("Floor")
GUEST = sort("Guest")

lamp = mapping("lamp", (FLOOR,), LAMP, OFF, "house", doc="one for each floor; /* not a comment */")
seen = mapping("seen", (GUEST, FLOOR), BOOL, False, "house")
top = scalar("top", INT, 0, "house")
mood = scalar("mood", LAMP, DIM, "house")
written = scalar("written", INT, 0, "house", ghost=True, doc="is written and never read")

guest = param("guest", GUEST)
floor = param("floor", FLOOR)
shade = param("shade", LAMP)
open_ = param("open", BOOL)

bright = count("bright lamps", FLOOR, lambda f: lamp[f].eq(BRIGHT))


def row(name, params, when, then):  # type: ignore[no-untyped-def]
    needs = [need(f"n{k}", formula) for k, formula in enumerate(when)]
    return step(name, "house", params, when=needs, then=then, why="a test */", cite="(* none *)")


HOUSE = System(
    "house",
    (lamp, seen, top, mood, written),
    (
        row(
            "walk",
            (guest, floor),
            [floor.le(top), not_(seen[guest, floor])],
            [
                seen[guest, floor].to(True),
                lamp[floor].to(lookup(lamp[floor], {OFF: DIM, DIM: BRIGHT})),
            ],
        ),
        row("climb", (), [lamp[top].ne(OFF)], [top.to(top + 1), written.to(top)]),
        row("swap", (), [top.gt(0)], [lamp[top].to(lamp[top - 1]), top.to(top - 1)]),
        row("paint", (shade,), [mood.ne(shade), bright.lt(2)], [mood.to(shade)]),
        row(
            "night",
            (open_,),
            [mood.in_(OFF, BRIGHT)],
            [
                lamp.fill(lambda f: choose(all_of(open_.eq(True), f.eq(0)), mood, OFF)),
                mood.to(choose(bright.eq(0), DIM, lamp[0])),
            ],
        ),
    ),
    properties=(
        Property("low", top.le(3), "Nobody is above the roof.", "leaf"),
        Property(
            "stairs",
            forall({"a": FLOOR, "b": FLOOR}, lambda a, b: implies(a.lt(b), lamp[a].ne(lamp[b]))),
            "No two lamps are equal.",
            "leaf",
        ),
    ),
    goals=(Goal("all_bright", all_of(bright.eq(3), top.gt(0)), "Every lamp is bright."),),
)
SMALL = Instance.small(HOUSE, {"Floor": 3, "Guest": 2})


# --- SPIN ---------------------------------------------------------------------------------------

SPIN = pytest.mark.skipif(
    not (shutil.which("spin") and shutil.which("gcc")), reason="spin and gcc are not on PATH"
)


def run(folder: Path, *command: str) -> str:
    ran = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def spin(folder: Path, text: str, *defines: str) -> str:
    """What a full search by SPIN prints, under the rule that the text itself states."""
    (folder / "model.pml").write_text(text)
    run(folder, "spin", "-o2", *(f"-D{d}" for d in defines), "-a", "model.pml")
    run(folder, "gcc", "-O0", "-w", "-DSAFETY", "-DNOREDUCE", "-o", "pan", "pan.c")
    return run(folder, "./pan", "-m1000000", "-w20")


def spin_counts(output: str) -> tuple[int, int]:
    """States, and transitions without the one to the initial state."""
    assert "errors: 0" in output, output
    assert "max search depth too small" not in output
    stored = re.search(r"(\d+) states, stored", output)
    taken = re.search(r"(\d+) transitions \(= stored\+matched\)", output)
    assert stored
    assert taken
    return int(stored[1]), int(taken[1]) - 1


@SPIN
def test_spin_counts_the_states_of_the_toy(tmp_path: Path) -> None:
    found = explore(HOUSE, SMALL)
    assert found.states > 500
    assert found.clipped > 0
    counts = spin_counts(spin(tmp_path, promela(HOUSE, SMALL)))
    assert counts == (found.states, found.transitions)


@SPIN
@pytest.mark.parametrize(
    ("define", "error"),
    [("not_low", False), ("not_stairs", True), ("goal_all_bright", True), ("not_HOUSE", False)],
)
def test_spin_judges_properties_and_goals_as_we_do(
    tmp_path: Path, define: str, error: bool
) -> None:
    output = spin(tmp_path, promela(HOUSE, SMALL), f"CHECK_{define}")
    assert ("assertion violated" in output) == error
    found = explore(
        HOUSE,
        SMALL,
        goals=HOUSE.goals,
        invariants={p.identifier: p.formula for p in HOUSE.properties},
    )
    assert set(found.violations) == {"stairs"}
    assert set(found.reached) == {"all_bright"}


@SPIN
def test_spin_counts_the_states_of_random_systems(tmp_path: Path) -> None:
    compared = 0
    for seed in (3, 16, 24, 28, 35):
        terms = Terms(seed, wander=True)
        system = System("toy", VARIABLES, tuple(terms.step(f"s{k}") for k in range(8)))
        instance = Instance.small(system, {"Cell": 2, "Worker": 1})
        found = explore(system, instance, ceiling=2, limit=5000)
        if found.truncated or found.states < 4:
            continue
        compared += 1
        counts = spin_counts(spin(tmp_path, promela(system, instance, 2)))
        assert counts == (found.states, found.transitions), seed
    assert compared >= 3


LIFECYCLE_SIZES = {"Vcpu": 2, "Message": 6, "Epoch": 4, "Page": 1, "Stream": 1}
LEAF_SIZES = {"Vcpu": 1, "Message": 1, "Epoch": 4, "Page": 1, "Stream": 1}


@SPIN
@pytest.mark.parametrize("profile", PROFILES)
def test_spin_counts_the_states_of_the_lifecycle(tmp_path: Path, profile: str) -> None:
    system = LIFECYCLE.under(profile)
    instance = Instance.small(system, LIFECYCLE_SIZES)
    found = explore(system, instance)
    assert not found.dead_steps
    counts = spin_counts(spin(tmp_path, promela(system, instance)))
    assert counts == (found.states, found.transitions)


@SPIN
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("model", MODELS)
def test_spin_counts_the_states_of_every_model(tmp_path: Path, model: str, profile: str) -> None:
    system, instance, limits = small(model, profile)
    found = explore(system, instance, ceiling=limits)
    assert not found.truncated
    counts = spin_counts(spin(tmp_path, promela(system, instance, limits)))
    assert counts == (found.states, found.transitions)


@SPIN
@pytest.mark.parametrize("profile", PROFILES)
def test_spin_counts_the_states_of_the_leaf_model(tmp_path: Path, profile: str) -> None:
    system = LEAF.under(profile)
    instance = Instance.small(system, LEAF_SIZES)
    found = explore(system, instance, ceiling=2, limit=100_000)
    assert not found.truncated
    counts = spin_counts(spin(tmp_path, promela(system, instance, 2)))
    assert counts == (found.states, found.transitions)


# --- TLC ----------------------------------------------------------------------------------------


def tlc_command() -> list[str] | None:
    """`tlc` on PATH, or Java with the jar that TLA2TOOLS names."""
    if shutil.which("tlc"):
        return ["tlc"]
    jar = os.environ.get("TLA2TOOLS")
    return ["java", "-XX:+UseParallelGC", "-cp", jar, "tlc2.TLC"] if jar else None


TLC = pytest.mark.skipif(
    tlc_command() is None, reason="TLC is neither on PATH as tlc nor named by TLA2TOOLS"
)


def tlc(
    folder: Path,
    system: System,
    instance: Instance,
    ceiling: int | Mapping[str, int] | None = None,
) -> str:
    name = module_name(system)
    (folder / f"{name}.tla").write_text(tla(system, instance, ceiling))
    # TLC before 1.7 has an option for what the configuration says, and newer ones have both.
    config = tla_config(system, instance, ceiling).replace("CHECK_DEADLOCK FALSE\n", "")
    (folder / f"{name}.cfg").write_text(config)
    command = tlc_command()
    assert command
    ran = subprocess.run(
        [*command, "-deadlock", "-config", f"{name}.cfg", f"{name}.tla"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return ran.stdout


def tlc_counts(output: str) -> tuple[int, int, int]:
    """Distinct states, generated states without the initial one, and depth without it."""
    assert "No error has been found" in output, output
    counted = re.search(r"(\d+) states generated, (\d+) distinct states found, 0 states", output)
    depth = re.search(r"depth of the complete state graph search is (\d+)", output)
    assert counted
    assert depth
    return int(counted[2]), int(counted[1]) - 1, int(depth[1]) - 1


@TLC
@pytest.mark.parametrize("profile", PROFILES)
def test_tlc_counts_the_states_of_the_lifecycle(tmp_path: Path, profile: str) -> None:
    system = LIFECYCLE.under(profile)
    instance = Instance.small(system, LIFECYCLE_SIZES)
    found = explore(system, instance)
    counts = tlc_counts(tlc(tmp_path, system, instance))
    assert counts == (found.states, found.transitions, found.depth)


@TLC
def test_tlc_counts_the_states_of_the_leaf_model(tmp_path: Path) -> None:
    """TLC takes each true side of a disjunction in a guard, and so generates more."""
    system = LEAF.under("hardened")
    instance = Instance.small(system, LEAF_SIZES)
    found = explore(system, instance, ceiling=2)
    states, generated, depth = tlc_counts(tlc(tmp_path, system, instance, 2))
    assert (states, depth) == (found.states, found.depth)
    assert generated >= found.transitions


@TLC
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("model", MODELS)
def test_tlc_counts_the_states_of_every_model(tmp_path: Path, model: str, profile: str) -> None:
    """TLC judges the properties too, and would end its search where one is violated."""
    system, instance, limits = small(model, profile)
    found = explore(system, instance, ceiling=limits)
    if profile == TDX_1_5_01:
        system = replace(system, properties=(), _by_name={})
    states, generated, depth = tlc_counts(tlc(tmp_path, system, instance, limits))
    assert (states, depth) == (found.states, found.depth)
    assert generated >= found.transitions


@TLC
def test_tlc_counts_the_states_of_the_toy_and_finds_what_is_violated(tmp_path: Path) -> None:
    assert "Invariant stairs is violated" in tlc(tmp_path, HOUSE, SMALL)
    sound = System(HOUSE.name, HOUSE.variables, HOUSE.steps, HOUSE.properties[:1], HOUSE.goals)
    found = explore(sound, SMALL)
    states, _, depth = tlc_counts(tlc(tmp_path, sound, SMALL))
    assert (states, depth) == (found.states, found.depth)


# --- the texts themselves -----------------------------------------------------------------------


def sized(system: System) -> Instance:
    """A few of everything, and room for the start epoch."""
    sizes = {"Message": 3, "Epoch": 4, "Floor": 3}
    return Instance.small(system, {k.name: sizes.get(k.name, 2) for k in system.indexes()})


def actions(text: str) -> Mapping[str, str]:
    """Each definition of a module by name, from its name to the next empty line."""
    found = {}
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("\\*")]
        if lines and "==" in lines[0]:
            found[re.split(r"\W", lines[0], maxsplit=1)[0]] = "\n".join(lines)
    return found


@pytest.mark.parametrize("model", [HOUSE, *SYSTEMS], ids=lambda m: m.name)
def test_every_action_gives_every_variable_its_next_value_once(model: System) -> None:
    system = model.under("hardened") if model.profiles else model
    instance = sized(system)
    definitions = actions(tla(system, instance, 3))
    for taken in system.steps:
        text = definitions[taken.name]
        primed = re.findall(r"(\w+)' =", text)
        kept = re.findall(r"UNCHANGED <<(.*)>>", text)
        unchanged = kept[0].split(", ") if kept else []
        assert sorted(primed + unchanged) == sorted(v.name for v in system.variables)
        assert set(primed) == taken.writes()
        for wanted in taken.when:
            assert f"\\* {wanted.label}" in text


@pytest.mark.parametrize("model", [HOUSE, *SYSTEMS], ids=lambda m: m.name)
def test_brackets_are_balanced_and_names_are_identifiers(model: System) -> None:
    system = model.under("hardened") if model.profiles else model
    instance = sized(system)
    module = re.sub(r"\\\*.*", "", tla(system, instance))
    for opening, closing in ("()", "[]", "{}"):
        assert module.count(opening) == module.count(closing)
    assert module.count("<<") == module.count(">>")
    defined = re.findall(r"^(\S+?)(?:\(.*\))? ==", module, re.MULTILINE)
    assert len(defined) == len(set(defined))
    assert all(re.fullmatch(r"[A-Za-z]\w*", name) for name in defined)
    config = tla_config(system, instance)
    listed = config.split("INVARIANTS")[1].split()
    assert listed[0] == "TypeOK"
    assert set(listed) <= set(defined)
    assert len(listed) == len(system.properties) + 1
    body = re.sub(r"/\*.*?\*/", "", promela(system, instance), flags=re.DOTALL)
    for opening, closing in ("()", "[]", "{}"):
        assert body.count(opening) == body.count(closing)


def test_one_row_in_tla() -> None:
    text = tla(HOUSE, SMALL)
    assert actions(text)["walk"].splitlines() == [
        "walk(guest, floor) ==",
        "  /\\ top >= floor  \\* n0",
        "  /\\ ~seen[guest, floor]  \\* n1",
        "  /\\ seen' = [seen EXCEPT ![guest, floor] = TRUE]",
        (
            "  /\\ lamp' = [lamp EXCEPT ![floor] = "
            '(CASE lamp[floor] = "OFF" -> "DIM" [] lamp[floor] = "DIM" -> "BRIGHT" '
            "[] OTHER -> lamp[floor])]"
        ),
        "  /\\ UNCHANGED <<top, mood, written>>",
    ]
    assert "  \\/ \\E guest \\in Guest, floor \\in Floor : walk(guest, floor)\n" in text
    assert 'bright_lamps == Cardinality({element \\in Floor : lamp[element] = "BRIGHT"})' in text
    assert '  /\\ lamp = [i \\in Floor |-> "OFF"]\n' in text
    assert "FloorCount = 3" in tla_config(HOUSE, SMALL)


def test_one_row_in_promela() -> None:
    text = promela(HOUSE, SMALL)
    assert (
        "inline climb() {\n"
        "  (\n"
        "     ((top >= 0) && (top < 3))  /* n0: inside */\n"
        "  && (lamp[top] != Lamp_OFF)  /* n0 */\n"
        "  && ((top + 1) <= 3)  /* top: ceiling */\n"
        "  ) ->\n"
        "  before_0 = top + 1;\n"
        "  before_1 = top;\n"
        "  top = before_0;\n"
        "  written = before_1;\n"
        "  skip\n"
        "}\n"
    ) in text
    assert "  :: d_step { walk(1, 2) }\n" in text
    assert "  :: d_step { paint(Lamp_BRIGHT) }\n" in text
    assert "byte lamp[3] = Lamp_OFF;  /* one for each floor; / * not a comment * / */\n" in text


@pytest.mark.parametrize("model", SYSTEMS, ids=lambda m: m.name)
def test_texts_are_stable(model: System) -> None:
    instance = sized(model)
    assert promela(model, instance, 2) == promela(model, instance, 2)
    assert tla(model, instance, 2) == tla(model, instance, 2)


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_both_languages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "tla", "--out", str(tmp_path / "new"), "--json"]) == 0
    files = [str(tmp_path / "new" / name) for name in ("Lifecycle.tla", "Lifecycle.cfg")]
    assert json.loads(capsys.readouterr().out) == {"ok": True, "files": files, "warnings": []}
    assert all(Path(f).is_file() for f in files)
    arguments = ["export", "promela", "leaf", "--out", str(tmp_path), "--messages", "2"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'leaf.pml'}\n"
    assert "Sizes: Epoch = 4, Message = 2," in (tmp_path / "leaf.pml").read_text()


@SPIN
def test_the_commands_explore_and_export_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["lifecycle", "--messages", "5", "--vcpus", "2"]
    assert cli.main(["explore", *options, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert cli.main(["export", "promela", *options, "--out", str(tmp_path)]) == 0
    counts = spin_counts(spin(tmp_path, (tmp_path / "lifecycle.pml").read_text()))
    assert counts == (answer["states"], answer["transitions"])
