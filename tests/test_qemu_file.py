"""Is a main channel that QEMU wrote read up to where devices put their state?"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inspection import good_stream, texts, write
from test_wire import to_bytes

from tdxmig_model.inspection import Entry, Framing, Summary, inspect
from tdxmig_model.inspection.judge import Judge, Totals
from tdxmig_model.inspection.qemu_file import QemuFileWalker
from tdxmig_model.inspection.reader import Reader
from tdxmig_model.wire import EndOfPass, Record, SharedPage


def walk(data: bytes) -> list[Entry]:
    return list(QemuFileWalker(Reader(io.BytesIO(data)), Judge(True, Totals())).entries())


HEAD = b"QEVM" + struct.pack(">I", 3)
CONFIGURATION = b"\x07" + struct.pack(">I", 6) + b"pc-q35"
COMMAND = b"\x08" + struct.pack(">HHI", 3, 4, 9)
BLOCKS = (
    struct.pack(">Q", 0x3000 | 0x4)
    + b"\x06pc.ram"
    + struct.pack(">Q", 0x2000)
    + b"\x07pc.bios"
    + struct.pack(">Q", 0x1000)
)
RAM_BEGINS = b"\x01" + struct.pack(">I", 2) + b"\x03ram" + struct.pack(">II", 0, 4) + BLOCKS
RAM_GOES_ON, RAM_ENDS = b"\x02" + struct.pack(">I", 2), b"\x03" + struct.pack(">I", 2)
RAM_FOOTER = b"\x7e" + struct.pack(">I", 2)
DEVICE = b"\x04" + struct.pack(">I", 7) + b"\x05timer" + struct.pack(">II", 0, 2) + b"whatever"


def ram(*records: Record) -> bytes:
    return to_bytes([*records, EndOfPass()])


def a_file() -> bytes:
    start, *memory = good_stream()[:6]
    chain = good_stream()[7:12]
    shared = SharedPage(0x1000, "pc.bios", bytes(range(256)) * 16)
    return b"".join(
        [
            HEAD,
            CONFIGURATION,
            COMMAND,
            to_bytes([start]),
            RAM_BEGINS,
            ram(),
            RAM_FOOTER,
            RAM_GOES_ON,
            ram(*memory[:3], shared),
            RAM_FOOTER,
            RAM_ENDS,
            ram(*memory[3:]),
            RAM_FOOTER,
            to_bytes(chain),
            DEVICE,
        ]
    )


def test_a_file_of_qemu_is_read_up_to_the_first_device(tmp_path: Path) -> None:
    entries = walk(a_file())
    assert texts(entries) == []
    assert [entry.record for entry in entries] == [
        *("QEMU file", "configuration", "command", "immutable state"),
        *("section begins", "end of pass", "section footer"),
        *("section goes on", "epoch token", "memory", "memory", "shared page", "end of pass"),
        "section footer",
        *("section ends", "epoch token", "memory", "end of pass", "section footer"),
        *("end section", "TD state", "vCPU state", "start token", "footer"),
        "section begins",
    ]
    assert entries[1].fields["machine"] == "pc-q35"
    assert entries[4].fields["blocks"] == "pc.ram 0x2000 pc.bios 0x1000"
    assert entries[-1].fields["note"] == (
        "the state of 'timer' has no length in the stream; reading ends here"
    )
    assert sum(entry.length for entry in entries) == len(a_file()) - len(b"whatever")
    summary = Summary()
    found = list(inspect([write(tmp_path, "qemu", a_file())], summary))
    assert {file.framing for file, _ in found} == {Framing.QEMU_FILE}
    assert (summary.problems, summary.bundles) == (0, 9)


def test_without_the_footer_of_the_end_section_the_next_section_is_found() -> None:
    """The oldest generation does not write it; a section footer begins with the same byte."""
    data = a_file()
    at = data.rindex(b"\x7e" + DEVICE[:1])
    entries = walk(data[:at] + data[at + 1 :])
    assert texts(entries) == []
    assert [entry.record for entry in entries[-2:]] == ["start token", "section begins"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"QEVM\0\0\0\2", "version 2 of QEMU's file format, and only 3 is known"),
        (HEAD + b"\x33", "no section begins with 0x33"),
        (HEAD + RAM_BEGINS + ram() + b"\x7e\0\0\0\3", "the footer of section 3, open is 2"),
        (HEAD + RAM_BEGINS[:17] + bytes(8), "RAM flags 0x0 where the sizes of the blocks belong"),
        (HEAD + RAM_BEGINS[:-8] + b"\xff" * 8, "RAM block 'pc.bios' of 18446744073709551615"),
        (HEAD + b"\x07\xff\xff\xff\xff", "a name of 4294967295 bytes"),
        (HEAD + CONFIGURATION[:8], "the file ends inside this record: 3 of 6 bytes"),
    ],
)
def test_what_is_wrong_is_told(data: bytes, text: str) -> None:
    found = texts(walk(data))
    assert len(found) == 1
    assert found[0].startswith(text)


@pytest.mark.parametrize("data", [b"\x02\0\0\0\7", b"\0"])
def test_what_is_not_described_is_no_problem(data: bytes) -> None:
    entries = walk(HEAD + data + b"rest")
    assert texts(entries) == []
    assert str(entries[-1].fields["note"]).endswith("reading ends here")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_never_crash(data: st.DataObject) -> None:
    wire = bytearray(a_file())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wire) - 1))
        wire[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    at = 0
    for entry in walk(bytes(wire)):
        assert entry.offset == at
        at += entry.length
    assert at <= len(wire)
