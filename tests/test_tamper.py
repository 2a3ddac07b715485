"""Does the judge refuse every trace that is no run, and every hostile one with its place?"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_replay import Trace, at
from test_session import migrate

from tdxmig_model.attribution import PROGRAMS
from tdxmig_model.errors import TdxmigError, UsageError, WireError
from tdxmig_model.replay import judge_one, judge_records
from tdxmig_model.session import SessionOptions
from tdxmig_model.supervisor import lifecycle_events
from tdxmig_model.trace import Message, Record, TraceWriter, read_trace

Traces = tuple[Trace, Trace]
DIRTYING = SessionOptions(batch=16, guest_budget=20_000, converged_pages=0, max_epochs=3)


def traces_of(path: Path, **how: Any) -> Traces:
    done = migrate(path, **how)
    first, second = (list(read_trace(one)) for one in done.traces)
    assert judge_records([first, second]).ok
    return first, second


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """The traces of a migration that sends pages again."""
    return traces_of(tmp_path_factory.mktemp("run"), options=DIRTYING)


@pytest.fixture(scope="module")
def aborted(tmp_path_factory: pytest.TempPathFactory) -> Traces:
    """The traces of a migration that goes back by abort token."""
    return traces_of(tmp_path_factory.mktemp("aborted"), stop=("destination", "end"))


def refused(traces: Traces, side: int, index: int, record: Record) -> str:
    """Why the traces are refused once that record is another."""
    changed = [list(trace) for trace in traces]
    changed[side][index] = record
    verdict = judge_records(changed)
    assert not verdict.ok
    assert verdict.refused_at
    return verdict.reason


def with_params(record: Record, **params: object) -> Record:
    return replace(record, params={**record.params, **params})


def having(trace: Trace, name: str) -> int:
    return next(i for i, record in enumerate(trace) if name in record.params)


# --- what the destination took -------------------------------------------------------------------


def test_pages_that_were_never_imported_again_are_missed(run: Traces) -> None:
    """The destination keeps stale pages: nothing but the source's list tells."""
    i = having(run[1], "remigrate")
    params = {name: value for name, value in run[1][i].params.items() if name != "remigrate"}
    assert "remigrate entries" in refused(run, 1, i, replace(run[1][i], params=params))


@pytest.mark.parametrize("kind", ["migrate", "remigrate"])
def test_another_page_or_another_entry_is_told(run: Traces, kind: str) -> None:
    i = having(run[1], kind)
    first, count = run[1][i].params[kind][-1]  # type: ignore[index]
    ranges = [*run[1][i].params[kind][:-1]]  # type: ignore[index]
    short = [*ranges, [first, count - 1]] if count > 1 else ranges
    assert "entries" in refused(run, 1, i, with_params(run[1][i], **{kind: short}))
    moved = {**run[1][i].params, f"{kind}_pending": run[1][i].params[kind]}
    del moved[kind]
    assert "entries" in refused(run, 1, i, replace(run[1][i], params=moved))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", Message.__slots__)
def test_every_field_of_a_bundle_counts(run: Traces, side: int, name: str) -> None:
    step = ("export_mem", "import_mem")[side]
    i = at(run[side], step)
    message = run[side][i].message
    assert message is not None
    value = getattr(message, name)
    other = "EPOCH_TOKEN" if name == "kind" else (value or 0) + 1
    assert refused(run, side, i, replace(run[side][i], message=replace(message, **{name: other})))


def test_a_page_twice_beyond_the_td_or_too_many_is_no_list(run: Traces) -> None:
    i = at(run[0], "export_mem")
    for ranges in ([[0, 1], [0, 1]], [[5000, 1]], [[0, 10**13]], [[10**30, 1]], 7, [["a", 1]]):
        assert refused(run, 0, i, with_params(run[0][i], gpas=ranges))


# --- records that say less -----------------------------------------------------------------------


def test_no_successful_call_hides_its_state_its_status_or_its_bundle(run: Traces) -> None:
    for side in (0, 1):
        for step in {r.step for r in run[side] if r.kind == "leaf"}:
            i = at(run[side], step)
            record = run[side][i]
            assert "op_state" in refused(run, side, i, replace(record, state={}))
            assert "no status" in refused(run, side, i, replace(record, status=None))
            if record.message is not None:
                assert "bundle" in refused(run, side, i, replace(record, message=None))


def test_no_call_hides_a_parameter(run: Traces) -> None:
    for side, step, name in (
        (0, "export_mem", "stream"),
        (0, "export_mem", "operation"),
        (0, "export_state_vp", "vcpu"),
        (0, "vp_enter", "vcpu"),
        (1, "import_mem", "stream"),
        (1, "import_state_vp", "vcpu"),
    ):
        i = at(run[side], step)
        fewer = {key: value for key, value in run[side][i].params.items() if key != name}
        assert f"has a {name}" in refused(run, side, i, replace(run[side][i], params=fewer))
        assert refused(run, side, i, with_params(run[side][i], **{name: 99}))


def test_the_abort_token_is_checked(aborted: Traces) -> None:
    i = at(aborted[1], "import_abort")
    message = aborted[1][i].message
    assert message is not None
    for change in ({"stream": 1}, {"kind": "MEM"}, {"epoch": 3}, {"n": 1}, {"mb_counter": 5}):
        forged = replace(aborted[1][i], message=replace(message, **change))
        assert refused(aborted, 1, i, forged)
    assert "import_abort" in refused(aborted, 1, i, replace(aborted[1][i], message=None))


# --- events and their calls ----------------------------------------------------------------------


