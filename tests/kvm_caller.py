"""A caller of KVM's interface that packs its own structures, as a C program would."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
from soft_pair import Pair

from tdxmig_model.backend.softkvm import SoftKvm

COMMAND, SET_ATTR, GET_ATTR, HAS_ATTR = 0xC008AEBA, 0x4018AEE1, 0x4018AEE2, 0x4018AEE3
CREATE, CHECK_EXTENSION, GET_LOG, CLEAR_LOG = 0xC00CAEE0, 0x0000AE03, 0x4010AE42, 0xC018AEC0
TYPES = {"Gen-1a": 11, "Gen-1b": 12}
EXPORT_IMMUTABLE, IMPORT_IMMUTABLE, EXPORT_MEM, IMPORT_MEM, EXPORT_TRACK, IMPORT_TRACK = range(
    9, 15
)
PAUSE, EXPORT_TD, IMPORT_TD, EXPORT_VP, IMPORT_VP, ABORT, IMPORT_END = range(15, 22)
START = 1 << 63
MIGRATE, CANCEL = 1 << 52, 2 << 52


class Caller:
    """Streams of one SoftKvm, used through addresses alone."""

    def __init__(self, kvm: SoftKvm) -> None:
        self.kvm = kvm
        self.word = ctypes.c_uint64()
        self.fds: list[int] = []

    def attributes(self, fd: int, request: int, pages: int = 0, version: int = 0) -> tuple:
        """The result, and the structure afterwards: version, pages, streams."""
        data = ctypes.create_string_buffer(struct.pack("<III", version, pages, 7), 12)
        attr = ctypes.create_string_buffer(
            struct.pack("<IIQQ", 0, 1, 12, ctypes.addressof(data)), 24
        )
        code = self.kvm.ioctl(fd, request, ctypes.addressof(attr))
        return code, struct.unpack("<III", data.raw)

    def stream(self, pages: int = 512) -> int:
        """A stream with its attributes set."""
        fd = self.kvm.create_device(TYPES[self.kvm.dialect.name], False)
        assert fd > 0
        assert self.attributes(fd, SET_ATTR, pages)[0] == 0
        self.fds.append(fd)
        return fd

    def call(self, fd: int, number: int, value: int | None = 0, data: int = 0) -> int:
        """A command with the address of a word, or with `data` if `value` is None."""
        if value is not None:
            self.word.value = value
            data = ctypes.addressof(self.word)
        layout = "<IIQQQ" if self.kvm.dialect.name == "Gen-1a" else "<IIQQ"
        words = (number, 0, data, 0, 0)[: 5 if self.kvm.dialect.name == "Gen-1a" else 4]
        raw = struct.pack(layout, *words)
        command = ctypes.create_string_buffer(raw, len(raw))
        code = self.kvm.ioctl(fd, COMMAND, ctypes.addressof(command))
        assert command.raw == raw  # the driver copies it in, and nothing out
        return code

    def ok(self, fd: int, number: int, value: int | None = 0, data: int = 0) -> int:
        """A command that must succeed; the word afterwards."""
        assert self.call(fd, number, value, data) == 0, hex(self.kvm.last_status)
        return self.word.value

    def view(self, fd: int, page: int, count: int = 1) -> ctypes.Array:
        """A mapping as bytes."""
        address = self.kvm.mmap(fd, count * 4096, page * 4096)
        assert address > 0
        return (ctypes.c_uint8 * (count * 4096)).from_address(address)

    def put(self, fd: int, page: int, data: bytes) -> None:
        """Write through a mapping that is taken away at once."""
        count = -(-len(data) // 4096)
        view = self.view(fd, page, count)
        ctypes.memmove(view, data, len(data))
        assert self.kvm.munmap(ctypes.addressof(view), count * 4096) == 0

    def get(self, fd: int, page: int, length: int) -> bytes:
        """Read through a mapping that is taken away at once."""
        count = -(-length // 4096)
        view = self.view(fd, page, count)
        data = bytes(view[:length])
        assert self.kvm.munmap(ctypes.addressof(view), count * 4096) == 0
        return data

    def entries(self, fd: int, count: int) -> list[int]:
        return list(struct.unpack(f"<{count}Q", self.get(fd, 1, 8 * count)))

    def export(self, fd: int, entries: list[int]) -> int:
        """EXPORT_MEM of raw entries; its result."""
        self.put(fd, 1, struct.pack(f"<{len(entries)}Q", *entries))
        return self.call(fd, EXPORT_MEM, len(entries))


class Callers:
    """Both ends of a pair of hosts, behind KVM's interface."""

    def __init__(self, pair: Pair, dialect: str, **options: bool) -> None:
        self.pair = pair
        self.source = Caller(SoftKvm(pair.source_host, pair.source.td, dialect, **options))
        self.destination = Caller(SoftKvm(pair.destination_host, pair.destination.td, dialect))

    def carry(self, here: int, there: int, pages: int, entries: int = 0) -> None:
        """Copy what lies in the mappings of a source stream to one of the destination."""
        for page, length in ((0, 48), (1, 8 * entries), (2, 16 * entries), (4, 4096 * pages)):
            if length:
                self.destination.put(there, page, self.source.get(here, page, length))

    def state(self, here: int, there: int, export: int, load: int) -> None:
        pages = self.source.ok(here, export)
        self.carry(here, there, pages)
        self.destination.ok(there, load, pages)

    def token(self, here: int, there: int, value: int = 0) -> None:
        self.source.ok(here, EXPORT_TRACK, value)
        self.carry(here, there, 0)
        self.destination.ok(there, IMPORT_TRACK, None)

    def memory(self, here: int, there: int, gpas: list[int]) -> None:
        assert self.source.export(here, [gpa | MIGRATE for gpa in gpas]) == 0
        assert not any(entry >> 56 & 31 for entry in self.source.entries(here, len(gpas)))
        self.carry(here, there, len(gpas), len(gpas))
        self.destination.ok(there, IMPORT_MEM, len(gpas))

    def end(self, here: int, there: int, vcpus: int) -> None:
        self.state(here, there, EXPORT_TD, IMPORT_TD)
        for _ in range(vcpus):
            self.state(here, there, EXPORT_VP, IMPORT_VP)
        self.token(here, there, START)

    def close(self) -> None:
        for caller in (self.source, self.destination):
            caller.kvm.shut_down()


