"""A legal call of every migration leaf and branch, each on a fresh pair brought there by leaves."""

import numpy as np
from soft_pair import CANCEL, Forger, Pair
from soft_scene import RESUME, Scene, always, at_source, gpa_list, list_registers

from tdxmig_model.backend.soft.op_state import Leaf
from tdxmig_model.backend.soft.status import Status
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.gpa_list import GpaEntry, GpaOperation, build_entries
from tdxmig_model.wire.mbmd import Mbmd

MIGRATE = GpaOperation.MIGRATE


def source_scene(pair, leaf, **registers):
    return Scene(pair, "source", leaf, registers)


def state_registers(pair, pages, side="source"):
    """Registers of a leaf of state: TD, MBMD buffer, a list of `pages` pages, stream 0."""
    host = pair.source_host if side == "source" else pair.destination_host
    td = (pair.source if side == "source" else pair.destination).td
    buffers = host.stream_buffers(0)
    return {
        "rcx": td.tdr,
        "r8": buffers.mbmd_register,
        "r9": buffers.page_list(pages),
        "r10": 0,
    }


def resumed(scene):
    """The same call, interrupted once and about to be resumed."""
    registers = scene.host.seamcall(scene.leaf, lp=scene.lp, interrupt=always, **scene.registers)
    assert registers.rax == Status.TDX_INTERRUPTED_RESUMABLE
    if scene.leaf in (Leaf.EXPORT_MEM, Leaf.IMPORT_MEM):
        scene.registers["rcx"] = registers.rcx
    scene.registers["r10"] |= RESUME
    return scene


# --- source --------------------------------------------------------------------------------------


def stream_create():
    pair = Pair(4, profile="tdx-1.5.01")
    page = pair.source_host.take_private_pages(1)[0]
    return source_scene(pair, Leaf.MIG_STREAM_CREATE, rcx=page, rdx=pair.source.td.tdr)


def immutable():
    """A second session, so that what the start of a session resets is not at its reset value."""
    pair = at_source("LIVE_EXPORT")
    pair.block(pair.gpas)
    pair.move(pair.gpas, stream=1)
    pair.on_source(c.ExportUnblockw(0))
    pair.epoch()
    pair.on_source(c.ExportAbort(None))
    pair.restore_all()
    pair.new_destination(streams=2)
    pair.exchange_keys()
    return source_scene(pair, Leaf.EXPORT_STATE_IMMUTABLE, **state_registers(pair, 3))


def immutable_resume():
    return resumed(immutable())


def blockw():
    pair = at_source("LIVE_EXPORT")
    rcx = gpa_list(pair, pair.gpas)
    return source_scene(pair, Leaf.EXPORT_BLOCKW, rcx=rcx, rdx=pair.source.td.tdr)


def unblockw():
    pair = at_source("LIVE_EXPORT")
    pair.block(pair.gpas)
    pair.export(pair.gpas[:1])
    return source_scene(pair, Leaf.EXPORT_UNBLOCKW, rcx=0, rdx=pair.source.td.tdr)


def export_mem():
    """PAUSED_EXPORT, four mapped pages on stream 0."""
    pair = at_source("PAUSED_EXPORT")
    rcx = gpa_list(pair, pair.gpas)
    return source_scene(pair, Leaf.EXPORT_MEM, **list_registers(pair, rcx))


def export_mem_stream_1():
    """The same on stream 1, which is not initialised yet."""
    scene = export_mem()
    scene.registers["r10"] = 1
    return scene


def export_mem_512():
    """PAUSED_EXPORT, a list of 512 entries, of which the first four are pages."""
    pair = at_source("PAUSED_EXPORT")
    entries = np.zeros(512, dtype=np.uint64)
    entries[:4] = build_entries(pair.gpas)
    buffers = pair.source_host.stream_buffers(0)
    buffers.offer_buffers(512)
    rcx = buffers.gpa_list(entries)
    return source_scene(pair, Leaf.EXPORT_MEM, **list_registers(pair, rcx))


def export_mem_resume():
    return resumed(export_mem())


def export_mem_512_resume():
    return resumed(export_mem_512())


