"""Is the model well made: reasons, citations, names, and no variable that nobody needs?"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from tdxmig_model import names
from tdxmig_model.expr import EnumType, Node, Read, Step, System, Variable, subterms
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.words import OP_STATE, SEPT
from tdxmig_model.names import Kind, Side

SPECS = Path(__file__).resolve().parent.parent / "specs"
SYSTEMS = (LEAF, LIFECYCLE)
ROWS = [(system, step) for system in SYSTEMS for step in system.steps]

# Leaf rows that the name table does not have by their name or by the call they are a part of: the
# step that they are a variant of, or None where a hypervisor never asks for it by a command.
VARIANTS = {
    "source_mig_stream_create": None,  # Part of the lifecycle's setup.
    "destination_mig_stream_create": None,
    "page_accept": None,  # What the guest does by itself.
    "vp_exit": None,  # The end of TDH.VP.ENTER.
    "vp_exit_previous": None,
    "export_state_immutable_other": "export_state_immutable",  # Of a session not observed.
    "import_failure_live": "import_failure",  # The effect of a failure after the commit.
}


def own_name(step: Step) -> str:
    return step.name.removeprefix(f"{step.actor}_")


def read_by(node: Node) -> set[str]:
    found = {n.name for n in subterms(node) if isinstance(n, Variable)}
    return found | {n.map.name for n in subterms(node) if isinstance(n, Read)}


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("system", "step"), ROWS, ids=lambda x: getattr(x, "name", None))
def test_a_row_has_a_reason_and_a_citation(system: System, step: Step) -> None:
    assert re.fullmatch(r"[A-Z].*\.", step.why), step.why
    # "; " is allowed within the sentence, a second sentence is not.
    assert ". " not in step.why
    source = r"TDH\.|TDG\." if system is LEAF else r"TDH\.|QEMU"
    assert re.search(source, step.cite) or step.name == "import_failure"


@pytest.mark.parametrize(("system", "step"), ROWS, ids=lambda x: getattr(x, "name", None))
def test_a_row_has_a_guard_and_an_effect(system: System, step: Step) -> None:
    assert step.when
    assert step.then
    assert step.actor in ("source", "destination")


def test_leaf_citations_give_the_number_of_the_leaf() -> None:
    with (SPECS / "op_state.csv").open(newline="") as table:
        numbers = {row["leaf_name"]: row["leaf_number"] for row in csv.DictReader(table)}
    cited = [re.match(r"(TDH[A-Z.]+), leaf (\d+); TDX module 1\.5\.01", s.cite) for s in LEAF.steps]
    assert {m[1]: m[2] for m in cited if m}.items() <= numbers.items()
    others = {s.name for s, match in zip(LEAF.steps, cited, strict=True) if match is None}
    assert others == {
        "source_set_migration_key",
        "destination_set_migration_key",
        "import_failure",
        "page_accept",
    }


def test_names_are_unique_across_both_models() -> None:
    steps = [step.name for _, step in ROWS]
    assert len(set(steps)) == len(steps)
    claims = [p.identifier for s in SYSTEMS for p in s.properties if p.level != "lemma"]
    assert len(set(claims)) == len(claims)


# Written by the rows and read by no guard and no other update: claims are made of them.
UNREAD = {"leaf": set[str](), "lifecycle": {"source_owns", "destination_owns"}}


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.name)
def test_every_variable_is_read_and_written(system: System) -> None:
    read: set[str] = set()
    claimed: set[str] = set()
    written: set[str] = set()
    for step in system.steps:
        for need in step.when:
            read |= read_by(need.formula)
        for assign in step.then:
            written.add(assign.target.name)
            # An update that only counts up is no use of the variable.
            read |= set().union(*(read_by(t) for t in (*assign.keys, assign.value))) - (
                {assign.target.name}
            )
    for claim in system.properties:
        claimed |= read_by(claim.formula)
    for goal in system.goals:
        claimed |= read_by(goal.formula)
    every = {v.name for v in system.variables}
    assert every - written == set()
    assert every - read - claimed == set()
    ghosts = {v.name for v in system.variables if v.ghost}
    assert every - ghosts - read == UNREAD[system.name], "nothing that happens depends on these"


def test_no_two_rows_of_one_side_are_the_same() -> None:
    bodies: dict[object, str] = {}
    for _, step in ROWS:
        body = (step.actor, step.params, step.when, step.then)
        assert body not in bodies, f"{step.name} is {bodies[body]} again"
        bodies[body] = step.name


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", Side)
def test_the_name_table_has_every_lifecycle_event_and_no_other(side: Side) -> None:
    ours = [own_name(step) for step in LIFECYCLE.of_actor(side.value)]
    theirs = [row.step for row in names.rows(side, Kind.LIFECYCLE)]
    assert sorted(ours) == sorted(theirs)


@pytest.mark.parametrize("side", Side)
def test_the_name_table_has_every_leaf_step_or_the_row_is_explained(side: Side) -> None:
    theirs = {row.step for row in names.rows(side, Kind.LEAF)}
    found = set()
    for step in LEAF.of_actor(side.value):
        known = step.part_of or own_name(step)
        if known in theirs:
            assert step.name not in VARIANTS
            found.add(known)
        else:
            assert step.name in VARIANTS, f"{step.name} is not in the name table"
            assert VARIANTS[step.name] is None or VARIANTS[step.name] in theirs
    assert found == theirs


def test_every_explained_row_is_there() -> None:
    assert VARIANTS.keys() <= {step.name for step in LEAF.steps}


def test_a_row_cites_the_leaf_of_its_name() -> None:
    for step in LEAF.steps:
        known = VARIANTS.get(step.name) or step.part_of or own_name(step)
        row = next(
            (r for r in names.rows(Side(step.actor), Kind.LEAF) if r.step == known and r.leaf),
            None,
        )
        if row is not None and row.leaf is not None:
            assert step.cite.startswith(row.leaf.name)
            assert str(row.leaf.number) in re.findall(r"\d+", step.cite)


# --- enums ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "table", "column", "number"),
    [
        (OP_STATE, "op_state_flags.csv", "op_state", "op_state_number"),
        (SEPT, "sept_state.csv", "state", "index"),
    ],
)
def test_an_enum_has_the_published_order(
    kind: EnumType, table: str, column: str, number: str
) -> None:
    with (SPECS / table).open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert kind.members == tuple(row[column] for row in rows)
    assert [int(row[number]) for row in rows] == list(range(len(rows)))


def test_op_states_have_the_order_of_the_permission_table() -> None:
    with (SPECS / "op_state.csv").open(newline="") as table:
        header = next(csv.reader(table))
    assert header[2:] == list(OP_STATE.members)
