"""Every check of the source's leaves but EXPORT.MEM: status, operand, order, and what changes.

Profile "tdx-1.5.01"; expected statuses are those of specs/error_rows.csv.
"""

import legal_calls as legal
import pytest
from error_rows import Case, cases_of, judge, orders_of, run, run_both
from soft_scene import (
    NOWHERE,
    RESUME,
    SHARED,
    Spoil,
    bit,
    entry,
    field,
    held,
    interrupted,
    link_held,
    list_entry,
    mbmd,
    mbmd_raw,
    no_entropy,
    not_interrupted,
    other_leaf,
    owned_page,
    page_held,
    reg,
    spoil,
    uninitialized,
    wrong_mac,
)

from tdxmig_model.backend.soft.locks import Mode
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.backend.soft.state import Interrupted, MigscLink, VcpuState
from tdxmig_model.wire.gpa_list import GpaStatus
from tdxmig_model.wire.mbmd import BundleType

AS_IT_IS = spoil()(lambda scene: None)
SMALL_MBMD = reg("r8", lambda old: old & (1 << 52) - 1 | 47 << 52)
MBMD_ALIGNMENT = reg("r8", lambda old: old | 64)
MBMD_NOWHERE = reg("r8", lambda old: old & 0xFFF << 52 | NOWHERE)
STREAM_1 = "tdcs.links[1]"
BEGUN = {f"{STREAM_1}.migsc.interrupted*"}


def pages_in_list(count):
    """last_entry of the page list, for `count` pages."""
    return reg("r9", lambda old: old & (1 << 55) - 1 | count - 1 << 55)


def list_hpa(hpa):
    return reg("r9", lambda old: old & ~0xF_FFFF_FFFF_F000 | hpa)


# --- TDH.MIG.STREAM.CREATE -----------------------------------------------------------------------


@spoil("links")
def all_streams(scene):
    """Injected: 512 links; creating them by 510 calls gives the same list."""
    first = scene.tdcs.links[0]
    scene.tdcs.links.extend(MigscLink(first.migsc) for _ in range(512 - len(scene.tdcs.links)))


STREAM_CREATE = [
    Case("10.1-2", legal.stream_create, held("mig_lock", Mode.SHARED)),
    Case("10.1-3", legal.stream_create, all_streams),
    Case("10.1-4a", legal.stream_create, bit("rcx", 3), label="misaligned"),
    Case("10.1-4a", legal.stream_create, bit("rcx", 46), label="HKID"),
    Case("10.1-4a", legal.stream_create, bit("rcx", 52), label="beyond MAX_PA"),
    Case("10.1-4b", legal.stream_create, reg("rcx", SHARED), label="of the VMM"),
    Case("10.1-4b", legal.stream_create, reg("rcx", 1 << 45), label="beyond the TDMR"),
    Case(
        "10.1-4c",
        legal.stream_create,
        page_held(lambda scene: scene.registers["rcx"], Mode.SHARED),
    ),
    Case(
        "10.1-4d",
        legal.stream_create,
        spoil("rcx")(lambda scene: scene.registers.update(rcx=owned_page(scene))),
    ),
]

# --- TDH.EXPORT.STATE.IMMUTABLE ------------------------------------------------------------------

SESSION_START = {
    "tdcs.mig_enc_key",
    "tdcs.mig_enc_working_key",
    "tdcs.mig_dec_working_key",
    "tdcs.mig_dec_key_set",
    "tdcs.mig_dec_key_words",
    "tdcs.mig_epoch",
    "tdcs.total_mb_count",
    "tdcs.dirty_count",
    f"{STREAM_1}.initialized",
    f"{STREAM_1}.migsc.iv_counter",
    f"{STREAM_1}.migsc.next_mb_counter",
    f"{STREAM_1}.migsc.cipher.key",
}
"""Check 12: the session key is used up and the counters are those of a new session."""


@spoil("attributes")
def not_migratable(scene):
    """Injected: ATTRIBUTES without MIGRATABLE."""
    scene.tdcs.fields["ATTRIBUTES"] = 0


@spoil("links")
def one_stream(scene):
    """Injected: the backward stream alone."""
    del scene.tdcs.links[1:]