def export_mem_live():
    """LIVE_EXPORT, four pages blocked for writing and tracked."""
    pair = at_source("LIVE_EXPORT")
    pair.block(pair.gpas)
    rcx = gpa_list(pair, pair.gpas)
    return source_scene(pair, Leaf.EXPORT_MEM, **list_registers(pair, rcx))


def export_mem_post():
    """POST_EXPORT, out of order."""
    pair = at_source("POST_EXPORT")
    rcx = gpa_list(pair, pair.gpas)
    return source_scene(pair, Leaf.EXPORT_MEM, **list_registers(pair, rcx))


def export_mem_cancel():
    """PAUSED_EXPORT, four exported pages to cancel."""
    pair = at_source("PAUSED_EXPORT")
    pair.export(pair.gpas)
    rcx = gpa_list(pair, pair.gpas, CANCEL)
    return source_scene(pair, Leaf.EXPORT_MEM, **list_registers(pair, rcx))


def track():
    pair = at_source("LIVE_EXPORT")
    buffers = pair.source_host.stream_buffers(0)
    td = pair.source.td
    return source_scene(pair, Leaf.EXPORT_TRACK, rcx=td.tdr, r8=buffers.mbmd_register, r10=0)


def start_track():
    scene = track()
    scene.pair.pause()
    scene.registers["r10"] = RESUME
    return scene


def live_start_track():
    """As `start_track` in LIVE_EXPORT, where it is refused for that reason alone."""
    scene = track()
    scene.registers["r10"] = RESUME
    return scene


def pause():
    pair = at_source("LIVE_EXPORT")
    return source_scene(pair, Leaf.EXPORT_PAUSE, rcx=pair.source.td.tdr)


def state_td():
    pair = at_source("PAUSED_EXPORT")
    return source_scene(pair, Leaf.EXPORT_STATE_TD, **state_registers(pair, 2))


def state_vp():
    """On stream 1, which is not initialised yet."""
    pair = at_source("PAUSED_EXPORT", vcpus=2)
    registers = {**state_registers(pair, 5), "rcx": pair.source.td.vcpus[0], "r10": 1}
    return source_scene(pair, Leaf.EXPORT_STATE_VP, **registers)


def state_vp_resume():
    return resumed(state_vp())


def abort_live():
    pair = at_source("LIVE_EXPORT")
    return source_scene(pair, Leaf.EXPORT_ABORT, rcx=pair.source.td.tdr, r8=0, r10=0)


def abort_post():
    """POST_EXPORT, with the abort token of the destination."""
    pair = at_source("POST_EXPORT")
    token = pair.on_destination(c.ImportAbort()).bundle
    buffers = pair.source_host.stream_buffers(0)
    registers = {"rcx": pair.source.td.tdr, "r8": buffers.mbmd_register, "r10": 0}
    forger = Forger(pair)
    forger.aead = type(forger.aead)(pair.source._tdcs.mig_dec_working_key)
    scene = Scene(pair, "source", Leaf.EXPORT_ABORT, registers, forger=forger)
    return scene.load(token)


def restore():
    pair = at_source("PAUSED_EXPORT")
    pair.export(pair.gpas)
    pair.on_source(c.ExportAbort(None))
    rcx = gpa_list(pair, pair.gpas)
    return source_scene(pair, Leaf.EXPORT_RESTORE, rcx=rcx, rdx=pair.source.td.tdr)


# --- destination ---------------------------------------------------------------------------------


def destination_scene(pair, leaf, bundle=None, lp=0, **registers):
    forger = Forger(pair) if pair.source._tdcs.mig_enc_working_key != bytes(32) else None
    scene = Scene(pair, "destination", leaf, registers, lp=lp, forger=forger)
    return scene if bundle is None else scene.load(bundle)


def import_immutable():
    pair = Pair(4, profile="tdx-1.5.01", streams=2)
    bundle = pair.on_source(c.ExportStateImmutable()).bundle
    registers = state_registers(pair, len(bundle.pages), "destination")
    return destination_scene(pair, Leaf.IMPORT_STATE_IMMUTABLE, bundle, **registers)


