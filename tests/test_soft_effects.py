"""What each migration leaf changes when it succeeds: that, and nothing else.

Profile "tdx-1.5.01".  Names are those of `soft_state`; "prefix*" stands for one or more names.
"""

import legal_calls as legal
import pytest
from error_rows import assert_same
from soft_calls import assert_nothing_is_locked
from soft_scene import RESUME, always
from soft_state import changes, snapshot

from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.sept import SeptState
from tdxmig_model.backend.soft.status import FATAL_BIT, Status
from tdxmig_model.errors import ModuleHalted

FORWARD_0, FORWARD_1, BACKWARD = "tdcs.links[1]", "tdcs.links[2]", "tdcs.links[0]"
ALL_PAGES = {f"sept[{gpa:#x}]" for gpa in (0, 0x1000, 0x2000, 0x3000)}
NEW_PAGES = {
    "content[other]",
    "pamt[other].page_type",
    "pamt[other].owner",
    "pamt[other].bepoch",
    "tdr.child_count",
}
SESSION_START = {
    "tdcs.mig_enc_key",
    "tdcs.mig_enc_working_key",
    "tdcs.mig_dec_working_key",
    "tdcs.mig_dec_key_set",
    "tdcs.mig_dec_key_words",
    "tdcs.export_count",
    "tdcs.op_state",
    f"{FORWARD_0}.initialized",
    f"{FORWARD_0}.migsc.iv_counter",
    f"{FORWARD_0}.migsc.cipher.key",
    "tdcs.total_mb_count",
}


def first_use(link):
    """A stream that is initialised by this call."""
    names = ("initialized", "migsc.iv_counter", "migsc.cipher.key", "migsc.cipher.suffix")
    return {f"{link}.{name}" for name in names}


def exported(link=FORWARD_0):
    """A bundle of a stream: counters of the stream and of the TD."""
    names = ("iv_counter", "next_mb_counter")
    return {f"{link}.migsc.{name}" for name in names} | {"tdcs.total_mb_count"}


def imported(link=FORWARD_0):
    names = ("iv_counter", "expected_mb_counter")
    return {f"{link}.migsc.{name}" for name in names} | {"tdcs.total_mb_count"}


def finished(link=FORWARD_0):
    """The record of an interrupted call is gone."""
    return {f"{link}.migsc.interrupted*"}


MEMORY = ALL_PAGES | {"tdcs.mig_count"}
IMPORTED_FIELDS = {
    "tdcs.fields*",
    "tdcs.num_vcpus",
    "tdcs.pre_import_uuid",
    "tdcs.td_epoch",
    "tdr.uuid",
}
VCPU = {
    "vcpu.state",
    "vcpu.registers*",
    "tdcs.imported_vcpus",
    "tdcs.num_migrated_vcpus",
    "tdcs.total_mb_count",
}
ASSOCIATED = {"vcpu.assoc_lp", "tdcs.num_assoc_vcpus"}
TOKEN = {f"{FORWARD_0}.migsc.iv_counter", "tdcs.mig_epoch", "tdcs.total_mb_count"}
THREE = {f"sept[{gpa:#x}]" for gpa in (0x1000, 0x2000, 0x3000)}
LISTS_BACK = {"gpas", "list", "macs_high"}