NEW, AGAIN = legal.immutable, legal.immutable_resume
IMMUTABLE = [
    Case("10.2-2", NEW, held("mig_lock", Mode.SHARED)),
    Case("10.2-3", NEW, not_migratable),
    Case("10.2-4", NEW, field("mig_count", 1)),
    Case("10.2-5", NEW, one_stream, apart={"10.2-8"}),
    Case("10.2-6a", NEW, SMALL_MBMD),
    Case("10.2-6b", NEW, MBMD_ALIGNMENT, label="misaligned"),
    Case("10.2-6b", NEW, MBMD_NOWHERE, label="beyond memory"),
    Case("10.2-7a", NEW, bit("r10", 0), apart={"10.2-8"}),
    Case("10.2-7b", NEW, bit("r10", 16), label="16"),
    Case("10.2-7b", NEW, bit("r10", 62), label="62"),
    Case("10.2-8", NEW, link_held(1)),
    Case("10.2-9a", NEW, pages_in_list(2)),
    Case("10.2-9b", NEW, bit("r9", 0), label="low"),
    Case("10.2-9b", NEW, bit("r9", 52), label="high"),
    Case("10.2-9c", NEW, list_hpa(NOWHERE)),
    Case("10.2-10", NEW, field("mig_dec_key_set", False)),
    # The working key is written before the fresh one fails; that is harmless, as a retry shows.
    Case("10.2-11", NEW, no_entropy, {"tdcs.mig_enc_working_key"}),
    Case("10.2-13", NEW, field("export_count", 0x7FFF_FFFF), SESSION_START),
    Case(
        "10.2-P1",
        NEW,
        list_entry(0, NOWHERE),
        {*SESSION_START, "tdcs.export_count"},
        label="first",
    ),
    Case(
        "10.2-P1",
        NEW,
        list_entry(1, NOWHERE),
        {*SESSION_START, "tdcs.export_count"},
        written={"pages"},
        label="second",
    ),
    Case(
        "10.2-P3",
        NEW,
        interrupted,
        {*SESSION_START, *BEGUN, "tdcs.export_count"},
        written={"pages"},
    ),
    Case("10.2-2", AGAIN, held("mig_lock", Mode.SHARED), label="RESUME"),
    Case("10.2-R1", AGAIN, uninitialized()),
    Case("10.2-R2", AGAIN, not_interrupted, apart={"10.2-R3"}),
    Case("10.2-R3", AGAIN, other_leaf(Leaf.EXPORT_STATE_TD), BEGUN),
    Case("10.2-R4", AGAIN, pages_in_list(4), BEGUN),
    Case("10.2-P1", AGAIN, list_entry(1, NOWHERE), BEGUN, label="resumed"),
]

# --- TDH.EXPORT.BLOCKW and RESTORE ---------------------------------------------------------------

LIST_SPOILS = [
    ("3", bit("rcx", 0), ""),
    ("4a", bit("rcx", 52), ""),
    ("4b", bit("rcx", 11), ""),
    ("4c", reg("rcx", lambda old: old & ~0xF_FFFF_FFFF_F000 | NOWHERE), ""),
]
OTHER_PAGES = {"sept[0x0]", "sept[0x2000]", "sept[0x3000]"}
ENTRY = 1
"""The list entry that is spoiled; the one before it is done already."""


def list_leaf(section, scene, counter, wrong_state):
    """The rows that BLOCKW and RESTORE share; `counter` is what a page changes elsewhere."""
    done = {"sept[0x0]", counter}
    rest = {*OTHER_PAGES, counter}

    def row(name, what, changed=frozenset(), written=frozenset(), label="", apart=frozenset()):
        apart = {f"{section}-{other}" for other in apart}
        return Case(f"{section}-{name}", scene, what, changed, written, label, apart)

    return [
        row("2", held("sept_lock")),
        *(row(name, what, label=label) for name, what, label in LIST_SPOILS),
        row("e1", entry(ENTRY, 1 << 54), done, {"gpas"}, "NOP"),
        row("e1", entry(ENTRY, 2 << 52 | 1), done, {"gpas"}, "CANCEL"),
        row("e2", entry(ENTRY, 0), rest, {"gpas"}, "NOP"),
        row("e2", entry(ENTRY, lambda old: old ^ 3 << 52), rest, {"gpas"}, "CANCEL"),
        row("e3", entry(ENTRY, lambda old: old | 1 << 61), done, {"gpas"}, "reserved"),
        row("e3", entry(ENTRY, lambda old: old | 2), done, {"gpas"}, "level"),
        row("e3", entry(ENTRY, lambda old: old | 1 << 47), done, {"gpas"}, "shared"),
        row("e4", entry(ENTRY, lambda old: old | 1 << 40), rest, {"gpas"}),
        row("e5", spoil("lock 1")(lambda scene: scene.lock_entry(0x1000)), rest, {"gpas"}),
        row("e6", wrong_state, rest, {"gpas"}),
        row("e7", interrupted, done),
    ]


