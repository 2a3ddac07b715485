"""Are the payloads the bytes that the seed writes for the same calls, from the same shared pages?

What the seed writes is put together here by hand: it reads the pages that the TDX module wrote
(MBMD, GPA list, MAC lists, buffers) after each call, in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tdxmig_model.backend.soft.backend import SoftBackend, soft_destination, soft_source
from tdxmig_model.engine import RamBlock, Send, SourceEngine, drive
from tdxmig_model.engine.commands import Command, Result
from tdxmig_model.engine.packets import packet_of
from tdxmig_model.wire import Hello, MemoryRecord, encode, encode_packet
from tdxmig_model.wire.extensions import Capability

SESSION = bytes(range(16))
PAGES, VCPUS = 300, 2


class Seed:
    """A source TD whose shared pages are looked at after each call of its module."""

    def __init__(self) -> None:
        self.backend: SoftBackend = soft_source(PAGES, vcpus=VCPUS)
        other = soft_destination(PAGES, vcpus=VCPUS)
        self.backend.write_migration_decryption_key(other.read_migration_encryption_key())
        self.engine = SourceEngine(SESSION, pages=PAGES, vcpus=VCPUS)
        self.parts: list[dict[str, bytes]] = []

    def execute(self, command: Command) -> Result:
        result = self.backend.execute(command)
        if result.bundle is not None:
            self.parts.append(self._shared_pages(len(result.bundle.pages)))
        return result

    def _shared_pages(self, count: int) -> dict[str, bytes]:
        memory = self.backend.host.memory.bytes
        buffers = self.backend.host.stream_buffers(0)

        def read(at: int, length: int) -> bytes:
            return bytes(memory[at : at + length])

        size = int.from_bytes(read(buffers.mbmd, 2), "little")
        first_macs, second_macs = min(count, 256), max(0, count - 256)
        return {
            "mbmd": read(buffers.mbmd, size),
            "pages": read(buffers.buffers, 4096 * count),
            "gpas": read(buffers.gpas, 8 * count),
            "macs": read(buffers.macs_low, 16 * first_macs)
            + read(buffers.macs_high, 16 * second_macs),
        }

    def sends(self, operation: Any) -> list[Any]:
        sent: list[Send] = []
        drive(operation, self.execute, sent.append)
        return [send.record for send in sent]


def wire(records: Sequence[Any]) -> bytes:
    return b"".join(buffer for record in records for buffer in encode(record))


def header(flags: int, count: int) -> bytes:
    return flags.to_bytes(2, "little") + count.to_bytes(2, "little")


def state(parts: dict[str, bytes], flags: int) -> bytes:
    count = len(parts["pages"]) // 4096
    return header(flags, count) + parts["mbmd"] + parts["pages"]


def word(value: int) -> bytes:
    return value.to_bytes(8, "big")


def test_a_whole_single_channel_migration_is_what_the_seed_writes() -> None:
    seed = Seed()
    engine = seed.engine
    sent = wire(seed.sends(engine.export_immutable()))
    assert sent == b"\x09" + state(seed.parts[-1], 0)
    sent = wire(seed.sends(engine.start_epoch()))
    assert sent == word(0x800) + header(0, 0) + seed.parts[-1]["mbmd"]
    seed.sends(engine.pause())
    for gpa in range(0, PAGES * 4096, 4096):
        sent = wire(seed.sends(engine.export_memory(np.array([gpa], dtype=np.uint64))))
        part = seed.parts[-1]
        name = b"\x06pc.ram" if not gpa else b""
        flags = 0x400 if not gpa else 0x420
        bundle = header(0, 1) + part["mbmd"] + part["pages"] + part["gpas"] + part["macs"]
        assert sent == word(gpa | flags) + name + bundle
        assert len(bundle) == 4172
    sent = wire(seed.sends(engine.export_td_state()))
    assert sent == b"\x0a" + state(seed.parts[-1], 1)
    for vcpu in range(VCPUS):
        sent = wire(seed.sends(engine.export_vcpu_state(vcpu)))
        assert sent == state(seed.parts[-1], 1)
    sent = wire(seed.sends(engine.finish_epochs()))
    assert sent == header(0, 0) + seed.parts[-1]["mbmd"] + b"\x7e"


def test_a_cancel_is_what_the_seed_writes_but_for_the_flag() -> None:
    """Its flag cannot be told from the offset, so ours has that of memory (specs/extensions.md)."""
    seed = Seed()
    engine = seed.engine
    engine.receive(Hello(SESSION, Capability.CANCEL, PAGES, VCPUS, 1))
    page = np.array([0x5000], dtype=np.uint64)
    for operation in (engine.export_immutable(), engine.start_epoch(), engine.pause()):
        seed.sends(operation)
    seed.sends(engine.export_memory(page))
    seed.sends(engine.start_epoch())
    sent = wire(seed.sends(engine.cancel_page(page)))
    part = seed.parts[-1]
    bundle = header(0, 1) + part["mbmd"] + part["pages"] + part["gpas"] + part["macs"]
    assert sent == word(0x5420) + bundle
    assert part["gpas"] == (0x5000 | 2 << 52).to_bytes(8, "little")


@pytest.mark.parametrize("count", [1, 128, 256, 257, 300])
def test_a_private_packet_has_the_buffers_of_the_seed(count: int) -> None:
    seed = Seed()
    engine = seed.engine
    engine.receive(Hello(SESSION, Capability.BATCH, PAGES, VCPUS, 1))
    for operation in (engine.export_immutable(), engine.start_epoch(), engine.pause()):
        seed.sends(operation)
    gpas = np.arange(count, dtype=np.uint64) * np.uint64(4096)
    (record,) = seed.sends(engine.export_memory(gpas))
    assert isinstance(record, MemoryRecord)
    part = seed.parts[-1]
    buffers = encode_packet(packet_of(record, RamBlock(), 1, slots=512))
    pages = [part["pages"][at : at + 4096] for at in range(0, 4096 * count, 4096)]
    macs = [part["macs"][at : at + 4096] for at in range(0, 16 * count, 4096)]
    assert buffers[1:] == [part["mbmd"], part["gpas"], *macs, *pages]
    assert int.from_bytes(buffers[0][20:24], "big") == sum(map(len, buffers[1:]))