def import_immutable_resume():
    return resumed(import_immutable())


def import_memory_scene(pair, bundle):
    """IMPORT.MEM of a bundle, with a free page for each entry."""
    host, td = pair.destination_host, pair.destination.td
    raw = np.frombuffer(bundle.gpa_list, dtype=np.uint64)
    host.add_tables(td, raw & np.uint64(0x7FFF_FFFF_F000))
    buffers = host.stream_buffers(0)
    buffers.offer_buffers(raw.size)
    buffers.offer_new_pages(np.array(host.take_private_pages(raw.size), dtype=np.uint64))
    registers = list_registers(pair, buffers.gpa_list(raw), "destination")
    registers["r13"] = buffers.new_pages
    return destination_scene(pair, Leaf.IMPORT_MEM, bundle, **registers)


def import_mem():
    """MEMORY_IMPORT, epoch 1: three new pages; GPA 0 came in epoch 0."""
    pair = at_source("PAUSED_EXPORT")
    pair.move(pair.gpas[:1])
    pair.epoch()
    return import_memory_scene(pair, pair.export(pair.gpas[1:]))


def import_mem_512():
    """MEMORY_IMPORT, a bundle of 512 entries, of which four are pages."""
    pair = at_source("PAUSED_EXPORT")
    entries = np.zeros(512, dtype=np.uint64)
    entries[:4] = build_entries(pair.gpas)
    return import_memory_scene(pair, Forger(pair).memory(entries.tolist()))


def import_mem_stream_1():
    """MEMORY_IMPORT, on stream 1, which is not initialised yet."""
    pair = at_source("PAUSED_EXPORT")
    scene = import_memory_scene(pair, pair.export(pair.gpas, stream=1))
    scene.registers["r10"] = 1
    return scene


def import_mem_resume():
    return resumed(import_mem())


def import_mem_512_resume():
    return resumed(import_mem_512())


def in_order(*entries, pages=4):
    """MEMORY_IMPORT, epoch 1, GPA 0 mapped and 0x1000 pending since epoch 0: these entries."""
    pair = at_source("PAUSED_EXPORT", pages=pages)
    pair.move(pair.gpas[:1])
    pending = GpaEntry(0x1000, MIGRATE, pending=True).to_int()
    forger = Forger(pair, 500)
    assert pair.destination.execute(c.ImportMem(0, forger.memory([pending]))).ok
    total = pair.destination.observe()["total_mb_count"] + 1
    token = forger.seal(Mbmd.epoch_token(total_mb=total, mig_epoch=1, iv_counter=0))
    pair.on_destination(c.ImportTrack(type(forger.memory([])).of(token)))
    return import_memory_scene(pair, Forger(pair, 600).memory(list(entries)))


def out_of_order(*entries, committed=False):
    """POST_IMPORT (or LIVE_IMPORT), GPAs 0 and 0x1000 mapped: these entries."""
    pair = at_source("POST_EXPORT")
    if committed:
        pair.on_destination(c.ImportCommit())
    return import_memory_scene(pair, Forger(pair).memory(list(entries)))


def import_mem_post():
    """POST_IMPORT, two new pages out of order."""
    entries = [GpaEntry(gpa, MIGRATE).to_int() for gpa in (0x2000, 0x3000)]
    return out_of_order(*entries)


def import_track():
    pair = at_source("LIVE_EXPORT")
    bundle = pair.on_source(c.ExportTrack()).bundle
    return import_token(pair, bundle)


def import_token(pair, bundle):
    td, buffers = pair.destination.td, pair.destination_host.stream_buffers(0)
    registers = {"rcx": td.tdr, "r8": buffers.mbmd_register, "r10": 0}
    return destination_scene(pair, Leaf.IMPORT_TRACK, bundle, **registers)


def import_start_track():
    pair = at_source("PAUSED_EXPORT")
    pair.move(pair.gpas)
    pair.states()
    return import_token(pair, pair.on_source(c.ExportTrack(True)).bundle)


def import_td():
    pair = at_source("PAUSED_EXPORT")
    bundle = pair.on_source(c.ExportStateTd()).bundle
    registers = state_registers(pair, len(bundle.pages), "destination")
    return destination_scene(pair, Leaf.IMPORT_STATE_TD, bundle, **registers)