@spoil("state 1")
def page_blocked(scene):
    """By a leaf where it is allowed, so that the page is BLOCKED."""
    scene.host.require(Leaf.MEM_RANGE_BLOCK, rcx=0x1000, rdx=scene.td.tdr)


@spoil("state 1")
def page_not_exported(scene):
    """By a leaf: the page is restored already."""
    page = scene.pair.gpas[1:2]
    rcx, buffers = scene.registers["rcx"], scene.buffers
    saved = scene.memory.page_words(buffers.gpas).copy()
    scene.host.require(scene.leaf, rcx=legal.gpa_list(scene.pair, page), rdx=scene.td.tdr)
    scene.memory.page_words(buffers.gpas)[:] = saved
    scene.registers["rcx"] = rcx


BLOCKW = list_leaf("10.3", legal.blockw, "tdcs.bw_epoch", page_blocked)
RESTORE = list_leaf("10.11", legal.restore, "tdcs.mig_count", page_not_exported)

# --- TDH.EXPORT.UNBLOCKW -------------------------------------------------------------------------


def no_table(_scene):
    """A free entry, at the level where the walk ends."""
    return {"rcx": 1 << 63, "rdx": 3}


def the_entry(scene):
    """A mapped page, published state 4, level 0."""
    return {"rcx": scene.memory.words[scene.slot(0)], "rdx": 4 << 8}


UNBLOCKW = [
    Case("10.4-2a", legal.unblockw, bit("rcx", 3), label="low"),
    Case("10.4-2a", legal.unblockw, bit("rcx", 52), label="high"),
    Case("10.4-2b", legal.unblockw, bit("rcx", 0)),
    Case("10.4-3a", legal.unblockw, bit("rcx", 47)),
    Case("10.4-3b", legal.unblockw, held("sept_lock")),
    Case("10.4-3c", legal.unblockw, bit("rcx", 40), outputs=no_table),
    Case("10.4-4", legal.unblockw, spoil("lock 0")(lambda scene: scene.lock_entry(0))),
    Case(
        "10.4-5",
        legal.unblockw,
        spoil("state 0")(lambda scene: scene.inject_state(0, SeptState.MAPPED)),
        outputs=the_entry,
    ),
]

# --- TDH.EXPORT.TRACK, PAUSE and ABORT -----------------------------------------------------------

TRACK = [
    Case("10.6-2", legal.track, held("mig_lock", Mode.SHARED)),
    Case("10.6-3", legal.track, bit("r10", 0), label="index", apart={"10.6-5", "10.6-6"}),
    Case("10.6-3", legal.track, bit("r10", 16), label="16"),
    Case("10.6-3", legal.track, bit("r10", 62), label="62"),
    Case("10.6-4a", legal.track, SMALL_MBMD),
    Case("10.6-4b", legal.track, MBMD_ALIGNMENT, label="misaligned"),
    Case("10.6-4b", legal.track, MBMD_NOWHERE, label="beyond memory"),
    Case("10.6-5", legal.track, link_held(1)),
    Case("10.6-6", legal.track, uninitialized(1)),
    Case("10.6-7a", legal.track, field("mig_epoch", 0xFFFF_FFFE)),
    Case("10.6-6", legal.start_track, uninitialized(1), label="start token"),
    Case("10.6-7b2", legal.start_track, field("dirty_count", 1)),
    # The same call in another OP_STATE, which is what is wrong with it.
    Case("10.6-7b1", legal.live_start_track, AS_IT_IS),
    Case("10.6-6", legal.live_start_track, uninitialized(1), label="start token, live"),
]

