"""Has every function, callback, constant and bundle type of the seed a counterpart and tests?"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tdxmig_model.names import NAMES, Kind
from tdxmig_model.wire import BundleType, iov_num

TESTS = Path(__file__).parent
SEED: dict[str, list[dict[str, Any]]] = tomllib.loads(
    (TESTS.parent / "specs" / "seed.toml").read_text()
)
ROWS = [row for table in ("function", "constant") for row in SEED[table]]
DEFECTS = {row["number"]: row for row in SEED["defect"]}

# Written down a second time, from the seed and not from the table.
FUNCTIONS = [
    "stream_ioctl",
    "put_mig_hdr",
    "stream_get_mbmd_bytes",
    "stream_get_mbmd_type",
    "savevm_state_start",
    "save_epoch",
    "savevm_state_ram_start_epoch",
    "gpa_list_setup",
    "save_ram",
    "savevm_state_ram",
    "savevm_state_ram_cancel",
    "savevm_state_pause",
    "save_td",
    "save_one_vcpu",
    "save_vcpus",
    "savevm_state_end",
    "is_ready",
    "stream_create",
    "do_stream_setup",
    "stream_setup",
    "stream_cleanup",
    "cleanup",
    "loadvm_state_cleanup",
    "savevm_state_ram_abort",
    "loadvm_state",
    "iov_num",
    "multifd_send_prepare",
    "multifd_recv_pages",
    "init",
]
CALLBACKS = [
    "is_ready",
    "savevm_state_setup",
    "savevm_state_start",
    "savevm_state_ram_start_epoch",
    "savevm_state_ram",
    "savevm_state_pause",
    "savevm_state_end",
    "savevm_state_cleanup",
    "savevm_state_ram_abort",
    "savevm_state_ram_cancel",
    "loadvm_state_setup",
    "loadvm_state",
    "loadvm_state_cleanup",
    "multifd_send_prepare",
    "multifd_recv_pages",
    "iov_num",
]
NUMBERS = {
    "MULTIFD_EXTRA_IOV_NUM": 4,
    "TDX_MBMD_MEM_BYTES": 48,
    "GPA_LIST_OP_EXPORT": 1,
    "GPA_LIST_OP_CANCEL": 2,
    "GPA_LIST_ENTRY_MIG_TYPE_4KB": 0,
    "TDX_MIG_F_CONTINUE": 1,
}


def resolve(path: str) -> Any:
    """What module:name stands for; a field of a dataclass is its default, or its descriptor."""
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(f"tdxmig_model.{module}")
    for part in name.split("."):
        fields = getattr(found, "__dataclass_fields__", {})
        default = fields[part].default if part in fields else None
        found = default if isinstance(default, int) else getattr(found, part)
    return found


@cache
def functions_in(file: str) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def named_tests() -> Iterator[str]:
    for row in ROWS:
        yield from row["tests"]


def defect_tests(number: str) -> list[str]:
    start = f"test_qf_{number.lower()}_"
    return [name for name in functions_in("test_seed_defects.py") if name.startswith(start)]


def test_all_29_functions_are_there() -> None:
    assert len(FUNCTIONS) == 29
    assert sorted(row["name"] for row in SEED["function"]) == sorted(
        f"tdx_mig_{name}" for name in FUNCTIONS
    )


def test_all_16_callbacks_are_there_and_are_filled_by_a_function() -> None:
    assert len(CALLBACKS) == 16
    assert sorted(row["name"] for row in SEED["callback"]) == sorted(CALLBACKS)
    known = {row["name"] for row in SEED["function"]}
    assert {row["function"] for row in SEED["callback"]} <= known


def test_the_constants_are_there_with_their_numbers() -> None:
    assert {row["name"]: row["value"] for row in SEED["constant"]} == NUMBERS
    for row in SEED["constant"]:
        ours = resolve(row["ours"])
        if isinstance(ours, int):
            assert ours == row["value"], row["name"]
    # The one that is no number here: buffers beside the pages, with both MAC pages.
    assert iov_num(512) - 512 == NUMBERS["MULTIFD_EXTRA_IOV_NUM"]


def test_the_bundle_types_are_there_and_are_sent_and_loaded() -> None:
    assert {row["ours"]: row["value"] for row in SEED["bundle_type"]} == {
        kind.name: kind.value for kind in BundleType
    }
    events = {row.step for row in NAMES if row.kind is Kind.LIFECYCLE}
    assert {row[way] for row in SEED["bundle_type"] for way in ("sent", "loaded")} <= events


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_each_row_names_what_there_is(row: dict[str, Any]) -> None:
    ours = [row["ours"]] if isinstance(row["ours"], str) else row["ours"]
    assert ours
    assert row["tests"]
    for path in ours:
        assert resolve(path) is not None, path
    for test in row["tests"]:
        file, _, name = test.partition("::")
        assert name in functions_in(file), test


def test_the_name_table_knows_no_function_of_the_seed_that_is_not_here() -> None:
    known = {row["name"] for row in SEED["function"]}
    assert {name for row in NAMES for name in row.seed} <= known


def test_all_39_defects_are_there() -> None:
    ranges = {"L": 12, "S": 10, "T": 7, "M": 10}
    expected = [f"{letter}{one}" for letter, count in ranges.items() for one in range(1, count + 1)]
    assert list(DEFECTS) == expected
    assert len(expected) == 39


@pytest.mark.parametrize("number", DEFECTS)
def test_a_defect_of_weight_has_a_test_or_a_reason(number: str) -> None:
    row = DEFECTS[number]
    found = defect_tests(number)
    assert bool(found) == ("holds" in row), found
    assert ("holds" in row) + ("waits" in row) == (row["severity"] in "HM")


def test_each_test_of_a_defect_has_a_number_of_the_table() -> None:
    for name in functions_in("test_seed_defects.py"):
        match = re.match(r"test_qf_([lstm]\d+)_", name)
        assert match is None or match[1].upper() in DEFECTS, name
        assert match is not None or not name.startswith("test_"), name
