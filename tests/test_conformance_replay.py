"""Counterexamples of the published module on the software module, and what hardened does."""

import json

import pytest

from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.leaves_servtd import MIG_VERSION
from tdxmig_model.backend.soft.op_state import GuestLeaf
from tdxmig_model.backend.soft.status import is_error
from tdxmig_model.cli import main
from tdxmig_model.cli.replayed import replays
from tdxmig_model.conformance import REPLAYABLE, replay_on_modules
from tdxmig_model.conformance import replay as conformance_replay
from tdxmig_model.conformance.demonstrations import DEMONSTRATIONS, NOT_SHOWN
from tdxmig_model.conformance.side import Side
from tdxmig_model.expr import not_
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.model.order import ORDER
from tdxmig_model.model.systems import SYSTEMS
from tdxmig_model.smt.bounded import inside
from tdxmig_model.smt.runs import Run, replay
from tdxmig_model.verify import Report, Row, small_instance

PUBLISHED, HARDENED = "tdx-1.5.01", "hardened"
S0 = {"stream": 0}
START = [("source_set_migration_key", {}), ("export_state_immutable", {})]
FAILED_EXPORT = [
    *START,
    ("export_pause", {}),
    ("export_mem_begin", S0),
    ("export_mem_migrate", {**S0, "p": 0}),
    ("export_mem_begin", S0),
]
"""P15: NEW takes the place of a call that has exported a page."""
STALE_PAGE = [
    *START,
    ("export_blockw", {"p": 0}),
    ("mem_track", {}),
    ("export_mem_begin", S0),
    ("export_mem_migrate", {**S0, "p": 0}),
    ("export_mem_end", S0),
    ("export_unblockw", {"p": 0}),
    ("vp_enter", {}),
    ("guest_write", {"p": 0}),
    ("vp_exit", {}),
    ("export_pause", {}),
    ("export_mem_begin", S0),
    ("export_mem_remigrate", {**S0, "p": 0}),
    ("export_mem_dropped", S0),
    ("export_state_td", {}),
    ("export_state_vp", {**S0, "v": 0}),
    ("export_track_start", {}),
    ("destination_set_migration_key", {}),
    ("import_state_immutable", {"m": 0}),
    ("import_mem_begin", {**S0, "m": 1}),
    ("import_mem_migrate", {**S0, "p": 0}),
    ("import_mem_end", S0),
    ("import_state_td", {"m": 3}),
    ("import_state_vp", {**S0, "m": 4, "v": 0}),
    ("import_track_start", {"m": 5}),
]
"""P13: the newer version of a page is in a bundle that does not count."""
SKIPPED_BUNDLE = [
    *START,
    ("export_mem_begin", S0),
    ("export_mem_begin", S0),
    ("destination_set_migration_key", {}),
    ("import_state_immutable", {"m": 0}),
    ("import_mem_begin", {**S0, "m": 2}),
]
"""P8: two bundles with one counter."""

TRACES = {
    "P15": (MEMORY, FAILED_EXPORT),
    "P13": (MEMORY, STALE_PAGE),
    "P8": (ORDER, SKIPPED_BUNDLE),
}
STOPPED = {
    "P15": (6, "export_mem_begin", "INVALID_RESUMPTION"),
    "P13": (16, "export_state_td", "INVALID_RESUMPTION"),
    "P8": (4, "export_mem_begin", "INVALID_RESUMPTION"),
}


def claim(system, identifier):
    return next(p for p in system.properties if p.identifier == identifier)


def run_of(identifier):
    """The trace on the interpreter of the published profile, to a state that breaks the claim."""
    system, moves = TRACES[identifier]
    part = system.under(PUBLISHED)
    instance = small_instance(part)
    bad = inside(not_(claim(part, identifier).formula), instance)
    return replay(part, instance, moves, bad)


def replayed(identifier, profile):
    system = TRACES[identifier][0]
    return replay_on_modules(system, run_of(identifier), profile, claim(system, identifier))


@pytest.mark.parametrize("identifier", TRACES)
def test_a_trace_reproduces_on_the_published_module(identifier):
    found = replayed(identifier, PUBLISHED)
    assert found.reproduces, found.why
    assert (found.calls, found.refused) == (found.of, ())
    assert found.why.endswith(f"{identifier} is false")


