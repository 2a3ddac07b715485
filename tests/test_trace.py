"""Does a trace say what happened, in the published format, and does a damaged one say where?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tdxmig_model.errors import UsageError, WireError
from tdxmig_model.trace import (
    KINDS,
    SIDES,
    Message,
    TraceWriter,
    expand_ranges,
    message_of,
    page_ranges,
    read_trace,
)
from tdxmig_model.wire.constants import START_EPOCH
from tdxmig_model.wire.mbmd import BundleType, Mbmd

SCHEMA = json.loads((Path(__file__).parent.parent / "specs" / "trace.schema.json").read_text())
SESSION = bytes(range(16))


def gpas(*pages: int) -> np.ndarray:
    return np.array(pages, dtype=np.uint64) * np.uint64(4096)


def write_example(path: Path) -> None:
    ticks = iter(range(100))
    with TraceWriter(path, "source", SESSION, clock=lambda: float(next(ticks))) as trace:
        trace.lifecycle("setup", {"streams": 1}, "SETUP")
        trace.record(
            "export_mem",
            {"stream": 0, "gpas": gpas(4, 5, 6, 9), "operation": np.uint8(1)},
            {"op_state": "LIVE_EXPORT", "next_mb_counter": [2]},
            message_of(Mbmd.memory(num_gpas=4, mb_counter=1, mig_epoch=0, iv_counter=3), 4),
            status=0,
            status_name="TDX_SUCCESS",
        )
        token = Mbmd.epoch_token(total_mb=4, mig_epoch=START_EPOCH, iv_counter=9)
        trace.record("export_track_start", {}, {"op_state": "POST_EXPORT"}, message_of(token, 0))
        trace.note("the destination committed", after=2)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_example(tmp_path / "a.ndjson")
    setup, memory, token, note = read_trace(tmp_path / "a.ndjson")
    assert [record.seq for record in (setup, memory, token, note)] == [0, 1, 2, 3]
    assert [record.t for record in (setup, memory, token, note)] == [0.0, 1.0, 2.0, 3.0]
    assert {record.session for record in (setup, memory)} == {SESSION.hex()}
    assert (setup.kind, setup.step, setup.state) == ("lifecycle", "setup", {"lifecycle": "SETUP"})
    assert memory.params == {"stream": 0, "gpas": [[4, 3], [9, 1]], "operation": 1}
    assert memory.gpas().tolist() == gpas(4, 5, 6, 9).tolist()
    assert memory.message == Message(0, 3, "MEM", 0, 1, None, 4)
    assert (memory.status, memory.status_name) == (0, "TDX_SUCCESS")
    assert token.message == Message(0, 9, "EPOCH_TOKEN", START_EPOCH, 0, 4, 0)
    assert note.params == {"text": "the destination committed", "after": 2}
    assert token.gpas().size == 0


@pytest.mark.parametrize(
    ("pages", "ranges"),
    [
        ([], []),
        ([7], [[7, 1]]),
        ([0, 1, 2], [[0, 3]]),
        ([2, 1, 0], [[2, 1], [1, 1], [0, 1]]),
        ([5, 5, 6], [[5, 1], [5, 2]]),
        ([1 << 39, (1 << 39) + 1], [[1 << 39, 2]]),
    ],
)
def test_page_ranges_keep_order_and_duplicates(pages: list[int], ranges: list[list[int]]) -> None:
    assert page_ranges(gpas(*pages)) == ranges
    assert expand_ranges(ranges).tolist() == gpas(*pages).tolist()


def test_ranges_of_nonsense_are_refused() -> None:
    for ranges in (7, [[1]], [[1, 0]], [[-1, 2]], ["ab"]):
        with pytest.raises(UsageError, match="page range"):
            expand_ranges(ranges)


def test_nothing_is_on_disk_before_flush_and_whole_lines_after(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    trace = TraceWriter(path, "destination", SESSION)
    trace.record("import_mem", {}, {})
    assert path.read_bytes() == b""
    trace.flush()
    assert path.read_bytes().endswith(b"\n")
    assert [record.step for record in read_trace(path)] == ["import_mem"]
    trace.close()
    trace.close()


@pytest.mark.parametrize(
    ("damage", "line", "field"),
    [
        (lambda text: text[:-20], 4, "line"),
        (lambda text: text.replace('"step":"export_mem",', ""), 2, "step"),
        (lambda text: text.replace('"seq":1', '"seq":5'), 2, "seq"),
        (lambda text: text.replace('"seq":1', '"seq":true'), 2, "seq"),
        (lambda text: text.replace('"v":1', '"v":2', 1), 1, "v"),
        (lambda text: text.replace('"side":"source"', '"side":"middle"', 1), 1, "side"),
        (lambda text: text.replace('"mb_counter":1', '"mb_counter":"1"'), 2, "mb_counter"),
        (lambda text: text.replace('"message":{', '"message":[{', 1), 2, "line"),
        (lambda text: text.replace("{", "", 1), 1, "line"),
        (lambda text: text.replace("\n", "\n\n", 1), 2, "line"),
        (lambda text: text.replace('"status":0', '"status":"0"'), 2, "status"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage, line: int, field: str) -> None:
    path = tmp_path / "a.ndjson"
    write_example(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(WireError, match=f"line {line}:") as caught:
        list(read_trace(path))
    assert caught.value.field == field


def test_unusable_files_and_values_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the trace"):
        list(read_trace(tmp_path / "absent"))
    with pytest.raises(UsageError, match="cannot write the trace"):
        TraceWriter(tmp_path / "absent" / "a", "source", SESSION)
    with pytest.raises(UsageError, match="'middle'"):
        TraceWriter(tmp_path / "a", "middle", SESSION)
    with (
        TraceWriter(tmp_path / "a", "source", SESSION) as trace,
        pytest.raises(UsageError, match="cannot be written"),
    ):
        trace.record("setup", {"what": object()})


def test_every_record_has_the_form_of_the_schema(tmp_path: Path) -> None:
    write_example(tmp_path / "a.ndjson")
    lines = [json.loads(line) for line in (tmp_path / "a.ndjson").read_text().splitlines()]
    for line in lines:
        assert list(violations(line, SCHEMA)) == []
    memory = lines[1]
    for name in SCHEMA["required"]:
        cut = {key: value for key, value in memory.items() if key != name}
        assert list(violations(cut, SCHEMA)) == [f"{name} is missing"]
    assert list(violations({**memory, "extra": 1}, SCHEMA)) == ["extra is unknown"]
    assert list(violations({**memory, "t": "0"}, SCHEMA)) == ["t: not a number"]


def test_schema_and_code_agree_on_words() -> None:
    properties = SCHEMA["properties"]
    assert tuple(properties["side"]["enum"]) == SIDES
    assert tuple(properties["kind"]["enum"]) == KINDS
    assert properties["message"]["properties"]["kind"]["enum"] == [kind.name for kind in BundleType]
    assert properties["message"]["required"] == list(Message.__slots__)


JSON_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


def violations(value: object, schema: dict, name: str = "record"):
    """The part of JSON Schema that the trace schema uses, as messages."""
    kinds = schema.get("type", list(JSON_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(value, bool) or not any(isinstance(value, JSON_TYPES[kind]) for kind in kinds):
        yield f"{name}: not a {' or '.join(kinds)}"
        return
    if "const" in schema and value != schema["const"]:
        yield f"{name}: not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{name}: {value!r} is none of the words"
    if "minimum" in schema and isinstance(value, int) and value < schema["minimum"]:
        yield f"{name}: below {schema['minimum']}"
    if isinstance(value, list):
        for item in value:
            yield from violations(item, schema.get("items", {}), name)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (f"{key} is missing" for key in schema.get("required", ()) if key not in value)
        if schema.get("additionalProperties") is False:
            yield from (f"{key} is unknown" for key in value if key not in known)
        for key, item in value.items():
            if key in known:
                yield from violations(item, known[key], key)
