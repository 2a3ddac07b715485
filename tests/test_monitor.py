"""Does the monitor refuse what the model forbids, say why, and change nothing when it does?"""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest

from tdxmig_model.errors import ModelError, Refused
from tdxmig_model.expr import Instance
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.words import SEPT
from tdxmig_model.monitor import Monitor
from tdxmig_model.rows import CANCEL, Call, rows_of

PAGES = 8


def source_monitor(profile: str = "hardened") -> Monitor:
    """A source that is ready for a session."""
    sizes = {"Page": PAGES, "Vcpu": 2, "Stream": 1, "Message": None, "Epoch": None}
    monitor = Monitor(
        LEAF.under(profile),
        Instance(sizes),
        ("source_op_state", "source_mig_epoch"),
        actor="source",
    )
    monitor["source_num_migs"] = 2
    monitor["source_mig_dec_key_set"] = True
    return monitor


def take(monitor: Monitor, call: Call) -> None:
    for row in rows_of(monitor, call):
        row.take(monitor)


def exported(monitor: Monitor, pages: list[int]) -> None:
    """Start a session, pause, and export pages."""
    monitor.take("export_state_immutable")
    monitor.take("export_pause")
    take(monitor, Call("source", "export_mem", pages=np.array(pages)))


def test_a_refusal_names_step_state_condition_values_and_what_is_legal() -> None:
    monitor = source_monitor()
    monitor.take("export_state_immutable")
    with pytest.raises(Refused) as caught:
        monitor.check("export_track_start")
    refused = caught.value
    assert refused.step == "export_track_start"
    assert refused.state == {"source_op_state": "LIVE_EXPORT", "source_mig_epoch": "0"}
    assert [u.label for u in refused.unmet] == ["paused"]
    assert str(refused.unmet[0]) == (
        "paused: needs source_op_state = PAUSED_EXPORT (source_op_state = LIVE_EXPORT)"
    )
    assert "export_pause" in refused.legal
    assert "export_track_start" not in refused.legal
    assert "no exported page has a newer version" in str(refused)


def test_a_refused_step_changes_nothing() -> None:
    monitor = source_monitor()
    exported(monitor, [0, 1])
    monitor.take("export_unblockw", p=1)
    before = copy.deepcopy(monitor.state)
    with pytest.raises(Refused, match="dirty_count"):
        monitor.take("export_track_start")
    for name, old in zip((v.name for v in LEAF.variables), before, strict=True):
        assert np.array_equal(monitor[name], old), name


def test_an_unknown_step_is_refused_and_an_unknown_variable_is_a_model_error() -> None:
    monitor = source_monitor()
    with pytest.raises(Refused, match="a row fly in the leaf model"):
        monitor.take("fly")
    with pytest.raises(ModelError, match="has no variable height"):
        monitor["height"]


def test_a_parameter_outside_its_domain_is_refused() -> None:
    monitor = source_monitor()
    exported(monitor, [0])
    with pytest.raises(Refused, match="p = 99 is no Page"):
        monitor.take("export_unblockw", p=99)


def test_entries_are_taken_all_or_none() -> None:
    monitor = source_monitor()
    exported(monitor, [0, 1, 2])
    pages = monitor["source_page"].copy()
    with pytest.raises(Refused, match="sept_state"):
        # Page 1 was exported and is clean: it cannot be exported again in order.
        take(monitor, Call("source", "export_mem", pages=np.array([3, 1, 4])))
    assert SEPT.members[int(monitor["source_page"][1])] == "EXPORTED_BLOCKEDW"
    assert np.array_equal(monitor["source_page"][[0, 1, 2]], pages[[0, 1, 2]])


def test_rollback_takes_back_every_kind_of_update() -> None:
    monitor = source_monitor()
    exported(monitor, [0, 1])
    before = copy.deepcopy(monitor.state)
    monitor.begin()
    take(monitor, Call("source", "export_mem", pages=np.array([2, 3])))
    monitor.take("export_unblockw", p=0)
    take(monitor, Call("source", "export_mem", pages=np.array([0]), operation=CANCEL))
    monitor.take("export_abort")
    monitor.rollback()
    for name, old in zip((v.name for v in LEAF.variables), before, strict=True):
        assert np.array_equal(monitor[name], old), name


def test_counts_follow_the_entries() -> None:
    monitor = source_monitor()
    exported(monitor, [0, 1, 2, 3])
    assert (monitor["source_mig_count"], monitor["source_dirty_count"]) == (4, 0)
    take(monitor, Call("source", "export_unblockw", pages=np.array([1, 2])))
    assert (monitor["source_mig_count"], monitor["source_dirty_count"]) == (4, 2)
    take(monitor, Call("source", "export_mem", pages=np.array([1])))
    take(monitor, Call("source", "export_mem", pages=np.array([2, 3]), operation=CANCEL))
    assert (monitor["source_mig_count"], monitor["source_dirty_count"]) == (2, 0)


def test_live_export_needs_write_blocking_and_tracking() -> None:
    monitor = source_monitor()
    monitor.take("export_state_immutable")
    call = Call("source", "export_mem", pages=np.array([0, 1]))
    monitor.begin()
    with pytest.raises(Refused, match="write_blocked_while_live"):
        take(monitor, call)
    monitor.rollback()
    take(monitor, Call("source", "export_blockw", pages=np.array([0, 1])))
    monitor.begin()
    with pytest.raises(Refused, match="tlb_tracked"):
        take(monitor, call)
    monitor.rollback()
    monitor.take("mem_track")
    take(monitor, call)
    assert monitor["source_mig_count"] == 2


def test_the_profiles_differ_in_when_a_bundle_counts() -> None:
    totals = {}
    for profile in ("hardened", "tdx-1.5.01"):
        monitor = source_monitor(profile)
        monitor.take("export_state_immutable")
        monitor.take("export_pause")
        monitor.take("export_mem_begin", stream=0)
        totals[profile] = int(monitor["source_total_mb_count"])
    assert totals == {"hardened": 2, "tdx-1.5.01": 1}


def legal_by_trying(monitor: Monitor) -> list[str]:
    """The rows that the monitor takes with some parameters, every one of them tried."""
    found = []
    for row in monitor.system.of_actor("source"):
        names = [p.name for p in row.params]
        domains = [range(monitor.instance.bounded(p.kind)) for p in row.params]
        for values in product(*domains):
            try:
                monitor.check(row.name, **dict(zip(names, values, strict=True)))
            except Refused:
                continue
            found.append(row.name)
            break
    return found


@pytest.mark.parametrize("pages", [3, 100])
def test_what_is_called_legal_is_legal_with_some_parameters(pages: int) -> None:
    system = LEAF.under("hardened")
    sizes = {"Page": pages, "Vcpu": 2, "Stream": 2, "Epoch": 5, "Message": 12}
    monitor = Monitor(system, Instance.small(system, sizes), actor="source")
    monitor["source_num_migs"] = 2
    monitor["source_mig_dec_key_set"] = True
    for name in (None, "export_state_immutable", "export_pause", "export_state_td"):
        if name is not None:
            params = {p.name: 0 for p in system.step(name).params}
            monitor.take(name, **params)
        assert monitor.legal() == legal_by_trying(monitor)


def test_a_step_that_every_parameter_refuses_is_not_called_legal() -> None:
    monitor = source_monitor()
    monitor.take("export_state_immutable")
    # No page was exported yet, so none can be restored or cancelled, whichever it is.
    assert "export_restore" not in monitor.legal()
    assert [name for name in monitor.legal() if "cancel" in name] == []