@pytest.mark.parametrize("identifier", TRACES)
def test_the_same_calls_are_refused_by_the_hardened_module(identifier):
    found = replayed(identifier, HARDENED)
    assert not found.reproduces
    assert found.refused[-1] == STOPPED[identifier]
    assert found.calls + len(found.refused) == STOPPED[identifier][0]


def test_a_malformed_entry_alone_does_not_end_a_replay():
    """In hardened it fails alone, and the call that it should have ended blocks what comes next."""
    refused = replayed("P13", HARDENED).refused
    assert refused[0] == (15, "export_mem_dropped", "GPA_LIST_ENTRY_INVALID")


def test_a_run_that_breaks_nothing_does_not_reproduce():
    part = MEMORY.under(PUBLISHED)
    run = replay(part, small_instance(part), FAILED_EXPORT[:-1])
    found = replay_on_modules(MEMORY, run, PUBLISHED, claim(MEMORY, "P15"))
    assert not found.reproduces
    assert found.why == "harmless: at the end P15 holds"


def test_a_step_that_no_host_can_make_is_said():
    part = LEAF.under(PUBLISHED)
    instance = small_instance(part)
    run = Run(instance, (("import_track", {"m": 0}),), ([], []))
    found = replay_on_modules(LEAF, run, PUBLISHED)
    assert (found.reproduces, found.calls) == (False, 0)
    assert found.why == "step 1, import_track, is no call here: no bundle was sent yet"


def test_a_module_that_differs_is_said(monkeypatch):
    """With the hardened module under the published model the replay does not claim anything."""
    pair = conformance_replay.Twin
    monkeypatch.setattr(
        conformance_replay, "Twin", lambda part, _profile, **sizes: pair(part, HARDENED, **sizes)
    )
    found = replayed("P15", PUBLISHED)
    assert not found.reproduces
    assert found.why.startswith("model and module differ")


# --- demonstrations ------------------------------------------------------------------------------

REFUSED = {
    "P9": ("import_mem", "OP_STATE_INCORRECT"),
    "P21": ("mng_init", "OP_STATE_INCORRECT"),
    "P41": ("mng_init", "OP_STATE_INCORRECT"),
    "P22": ("import_state_immutable", "METADATA_FIELD_ID_INCORRECT"),
    "P23": ("import_state_immutable", "METADATA_FIELD_ID_INCORRECT"),
    "P24": ("import_state_vp", "INVALID_METADATA_LIST_HEADER"),
    "P28": ("start_export", "INVALID_MIGRATION_DECRYPTION_KEY"),
    "P29": ("start_export", "INVALID_MIGRATION_DECRYPTION_KEY"),
    "P40": ("export_mem", "GPA_LIST_ENTRY_INVALID"),
}


@pytest.mark.parametrize("identifier", DEMONSTRATIONS)
def test_a_demonstration_reproduces_on_the_published_module(identifier):
    shown = DEMONSTRATIONS[identifier](PUBLISHED)
    assert shown.reproduces, shown.why
    assert (shown.calls, shown.refused) == (shown.of, ())


@pytest.mark.parametrize("identifier", REFUSED)
def test_the_hardened_module_refuses_it(identifier):
    shown = DEMONSTRATIONS[identifier](HARDENED)
    assert not shown.reproduces
    ((_, step, status),) = shown.refused
    assert (step, status) == REFUSED[identifier]


def test_a_cancelled_page_is_given_back_in_hardened():
    shown = DEMONSTRATIONS["P48"](HARDENED)
    assert not shown.reproduces
    assert shown.why == "harmless: ACCEPT exits to the VMM, which adds the page; then SUCCESS"


def test_demonstrations_are_of_claims_whose_rows_are_no_calls():
    claims = {p.identifier: s.name for s in SYSTEMS for p in s.properties}
    assert all(claims.get(name, "") not in REPLAYABLE for name in DEMONSTRATIONS)


