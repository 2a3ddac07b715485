"""The published checks of specs/error_rows.csv, and how a test provokes one of them.

What is expected comes from the tables in specs/ alone: status, operand id, FATAL and the status
that a list entry gets.  A case says only how to provoke the row and what section 10 lets change.
"""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from soft_scene import Scene, Spoil

from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.schedulers import LIST_LEAVES

SPECS = Path(__file__).resolve().parent.parent / "specs"
FATAL_BIT = 1 << 61
NOTHING = frozenset()
REGISTERS = ("rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13")
LEFT_OVER = 0xA5A5_0000
"""What is in a register that the leaf does not read."""


def no_outputs(_scene):
    return {}


def table(name):
    with (SPECS / name).open() as file:
        return list(csv.DictReader(file))


CODES = {row["name"]: int(row["value_hex"], 16) for row in table("errors_all.csv")}
OPERANDS = {row["operand"]: int(row["id_decimal"]) for row in table("operand_ids.csv")}
ROWS = {row["id"]: row for row in table("error_rows.csv")}
ORDER = {row: number for number, row in enumerate(ROWS)}


def code_of(row_id, operand=None):
    """The 64-bit completion status of a row; `operand` where the row says that it is the leaf's."""
    row = ROWS[row_id]
    low = operand if row["operand"] == "*" else row["operand"]
    code = CODES[row["status"]] | (OPERANDS[low] if low else 0)
    if row["severity"] == "P":
        code |= 1  # one problematic entry
    return code | FATAL_BIT if row["fatal"] == "1" else code


class Case(NamedTuple):
    """One way to provoke a row.

    `scene` makes the legal call and `spoil` breaks it.  `changed` are the names of everything in
    the module that differs afterwards, FAILED_IMPORT of a fatal row aside, and `written` the VMM's
    buffers.  `apart` are rows with which this one cannot be provoked together.  `outputs` are
    registers with another value than the leaf leaves in them whenever it fails.
    """

    row: str
    scene: Callable[[], Scene]
    spoil: Spoil
    changed: Iterable[str] = NOTHING
    written: Iterable[str] = NOTHING
    label: str = ""
    apart: Iterable[str] = NOTHING
    outputs: Callable[[Scene], Mapping[str, int]] = no_outputs

    @property
    def id(self):
        return f"{self.row} {self.label}".strip()

    @property
    def code(self):
        return code_of(self.row)


def run(case):
    """Provoke the case; the scene and the outcome, whose status is right."""
    scene = case.scene()
    case.spoil.apply(scene)
    scene.registers = dict.fromkeys(REGISTERS, LEFT_OVER) | scene.registers
    outcome = scene.attempt()
    assert hex(outcome.status) == hex(case.code)
    if ROWS[case.row]["fatal"] == "1":
        assert scene.tdcs.op_state is OpState.FAILED_IMPORT
    return scene, outcome


def run_both(case, later):
    """Provoke the case with a later check failing too: the earlier one decides."""
    scene = case.scene()
    later.spoil.apply(scene)
    case.spoil.apply(scene)
    assert hex(scene.status()) == hex(case.code)
    return scene


def judge(case):
    """The whole judgement of one case: status, registers, and exactly what changed."""
    scene, outcome = run(case)
    fatal = {"tdcs.op_state"} if ROWS[case.row]["fatal"] == "1" else set()
    assert_same(outcome.changed, set(case.changed) | fatal)
    assert outcome.written == set(case.written)
    left = {name: getattr(outcome.registers, name) for name in REGISTERS}
    assert comparable(case, scene, left) == comparable(case, scene, expected_outputs(case, scene))
    return scene, outcome


RDX_ZERO = {Leaf.EXPORT_STATE_IMMUTABLE, Leaf.EXPORT_STATE_TD, Leaf.EXPORT_STATE_VP}
"""RDX is the number of pages: 0 on error, those done if interrupted, here after the first."""
BOTH_ZERO = {
    Leaf.EXPORT_UNBLOCKW,
    Leaf.IMPORT_STATE_IMMUTABLE,
    Leaf.IMPORT_STATE_TD,
    Leaf.IMPORT_STATE_VP,
}
"""RCX and RDX are 0 or details on error, and kept if interrupted."""


def expected_outputs(case, scene):
    """The registers of a call that ends with the row of this case."""
    interrupted = ROWS[case.row]["status"] == "TDX_INTERRUPTED_RESUMABLE"
    expected = dict(scene.registers)
    if scene.leaf in RDX_ZERO:
        expected["rdx"] = int(interrupted)
    if scene.leaf in BOTH_ZERO and not interrupted:
        expected.update(rcx=0, rdx=0)
    return expected | case.outputs(scene)


def comparable(case, scene, registers):
    """Without what tests of list entries judge: the entry in RCX, and RDX of a complete bundle."""
    found = dict(registers)
    if scene.leaf in LIST_LEAVES and case.row.partition("-")[2].startswith("e"):
        found["rcx"] &= ~(511 << 3)
        if ROWS[case.row]["status"] == "TDX_SUCCESS":
            del found["rdx"]
    return found


def assert_same(names, expected):
    """Exactly the expected names; "prefix*" stands for one or more names with this prefix."""
    prefixes = {name[:-1] for name in expected if name.endswith("*")}
    under = {prefix: {name for name in names if name.startswith(prefix)} for prefix in prefixes}
    assert all(under.values()), under
    exact = {name for name in expected if not name.endswith("*")}
    assert set(names) - set().union(*under.values()) == exact


def neighbours(cases):
    """(earlier, later): each case with the next check that can fail at the same time.

    They are on the same call, touch different things, and have different status.  An interruption
    is no check: it is looked for when an entry or page is done.
    """
    pairs = []
    cases = [case for case in cases if ROWS[case.row]["status"] != "TDX_INTERRUPTED_RESUMABLE"]
    for case in cases:
        after = [
            other
            for other in cases
            if other.scene is case.scene
            and ORDER[other.row] > ORDER[case.row]
            and other.row not in case.apart
            and not other.spoil.touches & case.spoil.touches
            and other.code != case.code
        ]
        if after:
            pairs.append((case, min(after, key=lambda other: ORDER[other.row])))
    return pairs


def pair_id(pair):
    return f"{pair[0].id} before {pair[1].id}"


def cases_of(cases):
    """Parameters for a test of each case."""
    return [pytest.param(case, id=case.id) for case in cases]


def orders_of(cases):
    """Parameters for a test of each pair of neighbouring checks."""
    return [pytest.param(*pair, id=pair_id(pair)) for pair in neighbours(cases)]