ABORT = [
    Case("10.10-2", legal.abort_live, held("mig_lock", Mode.SHARED)),
    Case("10.10-3", legal.abort_live, bit("r10", 0), label="0"),
    Case("10.10-3", legal.abort_live, bit("r10", 63), label="63"),
    Case("10.10-L1", legal.abort_live, bit("r8", 63)),
    Case("10.10-2", legal.abort_post, held("mig_lock", Mode.SHARED), label="POST_EXPORT"),
    Case("10.10-3", legal.abort_post, bit("r10", 5), label="POST_EXPORT"),
    Case("10.10-P1a", legal.abort_post, SMALL_MBMD),
    Case("10.10-P1a", legal.abort_post, reg("r8", 0), label="no token"),
    Case("10.10-P1b", legal.abort_post, MBMD_ALIGNMENT, label="misaligned"),
    Case("10.10-P1b", legal.abort_post, MBMD_NOWHERE, label="beyond memory"),
    Case("10.10-P2", legal.abort_post, mbmd(mig_version=1), label="version"),
    Case("10.10-P2", legal.abort_post, mbmd_raw(0, b"\x31"), label="size"),
    Case("10.10-P2", legal.abort_post, mbmd(bundle_type=BundleType.EPOCH_TOKEN), label="type"),
    Case("10.10-P2", legal.abort_post, mbmd_raw(7, b"\1"), label="reserved"),
    Case("10.10-P2", legal.abort_post, mbmd_raw(24, b"\1"), label="reserved of the type"),
    Case("10.10-P2", legal.abort_post, mbmd(migs_index=1), label="stream"),
    Case("10.10-P3", legal.abort_post, link_held(0)),
    Case(
        "10.10-P4",
        legal.abort_post,
        wrong_mac,
        {"tdcs.links[0].migsc.cipher.key", "tdcs.links[0].migsc.cipher.suffix"}
        | {"tdcs.links[0].initialized"},
    ),
]

# --- TDH.EXPORT.STATE.TD and VP ------------------------------------------------------------------

STARTED = {f"{STREAM_1}.migsc.iv_counter"}


@spoil("interrupted")
def another_interrupted(scene):
    """By a leaf: EXPORT.MEM of this stream is interrupted, and STATE.TD resumed."""
    registers = dict(scene.registers)
    operands = legal.list_registers(scene.pair, legal.gpa_list(scene.pair, scene.pair.gpas))
    scene.host.seamcall(Leaf.EXPORT_MEM, interrupt=lambda: True, **operands)
    assert scene.link.migsc.interrupted is not None
    scene.registers = registers


@spoil("interrupted")
def injected_td(scene):
    """Injected, for mutable TD state is one page and is never interrupted."""
    operands = (scene.registers["r9"] ^ 1 << 55,)
    record = Interrupted(Leaf.EXPORT_STATE_TD, operands, -1, 0)
    scene.link.migsc.interrupted = record


def td_again():
    """RESUME of a STATE.TD that was not interrupted: refused for that reason."""
    scene = legal.state_td()
    scene.registers["r10"] = RESUME
    return scene


TD = [
    Case("10.8-2", legal.state_td, bit("r10", 0), label="index", apart={"10.8-3", "10.8-4"}),
    Case("10.8-2", legal.state_td, bit("r10", 16), label="16"),
    Case("10.8-2", legal.state_td, bit("r10", 62), label="62"),
    Case("10.8-3", legal.state_td, link_held(1)),
    Case("10.8-4", legal.state_td, uninitialized(1)),
    Case("10.8-Na", legal.state_td, pages_in_list(1)),
    Case("10.8-Nb", legal.state_td, bit("r9", 0), label="low"),
    Case("10.8-Nb", legal.state_td, bit("r9", 52), label="high"),
    Case("10.8-4", td_again, uninitialized(1), label="RESUME"),
    Case("10.8-R1", td_again, AS_IT_IS),
    Case("10.8-R2", td_again, another_interrupted, BEGUN),
    Case("10.8-R3", td_again, injected_td, BEGUN),
    Case("10.8-5", legal.state_td, list_hpa(NOWHERE), STARTED),
    Case("10.8-P1", legal.state_td, list_entry(0, NOWHERE), STARTED),
    Case("10.8-E1", legal.state_td, SMALL_MBMD, STARTED, {"pages"}),
    Case("10.8-E2", legal.state_td, MBMD_ALIGNMENT, STARTED, {"pages"}, "misaligned"),
    Case("10.8-E2", legal.state_td, MBMD_NOWHERE, STARTED, {"pages"}, "beyond memory"),
]

