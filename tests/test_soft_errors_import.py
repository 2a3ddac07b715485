"""Every check of the destination's leaves but IMPORT.MEM: status, operand, order, what changes.

Profile "tdx-1.5.01"; expected statuses are those of specs/error_rows.csv.  Every MBMD carries the
right MAC unless the row is about the MAC, so what is refused is the field.
"""

import legal_calls as legal
import pytest
from error_rows import Case, cases_of, judge, orders_of, run, run_both
from soft_scene import (
    NOWHERE,
    PAGE,
    RESUME,
    Spoil,
    bit,
    field,
    interrupted,
    link_held,
    list_entry,
    mbmd,
    mbmd_raw,
    no_entropy,
    not_interrupted,
    other_leaf,
    reg,
    spoil,
    uninitialized,
    wrong_mac,
)

from tdxmig_model.backend.soft.fields import ROWS
from tdxmig_model.backend.soft.leaves_export_state import immutable_pages
from tdxmig_model.backend.soft.metadata import build_lists
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.servtd import bindings_table
from tdxmig_model.backend.soft.state import VcpuState
from tdxmig_model.wire.constants import START_EPOCH
from tdxmig_model.wire.mbmd import BundleType

AS_IT_IS = spoil()(lambda scene: None)
SMALL_MBMD = reg("r8", lambda old: old & (1 << 52) - 1 | 47 << 52)
MBMD_ALIGNMENT = reg("r8", lambda old: old | 64)
MBMD_NOWHERE = reg("r8", lambda old: old & 0xFFF << 52 | NOWHERE)
STREAM_1, STREAM_2 = "tdcs.links[1]", "tdcs.links[2]"
LOW, HIGH = bit("r9", 0), bit("r9", 54)


def pages_in_list(count):
    """last_entry of the page list, for `count` pages."""
    return reg("r9", lambda old: old & (1 << 55) - 1 | count - 1 << 55)


def list_hpa(hpa):
    return reg("r9", lambda old: old & ~0xF_FFFF_FFFF_F000 | hpa)


def fields_of_the_mbmd(row, scene, changed, *more):
    """The MBMD fields that every bundle shares, each wrong alone."""
    spoils = [
        (mbmd(mig_version=1), "version"),
        (mbmd_raw(0, b"\x31"), "size"),
        (mbmd_raw(4, b"\5"), "stream"),
        (mbmd_raw(6, b"\x11"), "unknown type"),
        (mbmd_raw(7, b"\1"), "reserved"),
        *more,
    ]
    return [Case(row, scene, what, changed, label=label) for what, label in spoils]


def broken_list(page):
    """A metadata page without sequences, under the right MAC."""

    def edit(pages):
        pages[page][2:4] = bytes(2)

    return Spoil(frozenset({"pages"}), lambda scene: scene.change_pages(edit))


# --- TDH.IMPORT.STATE.IMMUTABLE ------------------------------------------------------------------

SESSION_START = {
    "tdcs.mig_enc_key",
    "tdcs.mig_enc_working_key",
    "tdcs.mig_dec_working_key",
    "tdcs.mig_dec_key_set",
    "tdcs.mig_dec_key_words",
    f"{STREAM_1}.initialized",
    f"{STREAM_1}.migsc.cipher.key",
    f"{STREAM_1}.migsc.cipher.suffix",
}
"""Check 8: the session key is used up; epoch, counters and streams of a new TD are 0 already."""
OPENED = SESSION_START | {
    f"{STREAM_1}.migsc.iv_counter",
    f"{STREAM_1}.migsc.expected_mb_counter",
}
"""The MBMD was accepted."""
APPLIED = {
    "tdcs.fields*",
    "tdcs.num_vcpus",
    "tdcs.export_count",
    "tdcs.pre_import_uuid",
    "tdr.uuid",
}
"""Every page was applied, before the tag was known."""
BEGUN = {f"{STREAM_1}.migsc.interrupted*"}


@spoil("links")
def one_stream(scene):
    """Injected: the backward stream alone."""
    del scene.tdcs.links[1:]


