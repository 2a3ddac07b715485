"""A page whose Secure EPT entry is in a given state, brought there by leaves where that can be.

On a source TD every state is reached by leaves but the two of tables, which a 4 KiB page never has:
those are written into the entry by hand.  In INITIALIZED and MEMORY_IMPORT fewer leaves are
allowed, so more is injected; `INJECTED` says what.
"""

import numpy as np
from soft_pair import CANCEL, MIGRATE, Forger, Pair
from td_places import Place, td_in

from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.backend.soft.sept import STATE_BITS, STATE_MASK, STATE_OF, SeptState
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.gpa_list import GpaEntry
from tdxmig_model.wire.mbmd import Mbmd
from tdxmig_model.wire.records import Bundle

S = SeptState
MAPPED_GPA, PENDING_GPA, FREE_GPA = 0x1000, 0x3000, 0x7000
ON_PAGES = {
    S.MAPPED: "",
    S.BLOCKED: "b",
    S.BLOCKEDW: "w",
    S.EXPORTED_BLOCKEDW: "we",
    S.EXPORTED_DIRTY: "weu",
    S.EXPORTED_DIRTY_BLOCKEDW: "weuw",
}
"""Leaves from MAPPED: RANGE.BLOCK, BLOCKW (and TRACK), EXPORT.MEM, UNBLOCKW."""
ON_PENDING = {
    S.PENDING: "",
    S.PENDING_BLOCKED: "b",
    S.PENDING_BLOCKEDW: "w",
    S.PENDING_EXPORTED_BLOCKEDW: "we",
    S.PENDING_EXPORTED_DIRTY: "weu",
    S.PENDING_EXPORTED_DIRTY_BLOCKEDW: "weuw",
}
"""The same from PENDING."""
INJECTED = {
    "source": {S.NL_MAPPED, S.NL_BLOCKED},
    "INITIALIZED": set(SeptState) - {S.FREE, S.MAPPED, S.BLOCKED, S.PENDING, S.PENDING_BLOCKED},
    "MEMORY_IMPORT": set(SeptState) - {S.FREE, S.REMOVED, S.MAPPED, S.PENDING},
}
"""States that no leaf can bring a 4 KiB page into, by where its TD is."""


def slot_of(place, gpa, level=0):
    return place.tdcs.sept.walk(gpa, level)[0]


def entry_state(place, gpa, level=0):
    """The state of an entry."""
    return STATE_OF[place.host.memory.words[slot_of(place, gpa, level)] & STATE_MASK]


def inject(place, gpa, state, level=0):
    """The state bits of an entry, by hand; HPA and permissions stay."""
    words, slot = place.host.memory.words, slot_of(place, gpa, level)
    words[slot] = words[slot] & ~STATE_MASK | STATE_BITS[state]


def sept_words(place):
    """Every Secure EPT entry of the first 2 MiB."""
    first = slot_of(place, 0)
    return place.host.memory.array[first : first + 512].tobytes()


def page_on_source(state):
    """LIVE_EXPORT, TLB tracked: the place and the GPA of a page in this state."""
    if state is S.REMOVED:
        return removed_page()
    pair = Pair(4, profile="tdx-1.5.01", pending_pages=1)
    pair.start()
    place = Place(pair, "source")
    if state in (S.FREE, *INJECTED["source"]):
        gpa = FREE_GPA if state is S.FREE else MAPPED_GPA
        if state is not S.FREE:
            inject(place, gpa, state)
        return place, gpa
    pending = state in ON_PENDING
    gpa = PENDING_GPA if pending else MAPPED_GPA
    for step in (ON_PENDING if pending else ON_PAGES)[state]:
        _step(place, step, gpa)
    assert entry_state(place, gpa) is state
    return place, gpa


def _step(place, step, gpa):
    pages = np.array([gpa], dtype=np.uint64)
    if step == "b":
        place.page(Leaf.MEM_RANGE_BLOCK, gpa)
        place.pair.on_source(c.MemTrack())
    elif step == "w":
        place.pair.block(pages)
    elif step == "e":
        place.pair.export(pages)
    else:
        place.page(Leaf.EXPORT_UNBLOCKW, gpa)


def removed_page():
    """A TD that came by migration keeps REMOVED entries; here it is being exported in its turn."""
    place = td_in(OpState.LIVE_IMPORT)
    place.page(Leaf.MEM_RANGE_BLOCK, MAPPED_GPA)
    place.require(Leaf.MEM_TRACK, rcx=place.td.tdr)
    place.page(Leaf.MEM_PAGE_REMOVE, MAPPED_GPA)
    place.require(Leaf.IMPORT_END, rcx=place.td.tdr)
    place.host.write_migration_decryption_key(place.td, bytes(range(32)))
    result = place.backend.execute(c.ExportStateImmutable())
    assert result.ok
    assert entry_state(place, MAPPED_GPA) is S.REMOVED
    return place, MAPPED_GPA


def page_initialized(state):
    """INITIALIZED: the place and the GPA of a page in this state."""
    place = td_in(OpState.INITIALIZED)
    gpa = FREE_GPA
    if state is S.FREE:
        return place, gpa
    tdr, source = place.td.tdr, place.buffers.buffers
    if state in (S.PENDING, S.PENDING_BLOCKED):
        place.require(Leaf.MEM_PAGE_AUG, rcx=gpa, rdx=tdr, r8=place.free_page())
    else:
        place.require(Leaf.MEM_PAGE_ADD, rcx=gpa, rdx=tdr, r8=place.free_page(), r9=source)
    if state in (S.BLOCKED, S.PENDING_BLOCKED):
        place.page(Leaf.MEM_RANGE_BLOCK, gpa)
    if state in INJECTED["INITIALIZED"]:
        inject(place, gpa, state)
    assert entry_state(place, gpa) is state
    return place, gpa


def page_on_destination(state):
    """MEMORY_IMPORT, epoch 2: the place and the GPA of a page that came in an older epoch."""
    place = td_in(OpState.MEMORY_IMPORT)
    forger, gpa = Forger(place.pair), MAPPED_GPA
    if state is S.FREE:
        gpa = FREE_GPA
    elif state is S.PENDING:
        gpa = PENDING_GPA
        _import(place, forger, GpaEntry(gpa, MIGRATE, pending=True))
    _epoch(place, forger)
    if state is S.REMOVED:
        _import(place, forger, GpaEntry(gpa, CANCEL))
    _epoch(place, forger)
    if state in INJECTED["MEMORY_IMPORT"]:
        inject(place, gpa, state)
    assert entry_state(place, gpa) is state
    return place, gpa


def _import(place, forger, entry):
    result = place.backend.execute(c.ImportMem(0, forger.memory([entry.to_int()])))
    assert result.status == 0


def _epoch(place, forger):
    seen = place.backend.observe()
    total, epoch = seen["total_mb_count"] + 1, seen["mig_epoch"] + 1
    token = forger.seal(Mbmd.epoch_token(total_mb=total, mig_epoch=epoch, iv_counter=0))
    assert place.backend.execute(c.ImportTrack(Bundle.of(token))).ok
