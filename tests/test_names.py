"""Does the name table say what the published interfaces say?"""

from __future__ import annotations

import csv
import tomllib
from pathlib import Path

import pytest

from tdxmig_model import names
from tdxmig_model.errors import UsageError
from tdxmig_model.names import NAMES, Call, Kind, Name, Side
from tdxmig_model.wire import BundleType

SPECS = Path(__file__).parent.parent / "specs"
ORACLE = tomllib.loads((SPECS / "names.toml").read_text())


def as_oracle_row(row: Name) -> dict[str, object]:
    shown: dict[str, object] = {"step": row.step}
    if row.leaf:
        shown |= {"leaf": row.leaf.name, "number": row.leaf.number}
        if row.leaf.call is not Call.SEAMCALL:
            shown["call"] = row.leaf.call.value
    if row.kvm:
        shown |= {"kvm": row.kvm.name, "id": row.kvm.id}
    if row.kvm_inside:
        shown |= {"inside": row.kvm_inside.name, "inside_id": row.kvm_inside.id}
    if row.bundle:
        shown["bundle"] = row.bundle
    if row.seed:
        shown["seed"] = list(row.seed)
    return shown


@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("kind", Kind)
def test_the_table_equals_the_oracle(side: Side, kind: Kind) -> None:
    table = [as_oracle_row(row) for row in names.rows(side, kind)]
    assert table == ORACLE[f"{side.value}_{kind.value}"]


def test_the_oracle_and_the_table_have_the_same_rows() -> None:
    assert len(NAMES) == sum(len(rows) for rows in ORACLE.values()) == 51


def test_a_step_is_unique_within_its_side_and_kind() -> None:
    assert len({(row.side, row.kind, row.step) for row in NAMES}) == len(NAMES)


def test_the_trace_event_is_the_step() -> None:
    assert all(row.trace_event == row.step for row in NAMES)


def test_leaf_names_and_numbers_are_one_to_one() -> None:
    leaves = {row.leaf for row in NAMES if row.leaf}
    assert len({leaf.name for leaf in leaves}) == len(leaves)
    assert len({(leaf.call, leaf.number) for leaf in leaves}) == len(leaves)


@pytest.mark.skipif(
    not (SPECS / "op_state.csv").exists(), reason="the OP_STATE table is not in this tree"
)
def test_leaf_numbers_are_those_of_the_op_state_table() -> None:
    with (SPECS / "op_state.csv").open(newline="") as table:
        published = {row["leaf_name"]: int(row["leaf_number"]) for row in csv.DictReader(table)}
    ours = {row.leaf.name: row.leaf.number for row in NAMES if row.leaf}
    del ours["TDG.SERVTD.WR"]  # A TDCALL; that table is about SEAMCALLs.
    assert ours.items() <= published.items()


def test_every_migration_leaf_of_the_module_is_in_the_table() -> None:
    numbers = {row.leaf.number for row in NAMES if row.leaf and row.leaf.call is Call.SEAMCALL}
    exports, imports = {64, 65, 66, 68, *range(70, 76)}, set(range(80, 88))
    assert numbers == {0, 38, 96} | exports | imports


def test_the_stream_commands_are_9_to_21_without_a_gap() -> None:
    commands = {row.kvm for row in NAMES if row.kvm}
    assert sorted(command.id for command in commands) == list(range(9, 22))
    assert len({command.name for command in commands}) == len(commands)


def test_bundles_are_named_as_on_the_wire() -> None:
    used = {row.bundle for row in NAMES if row.bundle}
    assert used == {member.name for member in BundleType}


def test_a_command_and_its_leaf_have_the_same_name() -> None:
    for row in NAMES:
        if row.kvm and row.leaf:
            leaf_words = row.leaf.name.removeprefix("TDH.").replace(".", "_")
            assert row.kvm.name == f"KVM_TDX_MIG_{leaf_words}"


def test_leaf_steps_are_named_after_their_leaf() -> None:
    variants = {"set_migration_key", "import_failure"}
    for row in NAMES:
        if row.kind is Kind.LEAF and row.step not in variants:
            assert row.leaf is not None
            leaf_words = row.leaf.name.removeprefix("TDH.").replace(".", "_").lower()
            assert row.step.removesuffix("_start").removesuffix("_with_token") == leaf_words


def test_a_step_is_found_by_name_leaf_and_command() -> None:
    row = names.find("export_mem", Side.SOURCE, Kind.LEAF)
    assert row.leaf is not None
    assert row.leaf.name == "TDH.EXPORT.MEM"
    assert [step.step for step in names.steps_of_leaf(71)] == ["export_track", "export_track_start"]
    assert [step.step for step in names.steps_of_leaf(20, Call.TDCALL)] == ["set_migration_key"] * 2
    assert names.steps_of_leaf(9999) == ()
    assert [step.step for step in names.steps_of_command(14)] == [
        "import_track",
        "import_track_start",
        "import_commit",
    ]


def test_an_unknown_step_is_refused_with_the_steps_there_are() -> None:
    with pytest.raises(UsageError, match="no lifecycle step 'export_mem' of the source; there are"):
        names.find("export_mem", Side.SOURCE, Kind.LIFECYCLE)
