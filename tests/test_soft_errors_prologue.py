"""The dispatcher, the prologue and the locks of every migration leaf, and whether every row of the
table of checks has a test.

Profile "tdx-1.5.01"; expected statuses are those of specs/error_rows.csv.
"""

import legal_calls as legal
import pytest
import test_soft_errors_export as export_tests
import test_soft_errors_export_mem as export_mem_tests
import test_soft_errors_import as import_tests
import test_soft_errors_import_mem as import_mem_tests
import test_soft_errors_rest as rest_tests
from error_rows import CODES, OPERANDS, ROWS, Case, code_of, judge, table
from soft_scene import TDR_IN_RDX, VCPU_LEAVES, Spoil, held, spoil
from soft_state import changes, snapshot

from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.state import Lifecycle, VcpuState

S, X = Mode.SHARED, Mode.EXCLUSIVE
SCENES = legal.FIRST_CALLS
LEAVES = [pytest.param(leaf, id=leaf.name) for leaf in SCENES]


# --- dispatcher ----------------------------------------------------------------------------------


RAX_BITS = [(24, "2.1-1"), (31, "2.1-1"), (32, "2.1-1"), (63, "2.1-1"), (16, "2.1-2")]


@pytest.mark.parametrize("leaf", LEAVES)
def test_rax_and_shutdown(leaf):
    """Reserved bits and versions are looked at first, and nothing else is after a shutdown."""
    scene = SCENES[leaf]()
    before, registers = snapshot(scene.module), Registers(**scene.registers)
    for bit, row in RAX_BITS:
        assert scene.module.call(leaf | 1 << bit, registers) == code_of(row)
    scene.module.shut_down = True
    for bit, row in RAX_BITS:
        assert scene.module.call(leaf | 1 << bit, registers) == code_of(row)
    assert scene.module.call(leaf, registers) == code_of("2.1-3a")
    assert set(changes(before, snapshot(scene.module))) == {"shut_down"}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_module_that_is_not_ready(leaf):
    """Nothing is done until the module is ready; a shutdown and a bad RAX are told first."""
    scene = SCENES[leaf]()
    before, registers = snapshot(scene.module), Registers(**scene.registers)
    scene.module.ready = False
    assert scene.module.call(leaf, registers) == code_of("2.1-3b")
    for bit, row in RAX_BITS:
        assert scene.module.call(leaf | 1 << bit, registers) == code_of(row)
    assert set(changes(before, snapshot(scene.module))) == {"ready"}
    scene.module.shut_down = True
    assert scene.module.call(leaf, registers) == code_of("2.1-3a")
    scene.module.ready, scene.module.shut_down = True, False
    assert not scene.status() >> 63


# --- prologue ------------------------------------------------------------------------------------


def td_operand(leaf):
    return "RDX" if leaf in TDR_IN_RDX else "RCX"


def named(scene, change):
    """Another value in the register that names the TD or the vCPU."""
    register = td_operand(scene.leaf).lower()
    scene.registers[register] = change(scene.registers[register])


def renamed(change):
    return Spoil(frozenset({"td"}), lambda scene: named(scene, change))


@spoil("td")
def other_kind_of_page(scene):
    """The TDR where a TDVPR is due, and the other way round."""
    vcpu = scene.td.vcpus[0] if scene.td.vcpus else scene.td.control_pages[0]
    wrong = scene.td.tdr if scene.leaf in VCPU_LEAVES else vcpu
    named(scene, lambda _: wrong)


def page_of_td(scene):
    return scene.registers[td_operand(scene.leaf).lower()]


def locked(mode):
    def apply(scene):
        assert scene.memory.try_lock(page_of_td(scene), mode)

    return Spoil(frozenset({"page lock"}), apply)


@spoil("fatal")
def fatal(scene):
    """Injected: only a module error sets it."""
    scene.tdr.fatal = True


