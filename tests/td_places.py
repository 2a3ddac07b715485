"""TDs that leaves brought into each OP_STATE, and the operands of every leaf on such a TD."""

from collections.abc import Callable

import numpy as np
from soft_pair import Forger, Pair

from tdxmig_model.backend.soft.call import NO_PAGE, Registers
from tdxmig_model.backend.soft.op_state import Leaf, OpState
from tdxmig_model.engine import commands as c
from tdxmig_model.wire.gpa_list import build_entries
from tdxmig_model.wire.mbmd import Mbmd


class Place:
    """A TD of one side of a pair, and the operands of any leaf on it."""

    def __init__(self, pair, side):
        self.pair = pair
        self.backend = pair.source if side == "source" else pair.destination
        self.host, self.td = self.backend.host, self.backend.td

    @property
    def tdcs(self):
        return self.host.module.tdrs[self.td.tdr].tdcs

    @property
    def buffers(self):
        return self.host.stream_buffers(0)

    def free_page(self):
        return self.host.take_private_pages(1)[0]

    def call(self, leaf, registers):
        """The leaf, on the logical processor of the first vCPU."""
        return self.host.module.call(leaf, registers)

    def require(self, leaf, **operands):
        return self.host.require(leaf, **operands)

    def page(self, leaf, gpa):
        """A page leaf that must succeed."""
        return self.require(leaf, rcx=gpa, rdx=self.td.tdr)


def td_in(state, profile="tdx-1.5.01"):
    """A TD that leaves brought into this OP_STATE."""
    if state in (OpState.UNINITIALIZED, OpState.INITIALIZED):
        pair = Pair(4, profile=profile)
        place = Place(pair, "destination")
        if state is OpState.INITIALIZED:
            initialize(place)
        return place
    pair = Pair(4, profile=profile)
    if state in SOURCE_STEPS:
        for step in SOURCE_STEPS[state]:
            step(pair)
        place = Place(pair, "source")
    else:
        for step in DESTINATION_STEPS[state]:
            step(pair)
        place = Place(pair, "destination")
    assert place.tdcs.op_state is state
    return place


def initialize(place):
    """INITIALIZED, with one vCPU that is not initialised, and tables for the first 2 MiB."""
    host, td = place.host, place.td
    host._initialize(td, migratable=True)
    host._add_vcpu(td)
    host.add_tables(td, place.pair.gpas)


def start(pair):
    pair.start()


def pause(pair):
    pair.pause()


def some_pages(pair):
    pair.move(pair.gpas[:2])


def td_state(pair):
    pair.on_destination(c.ImportStateTd(pair.on_source(c.ExportStateTd()).bundle))


def states(pair):
    pair.states()


def token(pair):
    pair.start_token()


def commit(pair):
    pair.on_destination(c.ImportCommit())


def with_vcpu(pair):
    pair.destination_host.ensure_vcpus(pair.destination.td, 1)


def import_abort(pair):
    pair.on_destination(c.ImportAbort())


IN_ORDER = (start, pause, some_pages)
SOURCE_STEPS: dict[OpState, tuple[Callable, ...]] = {
    OpState.RUNNABLE: (),
    OpState.LIVE_EXPORT: (start,),
    OpState.PAUSED_EXPORT: IN_ORDER,
    OpState.POST_EXPORT: (*IN_ORDER, states, token),
}
DESTINATION_STEPS: dict[OpState, tuple[Callable, ...]] = {
    OpState.MEMORY_IMPORT: IN_ORDER,
    OpState.STATE_IMPORT: (*IN_ORDER, td_state, with_vcpu),
    OpState.POST_IMPORT: (*IN_ORDER, states, token),
    OpState.LIVE_IMPORT: (*IN_ORDER, states, token, commit),
    OpState.FAILED_IMPORT: (*IN_ORDER, td_state, with_vcpu, import_abort),
}


# --- legal operands of every leaf, on a TD in any OP_STATE ----------------------------------------


def on_tdr(place):
    return Registers(rcx=place.td.tdr)


def new_page_for(register):
    """RCX a free page; the TDR or TDVPR in RDX."""

    def make(place):
        owner = place.td.tdr if register == "tdr" else vcpu_of(place)
        return Registers(rcx=place.free_page(), rdx=owner)

    return make


def vcpu_of(place):
    """A vCPU; where no leaf can create one, it is created with OP_STATE injected for a moment."""
    if not place.td.vcpus:
        tdcs = place.tdcs
        before, tdcs.op_state = tdcs.op_state, OpState.INITIALIZED
        place.host._add_vcpu(place.td)
        tdcs.op_state = before
    return place.td.vcpus[0]


def on_vcpu(place):
    return Registers(rcx=vcpu_of(place))


def on_gpa(gpa, level=0):
    def make(place):
        place.host.memory.zero_page(place.buffers.buffers)
        return Registers(
            rcx=gpa | level, rdx=place.td.tdr, r8=place.free_page(), r9=place.buffers.buffers
        )

    return make


