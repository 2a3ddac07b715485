"""The main channel of QEMU with everything around the migration of a TD (file format version 3).

::

    "QEVM" be32 3
    0x07 be32 length, machine name           configuration
    0x08 be16 command, be16 length, payload  command
    0x01 be32 id, u8 length, name, be32 instance, be32 version, content     a section begins
    0x02 be32 id, content                    a part of a section
    0x03 be32 id, content                    the end of a section
    0x7E be32 id                             footer of a section
    0x00                                     end of the file
    0x09, 0x0A                               the state of a TD, as in `RecordWalker`

The content of the section "ram" is RAM records up to 0x10.  What a device puts into its section has
no length, so reading ends there; the state of a TD comes before that.  Source: QEMU 8.1.
"""

from __future__ import annotations

import struct
from typing import Final

from tdxmig_model.inspection.channels import RecordWalker
from tdxmig_model.inspection.entry import Entry
from tdxmig_model.inspection.walker import Lost, NotDescribed
from tdxmig_model.wire.records import FOOTER, SECTION_END, SECTION_START, RamFlags

MAGIC: Final = b"QEVM"
VERSION: Final = 3
_END, _BEGIN, _PART, _LAST, _FULL = range(5)
_CONFIGURATION, _COMMAND = 0x07, 0x08
_MOST_NAME: Final = 4096


class QemuFileWalker(RecordWalker):
    """The records of a file or main channel that QEMU wrote."""

    _ram_id: int | None = None
    _open_id: int | None = None
    _in_ram = False

    def _read(self, entry: Entry) -> None:
        first = self.reader.peek(1)[0]
        if not entry.offset:
            self._read_head(entry)
        elif (
            self._chained
            or first in (SECTION_START, SECTION_END)
            or (first == FOOTER and self._footer_allowed)
        ):
            super()._read(entry)
        elif self._in_ram:
            self._read_ram(entry)
            self._in_ram = entry.record != "end of pass"
        else:
            self._footer_allowed = False
            self._read_section(entry, self.reader.take(1)[0])

    def _is_footer(self, first: int) -> bool:
        """The footer of the end section is its byte alone; that of a section has a number."""
        return first == FOOTER and self._footer_allowed

    def _read_head(self, entry: Entry) -> None:
        entry.record = "QEMU file"
        magic, version = struct.unpack(">4sI", self.reader.take(8))
        entry.fields["version"] = version
        if (magic, version) != (MAGIC, VERSION):
            raise Lost(0, f"version {version} of QEMU's file format, and only {VERSION} is known")

    def _read_section(self, entry: Entry, kind: int) -> None:
        if kind == _CONFIGURATION:
            entry.record = "configuration"
            entry.fields["machine"] = self._name(self._number(4))
        elif kind == _COMMAND:
            entry.record = "command"
            entry.fields["command"] = self._number(2)
            self.reader.skip(self._number(2))
        elif kind in (_BEGIN, _FULL):
            self._begin_section(entry, full=kind == _FULL)
        elif kind in (_PART, _LAST):
            self._go_on(entry, last=kind == _LAST)
        elif kind == FOOTER:
            self._read_footer(entry)
        elif kind == _END:
            entry.record = "end of file"
            raise NotDescribed("what may follow is a description for people")
        else:
            raise Lost(entry.offset, f"no section begins with {kind:#04x}")

    def _begin_section(self, entry: Entry, *, full: bool) -> None:
        entry.record = "section begins"
        number = self._number(4)
        name = self._name(self._number(1))
        entry.fields |= {"id": number, "name": name}
        entry.fields |= {"instance": self._number(4), "version": self._number(4)}
        if full or name != "ram":
            raise NotDescribed(f"the state of {name!r} has no length in the stream")
        self._ram_id = self._open_id = number
        self._in_ram = True
        self._read_sizes(entry)

    def _read_sizes(self, entry: Entry) -> None:
        """The RAM blocks and their sizes, which stand in front of all pages."""
        word = self._number(8)
        if word & 0xFFF != RamFlags.MEMORY_SIZE:
            at = self.reader.offset - 8
            raise Lost(at, f"RAM flags {word & 0xFFF:#x} where the sizes of the blocks belong")
        total, blocks = word & ~0xFFF, []
        left = total
        while left > 0:
            name, size = self._name(self._number(1)), self._number(8)
            if not 0 < size <= left:
                raise Lost(self.reader.offset - 8, f"RAM block {name!r} of {size} bytes")
            left -= size
            blocks.append(f"{name} {size:#x}")
        entry.fields["blocks"] = " ".join(blocks)

    def _go_on(self, entry: Entry, *, last: bool) -> None:
        entry.record = "section ends" if last else "section goes on"
        number = self._number(4)
        entry.fields["id"] = number
        if number != self._ram_id:
            raise NotDescribed(f"section {number} has no length in the stream")
        self._open_id, self._in_ram = number, True

    def _read_footer(self, entry: Entry) -> None:
        entry.record = "section footer"
        number = self._number(4)
        entry.fields["id"] = number
        if number != self._open_id:
            entry.blame(entry.offset, f"the footer of section {number}, open is {self._open_id}")
        self._open_id = None

    def _number(self, size: int) -> int:
        return int.from_bytes(self.reader.take(size), "big")

    def _name(self, length: int) -> str:
        if length > _MOST_NAME:
            raise Lost(self.reader.offset, f"a name of {length} bytes")
        return self.reader.take(length).decode("ascii", "backslashreplace")