@spoil("pages")
def with_l2_vms(scene):
    """A bundle of a TD with an L2 VM; its own module refuses to make one, so it is forged.

    The destination has the TDCS pages for one, or it would be refused for that.
    """
    for page in scene.host.take_private_pages(3):
        scene.host.require(Leaf.MNG_ADDCX, rcx=page, rdx=scene.td.tdr)
    _set_word(scene, "NUM_L2_VMS", 1)


def vcpus_in_bundle(count):
    return Spoil(frozenset({"pages"}), lambda scene: _set_word(scene, "NUM_VCPUS", count))


def _set_word(scene, name, value):
    """One word of the immutable TD state, in the source's TDCS, and its bundle made again."""
    pair = scene.pair
    tdcs = pair.source._tdcs
    if name == "NUM_VCPUS":
        tdcs.num_vcpus = value
    else:
        tdcs.fields[name] = value
    made = immutable_pages(pair.source_host.module.tdrs[pair.source.td.tdr], tdcs)

    def edit(pages):
        pages[:] = [bytearray(page) for page in made]

    scene.change_pages(edit)


NEW, AGAIN = legal.import_immutable, legal.import_immutable_resume
IMMUTABLE = [
    Case("10.12-3", NEW, one_stream, apart={"10.12-5"}),
    Case("10.12-4", NEW, bit("r10", 0), label="index", apart={"10.12-5"}),
    Case("10.12-4", NEW, bit("r10", 16), label="16"),
    Case("10.12-4", NEW, bit("r10", 62), label="62"),
    Case("10.12-5", NEW, link_held(1)),
    Case("10.12-6", NEW, field("mig_dec_key_set", False)),
    # The working key is written before the fresh one fails; that is harmless, as a retry shows.
    Case("10.12-7", NEW, no_entropy, {"tdcs.mig_enc_working_key"}),
    Case("10.12-9a", NEW, SMALL_MBMD, SESSION_START),
    Case("10.12-9b", NEW, MBMD_ALIGNMENT, SESSION_START, label="misaligned"),
    Case("10.12-9b", NEW, MBMD_NOWHERE, SESSION_START, label="beyond memory"),
    *fields_of_the_mbmd(
        "10.12-10",
        NEW,
        SESSION_START,
        (mbmd(bundle_type=BundleType.MUTABLE_TD_STATE, type_specific=bytes(8)), "type"),
        (mbmd(mb_counter=1), "counter"),
        (mbmd(mig_epoch=1), "epoch"),
        (mbmd_raw(26, b"\1"), "reserved of the type"),
        (mbmd_raw(29, b"\1"), "reserved of the type, end"),
        (mbmd_raw(28, b"\0"), "no SYS page"),
    ),
    Case("10.12-11", NEW, mbmd_raw(24, b"\3"), SESSION_START),
    Case("10.12-12a", NEW, pages_in_list(1), OPENED),
    Case("10.12-12b", NEW, LOW, OPENED, label="low"),
    Case("10.12-12b", NEW, HIGH, OPENED, label="high"),
    Case("10.12-12c", NEW, list_hpa(NOWHERE), OPENED),
    Case("10.12-P1", NEW, list_entry(0, NOWHERE), OPENED, label="first"),
    Case("10.12-P1", NEW, list_entry(1, NOWHERE), OPENED, label="second"),
    Case("10.12-P2", NEW, interrupted, OPENED | BEGUN),
    Case("10.12-E1", NEW, wrong_mac, OPENED | APPLIED),
    Case("10.12-E2", NEW, broken_list(0), OPENED | APPLIED, label="SYS page"),
    Case("10.12-E2", NEW, broken_list(1), OPENED, label="TD page"),
    Case("10.12-E3", NEW, with_l2_vms, OPENED | APPLIED),
    Case("10.12-E4", NEW, vcpus_in_bundle(0), OPENED | APPLIED - {"tdcs.num_vcpus"}, label="none"),
    Case("10.12-E4", NEW, vcpus_in_bundle(2), OPENED | APPLIED, label="too many"),
    Case("10.12-R1", AGAIN, uninitialized()),
    Case("10.12-R2", AGAIN, not_interrupted, apart={"10.12-R3"}),
    Case("10.12-R3", AGAIN, other_leaf(Leaf.IMPORT_STATE_TD), BEGUN),
    Case("10.12-R4", AGAIN, pages_in_list(3), BEGUN),
    Case("10.12-P1", AGAIN, list_entry(1, NOWHERE), BEGUN, label="resumed"),
]

