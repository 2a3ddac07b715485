"""Is a recorded run accepted, and is every damaged one rejected at the right place?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_session import migrate

from tdxmig_model.errors import UsageError
from tdxmig_model.replay import judge, judge_one, judge_records
from tdxmig_model.trace import Record, read_trace

Trace = list[Record]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The traces of one real migration."""
    return migrate(tmp_path_factory.mktemp("run")).traces


@pytest.fixture
def traces(paths: tuple[Path, Path]) -> tuple[Trace, Trace]:
    return list(read_trace(paths[0])), list(read_trace(paths[1]))


def at(trace: Trace, step: str, kind: str = "leaf") -> int:
    """Where a step stands in a trace, the first time."""
    return next(i for i, r in enumerate(trace) if r.step == step and r.kind == kind)


def test_a_real_run_is_a_run_of_both_models(paths: tuple[Path, Path]) -> None:
    verdict = judge(*paths)
    assert verdict.ok, verdict.reason
    assert verdict.refused_at is None
    assert {"P1", "P50", "L3", "L4", "P12", "P14", "O1", "O5", "O6"} <= set(verdict.properties)
    assert verdict.final["source_op_state"] == "POST_EXPORT"
    assert verdict.final["destination_op_state"] == "RUNNABLE"
    assert verdict.final["destination_phase"] == "CLOSED"
    assert verdict.steps > verdict.records > 50


def test_each_side_alone_is_a_run(paths: tuple[Path, Path]) -> None:
    for path in paths:
        verdict = judge_one(path)
        assert verdict.ok, (path.name, verdict.refused_at, verdict.reason)
        assert "P1" in verdict.not_evaluated  # one side says nothing about both


def test_an_aborted_run_is_a_run(tmp_path: Path) -> None:
    done = migrate(tmp_path, stop=("destination", "end"))
    verdict = judge(*done.traces)
    assert verdict.ok, verdict.reason
    assert verdict.final["destination_op_state"] == "FAILED_IMPORT"
    assert verdict.final["source_op_state"] == "RUNNABLE"


def drop(side: int, step: str) -> Callable[[tuple[Trace, Trace]], None]:
    def damage(traces: tuple[Trace, Trace]) -> None:
        del traces[side][at(traces[side], step)]

    return damage


def swap(side: int, first: str, second: str) -> Callable[[tuple[Trace, Trace]], None]:
    def damage(traces: tuple[Trace, Trace]) -> None:
        trace = traces[side]
        i, j = at(trace, first), at(trace, second)
        trace[i], trace[j] = replace(trace[j], t=trace[i].t), replace(trace[i], t=trace[j].t)

    return damage


def twice(side: int, step: str) -> Callable[[tuple[Trace, Trace]], None]:
    def damage(traces: tuple[Trace, Trace]) -> None:
        i = at(traces[side], step)
        traces[side].insert(i, traces[side][i])

    return damage


@pytest.mark.parametrize(
    ("damage", "where", "reason"),
    [
        (drop(0, "export_state_immutable"), "import_state_immutable", "from the source"),
        (drop(0, "export_pause"), "source record", "the trace shows op_state PAUSED_EXPORT"),
        (drop(0, "mem_track"), "export_mem", "tlb_tracked"),
        (drop(0, "export_state_td"), "export_state_vp", "the model makes"),
        (drop(1, "import_state_immutable"), "import_", "op_state"),
        (drop(1, "import_state_td"), "import_state_vp", "op_state"),
        (drop(1, "import_mem"), "import_mem", "mb_counter"),
        (swap(0, "export_pause", "export_state_td"), "export_state_td", "op_state"),
        (swap(1, "import_state_td", "import_state_vp"), "import_state_vp", "op_state"),
        (twice(0, "export_track_start"), "export_track_start", "op_state"),
        (twice(1, "import_mem"), "import_mem", "mb_counter"),
        (twice(1, "import_track_start"), "import_track_start", "op_state"),
        (twice(0, "export_state_vp"), "export_state_vp", "not_exported_yet"),
    ],
)
def test_a_damaged_run_is_rejected_where_it_goes_wrong(
    traces: tuple[Trace, Trace],
    damage: Callable[[tuple[Trace, Trace]], None],
    where: str,
    reason: str,
) -> None:
    damage(traces)
    verdict = judge_records(traces)
    assert not verdict.ok
    assert verdict.refused_at is not None
    assert where in verdict.refused_at
    assert reason in verdict.reason