@pytest.mark.parametrize("profile", [PUBLISHED, HARDENED])
def test_no_migration_version_but_0_can_be_written(profile):
    """So no calls lead to a token of another version: P11 has a reason in place of a replay."""
    side = Side("source", profile, 1, 1, 1, 0)
    registers = Registers(rcx=side.td.binding_handle, rdx=MIG_VERSION, r8=1, r9=(1 << 64) - 1)
    registers.r10, registers.r11, registers.r12, registers.r13 = side.td.uuid
    module, writer = side.host.module, side.host._migration_td.vcpus[0]
    assert is_error(module.tdcall(GuestLeaf.SERVTD_WR, registers, writer))
    assert side.tdcs.mig_version == 0
    registers.r8 = 0
    assert not is_error(module.tdcall(GuestLeaf.SERVTD_WR, registers, writer))
    assert set(NOT_SHOWN) == {"P11"}


def test_what_cannot_be_shown_has_a_reason():
    row = Row("P11", "", "leaf", "violated", "search", 3, 0.0)
    (found,) = replays(PUBLISHED, [Report("keys", PUBLISHED, (row,), (), (), (), 0, 0, 0.0)])
    assert found.modules == ()
    assert "not replayed, the release knows migration version 0 alone" in found.text()
    assert not set(NOT_SHOWN) & set(DEMONSTRATIONS)


def test_an_import_with_unwritten_attributes_ends_with_those_of_no_migratable_td():
    assert "ATTRIBUTES are 0x0" in DEMONSTRATIONS["P23"](PUBLISHED).why


# --- the command line ----------------------------------------------------------------------------


def report(identifier):
    """What `verify` says of a trace, without the search for it."""
    run = run_of(identifier)
    system = TRACES[identifier][0]
    row = Row(identifier, "", "leaf", "violated", "search", run.depth, 0.0, run=run)
    return Report(system.name, PUBLISHED, (row,), (), (), (), 0, 0, 0.0)


def test_a_replay_has_both_halves():
    (found,) = replays(PUBLISHED, [report("P13")])
    assert found.interpreted
    assert [one.profile for one in found.modules] == [PUBLISHED, HARDENED]
    lines = found.text().splitlines()
    assert lines[0] == "P13 replayed:"
    assert lines[1].startswith("  on the interpreter: reproduces, 26 steps")
    assert lines[2].startswith("  on the software module, tdx-1.5.01: reproduces, 26 of 26 calls")
    assert "does not reproduce" in lines[3]
    assert "16 export_state_td: INVALID_RESUMPTION" in lines[3]


def test_a_trace_that_does_not_replay_is_said():
    whole = report("P15")
    row = whole.rows[0]
    cut = Run(row.run.instance, row.run.moves[1:], row.run.states[1:])
    broken = Report("memory", PUBLISHED, (Row(*_fields(row, cut)),), (), (), (), 0, 0, 0.0)
    (found,) = replays(PUBLISHED, [broken])
    assert not found.interpreted
    assert found.interpreter.startswith("does not reproduce: the trace does not replay: step 1")


def _fields(row, run):
    names = ("identifier", "sentence", "level", "verdict", "method", "depth", "ms")
    return [*(getattr(row, name) for name in names), None, "", (), run]


def test_what_no_module_shows_is_said():
    row = Row("X1", "", "leaf", "violated", "search", 3, 0.0)
    (found,) = replays(PUBLISHED, [Report("calls", PUBLISHED, (row,), (), (), (), 0, 0, 0.0)])
    assert found.modules == ()
    assert "not replayed, no step of the calls model is a call" in found.text()


def test_verify_replays(capsys):
    arguments = ["verify", "--profile", PUBLISHED, "--property", "P21", "--replay", "--json"]
    assert main(arguments) == 1
    (found,) = json.loads(capsys.readouterr().out)["replays"]
    assert (found["model"], found["id"]) == ("control", "P21")
    assert found["interpreter"]["reproduces"]
    published, hardened = found["software_module"]
    assert (published["profile"], published["reproduces"]) == (PUBLISHED, True)
    assert (hardened["profile"], hardened["reproduces"]) == (HARDENED, False)
    assert hardened["refused"] == [
        {"number": 2, "step": "mng_init", "status": "OP_STATE_INCORRECT"}
    ]


def test_nothing_to_replay_is_said(capsys):
    assert main(["verify", "--property", "P24", "--replay"]) == 0
    assert "Nothing is violated, so there is nothing to replay." in capsys.readouterr().out


def test_replay_is_not_for_deleted_guards(capsys):
    assert main(["verify", "--replay", "--mutants"]) == 2
    assert "--replay is for properties" in capsys.readouterr().err