# --- TDH.IMPORT.TRACK and ABORT ------------------------------------------------------------------

TRACK = [
    Case("10.14-2", legal.import_track, bit("r10", 0), label="0"),
    Case("10.14-2", legal.import_track, bit("r10", 63), label="63"),
    Case("10.14-3a", legal.import_track, SMALL_MBMD),
    Case("10.14-3b", legal.import_track, MBMD_ALIGNMENT, label="misaligned"),
    Case("10.14-3b", legal.import_track, MBMD_NOWHERE, label="beyond memory"),
    Case("10.14-4", legal.import_track, link_held(1)),
    Case("10.14-5", legal.import_track, uninitialized(1)),
    *fields_of_the_mbmd(
        "10.14-6",
        legal.import_track,
        set(),
        (mbmd(bundle_type=BundleType.ABORT_TOKEN, type_specific=bytes(8)), "type"),
        (mbmd(mb_counter=1), "counter"),
        (mbmd(mig_epoch=0), "epoch of now"),
        (mbmd_raw(24, b"\3"), "one bundle too many"),
        (mbmd_raw(24, b"\1"), "one bundle too few"),
    ),
    Case("10.14-7", legal.import_track, wrong_mac),
    Case("10.14-7", legal.import_start_track, wrong_mac, label="start token"),
    Case("10.14-8", legal.import_start_track, field("num_migrated_vcpus", 0)),
    Case("10.14-8", legal.import_start_track, field("num_migrated_vcpus", 2), label="more"),
    Case(
        "10.14-8",
        legal.import_track,
        mbmd(mig_epoch=START_EPOCH),
        label="in MEMORY_IMPORT",
    ),
]

ABORT = [
    Case("10.19-2", legal.import_abort, bit("r10", 0), label="0"),
    Case("10.19-2", legal.import_abort, bit("r10", 63), label="63"),
    Case("10.19-3a", legal.import_abort, SMALL_MBMD),
    Case("10.19-3b", legal.import_abort, MBMD_ALIGNMENT, label="misaligned"),
    Case("10.19-3b", legal.import_abort, MBMD_NOWHERE, label="beyond memory"),
    Case("10.19-4", legal.import_abort, link_held(0)),
]

# --- TDH.IMPORT.STATE.TD -------------------------------------------------------------------------

TD_OPENED = {f"{STREAM_1}.migsc.iv_counter", f"{STREAM_1}.migsc.expected_mb_counter"}


@spoil("interrupted")
def another_interrupted(scene):
    """By a leaf: IMPORT.MEM of this stream is interrupted, and STATE.TD resumed."""
    memory = legal.import_memory_scene(scene.pair, scene.forger.memory([0, 0]))
    registers = {**memory.registers}
    scene.host.seamcall(Leaf.IMPORT_MEM, interrupt=lambda: True, **registers)
    assert scene.link.migsc.interrupted is not None


def td_long():
    """Mutable TD state on several pages, as no published module sends it, so it is forged."""
    scene = legal.import_td()
    tdcs = scene.pair.source._tdcs
    names = {row.name for row in ROWS["td"]}
    values = {name: value for name, value in tdcs.fields.items() if name in names}
    values.update(IMPORT_COUNT=0, SERVTD_BINDINGS_TABLE=bindings_table(tdcs.binding))
    pages = build_lists("td", values, list_size=256)
    scene.load(scene.forger.state(scene.bundle.mbmd, pages))
    scene.registers["r9"] = scene.buffers.page_list(len(pages))
    return scene


def td_long_again():
    return legal.resumed(td_long())


def td_again():
    """RESUME of a STATE.TD that was not interrupted: refused for that reason."""
    scene = legal.import_td()
    scene.registers["r10"] = RESUME
    return scene