def begin(ends, streams=1, pages=512):
    """Streams on both sides and a session; the descriptors, source first."""
    here = [ends.source.stream(pages) for _ in range(streams)]
    there = [ends.destination.stream(pages) for _ in range(streams)]
    ends.state(here[0], there[0], EXPORT_IMMUTABLE, IMPORT_IMMUTABLE)
    ends.token(here[0], there[0])
    return here, there


def gpas_of(ends):
    return [int(gpa) for gpa in ends.pair.gpas]


def dirty_log(caller, slot=0):
    """KVM_GET_DIRTY_LOG of a slot: one Boolean per page."""
    pages = caller.kvm.slot_pages
    bitmap = (ctypes.c_uint8 * (-(-pages // 64) * 8))()
    argument = struct.pack("<IIQ", slot, 0, ctypes.addressof(bitmap))
    buffer = ctypes.create_string_buffer(argument, 16)
    assert caller.kvm.ioctl(caller.kvm.vm_fd, GET_LOG, ctypes.addressof(buffer)) == 0
    return np.unpackbits(np.frombuffer(bitmap, np.uint8), count=pages, bitorder="little")


def clear_log(caller, first, count, bits=b"\xff" * 64, slot=0):
    bitmap = ctypes.create_string_buffer(bits, len(bits))
    raw = struct.pack("<IIQQ", slot, count, first, ctypes.addressof(bitmap))
    buffer = ctypes.create_string_buffer(raw, 24)
    return caller.kvm.ioctl(caller.kvm.vm_fd, CLEAR_LOG, ctypes.addressof(buffer))
