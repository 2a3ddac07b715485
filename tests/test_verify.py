"""Does each verdict mean what its word says, on a toy and on the model?"""

from __future__ import annotations

import json

import pytest
from toy_handover import (
    CLEAN,
    COUNTED,
    DONE,
    NEVER,
    NONE_TAKEN,
    SAFE,
    STEPS,
    WORKERS,
    copied,
    dirty,
    dirty_count,
    phase,
    toy,
)
from toy_handover import SIZES as TOY_SIZES

from tdxmig_model.cli import main
from tdxmig_model.errors import UsageError
from tdxmig_model.expr import (
    INT,
    Goal,
    Interpreter,
    Property,
    System,
    all_of,
    implies,
    need,
    scalar,
    step,
)
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.systems import SYSTEMS as EVERY
from tdxmig_model.model.words import HARDENED, PROFILES
from tdxmig_model.smt.induction import prove
from tdxmig_model.smt.runs import replay
from tdxmig_model.story import tell
from tdxmig_model.verify import Mutant, Report, every, listed, mutants, verify
from tdxmig_model.verify.scope import NOT_STATED

SYSTEMS = {"lifecycle": LIFECYCLE, "leaf": LEAF}


GUARDLESS = next(p.identifier for p in LEAF.under(HARDENED).properties if not p.guards)


def judged(system, **options) -> Report:
    return verify(system, "plain", sizes=TOY_SIZES, **options)


def verdicts(report: Report) -> dict[str, str]:
    return {r.identifier: r.verdict for r in (*report.rows, *report.goals)}


# --- verdicts -------------------------------------------------------------------------------------


def test_a_safe_system_is_proved_and_its_goal_is_reached():
    report = judged(SAFE)
    found = verdicts(report)
    assert found["clean"] == found["workers"] == found["counted"] == "proved"
    assert found["done"] == "reachable"
    assert found["count_slack"] == "proved"
    assert report.holds
    assert report.dead_steps == ()
    assert all(r.depth is None for r in report.rows)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_violation_comes_with_a_shortest_run(jobs):
    small = Property("small", dirty_count.lt(2), "Never two dirty cells.", "leaf")
    report = judged(toy(small, COUNTED), jobs=jobs)
    row = report.rows[0]
    assert (row.verdict, row.depth) == ("violated", 2)
    assert [e.step for e in row.story.events] == ["write", "write"]
    assert not report.holds
    assert row.as_json()["counterexample"][-1]["broke"] == list(row.story.ending)


def test_what_is_true_but_not_inductive_is_exhausted_where_the_states_end():
    """Without its lemmas the claim has no proof, and the toy has finitely many states."""
    row = judged(toy(WORKERS, CLEAN, COUNTED)).rows[0]
    assert row.verdict == "proved"
    alone = judged(toy(CLEAN))
    assert alone.rows[0].verdict == "exhausted"
    assert "2 Cell" in alone.rows[0].method
    assert alone.rows[0].detail == "clean is not kept by finish"


def test_what_is_true_but_not_inductive_is_bounded_where_the_states_do_not_end():
    forever = step(
        "forever",
        "host",
        (),
        when=(need("running", phase.eq(DONE)), need("none", dirty_count.eq(0))),
        then=(dirty_count.to(dirty_count + 1),),
        why="toy",
        cite="none",
    )
    again = step(
        "again",
        "host",
        (),
        when=(need("done", phase.eq(DONE)), need("some", dirty_count.ge(1))),
        then=(dirty_count.to(dirty_count + 1),),
        why="toy",
        cite="none",
    )
    odd = Property("odd", dirty_count.ne(-1), "The counter is never -1.", "leaf")
    report = judged(toy(odd, steps=(*STEPS, forever, again)), depth=6)
    row = report.rows[0]
    assert row.verdict == "bounded"
    assert row.depth >= 6
    assert not report.holds


def test_a_property_that_never_says_anything_is_vacuous():
    idle = Property(
        "idle",
        implies(all_of(phase.eq(DONE), dirty[0]), copied[0, 0]),
        "A dirty cell at the hand-over was copied.",
        "leaf",
        witness=all_of(phase.eq(DONE), dirty[0]),
    )
    report = judged(toy(idle, CLEAN, COUNTED, WORKERS, NONE_TAKEN))
    assert verdicts(report)["idle"] == "vacuous"
    assert "witness not reached" in report.rows[0].method
    assert not report.holds