STREAM_2 = "tdcs.links[2]"
FIRST_USE = {
    f"{STREAM_2}.initialized",
    f"{STREAM_2}.migsc.iv_counter",
    f"{STREAM_2}.migsc.cipher.key",
    f"{STREAM_2}.migsc.cipher.suffix",
}
VP_BEGUN = {f"{STREAM_2}.migsc.interrupted*"}


def vcpu_field(name, value):
    """Injected: a field of the TDVPS."""
    return Spoil(frozenset({name}), lambda scene: setattr(scene.vcpu, name, value))


@spoil("rcx")
def other_vcpu(scene):
    """The second vCPU, on its own logical processor's side."""
    scene.registers["rcx"] = scene.td.vcpus[1]
    scene.lp = scene.td.processors[1]


VP, VP_AGAIN = legal.state_vp, legal.state_vp_resume
VCPU = [
    Case("10.9-4", VP, vcpu_field("pages", 5)),
    Case("10.9-5a", VP, vcpu_field("state", VcpuState.DISABLED)),
    Case("10.9-5b", VP, vcpu_field("assoc_lp", 2)),
    Case("10.9-6", VP, vcpu_field("export_count", 1)),
    Case("10.9-7a", VP, reg("r10", 2), apart={"10.9-8"}),
    Case("10.9-7b", VP, bit("r10", 16), label="16"),
    Case("10.9-7b", VP, bit("r10", 62), label="62"),
    Case("10.9-8", VP, link_held(2)),
    Case("10.9-Na", VP, pages_in_list(4)),
    Case("10.9-Nb", VP, bit("r9", 0), label="low"),
    Case("10.9-Nb", VP, bit("r9", 54), label="high"),
    Case("10.9-9", VP, list_hpa(NOWHERE), FIRST_USE),
    Case("10.9-P1", VP, list_entry(0, NOWHERE), FIRST_USE),
    Case("10.9-P1", VP, list_entry(2, NOWHERE), FIRST_USE, {"pages"}, "third"),
    Case("10.9-P3", VP, interrupted, FIRST_USE | VP_BEGUN, {"pages"}),
    Case("10.9-E1", VP, SMALL_MBMD, FIRST_USE, {"pages"}),
    Case("10.9-E2", VP, MBMD_ALIGNMENT, FIRST_USE, {"pages"}),
    Case("10.9-R1", VP_AGAIN, uninitialized()),
    Case("10.9-R2", VP_AGAIN, not_interrupted),
    Case("10.9-R3", VP_AGAIN, other_leaf(Leaf.EXPORT_MEM), VP_BEGUN),
    Case("10.9-R4", VP_AGAIN, pages_in_list(6), VP_BEGUN),
    Case("10.9-R5", VP_AGAIN, other_vcpu, VP_BEGUN),
    Case("10.9-P1", VP_AGAIN, list_entry(1, NOWHERE), VP_BEGUN, label="resumed"),
    Case("10.9-E1", VP_AGAIN, SMALL_MBMD, VP_BEGUN, {"pages"}, "resumed"),
]

CASES = [*STREAM_CREATE, *IMMUTABLE, *BLOCKW, *UNBLOCKW, *TRACK, *TD, *VCPU, *ABORT, *RESTORE]


@pytest.mark.parametrize("case", cases_of(CASES))
def test_check(case):
    judge(case)


@pytest.mark.parametrize(("earlier", "later"), orders_of(CASES))
def test_the_earlier_check_decides(earlier, later):
    run_both(earlier, later)


@pytest.mark.parametrize("case", cases_of(BLOCKW + RESTORE))
def test_list_entries_and_rcx_of_list_leaves(case):
    """RCX names the entry that ended the call; a bad entry becomes NOP with its status."""
    scene, outcome = run(case)
    name = case.row.partition("-")[2]
    expected = {"e1": 15, "e2": 1, "e3": 15, "e4": 2, "e5": 3, "e6": 4}.get(name)
    if expected is None:
        return
    entry_now = scene.word(ENTRY)
    assert GpaStatus(entry_now >> 56 & 0x1F) == expected
    assert entry_now >> 52 & 3 == 0
    stopped = name in ("e1", "e3")
    assert outcome.registers.rcx >> 3 & 511 == (ENTRY if stopped else 4)