@spoil("lifecycle")
def no_keys(scene):
    """Injected: back to before KEY.CONFIG."""
    scene.tdr.lifecycle = Lifecycle.HKID_ASSIGNED


@spoil("tdcx")
def five_pages(scene):
    """Injected: back to before the sixth ADDCX."""
    del scene.tdr.tdcx[5:]


def wrong_op_state(scene):
    """Injected: any OP_STATE that the leaf is not for."""
    allowed = {row["leaf_number"]: row for row in table("op_state.csv")}[str(int(scene.leaf))]
    scene.tdcs.op_state = next(
        state for state in OpState if state.name in allowed and allowed[state.name] == "0"
    )


NO_OP_STATE_LOCK = frozenset(
    {
        Leaf.EXPORT_PAUSE,
        Leaf.IMPORT_STATE_IMMUTABLE,
        Leaf.IMPORT_TRACK,
        Leaf.IMPORT_STATE_TD,
        Leaf.IMPORT_COMMIT,
        Leaf.IMPORT_END,
        Leaf.IMPORT_ABORT,
    }
)
"""They hold the TDR exclusively instead."""
PROLOGUE = [
    ("2.2-1", renamed(lambda hpa: hpa | 8), "misaligned"),
    ("2.2-1", renamed(lambda hpa: hpa | 1 << 46), "HKID"),
    ("2.2-1", renamed(lambda hpa: hpa | 1 << 52), "beyond MAX_PA"),
    ("2.2-2", renamed(lambda hpa: 4096), "of the VMM"),
    ("2.2-2", renamed(lambda hpa: 1 << 45), "beyond the TDMR"),
    ("2.2-3", locked(X), ""),
    ("2.2-4", other_kind_of_page, ""),
    ("2.2-5", fatal, ""),
    ("2.2-6", no_keys, ""),
    ("2.2-7", five_pages, ""),
    ("2.2-8", held("op_state_lock", X), ""),
    ("2.2-9", Spoil(frozenset({"op_state"}), wrong_op_state), ""),
]


def applies(leaf, row):
    return not (row == "2.2-8" and leaf in NO_OP_STATE_LOCK)


def broken(leaf, *spoils):
    scene = SCENES[leaf]()
    for one in spoils:
        one.apply(scene)
    return scene


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize(("row", "what", "label"), PROLOGUE)
def test_prologue(leaf, row, what, label):
    if not applies(leaf, row):
        assert leaf in NO_OP_STATE_LOCK
        return
    outcome = broken(leaf, what).attempt()
    assert hex(outcome.status) == hex(code_of(row, td_operand(leaf)))
    assert not outcome.changed
    assert not outcome.written


@pytest.mark.parametrize("leaf", LEAVES)
def test_the_prologue_is_checked_in_order(leaf):
    """Each check with the next one that touches something else."""
    rows = [entry for entry in PROLOGUE if applies(leaf, entry[0])]
    for number, (row, what, _) in enumerate(rows):
        later = [other for other in rows[number + 1 :] if not other[1].touches & what.touches]
        later = [other for other in later if other[0] != row]
        if later:
            scene = broken(leaf, later[0][1], what)
            assert hex(scene.status()) == hex(code_of(row, td_operand(leaf))), (row, later[0][0])


FIRST_OWN_CHECKS = [
    case
    for cases in (
        export_tests.CASES,
        export_mem_tests.CASES,
        import_tests.CASES,
        import_mem_tests.CASES,
    )
    for case in {case.scene: case for case in reversed(cases)}.values()
]


@pytest.mark.parametrize("case", FIRST_OWN_CHECKS, ids=lambda case: case.id)
def test_the_prologue_comes_before_a_leafs_own_checks(case):
    scene = case.scene()
    case.spoil.apply(scene)
    wrong_op_state(scene)
    assert hex(scene.status()) == hex(code_of("2.2-9"))


