"""Memory records as multifd packets and back: the engine has records, a side channel packets.

What a packet says beside its bundle is where its pages are in the RAM block, once per page; a
record says it for the first page only.  Nobody authenticates either, so both are compared with the
GPAs of the list, which are.
"""

from __future__ import annotations

from tdxmig_model.engine.steps import RamBlock
from tdxmig_model.errors import PeerError, UsageError
from tdxmig_model.wire.gpa_list import entries_from_bytes, entry_gpas
from tdxmig_model.wire.multifd import QEMU_SLOTS, PrivatePacket
from tdxmig_model.wire.records import MemoryRecord, cancels


def packet_of(
    record: MemoryRecord, ram: RamBlock, packet_num: int, *, slots: int = QEMU_SLOTS
) -> PrivatePacket:
    """The record as a packet with room for `slots` offsets; `ram` says where its pages are.

    UsageError: it has more pages than that.
    """
    gpas = entry_gpas(entries_from_bytes(record.bundle.gpa_list)).tolist()
    if len(gpas) > slots:
        raise UsageError(
            f"a bundle of {len(gpas)} pages does not fit into a packet of {slots}; "
            "export smaller batches"
        )
    offsets = tuple(ram.offset(gpa) for gpa in gpas)
    return PrivatePacket(packet_num, record.block, offsets, record.bundle, slots=slots)


def record_of(packet: PrivatePacket, ram: RamBlock) -> MemoryRecord:
    """The packet as a record.  PeerError: an offset stands for another page than its entry."""
    entries = entries_from_bytes(packet.bundle.gpa_list)
    for offset, gpa in zip(packet.offsets, entry_gpas(entries).tolist(), strict=True):
        if ram.gpa(offset) != gpa:
            raise PeerError(
                f"packet {packet.packet_num} says offset {offset:#x} (GPA {ram.gpa(offset):#x}), "
                f"its bundle has GPA {gpa:#x} there"
            )
    return MemoryRecord(packet.offsets[0], packet.block, packet.bundle, cancels(packet.bundle))