def with_mbmd(place):
    return Registers(rcx=place.td.tdr, r8=place.buffers.mbmd_register)


def aborting(place):
    """R8 is 0 but where a token is needed."""
    if place.tdcs.op_state is not OpState.POST_EXPORT:
        return Registers(rcx=place.td.tdr)
    bundle = place.pair.on_destination(c.ImportAbort()).bundle
    place.buffers.write_mbmd(bundle.mbmd.pack())
    return with_mbmd(place)


def list_of(gpas, **more):
    def make(place):
        buffers = place.buffers
        buffers.offer_buffers(len(gpas))
        return Registers(
            rcx=buffers.gpa_list(build_entries(np.array(gpas, dtype=np.uint64))),
            rdx=place.td.tdr,
            r8=buffers.mbmd_register,
            r9=buffers.list,
            r11=buffers.macs_low,
            **more,
        )

    return make


def exporting_state(place):
    return Registers(
        rcx=place.td.tdr, r8=place.buffers.mbmd_register, r9=place.buffers.page_list(8)
    )


def new_session(place):
    """As `exporting_state`, with a decryption key where one can be written."""
    if place.tdcs.op_state not in (OpState.PAUSED_EXPORT, OpState.POST_EXPORT):
        place.host.write_migration_decryption_key(place.td, bytes(range(32)))
    return exporting_state(place)


def exporting_vcpu(place):
    registers = exporting_state(place)
    registers.rcx = vcpu_of(place)
    return registers


def importing(place, make, pages=True):
    """The bundle that the source makes for this leaf, in the buffers."""
    bundle = make(place.pair)
    buffers = place.buffers
    buffers.write_mbmd(bundle.mbmd.pack())
    if pages and bundle.pages:
        buffers.write_pages(bundle.pages)
    return Registers(
        rcx=place.td.tdr,
        r8=buffers.mbmd_register,
        r9=buffers.page_list(max(len(bundle.pages), 1)),
    )


def importing_immutable(place):
    if place.tdcs.op_state is OpState.UNINITIALIZED:
        return importing(place, lambda pair: pair.on_source(c.ExportStateImmutable()).bundle)
    return exporting_state(place)


def importing_td(place):
    if place.tdcs.op_state is OpState.MEMORY_IMPORT:
        return importing(place, lambda pair: pair.on_source(c.ExportStateTd()).bundle)
    return exporting_state(place)


def importing_vcpu(place):
    registers = exporting_state(place)
    if place.tdcs.op_state is OpState.STATE_IMPORT:
        registers = importing(place, lambda pair: pair.on_source(c.ExportStateVp(0)).bundle)
    registers.rcx = vcpu_of(place)
    return registers


def importing_memory(place):
    """One NOP entry, under the session key where there is a session."""
    if place.pair.source._tdcs.mig_enc_working_key != bytes(32):
        bundle = Forger(place.pair).memory([0])
        place.buffers.write_mbmd(bundle.mbmd.pack())
        place.buffers.write_macs(bundle.macs)
    registers = list_of([0], r13=NO_PAGE)(place)
    place.host.memory.page_words(place.buffers.gpas)[0] = 0
    return registers


def importing_token(place):
    """An epoch token of the next epoch, under the session key."""
    if place.tdcs.op_state in (OpState.MEMORY_IMPORT, OpState.STATE_IMPORT):
        seen = place.backend.observe()
        token = Mbmd.epoch_token(
            total_mb=seen["total_mb_count"] + 1, mig_epoch=seen["mig_epoch"] + 1, iv_counter=0
        )
        place.buffers.write_mbmd(Forger(place.pair).seal(token).pack())
    return with_mbmd(place)


def td_params(place):
    """TD_PARAMS of another TD that was just initialised with them."""
    place.host._initialize(place.host._new_td(1), migratable=True)
    return Registers(rcx=place.td.tdr, rdx=place.host._staging)


def binding(place):
    """The host's Migration TD, bound once more."""
    return Registers(rcx=place.td.tdr, rdx=place.host._migration_td.tdr)


def prebinding(place):
    """A TD in the same OP_STATE that no service TD is bound to, if there can be one."""
    tdr = place.td.tdr
    if place.tdcs.op_state in (OpState.UNINITIALIZED, OpState.INITIALIZED):
        td = place.host._new_td(1)
        if place.tdcs.op_state is OpState.INITIALIZED:
            place.host._initialize(td, migratable=True)
        tdr = td.tdr
    return Registers(rcx=tdr, rdx=place.buffers.buffers)


def finalizing(place):
    """MR.FINALIZE of a TD with a vCPU."""
    if place.tdcs.op_state is OpState.INITIALIZED:
        place.require(Leaf.VP_INIT, rcx=vcpu_of(place))
    return on_tdr(place)


