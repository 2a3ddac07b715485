"""Does the docstring of each leaf say what the leaf can answer, and which source it follows?"""

import re

import pytest
from error_rows import ROWS
from test_soft_errors_prologue import NOT_PROVOKED

from tdxmig_model.backend.soft.module import _GUEST_LEAVES, _LEAVES
from tdxmig_model.backend.soft.op_state import Leaf

LEAVES = {
    **{f"TDH.{leaf.name.replace('_', '.')}": (leaf, body) for leaf, body in _LEAVES.items()},
    **{f"TDG.{leaf.name.replace('_', '.')}": (leaf, body) for leaf, body in _GUEST_LEAVES.items()},
}
FILES = {
    "TDH.MNG.ADDCX": "tdh_mng_add_cx.c",
    "TDG.SERVTD.RD": "tdg_servtd_rd_wr.c",
    "TDG.SERVTD.WR": "tdg_servtd_rd_wr.c",
}
"""Files of the public source that are not named as the leaf is."""
HARDENED_ONLY = {
    Leaf.EXPORT_STATE_IMMUTABLE: {"INVALID_MIGRATION_DECRYPTION_KEY", "OP_STATE_INCORRECT"},
    Leaf.EXPORT_MEM: {"INVALID_RESUMPTION"},
    Leaf.EXPORT_TRACK: {"INVALID_RESUMPTION"},
    Leaf.EXPORT_STATE_TD: {"INVALID_RESUMPTION"},
    Leaf.EXPORT_STATE_VP: {"INVALID_RESUMPTION"},
    Leaf.IMPORT_STATE_IMMUTABLE: {"INVALID_MIGRATION_DECRYPTION_KEY", "OP_STATE_INCORRECT"},
    Leaf.IMPORT_STATE_VP: {"METADATA_FIELD_VALUE_NOT_VALID"},
    Leaf.IMPORT_MEM: {"OP_STATE_INCORRECT"},
    Leaf.MNG_ADDCX: {"OP_STATE_INCORRECT"},
}
"""Statuses that repairs of specs/repairs.toml give a leaf, without the prefix TDX_."""


def text_of(body):
    """The docstring, in one line."""
    return re.sub(r"\s+", " ", body.__doc__)


def statuses_of(name):
    """Statuses that specs/error_rows.csv has for a leaf, as docstrings write them."""
    rows = [row for row in ROWS.values() if f"TDH.{row['leaf']}" == name]
    told = {row["status"] for row in rows if row["id"] not in NOT_PROVOKED}
    told -= {"", "TDX_SUCCESS"}
    return {"BUSY" if one == "TDX_OPERAND_BUSY" else one.removeprefix("TDX_") for one in told}


def untold(body, statuses):
    """Those that no word of the docstring is."""
    return {one for one in statuses if not re.search(rf"\b{one}\b", text_of(body))}


@pytest.mark.parametrize("name", LEAVES)
def test_a_docstring_names_leaf_number_operands_and_statuses(name):
    leaf, body = LEAVES[name]
    assert text_of(body).startswith(f"{name} ({int(leaf)}, TDX module 1.5.01): ")
    assert " In: " in text_of(body)
    assert " Status: " in text_of(body)


TOLD_ELSEWHERE = {
    "TDH.IMPORT.MEM": {
        "MIGRATION_STREAM_STATE_INCORRECT",
        "OPERAND_ADDR_RANGE_ERROR",
        "PAGE_METADATA_INCORRECT",
        "BUSY",
    },
}
"""The docstring refers to TDH.EXPORT.MEM, or to a list that is at fault."""


@pytest.mark.parametrize("name", LEAVES)
def test_each_status_of_the_error_rows_is_in_the_docstring(name):
    _, body = LEAVES[name]
    assert untold(body, statuses_of(name)) == TOLD_ELSEWHERE.get(name, set())


@pytest.mark.parametrize("leaf", HARDENED_ONLY, ids=lambda leaf: leaf.name)
def test_each_status_of_a_repair_is_in_the_docstring(leaf):
    assert not untold(_LEAVES[leaf], HARDENED_ONLY[leaf])


@pytest.mark.parametrize("name", LEAVES)
def test_each_leaf_names_the_file_that_it_follows(name):
    _, body = LEAVES[name]
    file = FILES.get(name, f"{name.lower().replace('.', '_')}.c")
    assert f" Source: {file}." in text_of(body)
