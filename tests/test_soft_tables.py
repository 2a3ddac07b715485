"""Are the tables in the software module those of the published one?"""

import csv
from pathlib import Path

import pytest

from tdxmig_model.backend.soft import sept
from tdxmig_model.backend.soft.leaves_export_mem import judge
from tdxmig_model.backend.soft.module import _LEAVES
from tdxmig_model.backend.soft.op_state import (
    ALLOWED,
    ANY_INITIALIZED,
    EXPORT_IN_ORDER,
    IMPORT_IN_ORDER,
    IMPORT_IN_PROGRESS,
    IMPORT_OUT_OF_ORDER,
    PUBLISHED_STATES,
    SERVTD_BIND_SERVICE_TD,
    SERVTD_RD_TARGET,
    SERVTD_WR_TARGET,
    TLB_TRACKING_REQUIRED,
    Leaf,
    OpState,
)
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.backend.soft.status import (
    FATAL_BIT,
    Operand,
    Status,
    describe_status,
    status_name,
    with_operand,
)
from tdxmig_model.wire.gpa_list import GpaOperation, GpaStatus

SPECS = Path(__file__).resolve().parent.parent / "specs"


def rows(name):
    with (SPECS / name).open() as file:
        return list(csv.DictReader(file))


def in_row(row):
    return {state for state in PUBLISHED_STATES if row[state.name] == "1"}


def test_op_states_of_every_leaf():
    published = {int(row["leaf_number"]): row for row in rows("op_state.csv")}
    for leaf, states in ALLOWED.items():
        assert published[leaf]["leaf_name"] == "TDH." + leaf.name.replace("_", ".")
        assert states == in_row(published[leaf]), leaf.name
    unchecked = set(_LEAVES) - set(ALLOWED)
    assert not {int(leaf) for leaf in unchecked} & set(published)
    assert set(_LEAVES) == set(Leaf)


def test_flags_of_op_states():
    columns = {
        "tlb_tracking_required": TLB_TRACKING_REQUIRED,
        "any_initialized": ANY_INITIALIZED,
        "export_in_order": EXPORT_IN_ORDER,
        "import_in_order": IMPORT_IN_ORDER,
        "import_out_of_order": IMPORT_OUT_OF_ORDER,
        "import_in_progress": IMPORT_IN_PROGRESS,
    }
    for row in rows("op_state_flags.csv"):
        state = OpState(int(row["op_state_number"]))
        assert state.name == row["op_state"]
        for column, states in columns.items():
            assert (state in states) == (row[column] == "1"), (state.name, column)


def test_op_states_of_service_and_target_tds():
    expected = {48: SERVTD_BIND_SERVICE_TD, 18: SERVTD_RD_TARGET, 20: SERVTD_WR_TARGET}
    for row in rows("op_state_other.csv"):
        assert in_row(row) == expected[int(row["leaf_number"])], row["leaf_name"]


STATE_SETS = {
    "any_exported": sept.EXPORTED_STATES,
    "any_exported_and_dirty": sept.DIRTY_STATES,
    "any_pending": sept.PENDING_STATES,
    "any_blockedw": sept.WRITE_BLOCKED_STATES,
    "first_time_export_allowed": sept.FIRST_EXPORT_STATES,
    "export_cancel_allowed": frozenset(sept.RESTORE),
    "tlb_tracking_required": sept.TLB_TRACKING_REQUIRED,
    "guest_accessible_leaf": sept.READABLE_STATES,
    "SEAMCALL_6_TDH.MEM.PAGE.AUG": sept.PAGE_AUG_STATES,
    "SEAMCALL_7_TDH.MEM.RANGE.BLOCK": sept.RANGE_BLOCK_STATES,
    "SEAMCALL_29_TDH.MEM.PAGE.REMOVE": sept.PAGE_REMOVE_STATES,
    "SEAMCALL_39_TDH.MEM.RANGE.UNBLOCK": sept.RANGE_UNBLOCK_STATES,
    "SEAMCALL_65_TDH.EXPORT.BLOCKW": frozenset(sept.BLOCKW),
    "SEAMCALL_66_TDH.EXPORT.RESTORE": frozenset(sept.RESTORE),
    "SEAMCALL_68_TDH.EXPORT.MEM": sept.EXPORT_MEM_STATES,
    "SEAMCALL_75_TDH.EXPORT.UNBLOCKW": frozenset(sept.UNBLOCKW),
    "SEAMCALL_83_TDH.IMPORT.MEM": sept.IMPORT_MEM_STATES,
    "TDCALL_6_TDG.MEM.PAGE.ACCEPT": frozenset(sept.ACCEPT),
}


@pytest.mark.parametrize("row", rows("sept_state.csv"), ids=lambda row: row["state"])
def test_secure_ept_states(row):
    state = SeptState(int(row["index"]))
    assert state.name == row["state"]
    bits = int(row["sept_entry_state_bits_hex"], 16)
    assert sept.STATE_BITS[state] == bits
    assert sept.STATE_OF[bits] is state
    for column, states in STATE_SETS.items():
        assert (state in states) == (row[column] == "1"), column


@pytest.mark.parametrize("row", rows("sept_state.csv"), ids=lambda row: row["state"])
def test_export_rules_follow_the_state_flags(row):
    """EXPORT.MEM allows live what is write-blocked, paused every page that is not blocked."""
    state = SeptState(int(row["index"]))
    for op_state, column in (
        (OpState.LIVE_EXPORT, "live_export_allowed"),
        (OpState.POST_EXPORT, "paused_export_allowed"),
    ):
        allowed = row[column] == "1"
        for operation in (GpaOperation.MIGRATE, GpaOperation.REMIGRATE):
            verdict = judge(op_state, operation, state)
            if op_state is OpState.LIVE_EXPORT:
                fresh = row["first_time_export_allowed"] == "1" or row["re_export_allowed"] == "1"
                allowed = allowed and fresh
            assert (verdict.status == GpaStatus.SUCCESS) == allowed
    cancel = judge(OpState.PAUSED_EXPORT, GpaOperation.CANCEL, state)
    assert (cancel.status == GpaStatus.SUCCESS) == (row["export_cancel_allowed"] == "1")


def test_status_codes():
    published = {row["name"]: int(row["value_hex"], 16) for row in rows("errors_all.csv")}
    for status in Status:
        assert published[status.name] == status
        assert status_name(status) == status.name
    needed = {row["name"] for row in rows("errors.csv")}
    assert needed <= set(Status.__members__)


def test_operand_ids():
    published = {row["operand"]: int(row["id_decimal"]) for row in rows("operand_ids.csv")}
    assert {operand.name: int(operand) for operand in Operand} == published


def test_statuses_read_back_as_text():
    busy = with_operand(Status.TDX_OPERAND_BUSY, Operand.OP_STATE)
    assert describe_status(busy) == "TDX_OPERAND_BUSY|OP_STATE"
    fatal = Status.TDX_INVALID_MBMD | FATAL_BIT
    assert status_name(fatal) == "TDX_INVALID_MBMD"
    assert describe_status(fatal) == "TDX_INVALID_MBMD FATAL"
    assert describe_status(Status.TDX_TD_FATAL) == "TDX_TD_FATAL"
    assert describe_status(3) == "TDX_SUCCESS (3)"
    assert status_name(0xC0DE_0000_0000_0000) == "0xC0DE000000000000"
