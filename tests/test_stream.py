"""Does ``tdxmig stream inspect`` keep the contract, and can a run be captured for it?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_inspection import changed, good_stream, two_channels, write
from test_wire import to_bytes

from tdxmig_model import cli
from tdxmig_model.errors import PeerLost
from tdxmig_model.inspection import Summary, inspect
from tdxmig_model.supervisor import RunOptions, run_migration
from tdxmig_model.transport import CapturedTransport, capture_paths, memory_pair
from tdxmig_model.wire import SourceAbort


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["stream", "inspect", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_good_stream_is_printed_record_by_record(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path, "good", to_bytes(good_stream()))
    code, out, err = run(capsys, str(path))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{path}: single-channel records"
    assert len(lines) == 2 + len(good_stream()) + 1
    assert lines[4].split() == [
        *("4209", "16547", "memory", "0", "1", "1", "3"),
        *("ram_offset", "0x2000,", "ram_flags", "0x400,", "block", "pc.ram,", "flags", "0x0,"),
        *("buf_list_num", "4,", "num_gpas", "4,", "GPAs", "0x2000..0x6000"),
    ]
    size = path.stat().st_size
    assert lines[-1] == (
        f"13 records, 10 bundles, 8 GPA list entries, {size} bytes: nothing is wrong"
    )


def test_a_problem_is_printed_with_its_byte_and_is_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(write(tmp_path, "bad", to_bytes(changed(2, mb_counter=7))))
    code, out, _ = run(capsys, "--problems", path)
    assert code == 1
    record, problem, last = out.splitlines()[2:]
    assert record.split()[:3] == ["4209", "16547", "memory"]
    assert problem.split() == ["4209", "!!", "MB_COUNTER", "7,", "expected", "1"]
    assert last.endswith(": 1 problem")


def test_the_json_object_has_every_record_and_every_problem(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = [str(path) for path in two_channels(tmp_path)]
    code, out, err = run(capsys, "--json", *paths)
    found = json.loads(out)
    assert (code, err, found["ok"], found["errors"]) == (0, "", True, [])
    assert [one["file"] for one in found["bundles"]] == (
        [paths[0]] * 9 + [paths[1]] * 2 + [paths[2]] * 4
    )
    assert found["records"] == len(found["bundles"]) == 15
    assert found["bundles"][0]["mbmd"]["num_forward_streams"] == 2
    assert found["bundles"][10]["gpas"] == [
        {"first": 0x2000, "count": 4, "operation": "MIGRATE", "status": "SUCCESS", "pending": False}
    ]


def test_problems_of_the_whole_are_printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = [str(path) for path in two_channels(tmp_path, total=8)]
    code, out, _ = run(capsys, *paths)
    assert code == 1
    assert "!! all files: the start token counts 8 bundles, and 9 are in these files" in out
    code, out, _ = run(capsys, "--json", "--problems", *paths)
    found = json.loads(out)
    assert (code, found["ok"], found["bundles"]) == (1, False, [])
    assert [(one["file"], one["offset"]) for one in found["errors"]] == [(None, None)]


def test_a_missing_file_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good, absent = write(tmp_path, "good", to_bytes(good_stream())), tmp_path / "absent"
    code, out, err = run(capsys, "--json", str(good), str(absent))
    assert code == 2
    assert err == f"tdxmig: cannot read {absent}: No such file or directory\n"
    assert json.loads(out)["kind"] == "UsageError"


def test_an_empty_file_holds_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "--json", str(write(tmp_path, "empty", b"")))
    assert code == 0
    assert json.loads(out)["bundles"] == []


def test_text_of_a_peer_does_not_reach_the_terminal_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wire = to_bytes([SourceAbort("why not")]).replace(b" ", b"\x1b")
    _, out, _ = run(capsys, str(write(tmp_path, "evil", wire)))
    assert "reason why?not" in out
    assert "\x1b" not in out


# Captures.


def test_a_captured_run_has_nothing_wrong_and_all_its_pages(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "capture"
    result = run_migration(RunOptions(memory=1 << 20, vcpus=2, capture=folder))
    assert result.ok
    summary = Summary()
    names = [entry.record for _, entry in inspect(list(capture_paths(folder)), summary)]
    assert summary.errors == []
    assert (summary.bundles, summary.pages) == (result.bundles, result.pages_sent)
    assert (names.count("HELLO"), names.count("start token"), names[-1]) == (2, 1, "COMMITTED")
    assert capture_paths(folder)[0].stat().st_size == result.bytes


def test_a_capture_that_cannot_be_written_does_not_end_the_migration(tmp_path: Path) -> None:
    capture_paths(tmp_path)[0].symlink_to("/dev/full")
    result = run_migration(RunOptions(memory=1 << 20, vcpus=1, guest="idle", capture=tmp_path))
    assert (result.ok, result.memory_equal) == (True, True)
    assert result.cause.startswith("the capture is not whole: [Errno 28]")


def test_a_capture_holds_both_directions(tmp_path: Path) -> None:
    ours, theirs = memory_pair()
    captured = CapturedTransport(ours, tmp_path, channel=3)
    captured.send([b"one", bytearray(b"two")])
    assert theirs.recv(100) == b"onetwo"
    theirs.send([b"abcdef"])
    assert captured.poll()
    assert captured.recv(2) == b"ab"
    buffer = bytearray(3)
    assert captured.recv_into(buffer) == 3
    assert (captured.bytes_sent, captured.bytes_received, captured.peer) == (
        ours.bytes_sent,
        ours.bytes_received,
        ours.peer,
    )
    captured.close()
    captured.close()
    forward, back = capture_paths(tmp_path, 3)
    assert (forward.read_bytes(), back.read_bytes()) == (b"onetwo", b"abcde")
    assert captured.failure is None


def test_what_could_not_be_sent_is_in_the_capture(tmp_path: Path) -> None:
    ours, theirs = memory_pair()
    captured = CapturedTransport(ours, tmp_path)
    theirs.close()
    with pytest.raises(PeerLost):
        captured.send([b"lost"])
    assert capture_paths(tmp_path)[0].read_bytes() == b"lost"
    absent = CapturedTransport(ours, tmp_path / "absent")
    assert absent.failure is not None