def test_a_goal_that_is_not_reached_is_vacuous():
    never = Goal("never", all_of(phase.eq(DONE), dirty[1]), "Done with a dirty cell.")
    report = judged(toy(CLEAN, COUNTED, goals=(never,)))
    assert verdicts(report)["never"] == "vacuous"
    assert not report.holds


def test_a_step_that_is_never_possible_is_named():
    clean = Property(
        "clean_count", implies(phase.eq(DONE), dirty_count.eq(0)), "No cell is dirty.", "leaf"
    )
    report = judged(toy(clean, COUNTED, steps=(*STEPS, NEVER)))
    assert report.dead_steps == ("never",)
    assert not report.holds


def test_only_the_chosen_properties_are_judged():
    report = judged(SAFE, properties=["workers"])
    assert [r.identifier for r in report.rows] == ["workers"]
    assert report.goals == ()
    with pytest.raises(UsageError, match="no property nonsense"):
        judged(SAFE, properties=["nonsense"])


def test_progress_sees_every_query_and_every_row():
    seen = []
    report = judged(SAFE, progress=lambda model, news: seen.append((model, news)))
    assert {model for model, _ in seen} == {"handover"}
    assert len(seen) == report.queries + len(report.rows) + len(report.goals)


# --- deletions ------------------------------------------------------------------------------------


def test_each_listed_guard_of_the_toy_is_needed():
    found = mutants(SAFE, "plain")
    assert {(m.step, m.label, m.outcome, m.broken) for m in found} == {
        ("finish", "clean", "killed", "clean"),
        ("finish", "every_worker", "killed", "workers"),
    }
    for mutant in found:
        part = SAFE.without(mutant.step, mutant.label)
        run = replay(part, mutant.run.instance, mutant.run.moves)
        broken = SAFE.property(mutant.broken).formula
        assert not Interpreter(part, run.instance).value(broken, run.states[-1], {})


def test_every_conjunct_of_the_toy_is_judged():
    found = {(m.step, m.label): m.outcome for m in mutants(SAFE, "plain", every(SAFE, "plain"))}
    assert len(found) == sum(len(s.when) for s in SAFE.steps)
    assert found["finish", "paused"] == "equivalent"
    assert found["pause", "running"] != "survivor"
    assert found["copy", "dirty"] == "killed"


def test_equivalence_is_not_claimed_of_an_invariant_that_is_no_invariant():
    """`finish:paused` is redundant only if what the other steps keep was proved."""
    shaky = Property("shaky", dirty_count.lt(2), "Never two dirty cells.", "lemma")
    system = toy(CLEAN, WORKERS, COUNTED, NONE_TAKEN, shaky)
    found = mutants(system, "plain", [(("finish", "paused"), "clean")])
    assert [m.outcome for m in found] == ["survivor"]


def test_a_run_past_the_ceilings_of_the_explicit_search_is_found():
    """The guard keeps a counter below 6, which no finite instance reaches without clipping."""
    level = scalar("level", INT, 0, "host")
    up = step(
        "up",
        "host",
        (),
        when=(need("below", level.lt(6)),),
        then=(level.to(level + 1),),
        why="toy",
        cite="none",
    )
    low = Property("low", level.le(6), "At most 6.", "leaf", guards=(("up", "below"),))
    found = mutants(System("levels", (level,), (up,), (low,), profiles=("plain",)), "plain")
    assert [(m.outcome, m.method, m.depth) for m in found] == [("killed", "bounded checking", 7)]


def test_an_unknown_deletion_is_refused():
    with pytest.raises(UsageError, match="no finish:nonsense"):
        mutants(SAFE, "plain", [(("finish", "nonsense"), None)])


# --- stories --------------------------------------------------------------------------------------


def test_a_story_says_who_did_what_and_what_was_deleted():
    mutant = mutants(SAFE, "plain", [(("finish", "clean"), "clean")])[0]
    told = mutant.story
    assert [e.number for e in told.events] == list(range(1, len(told.events) + 1))
    assert {e.who for e in told.events} == {"host"}
    last = told.events[-1]
    assert (last.step, [str(c) for c in last.changes]) == ("finish", ["phase PAUSED → DONE"])
    assert told.ending[0] == "Broken: clean, At the hand-over no cell is dirty."
    assert told.ending[1].startswith("  not so for c = 0: ")
    assert told.ending[-1] == "Deleted from finish: the conjunct clean: dirty_count = 0"
    text = told.text(100)
    assert all(len(line) <= 100 for line in text.splitlines()[: -len(told.ending)])
    assert text.splitlines()[0].split() == ["source", "channel", "destination"]


