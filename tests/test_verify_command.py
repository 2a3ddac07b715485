"""What ``tdxmig verify`` says of models that share rows, and of lemmas that are of no help."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from toy_handover import CLEAN, COUNTED, NONE_TAKEN, WORKERS, dirty_count, toy

from tdxmig_model.cli import main
from tdxmig_model.cli.verify import mutants_as_json, reports_as_json
from tdxmig_model.conformance import contract
from tdxmig_model.expr import Property
from tdxmig_model.model.keys import KEYS
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.model.order import ORDER
from tdxmig_model.model.words import HARDENED, TDX_1_5_01
from tdxmig_model.verify import Mutant, Report, Row, every, mutants, verify

GUARD = "export_track_start:dirty_count"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["verify", *arguments])
    return code, capsys.readouterr().out


# --- a guard of several models --------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None]]:
    """What is to be judged: the model, the guard and the property; nothing is."""
    seen: list[tuple[str, str, str | None]] = []

    def mutants_of(system, profile, pairs, **_options):  # type: ignore[no-untyped-def]
        seen.extend((system.name, ":".join(deletion), target) for deletion, target in pairs)
        return []

    monkeypatch.setattr("tdxmig_model.cli.verify.mutants", mutants_of)
    return seen


def test_a_guard_is_judged_in_the_model_that_has_the_property(capsys, chosen) -> None:
    run(capsys, "--property", "P13", "--mutant", GUARD, "--json")
    run(capsys, "--property", "L4", "--mutant", GUARD, "--json")
    run(capsys, "--property", "L4", "--property", "P13", "--mutant", GUARD, "--json")
    one, other = ("memory", GUARD, "P13"), ("leaf", GUARD, "L4")
    assert chosen == [one, other, other, one]


def test_without_a_property_a_guard_is_judged_where_it_is_listed(capsys, chosen) -> None:
    run(capsys, "--mutant", GUARD, "--json")
    assert chosen == [("leaf", GUARD, "L4"), ("memory", GUARD, "P13")]


def test_a_guard_that_no_property_lists_is_judged_in_the_smallest_model(capsys, chosen) -> None:
    for model in (LEAF, ORDER, MEMORY):
        assert ("vp_exit", "entered") in [d for d, _ in every(model, HARDENED)]
    run(capsys, "--mutant", "vp_exit:entered", "--json")
    assert chosen == [("leaf", "vp_exit:entered", None)]


def test_a_property_of_no_model_that_has_the_guard_is_a_usage_error(capsys) -> None:
    assert main(["verify", "--property", "O5", "--mutant", GUARD]) == 2
    assert "leaf, order, memory model, which has no O5" in capsys.readouterr().err


def test_what_the_smaller_model_loses_is_lost_in_the_larger_one_as_well() -> None:
    """P5 rests on what the leaf model keeps: no vCPU is inside while the TD is paused."""
    (found,) = mutants(MEMORY, HARDENED, [(("export_pause", "no_vcpu_inside"), "P5")])
    assert (found.outcome, found.broken) == ("killed", "P5")


# --- JSON -----------------------------------------------------------------------------------------


def report_of(system, *rows: Row) -> Report:
    return Report(system.name, HARDENED, rows, (), ("idle",), system.assumptions, 0, 0, 0.0)


def proved(identifier: str, level: str) -> Row:
    return Row(identifier, "True.", level, "proved", "induction", None, 1.0)


def test_an_id_stands_once_for_each_model() -> None:
    systems = (LEAF, ORDER, MEMORY)
    rows = (proved("P10", "leaf"), proved("session", "lemma"))
    value = reports_as_json(HARDENED, [report_of(system, *rows) for system in systems])
    for key, name in (("properties", "P10"), ("lemmas", "session")):
        listed = value[key]
        assert isinstance(listed, list)
        assert [(r["model"], r["id"]) for r in listed] == [(s.name, name) for s in systems]
    assert value["proved"] == 3
    assert value["dead_steps"] == [{"model": s.name, "step": "idle"} for s in systems]


def test_an_assumption_stands_once_with_the_models_that_make_it() -> None:
    systems = (LIFECYCLE, LEAF, MEMORY)
    value = reports_as_json(HARDENED, [report_of(system) for system in systems])
    assumed = value["assumptions"]
    assert isinstance(assumed, list)
    assert max(Counter(a["text"] for a in assumed).values()) == 1
    for system in systems:
        own = [a["text"] for a in assumed if system.name in a["models"]]
        assert own == list(system.assumptions)


def test_a_deleted_guard_has_verdicts_on_properties(capsys) -> None:
    guard = "finish_epochs:every_vcpu"
    code, out = run(capsys, "--mutant", guard, "--json", "--jobs", "1")
    assert code == 1
    value = json.loads(out)
    (row,) = value["properties"]
    assert (row["model"], row["id"], row["deleted"]) == ("lifecycle", "O5", guard)
    assert (row["verdict"], value["violated"], value["proved"]) == ("violated", 1, 0)
    assert row["depth"] == len(row["counterexample"])
    assert value["mutants"][0]["model"] == "lifecycle"


def test_a_guard_that_no_property_needs_leaves_them_proved() -> None:
    (found,) = mutants(KEYS, HARDENED, [(("start_export", "mig_dec_key_set"), "P29")])
    assert found.outcome == "equivalent"
    assert found.verdicts == (("P29", "proved"),)


def test_what_was_not_found_out_is_unknown() -> None:
    found = Mutant(
        *("a", "b", "P1", "survivor", None, "searched", None, 1.0),
        model="leaf",
        verdicts=(("P1", "unknown"),),
    )
    value = mutants_as_json(HARDENED, [found], named=False)
    assert (value["ok"], value["unknown"], value["survivors"]) == (False, 1, 1)


# --- lemmas ---------------------------------------------------------------------------------------


def test_a_lemma_that_rests_on_a_repair_is_no_failure_without_it() -> None:
    report = verify(KEYS, TDX_1_5_01, ["phases", "log"])
    found = {row.identifier: row for row in report.rows}
    assert (found["phases"].verdict, found["phases"].claims) == ("proved", True)
    assert (found["log"].verdict, found["log"].method) == ("unknown", "not inductive")
    assert not found["log"].claims
    assert report.holds
    value = reports_as_json(TDX_1_5_01, [report])
    assert (value["properties"], value["unknown"]) == ([], 0)


def test_a_fact_about_counts_that_has_no_proof_is_a_failure() -> None:
    row = Row("count_slack", "True.", "lemma", "unknown", "induction on the size", None, 1.0)
    assert not Report("leaf", HARDENED, (row,), (), (), (), 0, 0, 0.0).holds


def test_lemmas_are_listed_if_they_are_asked_for(capsys) -> None:
    command = ("--profile", TDX_1_5_01, "--property", "phases", "--property", "log", "--jobs", "1")
    code, out = run(capsys, *command)
    assert code == 0
    assert "1 of 2 lemmas proved" in out
    assert "not inductive under tdx-1.5.01, and of no use to it: log" in " ".join(out.split())
    assert "never possible" not in out
    assert "│ phases" not in out
    code, out = run(capsys, *command, "--lemmas")
    assert code == 0
    assert "│ phases" in out
    assert "no verdict" in " ".join(out.split())


# --- the table ------------------------------------------------------------------------------------


def test_the_table_says_how_and_a_violation_tells_its_story(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out = run(capsys, "--profile", TDX_1_5_01, "--property", "P31", "--jobs", "1")
    assert code == 1
    assert "key_words model, profile tdx-1.5.01" in out
    head = next(line for line in out.splitlines() if "verdict" in line)
    assert [cell.strip() for cell in head.strip("┃").split("┃")] == [
        *("id", "verdict", "method", "depth", "ms", "what it says"),
    ]
    row = next(line for line in out.splitlines() if line.startswith("│ P31"))
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1] == "violated"
    assert cells[2].startswith("search in")
    assert int(cells[3]) > 0
    assert int(cells[4]) > 0
    assert "P31 is violated:" in out
    assert "Broken: P31" in out


# --- guards that only a status code needs ---------------------------------------------------------

NO_NEED = ("start_export", "mig_dec_key_set")


def test_a_guard_that_an_implementation_keeps_is_of_the_contract() -> None:
    asked = []

    def refuses(model: str, step: str, label: str) -> bool:
        asked.append((model, step, label))
        return True

    needed = ("start_export", "not_own_key")
    chosen = [(NO_NEED, "P29"), (needed, "P28")]
    found = mutants(KEYS, HARDENED, chosen, contract=refuses)
    assert [m.outcome for m in found] == ["contract-only", "killed"]
    assert asked == [("keys", *NO_NEED)], "what a property needs is not asked"
    assert found[0].verdicts == (("P29", "proved"),)
    value = mutants_as_json(HARDENED, found, named=False)
    assert (value["contract_only"], value["equivalent"], value["ok"]) == (1, 0, True)


def test_a_guard_that_no_implementation_keeps_is_equivalent() -> None:
    (found,) = mutants(KEYS, HARDENED, [(NO_NEED, "P29")], contract=lambda *_: False)
    assert found.outcome == "equivalent"


def test_a_contract_does_not_stand_in_for_a_proof() -> None:
    """Where neither a run nor a proof is known, a refused call says nothing of the property."""
    shaky = Property("shaky", dirty_count.lt(2), "Never two dirty cells.", "lemma")
    system = toy(CLEAN, WORKERS, COUNTED, NONE_TAKEN, shaky)
    deletion = (("finish", "paused"), "clean")
    (found,) = mutants(system, "plain", [deletion], contract=lambda *_: True)
    assert found.outcome == "survivor"
    assert found.verdicts == (("clean", "unknown"),)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_deleted_guard_of_the_module_is_of_the_contract(capsys, jobs: str) -> None:
    """Of two guards that nothing rests on, the module refuses a call because of one of them."""
    kept, unseen = "export_state_vp:stream", "import_track:token_counter"
    guards = ("--mutant", kept, "--mutant", unseen)
    code, out = run(capsys, *guards, "--jobs", jobs, "--json")
    value = json.loads(out)
    outcomes = {f"{m['step']}:{m['label']}": m["outcome"] for m in value["mutants"]}
    assert outcomes == {kept: "contract-only", unseen: "equivalent"}
    assert (code, value["contract_only"], value["equivalent"], value["ok"]) == (0, 1, 1, True)


def test_the_table_says_contract_only(capsys) -> None:
    code, out = run(capsys, "--mutant", "export_state_vp:stream", "--jobs", "1")
    assert code == 0
    assert "contract-only" in out


def test_the_contract_of_many_guards_is_found_in_one_pass(monkeypatch) -> None:
    """Nothing is run before the first question, nor for models and profiles without a module."""
    passes = []
    found = {("export_state_vp", "stream"): ()}

    def refusals(profile: str, *, depth: int) -> object:
        passes.append((profile, depth))
        return found

    monkeypatch.setattr(contract, "refusals", refusals)
    asked = contract.Contract(HARDENED, 100)
    assert not asked("keys", "start_export", "mig_dec_key_set")
    assert not contract.Contract("hardened without R1", 100)("leaf", "export_state_vp", "stream")
    assert not passes
    assert asked("leaf", "export_state_vp", "stream")
    assert asked("memory", "export_state_vp", "stream")
    assert not asked("leaf", "import_track", "token_counter")
    assert passes == [(HARDENED, contract.DEPTH)]
