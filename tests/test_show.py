"""Does ``tdxmig show`` find everything that has a name, and say the whole truth about it?"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tdxmig_model.cli import main
from tdxmig_model.cli.catalogue import SYSTEMS, find, listing, name_row, step_item
from tdxmig_model.compile import Compiled
from tdxmig_model.errors import UsageError
from tdxmig_model.expr import Instance
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.words import HARDENED, PROFILES, TDX_1_5_01
from tdxmig_model.verify.scope import NOT_STATED, NotStated

SPECS = Path(__file__).resolve().parent.parent / "specs"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["show", *arguments]) == 0
    return capsys.readouterr().out


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Any]:
    answer = json.loads(shown(capsys, *arguments, "--json"))
    assert answer["ok"] is True
    items: list[Any] = answer["found"]
    return items


# --- names ---------------------------------------------------------------------------------------


def test_every_listed_name_is_found() -> None:
    for title, words in listing().items():
        for word in words:
            kinds = {item["kind"] for item in find(word)}
            assert kinds & {title.rstrip("s").split()[-1], *_KINDS.get(title, ())}, (title, word)


_KINDS = {
    **{f"{s.name} {w}": ("property",) for s in SYSTEMS for w in ("properties", "lemmas")},
    "widths properties": ("property",),
    "liveness properties": ("property",),
    "properties that are not stated": ("not stated",),
    "OP_STATEs": ("state",),
    "source phases": ("state",),
    "destination phases": ("state",),
    "leaves": ("leaf",),
    "status codes": ("status",),
}


def test_everything_of_the_models_is_listed() -> None:
    words = {word for lists in listing().values() for word in lists}
    for system in SYSTEMS:
        assert {s.name for s in system.steps} <= words
        assert {p.identifier for p in system.properties} <= words
        assert {g.identifier for g in system.goals} <= words
    assert set(PROFILES) <= words


def test_without_a_name_all_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    for words in listing().values():
        for word in words:
            assert word in text
    assert json.loads(shown(capsys, "--json")) == {"ok": True, "names": listing()}


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("exprot_mem_begin", "export_mem_begin"),
        ("live_exprt", "LIVE_EXPORT"),
        ("hardend", "hardened"),
        ("TDH.EXPORT.MEMO", "TDH.EXPORT.MEM"),
        ("some_vcpus", "TDX_SOME_VCPUS_NOT_MIGRATED"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest(
    wrong: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", wrong]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"tdxmig: nothing is called '{wrong}'; did you mean ")
    assert near in shown.err
    assert shown.err.count("\n") == 1


def test_a_name_like_nothing_points_to_the_list() -> None:
    with pytest.raises(UsageError, match="nothing is called 'qqqq'; tdxmig show lists all names"):
        find("qqqq")


def test_several_names_are_shown_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [item["kind"] for item in found(capsys, "P14", "export_pause", "hardened")]
    assert kinds == ["property", "step", "profile"]
    text = shown(capsys, "P14", "export_pause", "hardened")
    assert text.count("\n\n") == 2


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_a_row_is_shown_whole(system: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for step in system.steps:
        if system.base is not None and system.base.has_step(step.name):
            continue  # shown with the smaller model
        item = step_item(system, step)
        assert [need["label"] for need in item["when"]] == [n.label for n in step.when]
        assert [need["formula"] for need in item["when"]] == [str(n.formula) for n in step.when]
        assert [update["update"] for update in item["then"]] == [str(a) for a in step.then]
        text = " ".join(shown(capsys, step.name).split())
        for part in (step.why, step.cite, *(str(n.formula) for n in step.when)):
            assert part in text
        for assign in step.then:
            assert " ".join(str(assign).split()) in text


def test_a_row_says_which_parts_only_a_profile_has(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "export_track")
    assert "no_unfinished_call: unfinished EXPORT.MEM calls = 0  [only hardened]" in text
    assert "source_unfinished[0] := false  [only tdx-1.5.01]" in text
    assert "TDH.EXPORT.TRACK, SEAMCALL leaf 71" in text
    assert "tdx_mig_save_epoch" in text


PARTS = (
    "begin",
    "migrate",
    "migrate_pending",
    "remigrate_pending",
    "remigrate",
    "cancel",
    "end",
    "refused",
)


def test_parts_of_a_call_are_found_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    names = [item["name"] for item in found(capsys, "import_mem")]
    assert names == [f"import_mem_{x}" for x in PARTS]


def test_an_event_of_both_sides_is_shown_for_both(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [item for item in found(capsys, "cleanup") if item["kind"] == "step"]
    assert [(item["name"], item["actor"]) for item in steps] == [
        ("cleanup", "source"),
        ("destination_cleanup", "destination"),
    ]


def test_a_row_of_the_name_table_is_that_of_the_leaf_the_row_cites() -> None:
    for step in LEAF.steps:
        row = name_row(LEAF, step)
        if row is not None and row.leaf is not None:
            assert step.cite.startswith(row.leaf.name)


def test_python_is_what_the_step_is_compiled_to(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"Page": None, "Message": None, "Epoch": None, "Vcpu": 2, "Stream": 2}
    for profile in PROFILES:
        compiled = Compiled(LEAF.under(profile), Instance(sizes))
        text = shown(capsys, "--python", "--profile", profile, "export_mem_begin")
        assert text == compiled.source("export_mem_begin") + "\n"
    text = shown(capsys, "--python", "pause")
    assert text.startswith("def guard(state):\n")
    assert "\ndef apply(state):\n" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--python"], "--python needs the name of a step"),
        (["--python", "P14"], "--python is for steps, and P14 names none"),
        (["--profile", "soft", "P14"], "'soft' is not one of"),
        (["0x1FFFFFFFFFFFFFFFF"], "has more than 64 bits"),
        (["0x8000FFFF00000000"], "is no status code"),
    ],
)
def test_a_wrong_use_is_said_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", *arguments]) == 2
    assert complaint in capsys.readouterr().err


# --- claims --------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_a_property_is_shown_with_its_formula_and_guards(
    system: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for claimed in system.properties:
        text = " ".join(shown(capsys, claimed.identifier.lower()).split())
        assert claimed.sentence in text
        assert " ".join(str(claimed.formula).split()) in text
        for step, label in claimed.guards:
            assert f"{step}, {label}: {system.step(step).needs(label).formula}" in text
    for goal in system.goals:
        text = " ".join(shown(capsys, goal.identifier).split())
        assert goal.sentence in text


# --- states and leaves ---------------------------------------------------------------------------


def test_a_state_shows_what_is_legal_and_where_it_leads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, destination = found(capsys, "paused_export")
    assert (source["side"], source["number"]) == ("source", 4)
    assert destination["leads_in"] == destination["leads_out"] == []
    assert {e["step"]: e["to"] for e in source["leads_out"]} == {
        "export_track_start": "POST_EXPORT",
        "export_abort": "RUNNABLE",
    }
    assert [(e["from"], e["leaf"]) for e in source["leads_in"]] == [
        ("LIVE_EXPORT", "TDH.EXPORT.PAUSE")
    ]
    leaves = {e["leaf"] for e in (*source["stays"], *source["leads_out"]) if e["leaf"]}
    with (SPECS / "op_state.csv").open(newline="") as table:
        allowed = {row["leaf_name"] for row in csv.DictReader(table) if row["PAUSED_EXPORT"] == "1"}
    assert {leaf for leaf in allowed if "EXPORT" in leaf} <= leaves <= allowed


def test_a_state_is_shown_under_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    labels = {}
    for profile in PROFILES:
        state = found(capsys, "PAUSED_EXPORT", "--profile", profile)[0]
        start = next(e for e in state["leads_out"] if e["step"] == "export_track_start")
        labels[profile] = [need["label"] for need in start["needs"]]
    assert labels == {
        HARDENED: ["dirty_count", "no_unfinished_call"],
        TDX_1_5_01: ["dirty_count"],
    }


@pytest.mark.parametrize("name", ["TDH.IMPORT.TRACK", "import.track", "84", "0x54"])
def test_a_leaf_is_found_by_name_and_by_number(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (leaf,) = found(capsys, name)
    assert (leaf["kind"], leaf["name"], leaf["number"]) == ("leaf", "TDH.IMPORT.TRACK", 84)
    assert leaf["op_states"] == {"destination": ["MEMORY_IMPORT", "STATE_IMPORT"]}
    assert [s["step"] for s in leaf["steps"]] == [
        "import_track",
        "import_track_start",
        "import_epoch",
        "import_start_token",
    ]
    assert leaf["kvm"] == ["KVM_TDX_MIG_IMPORT_TRACK"]


@pytest.mark.parametrize("claim", NOT_STATED, ids=lambda claim: claim.identifier)
def test_a_property_that_is_not_stated_says_why(
    claim: NotStated, capsys: pytest.CaptureFixture[str]
) -> None:
    (item,) = found(capsys, claim.identifier)
    assert (item["kind"], item["reason"]) == ("not stated", claim.reason)
    text = " ".join(shown(capsys, claim.identifier.lower()).split())
    assert f"property {claim.identifier} says {claim.sentence}" in text
    assert f"not stated because {claim.reason}" in text


# --- profiles and status codes -------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_shows_what_only_it_has(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    (item,) = found(capsys, profile)
    expected = [
        (part, step.name)
        for system in SYSTEMS
        for step in system.steps
        for part, things in (("row", (step,)), ("conjunct", step.when), ("update", step.then))
        for thing in things
        if thing.profiles is not None and thing.profiles & set(PROFILES) == {profile}
    ]
    assert [(part["what"], part["step"]) for part in item["only_here"]] == expected
    assert expected


def test_every_status_code_is_taken_apart_as_published() -> None:
    with (SPECS / "errors.csv").open(newline="") as table:
        published = {row["name"]: row for row in csv.DictReader(table)}
    seen = 0
    for name in listing()["status codes"]:
        row = published.get(name)
        if row is None or int(row["value_hex"], 16) == 0:
            continue
        (item,) = find(row["value_hex"])
        assert item == find(name)[0]
        assert item["name"] == name
        bits = ("error_bit63", "non_recoverable_bit62", "fatal_bit61")
        assert [row[bit] == "1" for bit in bits] == [
            item[bit] for bit in ("error", "non_recoverable", "fatal")
        ]
        assert item["class"] == int(row["class_bits47_40_hex"], 16)
        assert item["details"] == int(row["details_l1_bits39_32_hex"], 16)
        seen += 1
    assert seen > 60


def test_a_status_code_is_taken_apart(capsys: pytest.CaptureFixture[str]) -> None:
    (item,) = found(capsys, "0xC0000608000000AC")
    assert item == {
        "kind": "status",
        "name": "TDX_OP_STATE_INCORRECT",
        "text": "TDX_OP_STATE_INCORRECT|OP_STATE",
        "value": "0xC0000608000000AC",
        "error": True,
        "non_recoverable": True,
        "fatal": False,
        "class": 6,
        "details": 8,
        "low_32_bits": 172,
    }
    assert found(capsys, "tdx_op_state_incorrect")[0]["low_32_bits"] == 0
    assert found(capsys, "OP_STATE_INCORRECT")[0]["name"] == "TDX_OP_STATE_INCORRECT"
    text = shown(capsys, "0xC0000608000000AC")
    assert "status TDX_OP_STATE_INCORRECT|OP_STATE (0xC0000608000000AC)" in text
    assert "error, non_recoverable" in text
