"""Leaf calls with their lists written, for tests that schedule them, and what must hold after."""

import itertools

import numpy as np
from soft_pair import MIGRATE

from tdxmig_model.backend.soft.call import Registers
from tdxmig_model.backend.soft.memory import PageType
from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.schedulers import LeafCall
from tdxmig_model.backend.soft.sept import HPA_MASK, LOCK_BIT
from tdxmig_model.wire.gpa_list import build_entries, entries_from_bytes, entry_statuses
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import Bundle


def export(pair, gpas, *, stream=0, lp=0, operation=MIGRATE, **more):
    """EXPORT.MEM of these pages; its lists are written now."""
    buffers = pair.source_host.stream_buffers(stream)
    buffers.offer_buffers(len(gpas))
    operands = Registers(
        rcx=buffers.gpa_list(build_entries(np.asarray(gpas, dtype=np.uint64), operation)),
        rdx=pair.source.td.tdr,
        r8=buffers.mbmd_register,
        r9=buffers.list,
        r10=stream,
        r11=buffers.macs_low,
        r12=buffers.macs_high,
    )
    return LeafCall(Leaf.EXPORT_MEM, operands, lp=lp, **more)


def exported(pair, count, *, stream=0):
    """The bundle that an EXPORT.MEM left in its buffers."""
    buffers = pair.source_host.stream_buffers(stream)
    return Bundle.of(
        Mbmd.unpack(buffers.read_mbmd()),
        buffers.read_pages(count),
        buffers.entries(count).tobytes(),
        buffers.read_macs(count),
    )


def statuses(pair, count, *, stream=0):
    return entry_statuses(pair.source_host.stream_buffers(stream).entries(count)).tolist()


def on_td(pair, leaf, *, lp=0, side="source", **operands):
    """A leaf whose RCX is the TD."""
    host, td = getattr(pair, f"{side}_host"), getattr(pair, side).td
    operands.setdefault("rcx", td.tdr)
    operands.setdefault("r8", host.stream_buffers(0).mbmd_register)
    return LeafCall(leaf, Registers(**operands), lp=lp)


def unblock(pair, gpa, *, lp=0, **more):
    operands = Registers(rcx=int(gpa), rdx=pair.source.td.tdr)
    return LeafCall(Leaf.EXPORT_UNBLOCKW, operands, lp=lp, **more)


def block(pair, gpas, *, lp=0, stream=2):
    buffers = pair.source_host.stream_buffers(stream)
    rcx = buffers.gpa_list(build_entries(np.asarray(gpas, dtype=np.uint64)))
    return LeafCall(Leaf.EXPORT_BLOCKW, Registers(rcx=rcx, rdx=pair.source.td.tdr), lp=lp)


def load(pair, bundle, pages, *, stream=0, lp=0, **more):
    """IMPORT.MEM of this bundle into these new pages; its lists are written now."""
    host, count = pair.destination_host, len(pages)
    buffers = host.stream_buffers(stream)
    buffers.write_mbmd(bundle.mbmd.pack())
    buffers.write_pages(bundle.pages)
    buffers.write_macs(bundle.macs)
    buffers.offer_buffers(count)
    buffers.offer_new_pages(np.asarray(pages, dtype=np.uint64))
    operands = Registers(
        rcx=buffers.gpa_list(entries_from_bytes(bundle.gpa_list)),
        rdx=pair.destination.td.tdr,
        r8=buffers.mbmd_register,
        r9=buffers.list,
        r10=stream,
        r11=buffers.macs_low,
        r12=buffers.macs_high,
        r13=buffers.new_pages,
    )
    return LeafCall(Leaf.IMPORT_MEM, operands, lp=lp, **more)


# --- judgements ----------------------------------------------------------------------------------


def assert_nothing_is_locked(module):
    """No lock outlives its leaf, neither PAMT, TDCS and stream locks nor Secure EPT entries."""
    assert not module.memory.any_locked
    for tdr in module.tdrs.values():
        tdcs = tdr.tdcs
        locks = [tdcs.op_state_lock, tdcs.mig_lock, tdcs.sept_lock, tdcs.epoch_lock]
        assert all(lock.free for lock in (*locks, *(link.lock for link in tdcs.links)))
        assert not (tdcs.sept.mapped()[1] & np.uint64(LOCK_BIT)).any()


def assert_pages_owned(backend):
    """Each leaf entry has a page of its own that the PAMT gives to this TD."""
    memory, tdcs = backend.host.memory, backend.host.module.tdrs[backend.td.tdr].tdcs
    pages = [int(entry) & HPA_MASK for entry in tdcs.sept.mapped()[1]]
    assert len(set(pages)) == len(pages)
    for hpa in pages:
        assert memory.page_type[hpa >> 12] == PageType.REG
        assert memory.owner[hpa >> 12] == backend.td.tdr


def switches(history):
    """How often another logical processor went on before a call had ended."""
    pairs = itertools.pairwise(history.events)
    return sum(one.lp != two.lp and one.point is not None for one, two in pairs)
