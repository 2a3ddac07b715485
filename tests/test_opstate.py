"""Do the leaf model's leaves, diagrams and entry states agree with the published tables?

That each single row does is the matter of test_permissions.py.
"""

from __future__ import annotations

import re

import pytest
from permission_tables import ENTRIES, entries, published, table

from tdxmig_model.expr import (
    Instance,
    Interpreter,
    MapVariable,
    Need,
    Read,
    Step,
    Variable,
    initial_state,
    subterms,
)
from tdxmig_model.model import source_state
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.words import HARDENED, OP_STATE, SEPT
from tdxmig_model.project import edges

SIDES = ("source", "destination")
SYSTEM = LEAF.under(HARDENED)
INSTANCE = Instance.small(SYSTEM, {i.name: 1 for i in SYSTEM.indexes()})
INTERPRETER = Interpreter(SYSTEM, INSTANCE)

HOST_LEAVES = {row["leaf_name"] for row in table("op_state.csv")}

# Leaves of the table that no row of the model takes: they build a TD, its Secure EPT and its vCPUs,
# read and write metadata, or bind a service TD.
NOT_MODELLED = {
    *("TDH.MNG.ADDCX", "TDH.MNG.INIT", "TDH.MNG.RD", "TDH.MNG.WR"),
    *("TDH.VP.ADDCX", "TDH.VP.CREATE", "TDH.VP.FLUSH", "TDH.VP.INIT", "TDH.VP.RD", "TDH.VP.WR"),
    *("TDH.MEM.PAGE.ADD", "TDH.MEM.PAGE.AUG", "TDH.MEM.PAGE.DEMOTE", "TDH.MEM.PAGE.PROMOTE"),
    *("TDH.MEM.PAGE.RELOCATE", "TDH.MEM.PAGE.REMOVE", "TDH.MEM.RD", "TDH.MEM.WR"),
    *("TDH.MEM.RANGE.BLOCK", "TDH.MEM.RANGE.UNBLOCK"),
    *("TDH.MEM.SEPT.ADD", "TDH.MEM.SEPT.RD", "TDH.MEM.SEPT.REMOVE"),
    *("TDH.MR.EXTEND", "TDH.MR.FINALIZE", "TDH.SERVTD.BIND", "TDH.SERVTD.PREBIND"),
}


def leaf_of(step: Step) -> str | None:
    cited = re.match(r"(TD[HG]\.[A-Z.]+[A-Z])(?:, leaf| of )", step.cite)
    return cited[1] if cited else None


MODELLED = sorted(
    {(leaf, side) for side in SIDES for s in SYSTEM.of_actor(side) if (leaf := leaf_of(s))}
)


# --- OP_STATE ------------------------------------------------------------------------------------


def variable(side: str) -> Variable:
    found = SYSTEM.variable(f"{side}_op_state")
    assert isinstance(found, Variable)
    return found


def test_only_the_exits_of_vp_enter_have_a_leaf_and_ask_for_no_op_state() -> None:
    without = {
        step.name
        for step in SYSTEM.steps
        if leaf_of(step) and all(n.label != "op_state" for n in step.when)
    }
    assert without == {"vp_exit", "vp_exit_previous"}


@pytest.mark.parametrize("side", SIDES)
def test_the_projection_lets_a_leaf_start_where_its_table_row_does(side: str) -> None:
    """What diagrams show is the whole guard; no leaf may lose an OP_STATE to another conjunct."""
    drawn: dict[str, set[str]] = {}
    for edge in edges(SYSTEM, variable(side), side):
        leaf = leaf_of(edge.step)
        if leaf:
            drawn.setdefault(leaf, set()).add(edge.origin)
    assert drawn == {leaf: published(leaf) for leaf, other in MODELLED if other == side}


def test_the_other_leaves_of_the_table_are_listed() -> None:
    modelled = {leaf for leaf, _ in MODELLED}
    assert modelled - HOST_LEAVES == {"TDG.SERVTD.WR"}
    assert HOST_LEAVES - modelled == NOT_MODELLED


def test_a_guest_runs_where_vp_enter_is_allowed_and_nowhere_else() -> None:
    assert published("TDH.VP.ENTER") == {"RUNNABLE", "LIVE_EXPORT", "LIVE_IMPORT"}


# --- Secure EPT ----------------------------------------------------------------------------------


def speaks_of_the_entry(need: Need, side: str) -> bool:
    """Whether a conjunct is about the Secure EPT entry and the OP_STATE, and nothing else."""
    terms = list(subterms(need.formula))
    names = {n.name for n in terms if isinstance(n, Variable)}
    names |= {n.map.name for n in terms if isinstance(n, Read)}
    return names <= {f"{side}_op_state", f"{side}_page"}