FIRST_FIELD = {"tdcs.fields[HP_LOCK_TIMEOUT]"}
TD = [
    Case("10.15-2", legal.import_td, bit("r10", 0), label="index", apart={"10.15-3", "10.15-4"}),
    Case("10.15-2", legal.import_td, bit("r10", 16), label="16"),
    Case("10.15-2", legal.import_td, bit("r10", 62), label="62"),
    Case("10.15-3", legal.import_td, link_held(1)),
    Case("10.15-4", legal.import_td, uninitialized(1)),
    Case("10.15-N1a", legal.import_td, SMALL_MBMD),
    Case("10.15-N1b", legal.import_td, MBMD_ALIGNMENT, label="misaligned"),
    Case("10.15-N1b", legal.import_td, MBMD_NOWHERE, label="beyond memory"),
    *fields_of_the_mbmd(
        "10.15-N2",
        legal.import_td,
        set(),
        (mbmd(bundle_type=BundleType.MUTABLE_VCPU_STATE), "type"),
        (mbmd(mb_counter=0), "older counter"),
        (mbmd(mb_counter=2), "newer counter"),
        (mbmd(mig_epoch=1), "epoch"),
        (mbmd_raw(24, b"\1"), "reserved of the type"),
    ),
    Case("10.15-4", td_again, uninitialized(1), label="RESUME"),
    Case("10.15-R1", td_again, AS_IT_IS, apart={"10.15-R2"}),
    Case("10.15-R2", td_again, another_interrupted, BEGUN, label="other leaf"),
    Case("10.15-R2", td_long_again, pages_in_list(9), BEGUN, label="other page list"),
    Case("10.15-P1", legal.import_td, LOW, TD_OPENED, label="low"),
    Case("10.15-P1", legal.import_td, HIGH, TD_OPENED, label="high"),
    Case("10.15-P2", legal.import_td, list_hpa(NOWHERE), TD_OPENED),
    Case("10.15-P3", legal.import_td, list_entry(0, NOWHERE), TD_OPENED),
    Case(
        "10.15-E1",
        legal.import_td,
        wrong_mac,
        TD_OPENED | FIRST_FIELD,
    ),
    Case("10.15-E2", legal.import_td, broken_list(0), TD_OPENED),
    Case("10.15-P4", td_long, interrupted, TD_OPENED | BEGUN | FIRST_FIELD),
]

# --- TDH.IMPORT.STATE.VP -------------------------------------------------------------------------

FIRST_USE = {
    f"{STREAM_2}.initialized",
    f"{STREAM_2}.migsc.cipher.key",
    f"{STREAM_2}.migsc.cipher.suffix",
}
VP_OPENED = FIRST_USE | {
    f"{STREAM_2}.migsc.iv_counter",
    f"{STREAM_2}.migsc.expected_mb_counter",
    "tdcs.num_assoc_vcpus",
    "vcpu.assoc_lp",
    "vcpu.registers[VCPU_XFAM]",
}
VP_BEGUN = {f"{STREAM_2}.migsc.interrupted*"}
VP_APPLIED = {"vcpu.registers[RBX]"}
VP_COUNTED = {"tdcs.num_migrated_vcpus"}


def vcpu_field(name, value):
    """Injected: a field of the TDVPS."""
    return Spoil(frozenset({name}), lambda scene: setattr(scene.vcpu, name, value))


@spoil("rcx")
def other_vcpu(scene):
    scene.registers["rcx"] = scene.td.vcpus[1]


@spoil("page 3")
def padding_changed(scene):
    """One bit behind the list of the last page; its content parses as before."""
    scene.memory.bytes[scene.buffers.buffers + 4 * PAGE - 1] ^= 1