EFFECTS = {
    legal.stream_create: (NEW_PAGES | {"tdcs.links[2]*"}, set()),
    legal.immutable: (
        SESSION_START | {"tdcs.mig_epoch", "tdcs.dirty_count"},
        {"mbmd", "pages"},
    ),
    legal.immutable_resume: (
        {"tdcs.op_state", "tdcs.total_mb_count", f"{FORWARD_0}.migsc.next_mb_counter"} | finished(),
        {"mbmd", "pages"},
    ),
    legal.blockw: (ALL_PAGES | {"tdcs.bw_epoch"}, set()),
    legal.unblockw: ({"sept[0x0]", "tdcs.dirty_count"}, set()),
    legal.export_mem: (MEMORY | exported(), {"mbmd", "macs_low", "pages"}),
    legal.export_mem_stream_1: (
        MEMORY | exported(FORWARD_1) | first_use(FORWARD_1),
        {"mbmd", "macs_low", "pages"},
    ),
    legal.export_mem_512: (MEMORY | exported(), {"mbmd", "macs_low", "pages"} | LISTS_BACK),
    legal.export_mem_resume: (
        THREE | {"tdcs.mig_count"} | exported() | finished(),
        {"macs_low", "pages"},
    ),
    legal.export_mem_512_resume: (
        THREE | {"tdcs.mig_count"} | exported() | finished(),
        {"macs_low", "pages"} | LISTS_BACK,
    ),
    legal.export_mem_live: (MEMORY | exported(), {"mbmd", "macs_low", "pages"}),
    legal.export_mem_post: (
        {"sept[0x2000]", "sept[0x3000]", "tdcs.mig_count"} | exported(),
        {"mbmd", "macs_low", "pages"},
    ),
    legal.export_mem_cancel: (MEMORY | exported(), {"mbmd", "macs_low", "list"}),
    legal.track: (TOKEN, {"mbmd"}),
    legal.start_track: (TOKEN | {"tdcs.op_state"}, {"mbmd"}),
    legal.pause: ({"tdcs.op_state", "tdcs.td_epoch"}, set()),
    legal.state_td: (exported(), {"mbmd", "pages"}),
    legal.state_vp: (
        exported(FORWARD_1) | first_use(FORWARD_1) | {"vcpu.export_count"},
        {"mbmd", "pages"},
    ),
    legal.state_vp_resume: (
        {f"{FORWARD_1}.migsc.next_mb_counter", "tdcs.total_mb_count", "vcpu.export_count"}
        | finished(FORWARD_1),
        {"mbmd", "pages"},
    ),
    legal.abort_live: ({"tdcs.op_state", f"{FORWARD_0}.initialized"}, set()),
    legal.abort_post: (
        {"tdcs.op_state", f"{FORWARD_0}.initialized"}
        | {f"{BACKWARD}.migsc.cipher.key", f"{BACKWARD}.migsc.cipher.suffix"},
        set(),
    ),
    legal.restore: (MEMORY, set()),
    legal.import_immutable: (
        SESSION_START
        | IMPORTED_FIELDS
        | {f"{FORWARD_0}.migsc.cipher.suffix", f"{FORWARD_0}.migsc.expected_mb_counter"},
        set(),
    ),
    legal.import_immutable_resume: (
        IMPORTED_FIELDS
        | {"tdcs.op_state", "tdcs.total_mb_count", "tdcs.export_count"}
        | finished(),
        set(),
    ),
    legal.import_mem: (THREE | NEW_PAGES | imported(), set()),
    legal.import_mem_512: (ALL_PAGES | NEW_PAGES | imported(), {"gpas", "new_pages"}),
    legal.import_mem_stream_1: (
        ALL_PAGES | NEW_PAGES | imported(FORWARD_1) | first_use(FORWARD_1),
        set(),
    ),
    legal.import_mem_resume: (
        THREE - {"sept[0x1000]"}
        | NEW_PAGES
        | finished()
        | {f"{FORWARD_0}.migsc.iv_counter", "tdcs.total_mb_count"},
        set(),
    ),
    legal.import_mem_512_resume: (
        THREE | NEW_PAGES | finished() | {f"{FORWARD_0}.migsc.iv_counter", "tdcs.total_mb_count"},
        {"gpas", "new_pages"},
    ),
    legal.import_mem_post: (
        {"sept[0x2000]", "sept[0x3000]"} | NEW_PAGES | imported(),
        set(),
    ),
    legal.import_track: (TOKEN, set()),
    legal.import_start_track: (
        TOKEN | {"tdcs.op_state", f"{FORWARD_0}.migsc.expected_mb_counter"},
        set(),
    ),
    legal.import_td: (
        imported() | {"tdcs.op_state", "tdcs.fields[HP_LOCK_TIMEOUT]"},
        set(),
    ),
    legal.import_vp: (VCPU | ASSOCIATED | imported(FORWARD_1) | first_use(FORWARD_1), set()),
    legal.import_vp_resume: (VCPU - {"vcpu.registers*"} | finished(FORWARD_1), set()),
    legal.import_commit: ({"tdcs.op_state", "tdcs.import_count"}, set()),
    legal.import_end: ({"tdcs.op_state", "tdcs.import_count"}, set()),
    legal.import_abort: (
        {"tdcs.op_state", f"{BACKWARD}.migsc.next_mb_counter"} | first_use(BACKWARD),
        {"mbmd"},
    ),
    legal.mem_track: ({"tdcs.td_epoch"}, set()),
    legal.vp_enter: (
        {"content[0x1000]", "content[0x2000]", "processors[0].retired", "vcpu.vcpu_epoch"}
        | {"vcpu.registers*", "vcpu.tlb*"},
        set(),
    ),
}
STATUSES = {legal.import_abort: FATAL_BIT, legal.vp_enter: 1}
"""IMPORT.ABORT succeeds with FATAL; VP.ENTER says why the guest left: an external interrupt."""
OP_STATES = {
    legal.immutable: OpState.LIVE_EXPORT,
    legal.start_track: OpState.POST_EXPORT,
    legal.pause: OpState.PAUSED_EXPORT,
    legal.abort_live: OpState.RUNNABLE,
    legal.abort_post: OpState.RUNNABLE,
    legal.import_immutable: OpState.MEMORY_IMPORT,
    legal.import_td: OpState.STATE_IMPORT,
    legal.import_start_track: OpState.POST_IMPORT,
    legal.import_commit: OpState.LIVE_IMPORT,
    legal.import_end: OpState.RUNNABLE,
    legal.import_abort: OpState.FAILED_IMPORT,
}