def import_vp():
    """On stream 1, which is not initialised yet."""
    pair = at_source("PAUSED_EXPORT", vcpus=2)
    pair.on_destination(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))
    bundle = pair.on_source(c.ExportStateVp(0, 1)).bundle
    pair.destination_host.ensure_vcpus(pair.destination.td, 2)
    registers = state_registers(pair, len(bundle.pages), "destination")
    registers.update(rcx=pair.destination.td.vcpus[0], r10=1)
    return destination_scene(pair, Leaf.IMPORT_STATE_VP, bundle, **registers)


def import_vp_resume():
    return resumed(import_vp())


def import_commit():
    pair = at_source("POST_EXPORT")
    return destination_scene(pair, Leaf.IMPORT_COMMIT, rcx=pair.destination.td.tdr)


def import_end():
    pair = at_source("POST_EXPORT")
    return destination_scene(pair, Leaf.IMPORT_END, rcx=pair.destination.td.tdr)


def import_abort():
    pair = at_source("LIVE_EXPORT")
    buffers = pair.destination_host.stream_buffers(0)
    registers = {"rcx": pair.destination.td.tdr, "r8": buffers.mbmd_register, "r10": 0}
    return destination_scene(pair, Leaf.IMPORT_ABORT, **registers)


# --- both sides ----------------------------------------------------------------------------------


def mem_track():
    pair = Pair(4, profile="tdx-1.5.01")
    return source_scene(pair, Leaf.MEM_TRACK, rcx=pair.source.td.tdr)


def vp_enter():
    pair = Pair(4, profile="tdx-1.5.01")
    pair.source_host.module.processors[0].timer = 3
    return source_scene(pair, Leaf.VP_ENTER, rcx=pair.source.td.vcpus[0])


LEGAL = [
    stream_create,
    immutable,
    immutable_resume,
    blockw,
    unblockw,
    export_mem,
    export_mem_stream_1,
    export_mem_512,
    export_mem_resume,
    export_mem_512_resume,
    export_mem_live,
    export_mem_post,
    export_mem_cancel,
    track,
    start_track,
    pause,
    state_td,
    state_vp,
    state_vp_resume,
    abort_live,
    abort_post,
    restore,
    import_immutable,
    import_immutable_resume,
    import_mem,
    import_mem_512,
    import_mem_stream_1,
    import_mem_resume,
    import_mem_512_resume,
    import_mem_post,
    import_track,
    import_start_track,
    import_td,
    import_vp,
    import_vp_resume,
    import_commit,
    import_end,
    import_abort,
    mem_track,
    vp_enter,
]
"""Every scene here succeeds as it stands."""

FIRST_CALLS = {
    Leaf.MIG_STREAM_CREATE: stream_create,
    Leaf.EXPORT_STATE_IMMUTABLE: immutable,
    Leaf.EXPORT_BLOCKW: blockw,
    Leaf.EXPORT_UNBLOCKW: unblockw,
    Leaf.EXPORT_MEM: export_mem,
    Leaf.EXPORT_TRACK: track,
    Leaf.EXPORT_PAUSE: pause,
    Leaf.EXPORT_STATE_TD: state_td,
    Leaf.EXPORT_STATE_VP: state_vp,
    Leaf.EXPORT_ABORT: abort_live,
    Leaf.EXPORT_RESTORE: restore,
    Leaf.IMPORT_STATE_IMMUTABLE: import_immutable,
    Leaf.IMPORT_MEM: import_mem,
    Leaf.IMPORT_TRACK: import_track,
    Leaf.IMPORT_STATE_TD: import_td,
    Leaf.IMPORT_STATE_VP: import_vp,
    Leaf.IMPORT_COMMIT: import_commit,
    Leaf.IMPORT_END: import_end,
    Leaf.IMPORT_ABORT: import_abort,
    Leaf.MEM_TRACK: mem_track,
    Leaf.VP_ENTER: vp_enter,
}
"""Every migration leaf, and those that gate it, with one legal call."""