VP, VP_AGAIN = legal.import_vp, legal.import_vp_resume
VCPU = [
    Case("10.16-4", VP, vcpu_field("pages", 5)),
    Case("10.16-5", VP, reg("r10", 2), label="index", apart={"10.16-6"}),
    Case("10.16-5", VP, bit("r10", 16), label="16"),
    Case("10.16-5", VP, bit("r10", 62), label="62"),
    Case("10.16-6", VP, link_held(2)),
    Case("10.16-N1", VP, vcpu_field("state", VcpuState.READY), FIRST_USE),
    Case("10.16-N2a", VP, SMALL_MBMD, FIRST_USE),
    Case("10.16-N2b", VP, MBMD_ALIGNMENT, FIRST_USE, label="misaligned"),
    Case("10.16-N2b", VP, MBMD_NOWHERE, FIRST_USE, label="beyond memory"),
    *fields_of_the_mbmd(
        "10.16-N3",
        VP,
        FIRST_USE,
        (mbmd(bundle_type=BundleType.MUTABLE_TD_STATE, type_specific=bytes(8)), "type"),
        (mbmd(mb_counter=1), "counter"),
        (mbmd(mig_epoch=1), "epoch"),
        (mbmd(migs_index=0), "another stream"),
        (mbmd_raw(26, b"\1"), "reserved of the type"),
    ),
    Case("10.16-P1", VP, pages_in_list(3), VP_OPENED),
    Case("10.16-P2", VP, LOW, VP_OPENED, label="low"),
    Case("10.16-P2", VP, HIGH, VP_OPENED, label="high"),
    Case("10.16-P3", VP, list_hpa(NOWHERE), VP_OPENED),
    Case("10.16-P4", VP, list_entry(0, NOWHERE), VP_OPENED),
    Case("10.16-P5", VP, interrupted, VP_OPENED | VP_BEGUN | VP_APPLIED | {"vcpu.state"}),
    Case("10.16-E1", VP, wrong_mac, VP_OPENED | VP_APPLIED),
    Case("10.16-E2", VP, broken_list(1), VP_OPENED | VP_APPLIED),
    Case("10.16-E3", VP, field("num_migrated_vcpus", 2), VP_OPENED | VP_APPLIED | VP_COUNTED),
    Case("10.16-5", VP_AGAIN, bit("r10", 16), label="RESUME"),
    Case("10.16-R1", VP_AGAIN, not_interrupted, apart={"10.16-R2"}),
    Case("10.16-R2", VP_AGAIN, other_leaf(Leaf.IMPORT_MEM), VP_BEGUN),
    Case("10.16-R3", VP_AGAIN, pages_in_list(5), VP_BEGUN),
    Case("10.16-R4", VP_AGAIN, other_vcpu, VP_BEGUN),
    Case("10.16-R5", VP_AGAIN, vcpu_field("state", VcpuState.UNINITIALIZED), VP_BEGUN),
    Case("10.16-R6", VP_AGAIN, vcpu_field("assoc_lp", 2), VP_BEGUN),
    Case("10.16-P4", VP_AGAIN, list_entry(1, NOWHERE), VP_BEGUN, label="resumed"),
    Case("10.16-E1", VP_AGAIN, padding_changed, VP_BEGUN, label="a later page"),
]

CASES = [*IMMUTABLE, *TRACK, *ABORT, *TD, *VCPU]


@pytest.mark.parametrize("case", cases_of(CASES))
def test_check(case):
    judge(case)


@pytest.mark.parametrize(("earlier", "later"), orders_of(CASES))
def test_the_earlier_check_decides(earlier, later):
    run_both(earlier, later)


def test_after_no_entropy_the_same_call_succeeds():
    case = next(case for case in IMMUTABLE if case.row == "10.12-7")
    scene, _ = run(case)
    scene.module.random = lambda length: bytes(range(length))
    assert scene.attempt().status == 0
    assert scene.tdcs.op_state is OpState.MEMORY_IMPORT


def test_a_parse_error_says_where_in_rcx_and_rdx():
    case = next(case for case in IMMUTABLE if case.id == "10.12-E2 TD page")
    _, outcome = run(case)
    assert (outcome.registers.rcx, outcome.registers.rdx) == (0, 0)


def test_the_mbmd_is_fetched_once():
    """What the VMM does to it after an interruption changes nothing."""
    scene = VP_AGAIN()
    wrong_mac.apply(scene)
    assert scene.attempt().status == 0


def test_imported_vcpu_in_the_middle_cannot_be_entered():
    case = next(case for case in VCPU if case.row == "10.16-P5")
    scene, _ = run(case)
    assert scene.vcpu.state is VcpuState.IMPORT