def flushing(place):
    """VP.FLUSH of a vCPU that is associated, where vCPUs can be."""
    if place.tdcs.op_state is OpState.INITIALIZED:
        place.require(Leaf.VP_INIT, rcx=vcpu_of(place))
    elif place.tdcs.op_state is OpState.STATE_IMPORT:
        place.pair.on_destination(
            c.ImportStateVp(place.pair.on_source(c.ExportStateVp(0)).bundle, 0)
        )
    return on_vcpu(place)


def plain_page(place):
    """GPA of a page that is mapped or pending and was not exported."""
    if place.tdcs.op_state is OpState.INITIALIZED:
        place.require(Leaf.MEM_PAGE_AUG, rcx=0x1000, rdx=place.td.tdr, r8=place.free_page())
        return 0x1000
    return 0x3000 if place.backend is place.pair.source else 0x1000


def blocking(place):
    return Registers(rcx=plain_page(place), rdx=place.td.tdr)


def blocked(place):
    """A page that is blocked and tracked, where the leaf is allowed at all."""
    gpa = plain_page(place)
    if place.tdcs.op_state in BLOCKING:
        place.page(Leaf.MEM_RANGE_BLOCK, gpa)
        place.require(Leaf.MEM_TRACK, rcx=place.td.tdr)
    return Registers(rcx=gpa, rdx=place.td.tdr)


BLOCKING = frozenset(
    {
        OpState.INITIALIZED,
        OpState.RUNNABLE,
        OpState.LIVE_EXPORT,
        OpState.PAUSED_EXPORT,
        OpState.POST_EXPORT,
        OpState.POST_IMPORT,
        OpState.LIVE_IMPORT,
    }
)


def write_blocked(place):
    """A page that is blocked for writing; in RUNNABLE after a session that was aborted."""
    pair, state = place.pair, place.tdcs.op_state
    if state is OpState.RUNNABLE:
        pair.start()
    if state in (OpState.RUNNABLE, OpState.LIVE_EXPORT):
        pair.block(pair.gpas[:1])
    if state is OpState.RUNNABLE:
        pair.on_source(c.ExportAbort(None))
    return Registers(rcx=0, rdx=place.td.tdr)


def exported_before(place):
    """In RUNNABLE, a page of a session that was aborted."""
    if place.tdcs.op_state is OpState.RUNNABLE:
        place.pair.start()
        place.pair.block(place.pair.gpas[:1])
        place.pair.export(place.pair.gpas[:1])
        place.pair.on_source(c.ExportAbort(None))
    return list_of([0])(place)


def exporting_memory(place):
    """A page that can be exported in this OP_STATE."""
    if place.tdcs.op_state is OpState.LIVE_EXPORT:
        place.pair.block(place.pair.gpas[3:])
    return list_of([0x3000])(place)


OPERANDS_OF: dict[Leaf, Callable] = {
    Leaf.VP_ENTER: on_vcpu,
    Leaf.MNG_ADDCX: new_page_for("tdr"),
    Leaf.MEM_PAGE_ADD: on_gpa(0x4000),
    Leaf.MEM_SEPT_ADD: on_gpa(1 << 21, level=1),
    Leaf.VP_ADDCX: new_page_for("vcpu"),
    Leaf.MEM_PAGE_AUG: on_gpa(0x4000),
    Leaf.MEM_RANGE_BLOCK: blocking,
    Leaf.VP_CREATE: new_page_for("tdr"),
    Leaf.MR_FINALIZE: finalizing,
    Leaf.VP_FLUSH: flushing,
    Leaf.MNG_INIT: td_params,
    Leaf.VP_INIT: on_vcpu,
    Leaf.MEM_PAGE_REMOVE: blocked,
    Leaf.MEM_TRACK: on_tdr,
    Leaf.MEM_RANGE_UNBLOCK: blocked,
    Leaf.SERVTD_BIND: binding,
    Leaf.SERVTD_PREBIND: prebinding,
    Leaf.EXPORT_ABORT: aborting,
    Leaf.EXPORT_BLOCKW: list_of([0x1000]),
    Leaf.EXPORT_RESTORE: exported_before,
    Leaf.EXPORT_MEM: exporting_memory,
    Leaf.EXPORT_PAUSE: on_tdr,
    Leaf.EXPORT_TRACK: with_mbmd,
    Leaf.EXPORT_STATE_IMMUTABLE: new_session,
    Leaf.EXPORT_STATE_TD: exporting_state,
    Leaf.EXPORT_STATE_VP: exporting_vcpu,
    Leaf.EXPORT_UNBLOCKW: write_blocked,
    Leaf.IMPORT_ABORT: with_mbmd,
    Leaf.IMPORT_END: on_tdr,
    Leaf.IMPORT_COMMIT: on_tdr,
    Leaf.IMPORT_MEM: importing_memory,
    Leaf.IMPORT_TRACK: importing_token,
    Leaf.IMPORT_STATE_IMMUTABLE: importing_immutable,
    Leaf.IMPORT_STATE_TD: importing_td,
    Leaf.IMPORT_STATE_VP: importing_vcpu,
    Leaf.MIG_STREAM_CREATE: new_page_for("tdr"),
}