def test_every_legal_call_has_its_effects_written_down():
    assert set(EFFECTS) == set(legal.LEGAL)
    assert {scene().leaf for scene in EFFECTS} == set(legal.FIRST_CALLS)
    assert all(scene().leaf is leaf for leaf, scene in legal.FIRST_CALLS.items())


@pytest.mark.parametrize("scene", EFFECTS, ids=lambda scene: scene.__name__)
def test_effects(scene):
    made = scene()
    outcome = made.attempt()
    assert hex(outcome.status) == hex(STATUSES.get(scene, 0))
    changed, written = EFFECTS[scene]
    assert_same(outcome.changed, changed)
    assert outcome.written == written
    if scene in OP_STATES:
        assert made.tdcs.op_state is OP_STATES[scene]


# --- what a call does to an interrupted one -------------------------------------------------------


def interrupted_memory(pair, side):
    """EXPORT.MEM or IMPORT.MEM of stream 0 is interrupted."""
    if side == "source":
        rcx = legal.gpa_list(pair, pair.gpas)
        scene = legal.source_scene(pair, Leaf.EXPORT_MEM, **legal.list_registers(pair, rcx))
    else:
        scene = legal.import_memory_scene(pair, pair.export(pair.gpas))
    registers = scene.host.seamcall(scene.leaf, interrupt=always, **scene.registers)
    assert registers.rax == Status.TDX_INTERRUPTED_RESUMABLE
    return scene


@pytest.mark.parametrize("start", [False, True])
def test_a_token_of_the_source_forgets_what_stream_0_had_interrupted(start):
    pair = legal.at_source("PAUSED_EXPORT")
    scene = interrupted_memory(pair, "source")
    made = legal.source_scene(
        pair,
        Leaf.EXPORT_TRACK,
        rcx=pair.source.td.tdr,
        r8=scene.buffers.mbmd_register,
        r10=RESUME if start else 0,
    )
    outcome = made.attempt()
    assert outcome.status == Status.TDX_SUCCESS
    state = {"tdcs.op_state"} if start else set()
    # The bundle is not counted; MB_COUNTER of the next one is 1 as before.
    assert_same(outcome.changed, TOKEN | finished() | state)


def test_a_token_of_the_destination_forgets_it_even_if_it_is_refused():
    pair = legal.at_source("PAUSED_EXPORT")
    scene = interrupted_memory(pair, "destination")
    assert scene.link.migsc.interrupted is not None
    made = legal.import_token(pair, pair.on_source(legal.c.ExportTrack()).bundle)
    outcome = made.attempt()
    # One bundle is not complete, so the token comes too early.
    assert outcome.status == Status.TDX_INVALID_MBMD | FATAL_BIT
    assert_same(outcome.changed, finished() | {"tdcs.op_state"})


@pytest.mark.parametrize(
    "leaf",
    [Leaf.EXPORT_STATE_TD, Leaf.EXPORT_STATE_VP, Leaf.EXPORT_MEM],
    ids=lambda leaf: leaf.name,
)
def test_a_new_call_on_the_stream_forgets_it(leaf):
    pair = legal.at_source("PAUSED_EXPORT")
    scene = interrupted_memory(pair, "source")
    registers = dict(scene.registers)
    if leaf is not Leaf.EXPORT_MEM:
        vcpu = pair.source.td.vcpus[0]
        registers = legal.state_registers(pair, 5)
        registers["rcx"] = vcpu if leaf is Leaf.EXPORT_STATE_VP else registers["rcx"]
    assert scene.host.seamcall(leaf, **registers).rax <= 4
    assert scene.link.migsc.interrupted is None


def test_cancelled_pages_are_mapped_and_writable():
    scene = legal.export_mem_cancel()
    scene.attempt()
    states = scene.pair.source.page_states(scene.pair.gpas).tolist()
    assert states == [SeptState.MAPPED] * 4
    assert all(scene.memory.words[scene.slot(int(gpa))] & 2 for gpa in scene.pair.gpas)


@pytest.mark.parametrize(
    ("scene", "field", "value", "finding"),
    [
        (legal.pause, "refcount", [0, 1], r"PAUSE in LIVE_EXPORT halts the .*REFCOUNT is \[0, 1\]"),
        (legal.restore, "mig_count", 0, "RESTORE in RUNNABLE halts the .*MIG_COUNT is 0"),
    ],
)
def test_a_state_that_cannot_be_halts_the_module(scene, field, value, finding):
    """Injected; the published module shuts down here, so no status can say it."""
    call = scene()
    setattr(call.tdcs, field, value)
    before = snapshot(call.module)
    with pytest.raises(ModuleHalted, match=finding):
        call.attempt()
    assert not changes(before, snapshot(call.module))
    assert_nothing_is_locked(call.module)