def test_a_story_of_the_model_has_both_sides_and_the_channel():
    mutant = mutants(LEAF, HARDENED, [(("import_mem_begin", "mig_epoch"), "P10")])[0]
    rows = mutant.story.rows()
    assert [number for number, *_ in rows] == [str(n + 1) for n in range(len(rows))]
    track = next(row for row in rows if "export_track" in row[1])
    assert "mig_epoch 0 → 1" in track[1]
    assert "log[1]: kind EPOCH_TOKEN, epoch 1" in track[2]
    assert track[3] == ""
    assert any("import_mem_begin" in row[3] and not row[1] for row in rows)


def test_ghosts_are_told_only_where_the_property_reads_them():
    part = LEAF.under(HARDENED)
    mutant = mutants(LEAF, HARDENED, [(("import_mem_begin", "mig_epoch"), "P10")])[0]
    names = {c.name for e in tell(part, mutant.run).events for c in e.changes}
    assert not {v.name for v in part.variables if v.ghost} & {n.split("[")[0] for n in names}
    told = {c.name.split("[")[0] for e in mutant.story.events for c in e.changes}
    assert "token_position" in told
    assert "destination_accepted" in told


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SYSTEMS)
def test_everything_is_proved(name, seed):
    result = prove(SYSTEMS[name].under(HARDENED), seed=seed)
    assert {k: [q.step for q in v] for k, v in result.failed.items()} == {}
    assert result.fallbacks <= result.queries // 50


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_verdict_of_every_profile_is_a_good_one(name, profile):
    report = verify(SYSTEMS[name], profile)
    bad = {r.identifier: r.verdict for r in (*report.rows, *report.goals) if not r.holds}
    assert bad == {}
    assert report.dead_steps == ()


def test_the_lifecycle_reaches_its_goals_and_says_something():
    report = verify(LIFECYCLE, HARDENED)
    assert {r.identifier for r in report.goals if r.verdict == "reachable"} == {
        g.identifier for g in LIFECYCLE.goals
    }
    assert report.holds


def test_each_guard_of_the_lifecycle_forbids_a_run():
    found = mutants(LIFECYCLE, HARDENED)
    assert {(m.step, m.label, m.target) for m in found if m.outcome != "killed"} == set()
    assert all(m.broken == m.target for m in found)
    _all_replay(LIFECYCLE, found)


# Listed guards without which the property is still proved, because others say as much.
REDUNDANT: set[tuple[str, str, str]] = set()


def test_each_guard_of_the_leaf_model_forbids_a_run_or_is_known_to_be_redundant():
    found = mutants(LEAF, HARDENED)
    assert {m.outcome for m in found} <= {"killed", "equivalent"}
    assert {(m.step, m.label, m.target) for m in found if m.outcome == "equivalent"} <= REDUNDANT
    _all_replay(LEAF, [m for m in found if m.outcome == "killed"])


def _all_replay(system, found):
    part = system.under(HARDENED)
    for m in found:
        mutant = part.without(m.step, m.label)
        run = replay(mutant, m.run.instance, m.run.moves)
        broken = part.property(m.broken).formula
        assert not Interpreter(mutant, run.instance).value(broken, run.states[-1], {})
        step_taken = [name for name, _ in run.moves]
        assert m.step in step_taken, f"{m.step} is not in the run that its guard forbids"


def test_the_listed_guards_exist_in_some_profile():
    for system in SYSTEMS.values():
        for profile in PROFILES:
            assert listed(system, profile)


# --- the command ----------------------------------------------------------------------------------


def run(capsys, *arguments: str) -> tuple[int, str]:
    code = main(["verify", *arguments])
    return code, capsys.readouterr().out


def test_the_command_prints_one_object(capsys):
    code, out = run(capsys, "--property", "O6", "--json", "--jobs", "1")
    assert code == 0
    value = json.loads(out)
    assert value["profile"] == HARDENED
    assert (value["proved"], value["violated"], value["unknown"]) == (1, 0, 0)
    row = value["properties"][0]
    assert (row["id"], row["level"], row["verdict"]) == ("O6", "lifecycle", "proved")
    assert {"method", "depth", "ms", "counterexample"} <= set(row)
    assumed = [{"text": text, "models": ["lifecycle"]} for text in LIFECYCLE.assumptions]
    assert value["assumptions"] == assumed
    assert "P34" in {p["id"] for p in value["not_stated"]}