def test_a_bundle_that_nobody_made_is_rejected(traces: tuple[Trace, Trace]) -> None:
    i = at(traces[1], "import_mem")
    message = traces[1][i].message
    assert message is not None
    traces[1][i] = replace(traces[1][i], message=replace(message, iv=message.iv + 10_000))
    verdict = judge_records(traces)
    assert not verdict.ok
    assert "a bundle of stream 0 with IV" in verdict.reason
    assert "destination record" in str(verdict.refused_at)


def test_a_bundle_of_another_epoch_than_the_models_is_rejected(
    traces: tuple[Trace, Trace],
) -> None:
    i = at(traces[0], "export_mem")
    message = traces[0][i].message
    assert message is not None
    traces[0][i] = replace(traces[0][i], message=replace(message, epoch=message.epoch + 1))
    verdict = judge_records(traces)
    assert not verdict.ok
    assert "the bundle has epoch" in verdict.reason


def test_a_lifecycle_event_out_of_order_is_rejected(traces: tuple[Trace, Trace]) -> None:
    i = at(traces[0], "finish_epochs", "lifecycle")
    j = at(traces[0], "export_td_state", "lifecycle")
    trace = traces[0]
    trace[i], trace[j] = trace[j], trace[i]
    verdict = judge_records(traces)
    assert not verdict.ok


def test_traces_without_a_beginning_or_of_two_sessions_are_told_apart(
    traces: tuple[Trace, Trace],
) -> None:
    with pytest.raises(UsageError, match="attach record"):
        judge_records([[r for r in traces[0] if r.step != "attach"], traces[1]])
    other = [replace(r, session="ff" * 16) for r in traces[1]]
    with pytest.raises(UsageError, match="different sessions"):
        judge_records([traces[0], other])


@pytest.mark.parametrize(
    ("side", "step", "change", "reason"),
    [
        (1, "import_track_start", {"total_mb": 99}, "total_mb 99"),
        (1, "import_mem", {"mb_counter": 99}, "mb_counter 99"),
        (0, "export_track_start", {"total_mb": 99}, "total_mb 99"),
        (0, "export_state_td", {"iv": 1}, "has used IV 1 before"),
    ],
)
def test_both_sides_must_say_the_same_of_a_bundle(
    traces: tuple[Trace, Trace], side: int, step: str, change: dict[str, int], reason: str
) -> None:
    i = at(traces[side], step)
    message = traces[side][i].message
    assert message is not None
    traces[side][i] = replace(traces[side][i], message=replace(message, **change))
    verdict = judge_records(traces)
    assert not verdict.ok
    assert reason in verdict.reason


def test_a_step_of_the_other_side_is_rejected(traces: tuple[Trace, Trace]) -> None:
    end = traces[1][at(traces[1], "import_end")]
    traces[0].append(replace(end, side="source", seq=len(traces[0])))
    verdict = judge_records(traces)
    assert not verdict.ok
    assert "import_end is a step of the destination" in verdict.reason


def test_a_refused_call_moves_nothing(traces: tuple[Trace, Trace]) -> None:
    i = at(traces[0], "export_pause")
    failed = replace(traces[0][i], status=1 << 63, state={"op_state": "RUNNABLE"})
    traces[0].insert(i, failed)
    verdict = judge_records(traces)
    assert not verdict.ok
    assert "the trace shows op_state RUNNABLE" in verdict.reason