def state_with(side: str, op_state: str, entry: int) -> list[object]:
    state = initial_state(SYSTEM, INSTANCE)
    state[INTERPRETER.slots[f"{side}_op_state"]] = OP_STATE.position(op_state)
    state[INTERPRETER.slots[f"{side}_page"]][0] = entry
    return state


def accepted(step: str, op_state: str) -> set[str]:
    """The entry states in which a row can be taken, as far as OP_STATE and entry decide."""
    row = SYSTEM.step(step)
    needs = [n for n in row.when if speaks_of_the_entry(n, row.actor)]
    assert any(n.label == "sept_state" for n in needs)
    found = set()
    for entry, name in enumerate(SEPT.members):
        state = state_with(row.actor, op_state, entry)
        if all(INTERPRETER.value(n.formula, state, {"p": 0, "stream": 0}) for n in needs):
            found.add(name)
    return found


def accepted_anywhere(*steps: str) -> set[str]:
    return set().union(*(accepted(s, o) for s in steps for o in OP_STATE.members))


EXPORT_ENTRIES = (
    "export_mem_migrate",
    "export_mem_remigrate",
    "export_mem_cancel",
    "export_mem_out_of_order",
)
IMPORT_ENTRIES = (
    "import_mem_migrate",
    "import_mem_migrate_pending",
    "import_mem_remigrate",
    "import_mem_remigrate_pending",
    "import_mem_cancel",
)


@pytest.mark.parametrize(
    ("column", "steps"),
    [
        ("SEAMCALL_65_TDH.EXPORT.BLOCKW", ("export_blockw",)),
        ("SEAMCALL_66_TDH.EXPORT.RESTORE", ("export_restore",)),
        ("SEAMCALL_68_TDH.EXPORT.MEM", EXPORT_ENTRIES),
        ("SEAMCALL_75_TDH.EXPORT.UNBLOCKW", ("export_unblockw",)),
        ("SEAMCALL_83_TDH.IMPORT.MEM", IMPORT_ENTRIES),
    ],
)
def test_a_leaf_accepts_the_published_entry_states(column: str, steps: tuple[str, ...]) -> None:
    ours = accepted_anywhere(*steps)
    for name in SEPT.members:
        assert (name in ours) == (name in entries(column)), f"{column} on {name}"


def test_named_sets_of_entry_states_are_the_published_flags() -> None:
    def named(states: tuple[object, ...]) -> set[str]:
        return {str(state) for state in states}

    assert named(source_state.EXPORTED) == entries("any_exported")
    assert named(source_state.EXPORTED_AND_DIRTY) == entries("any_exported_and_dirty")
    assert named(source_state.WRITE_BLOCKED) == entries("any_blockedw")
    assert named(source_state.FIRST_TIME) == entries("first_time_export_allowed")
    # The model has no entry that the host blocked.
    assert named(source_state.PENDING_STATES) == entries("any_pending") - {"PENDING_BLOCKED"}


# --- what a step makes of an entry ---------------------------------------------------------------

BITS = ("tdp_pending", "tdb_blocked", "tdbw_blocked_for_write", "tdex_exported", "d_dirty")


def bits(entry: str) -> dict[str, bool]:
    return {bit: ENTRIES[SEPT.position(entry)][bit] == "1" for bit in BITS}


def after(step: str, entry: str) -> str:
    row = SYSTEM.step(step)
    state = state_with(row.actor, "LIVE_EXPORT", SEPT.position(entry))
    page = SYSTEM.variable(f"{row.actor}_page")
    assert isinstance(page, MapVariable)
    new = INTERPRETER.apply(row, state, {"p": 0, "stream": 0})
    return SEPT.members[int(new[INTERPRETER.slots[page.name]][0])]


@pytest.mark.parametrize(
    ("step", "changed"),
    [
        ("export_blockw", {"tdbw_blocked_for_write": True}),
        ("export_restore", {"tdbw_blocked_for_write": False, "tdex_exported": False}),
        ("export_mem_cancel", {"tdbw_blocked_for_write": False, "tdex_exported": False}),
        ("export_mem_migrate", {"tdbw_blocked_for_write": True, "tdex_exported": True}),
        ("export_mem_remigrate", {"tdbw_blocked_for_write": True, "tdex_exported": True}),
        ("export_mem_out_of_order", {"tdbw_blocked_for_write": True, "tdex_exported": True}),
        ("export_unblockw", {"tdbw_blocked_for_write": False}),
    ],
)
def test_a_step_changes_the_bits_of_an_entry_that_it_is_for(
    step: str, changed: dict[str, bool]
) -> None:
    for entry in sorted(accepted_anywhere(step)):
        expected = {**bits(entry), **changed}
        if step == "export_unblockw":
            # An exported page that can be written again is dirty from then on.
            expected["d_dirty"] = expected["tdex_exported"]
        elif step != "export_blockw":
            expected["d_dirty"] = False
        assert bits(after(step, entry)) == expected, f"{step} on {entry}"