@pytest.mark.parametrize("leaf", sorted(VCPU_LEAVES))
def test_the_tdr_of_a_vcpu_is_locked_after_its_tdvpr(leaf):
    scene = SCENES[leaf]()
    assert scene.memory.try_lock(scene.td.tdr, X)
    outcome = scene.attempt()
    assert hex(outcome.status) == hex(code_of("2.2-4v"))
    assert not outcome.changed
    named(scene, lambda _: scene.td.tdr)
    # The TDR named as a vCPU is locked: that is found first.
    assert scene.attempt().status == code_of("2.2-3", "RCX")


# --- locks ---------------------------------------------------------------------------------------

FOOTPRINT = {
    # leaf: TDR (or TDVPR), OP_STATE, MIG, MIGSC link number or None, SEPT tree
    Leaf.MIG_STREAM_CREATE: (S, X, X, None, None),
    Leaf.EXPORT_STATE_IMMUTABLE: (S, X, X, 1, None),
    Leaf.EXPORT_BLOCKW: (S, S, None, None, S),
    Leaf.EXPORT_RESTORE: (S, S, None, None, S),
    Leaf.EXPORT_UNBLOCKW: (S, S, None, None, S),
    Leaf.EXPORT_MEM: (S, S, S, 1, S),
    Leaf.EXPORT_TRACK: (S, X, X, 1, None),
    Leaf.EXPORT_PAUSE: (X, None, None, None, None),
    Leaf.EXPORT_STATE_TD: (S, X, None, 1, None),
    Leaf.EXPORT_STATE_VP: (X, S, None, 2, None),
    Leaf.EXPORT_ABORT: (S, X, X, None, None),
    Leaf.IMPORT_STATE_IMMUTABLE: (X, None, None, 1, None),
    Leaf.IMPORT_MEM: (S, S, S, 1, S),
    Leaf.IMPORT_TRACK: (X, None, None, 1, None),
    Leaf.IMPORT_STATE_TD: (X, None, None, 1, None),
    Leaf.IMPORT_STATE_VP: (X, S, None, 2, None),
    Leaf.IMPORT_COMMIT: (X, None, None, None, None),
    Leaf.IMPORT_END: (X, None, None, None, None),
    Leaf.IMPORT_ABORT: (X, None, None, 0, None),
    Leaf.MEM_TRACK: (S, S, None, None, None),
    Leaf.VP_ENTER: (S, S, None, None, None),
}
"""The published lock footprint; the first column is the page that RCX or RDX names."""
LOCKS = ("PAGE", "OP_STATE", "MIG", "MIGSC", "SEPT_TREE")
LOCK_FIELDS = {"OP_STATE": "op_state_lock", "MIG": "mig_lock", "SEPT_TREE": "sept_lock"}


def hold(scene, lock, mode, link):
    """Another logical processor holds a lock in this mode."""
    if lock == "PAGE":
        return scene.memory.try_lock(page_of_td(scene), mode)
    if lock == "MIGSC":
        return scene.tdcs.links[link if link is not None else 1].lock.acquire(mode)
    return getattr(scene.tdcs, LOCK_FIELDS[lock]).acquire(mode)


def test_the_footprint_is_that_of_every_migration_leaf():
    assert set(FOOTPRINT) == set(SCENES)


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("mode", [S, X], ids=["shared", "exclusive"])
def test_a_lock_that_is_held(leaf, lock, mode):
    """BUSY with the operand of the lock if the modes conflict, and no word about it otherwise."""
    footprint = dict(zip(LOCKS, FOOTPRINT[leaf], strict=True))
    needed = footprint[lock]
    if lock == "MIGSC" and needed is not None:
        link, needed = needed, X
    else:
        link = None
    scene = SCENES[leaf]()
    assert hold(scene, lock, mode, link)
    if needed is None or (needed is S and mode is S):
        assert not scene.status() >> 63
    else:
        outcome = scene.attempt()
        operand = td_operand(leaf) if lock == "PAGE" else lock
        assert hex(outcome.status) == hex(CODES["TDX_OPERAND_BUSY"] | OPERANDS[operand])
        assert not outcome.changed
        assert not outcome.written


