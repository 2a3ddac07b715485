"""Do path properties mean what they say, and does each of them need the rows that it rests on?"""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path as FilePath

import pytest

from tdxmig_model.cli import main
from tdxmig_model.explore import graph
from tdxmig_model.expr import BOOL, INT, Instance, System, need, not_, scalar, step
from tdxmig_model.model.paths import PATHS, Path
from tdxmig_model.model.words import HARDENED, PROFILES, TDX_1_5_01
from tdxmig_model.verify.liveness import judge_path, liveness

RULES = FilePath(__file__).resolve().parent.parent / "specs" / "rules.toml"
BY_ID = {path.identifier: path for path in PATHS}


def judged(identifier: str, *, without: str = "", unguarded: tuple[str, str] | None = None):
    path = BY_ID[identifier]
    system = path.system
    if without:
        system = system.without_step(without)
    if unguarded is not None:
        system = system.under(HARDENED).without(*unguarded)
    return judge_path(path, HARDENED, system=system)


# --- a toy ----------------------------------------------------------------------------------------

level = scalar("level", INT, 0, "host")
noise = scalar("noise", BOOL, False, "host")


def _row(name, when, *then):
    return step(name, "host", when=when, then=then, why="toy", cite="none")


CLIMB = _row("climb", (need("low", level.lt(2)), need("going", level.ge(0))), level.to(level + 1))
TOGGLE = _row("toggle", (need("low", level.lt(2)),), noise.to(not_(noise)))
HALT = _row("halt", (need("at", level.eq(1)), need("quiet", not_(noise))), level.to(-1))
QUIET_CLIMB = _row(
    "climb", (need("low", level.lt(2)), need("quiet", not_(noise))), level.to(level + 1)
)


def toy(*steps, must=False):
    system = System("toy", (level, noise), steps, profiles=(HARDENED,))
    return Path("P99", "It gets to 2.", system, level.le(2), level.eq(2), must=must)


def test_can_needs_one_way_and_must_needs_all_fair_ones():
    assert judge_path(toy(CLIMB, TOGGLE), HARDENED).verdict == "exhausted"
    # A row that stays enabled is taken in the end, whatever else goes on.
    assert judge_path(toy(CLIMB, TOGGLE, must=True), HARDENED).verdict == "exhausted"


def test_a_fair_cycle_is_found():
    """While the noise comes and goes, climbing is not enabled all the time."""
    assert judge_path(toy(QUIET_CLIMB, TOGGLE), HARDENED).verdict == "exhausted"
    row = judge_path(toy(QUIET_CLIMB, TOGGLE, must=True), HARDENED)
    assert row.verdict == "violated"
    assert "a fair run stays here for ever" in row.detail


def test_a_stuck_state_comes_with_the_way_there():
    row = judge_path(toy(CLIMB, HALT), HARDENED)
    assert (row.verdict, row.depth) == ("violated", 2)
    assert [event.step for event in row.story.events] == ["climb", "halt"]


def test_a_dead_end_that_is_told_is_none():
    path = replace(toy(CLIMB, HALT), dead_ends=(("it halted", level.eq(-1)),))
    assert judge_path(path, HARDENED).verdict == "exhausted"


def test_a_part_of_the_states_proves_nothing():
    assert judge_path(toy(CLIMB, TOGGLE), HARDENED, states=2).verdict == "bounded"


def test_a_premise_that_never_holds_is_vacuous():
    path = replace(toy(CLIMB), premise=level.eq(7))
    assert judge_path(path, HARDENED).verdict == "vacuous"


def test_a_graph_has_every_state_and_transition():
    system = toy(CLIMB, TOGGLE).system
    seen = graph(system, Instance.small(system, {}), {"up": level.eq(2)}, limit=100, ceiling=2)
    assert (seen.states, len(seen.holds["up"]), seen.truncated) == (6, 2, False)
    assert sum(len(edges) for edges in seen.edges) == 8
    assert [s.step for s in seen.trace(min(seen.holds["up"]))] == ["climb", "climb"]


# --- the paths ------------------------------------------------------------------------------------


def test_every_path_is_exhausted_with_the_repairs():
    report = liveness(HARDENED)
    assert {r.identifier: r.verdict for r in report.rows} == dict.fromkeys(BY_ID, "exhausted")
    assert all("states of" in r.method for r in report.rows)
    assert report.holds


def test_on_the_published_release_a_page_cannot_be_accepted():
    """intel/tdx-module issue 18."""
    report = liveness(TDX_1_5_01)
    assert {r.identifier for r in report.rows if r.verdict != "exhausted"} == {"P48"}
    (row,) = (r for r in report.rows if r.identifier == "P48")
    steps = [event.step for event in row.story.events]
    assert steps[-3:] == ["import_guest_cancel", "hand_pages_over", "end_import_of_pages"]


@pytest.mark.parametrize(
    ("identifier", "row"),
    [
        ("P45", "import_start_token"),
        ("P45", "commit"),
        ("P45", "confirm_import"),
        ("P46", "abort_with_token"),
        ("P46", "abort"),
        ("P47", "restore_guest_page"),
        ("P47", "new_destination"),
        ("P48", "add_on_destination"),
        ("P48", "accept_on_destination"),
        ("P50", "abort_with_token"),
        ("P50", "destination_abort"),
        ("P50", "abort"),
    ],
)
def test_a_path_needs_the_row(identifier: str, row: str):
    if (identifier, row) in NOT_NEEDED:
        assert judged(identifier, without=row).verdict == "exhausted"
    else:
        assert judged(identifier, without=row).verdict in ("violated", "vacuous")


# The import can be ended without a commit.
NOT_NEEDED = {("P45", "commit")}


def test_the_start_token_waits_for_the_confirmation():
    """Otherwise the TD may be handed over to a destination that never began."""
    row = judged("P46", unguarded=("finish_epochs", "confirmed"))
    assert row.verdict == "violated"
    assert "finish_epochs" in [event.step for event in row.story.events]


# --- what was agreed on ---------------------------------------------------------------------------


def test_a_path_is_claimed_as_it_was_frozen():
    frozen = tomllib.loads(RULES.read_text())["path"]
    assert frozen == [
        {
            "id": path.identifier,
            "sentence": path.sentence,
            "must": path.must,
            "premise": str(path.premise),
            "goal": str(path.goal),
        }
        for path in PATHS
    ]


@pytest.mark.parametrize("profile", PROFILES)
def test_a_path_names_rows_that_there_are(profile: str):
    for path in PATHS:
        part = path.system.under(profile)
        for name in (*path.without, *(row for row, _ in path.policies)):
            assert part.has_step(name)


def test_the_command_judges_paths(capsys):
    assert main(["verify", "--property", "P47", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert "liveness model" in out
    assert "exhausted" in out


def test_a_path_that_the_published_module_lacks_is_told_by_its_repair():
    (row,) = liveness(TDX_1_5_01, ["P48"]).rows
    assert (row.verdict, row.kind, row.removed_by) == ("violated", "public", ("R8",))