def test_the_command_tells_the_story_of_a_deleted_guard(capsys):
    code, out = run(capsys, "--mutant", "finish_epochs:every_vcpu", "--jobs", "1")
    assert code == 1
    assert "Deleted from finish_epochs: the conjunct every_vcpu" in out
    assert "Broken: O5" in out
    table = [line.split() for line in out.splitlines()]
    assert ["model", "guard", "of", "outcome", "breaks", "depth", "ms"] in table
    row = ["lifecycle", "finish_epochs:every_vcpu", "O5", "killed", "O5"]
    assert row in [line[:5] for line in table]


def test_the_command_prints_mutants_as_one_object(capsys):
    code, out = run(capsys, "--mutants", "--property", "O8", "--json", "--jobs", "1")
    value = json.loads(out)
    assert code == 0
    assert (value["killed"], value["survivors"]) == (len(value["mutants"]), 0)
    assert all(m["counterexample"] for m in value["mutants"])


def test_a_deleted_guard_is_judged_by_the_named_property(capsys):
    judged = []

    def mutants_of(system, profile, chosen, **_options):
        judged.extend(chosen)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tdxmig_model.cli.verify.mutants", mutants_of)
        guard = ["--mutant", "finish_epochs:every_vcpu"]
        run(capsys, "--property", "O6", *guard, "--json")
        run(capsys, "--property", "O6", "--property", "O8", *guard, "--json")
        run(capsys, *guard, "--json")
        run(capsys, "--mutants", "--json")
        listed_ones = judged[4:]
        run(capsys, "--mutants", "--all", "--json")
    deletion = ("finish_epochs", "every_vcpu")
    assert judged[:4] == [(deletion, name) for name in ("O6", "O6", "O8", "O5")]
    assert listed_ones == [p for s in EVERY for p in listed(s, HARDENED)]
    everything = [d for s in EVERY for d, _ in every(s, HARDENED)]
    assert [d for d, _ in judged[4 + len(listed_ones) :]] == everything


def test_rows_of_a_campaign_are_printed_as_they_come(capsys, monkeypatch):
    printed = []

    def mutants_of(system, profile, chosen, *, progress, **_options):
        (step, label), target = chosen[0]
        found = Mutant(step, label, target, "survivor", None, "searched", None, 1.0)
        progress(found)
        printed.append(capsys.readouterr().out)
        return [found]

    monkeypatch.setattr("tdxmig_model.cli.verify.mutants", mutants_of)
    assert main(["verify", "--mutants", "--property", "O8"]) == 1
    assert "O8" in printed[0]
    assert "survivor" in printed[0]


def test_the_text_names_what_is_not_stated(capsys, monkeypatch):
    report = Report("leaf", HARDENED, (), (), (), (), 0, 0, 0.0)
    for judge in ("verify", "verify_widths", "liveness"):
        monkeypatch.setattr(f"tdxmig_model.cli.verify.{judge}", lambda *_a, **_k: report)
    code, out = run(capsys)
    assert code == 0
    for claim in NOT_STATED:
        assert claim.identifier in out
        assert claim.reason in " ".join(out.split())
    assert "lemmas" not in out, "no lemma was judged"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--property", "O66"], "did you mean O6"),
        (["--property", "O66", "--mutants"], "did you mean O6"),
        (["--property", "O66", "--mutant", "finish_epochs:every_vcpu"], "did you mean O6"),
        (["--property", "P14", "--mutant", "finish_epochs:every_vcpu"], "lifecycle model, which"),
        (["--property", GUARDLESS, "--mutants"], f"{GUARDLESS} list no guards"),
        (["--all"], "--all is for --mutants"),
        (["--mutant", "finish_epochs:every_vcp"], "did you mean finish_epochs:every_vcpu"),
        (["--mutant", "a:b", "--mutants"], "give one of them"),
        (["--profile", "soft"], "soft"),
    ],
)
def test_wrong_arguments_are_usage_errors(capsys, arguments, hint):
    assert main(["verify", *arguments]) == 2
    assert hint in capsys.readouterr().err


def test_a_violation_says_what_is_to_be_done(capsys):
    """One that a public repair removes is public; any other is for the vendor first."""
    code, out = run(capsys, "--profile", "tdx-1.5.01", "--property", "P28", "--jobs", "1")
    assert code == 1
    assert "P28 is public: R5 of specs/repairs.toml removes it" in out
    code, out = run(capsys, "--profile", "tdx-1.5.01", "--property", "P31", "--jobs", "1")
    assert code == 1
    assert "P31 is unreported" in out
    assert "report to the vendor before publishing (SECURITY.md)" in out
