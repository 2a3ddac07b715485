"""Does the generated dissector hold every field, and does Wireshark read with it what we read?"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from test_inspection import good_stream
from test_multifd import every_packet
from test_multifd import to_bytes as packets_to_bytes
from test_wire import every_record, to_bytes

from tdxmig_model import cli
from tdxmig_model.export import wireshark
from tdxmig_model.export.wireshark import field_names
from tdxmig_model.inspection import Entry
from tdxmig_model.inspection.channels import MultifdWalker, RecordWalker, ReturnPathWalker
from tdxmig_model.inspection.judge import Judge, Totals
from tdxmig_model.inspection.reader import Reader
from tdxmig_model.inspection.walker import Walker
from tdxmig_model.wire import (
    AbortToken,
    Committed,
    Failed,
    Hello,
    Mbmd,
    SessionStarted,
    encode_return,
)
from tdxmig_model.wire.layout import MBMD_SPECIFIC, STRUCTURES

TSHARK = shutil.which("tshark")
needs_tshark = pytest.mark.skipif(TSHARK is None, reason="tshark is not installed")
PORT = 4444


def test_every_field_of_the_tables_stands_in_the_text() -> None:
    text = wireshark()
    expected = {f"tdxmig.{one.name}.{field.name}" for one in STRUCTURES for field in one.fields}
    expected |= {f"tdxmig.mbmd.{field.name}" for own in MBMD_SPECIFIC.values() for field in own}
    assert set(field_names()) == expected
    for name in field_names():
        assert text.count(f'"{name}"') == 1, name
    assert wireshark() == text


def return_path() -> bytes:
    hello = every_record()[0]
    assert isinstance(hello, Hello)
    mbmd = Mbmd.abort_token(mb_counter=0, iv_counter=1)
    messages = [hello, SessionStarted(), AbortToken(mbmd), Failed("why"), Committed(bytes(32))]
    return b"".join(map(encode_return, messages))


STREAMS: dict[str, tuple[type[Walker], Callable[[], bytes]]] = {
    "good": (RecordWalker, lambda: to_bytes(good_stream())),
    "every record": (RecordWalker, lambda: to_bytes(every_record())),
    "multifd": (MultifdWalker, lambda: packets_to_bytes(every_packet())),
    "return path": (ReturnPathWalker, return_path),
}
COLUMNS = ("mb_counter", "mig_epoch", "iv_counter", "migs_index")


def capture(data: bytes, segment: int) -> bytes:
    """One TCP connection as a pcap file of raw IP packets."""
    packets = [struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 1 << 18, 101)]
    for number, at in enumerate(range(0, len(data), segment)):
        piece = data[at : at + segment]
        ports = (50000, PORT, at + 1, 1)
        tcp = struct.pack(">HHIIBBHHH", *ports, 5 << 4, 0x18, 65535, 0, 0) + piece
        local = bytes((127, 0, 0, 1))
        head = (0x45, 0, 20 + len(tcp), number & 0xFFFF, 0, 64, 6, 0, local, local)
        packet = struct.pack(">BBHHHBBH4s4s", *head) + tcp
        packets.append(struct.pack("<IIII", number, 0, len(packet), len(packet)) + packet)
    return b"".join(packets)


def tshark(folder: Path, *arguments: str) -> str:
    assert TSHARK is not None
    script = folder / "tdxmig.lua"
    script.write_text(wireshark())
    ran = subprocess.run(
        [TSHARK, "-X", f"lua_script:{script}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "HOME": str(folder)},
    )
    assert "tdxmig.lua" not in ran.stderr, ran.stderr
    return ran.stdout


def read_by_tshark(folder: Path, data: bytes, segment: int, *names: str) -> list[list[str]]:
    """All values of each field in the order of the stream."""
    path = folder / "stream.pcap"
    path.write_bytes(capture(data, segment))
    wanted = [word for name in names for word in ("-e", f"tdxmig.{name}")]
    port = f"tcp.port=={PORT},tdxmig"
    out = tshark(folder, "-r", str(path), "-d", port, "-T", "fields", *wanted)
    rows = [line.split("\t") for line in out.splitlines()]
    columns = zip(*(row for row in rows if len(row) == len(names)), strict=True)
    return [[one for cell in column for one in cell.split(",") if cell] for column in columns]


def read_by_us(kind: type[Walker], data: bytes) -> list[Entry]:
    return list(kind(Reader(io.BytesIO(data)), Judge(alone=True, totals=Totals())).entries())


@needs_tshark
@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("segment", [1400, 61])
def test_wireshark_reads_what_we_read(tmp_path: Path, name: str, segment: int) -> None:
    kind, make = STREAMS[name]
    data = make()
    entries = read_by_us(kind, data)
    names = ("record", *(f"mbmd.{column}" for column in COLUMNS), "gpa.gpa", "gpa.operation")
    records, *rest, gpas, operations = read_by_tshark(tmp_path, data, segment, *names)
    assert records == [entry.record for entry in entries]
    bundles = [entry.mbmd for entry in entries if entry.mbmd is not None]
    for column, seen in zip(COLUMNS, rest, strict=True):
        assert [int(value, 0) for value in seen] == [mbmd[column] for mbmd in bundles], column
    pages = [
        (one.first + 4096 * index, one.operation)
        for entry in entries
        for one in entry.gpas
        for index in range(one.count)
    ]
    numbers = {"NOP": 0, "MIGRATE": 1, "CANCEL": 2, "REMIGRATE": 3}
    assert [int(value, 0) for value in gpas] == [gpa for gpa, _ in pages]
    assert [int(value, 0) for value in operations] == [numbers[one] for _, one in pages]


@needs_tshark
def test_wireshark_shows_every_field_of_the_tables(tmp_path: Path) -> None:
    names = [name.removeprefix("tdxmig.") for name in field_names()]
    shown = set()
    for _, make in STREAMS.values():
        columns = read_by_tshark(tmp_path, make(), 1400, *names)
        shown |= {name for name, values in zip(names, columns, strict=True) if values}
    assert shown == set(names)


@needs_tshark
def test_garbage_is_no_record_and_no_error_of_the_script(tmp_path: Path) -> None:
    for data in (b"\x33" * 100, bytes(100), b"\x09" + bytes(99), b"\x11\x22\x33\x44" + b"\xff" * 9):
        path = tmp_path / "garbage.pcap"
        path.write_bytes(capture(data, 50))
        port = f"tcp.port=={PORT},tdxmig"
        shown = tshark(tmp_path, "-r", str(path), "-d", port, "-V")
        assert "Lua Error" not in shown
        assert "immutable state" not in shown


def test_the_command_writes_the_file_and_takes_no_sizes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["export", "wireshark", "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "ok": True,
        "files": [str(tmp_path / "tdxmig.lua")],
        "warnings": [],
    }
    assert (tmp_path / "tdxmig.lua").read_text() == wireshark()
    assert cli.main(["export", "wireshark", "leaf", "--out", str(tmp_path)]) == 2
    assert "wireshark takes no model and no sizes" in capsys.readouterr().err