def test_the_programs_cover_the_events() -> None:
    for side, programs in PROGRAMS.items():
        assert list(programs) == lifecycle_events(side)


def without(trace: Trace, index: int) -> Trace:
    return trace[:index] + trace[index + 1 :]


def test_no_event_is_without_its_calls_and_no_call_without_its_event(run: Traces) -> None:
    for side in (0, 1):
        steps = {r.step for r in run[side] if r.kind == "lifecycle"}
        for step in steps:
            i = at(run[side], step, "lifecycle")
            changed = [list(run[0]), list(run[1])]
            changed[side] = without(run[side], i)
            if step != "cleanup":  # its absence is that of a side which was killed just before
                assert not judge_records(changed).ok, step
            noted = replace(run[side][i], kind="note")
            if step != "cleanup":
                assert refused(run, side, i, noted), step
    for kind in ("leaf", "lifecycle"):
        bare = [[r for r in trace if r.kind != kind] for trace in run]
        assert not judge_records(bare).ok


def test_a_vcpu_event_is_that_of_its_vcpu(run: Traces) -> None:
    i = at(run[0], "export_vcpu_state", "lifecycle")
    for vcpu in (1, 99, "x", None):
        assert refused(run, 0, i, with_params(run[0][i], vcpu=vcpu))


def test_the_phase_that_a_lifecycle_record_shows_is_compared(run: Traces) -> None:
    i = at(run[1], "import_epoch", "lifecycle")
    reason = refused(run, 1, i, replace(run[1][i], state={"lifecycle": "CLOSED"}))
    assert "lifecycle CLOSED" in reason


# --- the beginning -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "state", "says"),
    [
        ({"profile": "tdx-1.5.01"}, {}, "recorded under profile"),
        ({"pages": 10**13}, {}, "pages"),
        ({"pages": -5}, {}, "pages"),
        ({"vcpus": 0}, {}, "vcpus"),
        ({"streams": 10**10}, {}, "streams"),
        ({"streams": "1"}, {}, "streams"),
        ({}, {"op_state": "NONSENSE"}, "begins in"),
        ({}, {"op_state": "POST_EXPORT"}, "begins in"),
        ({}, {"mig_epoch": "x"}, "mig_epoch"),
        ({}, {"total_mb_count": None}, "total_mb_count"),
        ({}, {"next_mb_counter": 3}, "next_mb_counter"),
        ({}, {"next_mb_counter": [1 << 70]}, "next_mb_counter"),
    ],
)
def test_a_beginning_that_cannot_be_is_a_usage_error(
    run: Traces, params: Mapping[str, object], state: Mapping[str, object], says: str
) -> None:
    first = run[0][0]
    changed = dataclasses.replace(
        first, params={**first.params, **params}, state={**first.state, **state}
    )
    with pytest.raises(UsageError, match=says):
        judge_records([[changed, *run[0][1:]], run[1]])


def test_there_is_one_beginning_and_it_is_first(run: Traces) -> None:
    with pytest.raises(UsageError, match="second beginning"):
        judge_records([[*run[0], run[0][0]], run[1]])
    with pytest.raises(UsageError, match="begins with an attach record"):
        judge_records([[run[0][1], run[0][0], *run[0][2:]], run[1]])


# --- hostile files -------------------------------------------------------------------------------


def line(**change: object) -> str:
    whole = {"v": 1, "seq": 0, "t": 1.0, "side": "source", "session": "00", "kind": "note"}
    return json.dumps({**whole, "step": "attach", "params": {}, "state": {}, **change})


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000 + "]" * 200_000,
        line().replace("1.0", "NaN"),
        line().replace("1.0", "1" + "0" * 5000),
        line().replace("1.0", "1" + "0" * 400),
        "\0" * 10,
        '"' + "x" * (17 << 20) + '"',
        line()[:-1] + ', "side": "destination"}',
    ],
    ids=["deep", "nan", "long", "large", "zeros", "line", "twice"],
)
def test_a_hostile_line_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hostile"
    path.write_text(text + "\n")
    with pytest.raises(WireError, match="line 1:"):
        list(read_trace(path))


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    opened: list[Callable[[], object]] = [
        lambda: TraceWriter(fifo, "source", "00"),
        lambda: judge_one(fifo),
        lambda: judge_one(tmp_path),
        lambda: judge_one("/dev/zero"),
    ]
    for attempt in opened:
        with pytest.raises(UsageError, match=r"cannot (read|write) the trace"):
            attempt()


def test_numbers_beyond_every_word_are_no_step(run: Traces) -> None:
    huge = 1 << 200
    for side, trace in enumerate(run):
        for i, record in enumerate(trace[1:], start=1):
            for name in record.params:
                if record.kind != "note":
                    assert refused(run, side, i, with_params(record, **{name: huge}))
            if record.message is not None and i < 40:
                for name in ("stream", "iv", "epoch", "mb_counter", "n"):
                    changed = replace(record.message, **{name: huge})
                    assert refused(run, side, i, replace(record, message=changed))
            if i > 20:
                break


def test_one_hostile_trace_alone_has_a_verdict_or_an_error(run: Traces) -> None:
    for trace in run:
        for i, record in enumerate(trace[1:40], start=1):
            if record.message is None:
                continue
            for change in ({"kind": "NONSENSE"}, {"stream": 400}, {"epoch": 1 << 70}, {"iv": -1}):
                message = replace(record.message, **change)  # type: ignore[arg-type]
                try:
                    ok = judge_records(
                        [[*trace[:i], replace(record, message=message), *trace[i + 1 :]]]
                    ).ok
                except TdxmigError:
                    continue
                assert not ok, (record.step, change)