# --- MEM.TRACK and VP.ENTER ----------------------------------------------------------------------


def running_before(scene):
    """A vCPU that is still in the epoch before the present one."""
    scene.tdcs.refcount[1 - (scene.tdcs.td_epoch & 1)] = 1


OTHER = [
    Case("10.20-2", legal.mem_track, held("epoch_lock", S)),
    Case("10.20-3", legal.mem_track, Spoil(frozenset({"refcount"}), running_before)),
    Case(
        "10.21-1",
        legal.vp_enter,
        Spoil(frozenset({"state"}), lambda s: setattr(s.vcpu, "state", VcpuState.IMPORT)),
    ),
    Case(
        "10.21-2",
        legal.vp_enter,
        Spoil(frozenset({"lp"}), lambda s: setattr(s.vcpu, "assoc_lp", 3)),
    ),
]


@pytest.mark.parametrize("case", OTHER, ids=lambda case: case.id)
def test_check(case):
    judge(case)


@pytest.mark.parametrize("earlier", [0, 2])
def test_the_earlier_check_decides(earlier):
    first, second = OTHER[earlier : earlier + 2]
    scene = first.scene()
    second.spoil.apply(scene)
    first.spoil.apply(scene)
    assert scene.attempt().status == first.code


# --- coverage ------------------------------------------------------------------------------------

NOT_PROVOKED = {
    "10.4-2c": "with level 0 the bits that would misalign the GPA are the reserved ones",
    "10.5-e6f": "every state that step 5 lets pass is allowed in a paused export",
}


def provoked_rows():
    tables = (
        export_tests.CASES,
        export_mem_tests.CASES,
        import_tests.CASES,
        import_mem_tests.CASES,
        rest_tests.CASES,
        OTHER,
    )
    rows = {case.row for cases in tables for case in cases}
    rows |= {f"10.13-{one.row}" for one in import_mem_tests.ENTRIES} | {"10.13-i"}
    rows |= {row for row, _, _ in PROLOGUE} | {"2.1-1", "2.1-2", "2.1-3a", "2.1-3b", "2.2-4v"}
    rows |= {"10.7-h", "10.11-h"}  # a halt is no status: test_soft_effects.py
    return rows


def test_every_row_is_provoked_or_says_why_not():
    assert provoked_rows() | set(NOT_PROVOKED) == set(ROWS)
    assert not provoked_rows() & set(NOT_PROVOKED)


def test_the_rows_use_published_codes_and_operands():
    migration_codes = {row["name"] for row in table("errors.csv")}
    known = {row["operand"] for row in table("operand_ids.csv")} | {"", "*"}
    for row in ROWS.values():
        if row["status"]:
            assert row["status"] in CODES
            assert row["operand"] in known
            unlisted = {"TDX_MAX_MIGS_NUM_EXCEEDED", "TDX_TSC_ROLLBACK"}
            assert row["status"] in migration_codes | unlisted


def test_every_code_that_a_migration_leaf_can_return_is_in_a_row_or_elsewhere():
    """Of the codes that the published migration leaves use, those that no row has."""
    used = {row["status"] for row in ROWS.values()}
    rest = {row["name"] for row in table("errors.csv")} - used
    leaves = {name for name in rest if not name.startswith(("TDX_METADATA", "TDX_SERVTD"))}
    assert leaves == {
        "TDX_CROSS_TD_TRAP",
        "TDX_OPERAND_BUSY_HOST_PRIORITY",
        "TDX_REQUIRED_METADATA_FIELD_MISSING",
        "TDX_TARGET_UUID_MISMATCH",
        "TDX_TARGET_UUID_UPDATED",
        "TDX_TD_VMCS_FIELD_NOT_INITIALIZED",
    }
