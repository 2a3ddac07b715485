"""The source TD: one row for each SEAMCALL leaf it takes part in, and for the MigTD's key write.

Pages are Secure-EPT entries; what they hold is not modelled here.  EXPORT.MEM is a sequence of
rows: begin
(the MBMD is emitted), one row per list entry, end.  The host may stop between any two of them.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    Assign,
    Literal,
    Need,
    Node,
    Step,
    all_of,
    any_of,
    choose,
    implies,
    lookup,
    need,
    not_,
    only,
    param,
    step,
)
from tdxmig_model.model import network
from tdxmig_model.model.source_state import (
    EXPORTED,
    EXPORTED_AND_DIRTY,
    FIRST_TIME,
    PENDING_STATES,
    WRITE_BLOCKED,
    bw_epoch,
    dirty_count,
    dirty_pages,
    export_count,
    key_set,
    mig_count,
    mig_epoch,
    next_mb_counter,
    num_migs,
    op_state,
    page,
    refcount,
    refcount_previous,
    td_epoch,
    total_mb_count,
    unfinished,
    unfinished_bundle,
    unfinished_calls,
    vcpu_export_count,
)
from tdxmig_model.model.words import (
    BLOCKEDW,
    EPOCH_TOKEN,
    EXPORTED_BLOCKEDW,
    EXPORTED_DIRTY,
    EXPORTED_DIRTY_BLOCKEDW,
    IMMUTABLE_TD_STATE,
    INITIALIZED,
    LIVE_EXPORT,
    LIVE_IMPORT,
    MAPPED,
    MEM,
    MEMORY_IMPORT,
    MODULE,
    MUTABLE_TD_STATE,
    MUTABLE_VCPU_STATE,
    PAGE,
    PAUSED_EXPORT,
    PENDING,
    PENDING_BLOCKEDW,
    PENDING_EXPORTED_BLOCKEDW,
    PENDING_EXPORTED_DIRTY,
    PENDING_EXPORTED_DIRTY_BLOCKEDW,
    POST_EXPORT,
    POST_IMPORT,
    RUNNABLE,
    SOURCE,
    START_EPOCH,
    STATE_IMPORT,
    STREAM,
    UNINITIALIZED,
    VCPU,
    cite_leaf,
    repaired,
    unrepaired,
)

p = param("p", PAGE)
i = param("stream", STREAM)
v = param("v", VCPU)


def _in(*states: Literal) -> Need:
    """The leaf's row of the OP_STATE permission table."""
    return need("op_state", op_state.in_(*states))


def _no_unfinished_call() -> Need:
    """Repair R14: an unfinished EXPORT.MEM blocks every token."""
    return need("no_unfinished_call", unfinished_calls.eq(0), *repaired("R14"))


tracked: Node = any_of(
    bw_epoch.lt(td_epoch - 1), all_of(bw_epoch.eq(td_epoch - 1), refcount_previous.eq(0))
)

_session_start: tuple[Assign, ...] = (
    op_state.to(LIVE_EXPORT),
    key_set.to(False),
    export_count.to(export_count + 1),
    mig_epoch.to(0),
    total_mb_count.to(1),
    dirty_count.to(0),
    next_mb_counter.fill(lambda s: choose(s.eq(0), 1, 0)),
    unfinished.fill(lambda s: False),
)
_session_start_needs = (
    _in(RUNNABLE, LIVE_IMPORT),
    need("mig_count", mig_count.eq(0)),
    need("min_migs", num_migs.ge(2)),
    need("mig_dec_key_set", key_set),
)
_session_end: tuple[Assign, ...] = (
    op_state.to(RUNNABLE),
    unfinished.fill(lambda s: False),
    network.observed.to(False),
)


def _export_entry(
    name: str,
    states: tuple[Literal, ...],
    needs: tuple[Need, ...],
    effects: tuple[Assign, ...],
    why: str,
) -> Step:
    """One entry of EXPORT.MEM; the states of each kind of entry are the module's."""
    return step(
        name,
        SOURCE,
        (i, p),
        when=(
            need("op_state", op_state.in_(LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT)),
            need("unfinished", unfinished[i]),
            *needs,
            need("sept_state", page[p].in_(*states)),
        ),
        then=effects,
        why=why,
        cite=cite_leaf("EXPORT.MEM", 68),
        part_of="export_mem",
    )


_in_order = need("in_order", op_state.in_(LIVE_EXPORT, PAUSED_EXPORT))
_write_blocked = need(
    "write_blocked_while_live", implies(op_state.eq(LIVE_EXPORT), page[p].in_(*WRITE_BLOCKED))
)
_tracked = need("tlb_tracked", implies(op_state.eq(LIVE_EXPORT), tracked))
_exported = page[p].to(
    choose(page[p].in_(*PENDING_STATES), PENDING_EXPORTED_BLOCKEDW, EXPORTED_BLOCKEDW)
)
_returned = page[p].to(choose(page[p].in_(*PENDING_STATES), PENDING, MAPPED))
_was_dirty = choose(page[p].in_(*EXPORTED_AND_DIRTY), -1, 0)

STEPS = (
    step(
        "source_set_migration_key",
        SOURCE,
        when=(
            need(
                "op_state",
                not_(op_state.in_(PAUSED_EXPORT, POST_EXPORT)),
            ),
        ),
        then=(key_set.to(True),),
        why="The MigTD installs the peer's key before a session; not during the blackout.",
        cite=f"TDG.SERVTD.WR of MIG_DEC_KEY, TDCALL 20; {MODULE}",
    ),
    step(
        "source_mig_stream_create",
        SOURCE,
        when=(
            _in(UNINITIALIZED, INITIALIZED, RUNNABLE),
            need("max_migs", num_migs.lt(512)),
        ),
        then=(num_migs.to(num_migs + 1),),
        why="Streams are created before the session; the first one is the backward stream.",
        cite=cite_leaf("MIG.STREAM.CREATE", 96),
    ),
    step(
        "export_state_immutable",
        SOURCE,
        when=(*_session_start_needs, need("first_observed", not_(network.used))),
        then=(
            *_session_start,
            network.observed.to(True),
            network.used.to(True),
            *network.make_bundle(
                IMMUTABLE_TD_STATE, epoch=0, counter=0, total=0, when=not_(network.used)
            ),
        ),
        why="A session starts with fresh keys, counters and epoch; no page is exported yet.",
        cite=cite_leaf("EXPORT.STATE.IMMUTABLE", 72),
    ),
    step(
        "export_state_immutable_other",
        SOURCE,
        when=_session_start_needs,
        then=_session_start,
        why="Any other session of this TD: what it sends is under other keys, not logged.",
        cite=cite_leaf("EXPORT.STATE.IMMUTABLE", 72),
    ),
    step(
        "export_blockw",
        SOURCE,
        (p,),
        when=(
            _in(LIVE_EXPORT),
            need(
                "sept_state",
                page[p].in_(MAPPED, EXPORTED_DIRTY, PENDING, PENDING_EXPORTED_DIRTY),
            ),
        ),
        then=(
            page[p].to(
                lookup(
                    page[p],
                    {
                        MAPPED: BLOCKEDW,
                        EXPORTED_DIRTY: EXPORTED_DIRTY_BLOCKEDW,
                        PENDING: PENDING_BLOCKEDW,
                        PENDING_EXPORTED_DIRTY: PENDING_EXPORTED_DIRTY_BLOCKEDW,
                    },
                )
            ),
            bw_epoch.to(td_epoch),
        ),
        why="A page is write-blocked before it is exported live, so what is sent stays current.",
        cite=cite_leaf("EXPORT.BLOCKW", 65),
    ),
    step(
        "mem_track",
        SOURCE,
        when=(
            _in(
                INITIALIZED,
                RUNNABLE,
                LIVE_EXPORT,
                PAUSED_EXPORT,
                POST_EXPORT,
                MEMORY_IMPORT,
                STATE_IMPORT,
                POST_IMPORT,
                LIVE_IMPORT,
            ),
            need("previous_epoch_left", refcount_previous.eq(0)),
        ),
        then=(
            td_epoch.to(td_epoch + 1),
            refcount_previous.to(refcount),
            refcount.to(0),
        ),
        why="A new TD_EPOCH: older cached translations die when every vCPU of theirs exits.",
        cite=cite_leaf("MEM.TRACK", 38),
    ),
    step(
        "vp_enter",
        SOURCE,
        when=(_in(RUNNABLE, LIVE_EXPORT, LIVE_IMPORT),),
        then=(refcount.to(refcount + 1),),
        why="The guest runs: before the migration, and during the live part of the export.",
        cite=cite_leaf("VP.ENTER", 0),
    ),
    step(
        "vp_exit",
        SOURCE,
        when=(need("entered", refcount.gt(0)),),
        then=(refcount.to(refcount - 1),),
        why="A vCPU that was entered in this TD_EPOCH leaves the guest.",
        cite=cite_leaf("VP.ENTER", 0) + ", TD exit",
    ),
    step(
        "vp_exit_previous",
        SOURCE,
        when=(need("entered", refcount_previous.gt(0)),),
        then=(refcount_previous.to(refcount_previous - 1),),
        why="A vCPU that was entered in the TD_EPOCH before leaves the guest.",
        cite=cite_leaf("VP.ENTER", 0) + ", TD exit",
    ),
    step(
        "page_accept",
        SOURCE,
        (p,),
        when=(
            _in(RUNNABLE, LIVE_EXPORT, LIVE_IMPORT),
            need("sept_state", page[p].in_(PENDING, PENDING_EXPORTED_DIRTY)),
        ),
        then=(
            page[p].to(lookup(page[p], {PENDING: MAPPED, PENDING_EXPORTED_DIRTY: EXPORTED_DIRTY})),
        ),
        why="The running guest accepts a page, which is zeroed; what is counted stays counted.",
        cite=f"TDG.MEM.PAGE.ACCEPT, TDCALL 6; {MODULE}",
    ),
    step(
        "export_unblockw",
        SOURCE,
        (p,),
        when=(
            _in(RUNNABLE, LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT),
            need("sept_state", page[p].in_(*WRITE_BLOCKED)),
        ),
        then=(
            page[p].to(
                lookup(
                    page[p],
                    {
                        BLOCKEDW: MAPPED,
                        EXPORTED_BLOCKEDW: EXPORTED_DIRTY,
                        EXPORTED_DIRTY_BLOCKEDW: EXPORTED_DIRTY,
                        PENDING_BLOCKEDW: PENDING,
                        PENDING_EXPORTED_BLOCKEDW: PENDING_EXPORTED_DIRTY,
                        PENDING_EXPORTED_DIRTY_BLOCKEDW: PENDING_EXPORTED_DIRTY,
                    },
                )
            ),
            dirty_count.to(
                dirty_count
                + choose(page[p].in_(EXPORTED_BLOCKEDW, PENDING_EXPORTED_BLOCKEDW), 1, 0)
            ),
        ),
        why="The guest wants to write: an exported page becomes dirty and is counted.",
        cite=cite_leaf("EXPORT.UNBLOCKW", 75),
    ),
    step(
        "export_mem_begin",
        SOURCE,
        (i,),
        when=(
            _in(LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT),
            need("stream", i.lt(num_migs - 1)),
            need("not_unfinished", not_(unfinished[i]), *repaired("R1")),
        ),
        then=(
            unfinished[i].to(True),
            unfinished_bundle[i].to(network.log_length),
            *network.make_bundle(
                MEM,
                epoch=mig_epoch,
                counter=next_mb_counter[i],
                stream=i,
                complete=False,
            ),
            # Repairs: a bundle is counted when its MBMD leaves, not when its last entry is done.
            only(repaired("R1"), next_mb_counter[i].to(next_mb_counter[i] + 1)),
            only(repaired("R14"), total_mb_count.to(total_mb_count + 1)),
        ),
        why="EXPORT.MEM starts: the MBMD, with its MAC, is written out before any page.",
        cite=cite_leaf("EXPORT.MEM", 68),
        part_of="export_mem",
    ),
    _export_entry(
        "export_mem_migrate",
        FIRST_TIME,
        (_in_order, _write_blocked, _tracked),
        (_exported, mig_count.to(mig_count + 1)),
        "A page is exported for the first time in this session.",
    ),
    _export_entry(
        "export_mem_remigrate",
        EXPORTED_AND_DIRTY,
        (_in_order, _write_blocked, _tracked),
        (_exported, dirty_count.to(dirty_count - 1)),
        "An exported page that became dirty is exported again.",
    ),
    _export_entry(
        "export_mem_cancel",
        EXPORTED,
        (_in_order,),
        (_returned, mig_count.to(mig_count - 1), dirty_count.to(dirty_count + _was_dirty)),
        "An exported page is taken back; the destination drops its copy.",
    ),
    _export_entry(
        "export_mem_out_of_order",
        FIRST_TIME + EXPORTED,
        (need("out_of_order", op_state.eq(POST_EXPORT)),),
        (
            _exported,
            mig_count.to(mig_count + choose(page[p].in_(*FIRST_TIME), 1, 0)),
            dirty_count.to(dirty_count + _was_dirty),
        ),
        "After the start token pages are only migrated, never re-migrated.",
    ),
    step(
        "export_mem_end",
        SOURCE,
        (i,),
        when=(
            _in(LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT),
            need("unfinished", unfinished[i]),
        ),
        then=(
            unfinished[i].to(False),
            network.log_complete[unfinished_bundle[i]].to(
                choose(network.observed, True, network.log_complete[unfinished_bundle[i]])
            ),
            only(unrepaired("R1"), next_mb_counter[i].to(next_mb_counter[i] + 1)),
            only(unrepaired("R14"), total_mb_count.to(total_mb_count + 1)),
        ),
        why="The last entry of the list is done and the bundle can be sent.",
        cite=cite_leaf("EXPORT.MEM", 68),
        part_of="export_mem",
    ),
    step(
        "export_mem_dropped",
        SOURCE,
        (i,),
        when=(
            _in(LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT),
            need("unfinished", unfinished[i]),
        ),
        then=(unfinished[i].to(False),),
        why="A malformed entry or a bad buffer ends the call, and what was done before it stays.",
        cite=cite_leaf("EXPORT.MEM", 68),
        part_of="export_mem",
        profiles=unrepaired("R13"),
    ),
    step(
        "export_track",
        SOURCE,
        when=(
            _in(LIVE_EXPORT, PAUSED_EXPORT),
            need("epoch_overflow", mig_epoch.lt(START_EPOCH - 1)),
            _no_unfinished_call(),
        ),
        then=(
            mig_epoch.to(mig_epoch + 1),
            total_mb_count.to(total_mb_count + 1),
            next_mb_counter[0].to(1),
            only(unrepaired("R14"), unfinished[0].to(False)),
            *network.make_bundle(
                EPOCH_TOKEN, epoch=mig_epoch + 1, counter=0, total=total_mb_count + 1
            ),
            network.token_position[mig_epoch + 1].to(
                choose(network.observed, network.log_length, network.token_position[mig_epoch + 1])
            ),
        ),
        why="A new epoch: its token carries the number of bundles made so far, itself included.",
        cite=cite_leaf("EXPORT.TRACK", 71),
    ),
    step(
        "export_pause",
        SOURCE,
        when=(
            _in(LIVE_EXPORT),
            need("no_vcpu_inside", all_of(refcount.eq(0), refcount_previous.eq(0))),
        ),
        then=(
            op_state.to(PAUSED_EXPORT),
            td_epoch.to(td_epoch + 1),
            network.session_paused.to(any_of(network.session_paused, network.observed)),
        ),
        why="The blackout begins: exclusive access to the TD means that no vCPU is in the guest.",
        cite=cite_leaf("EXPORT.PAUSE", 70),
    ),
    step(
        "export_state_td",
        SOURCE,
        when=(_in(PAUSED_EXPORT), need("not_unfinished", not_(unfinished[0]), *repaired("R1"))),
        then=(
            total_mb_count.to(total_mb_count + 1),
            next_mb_counter[0].to(next_mb_counter[0] + 1),
            only(unrepaired("R1"), unfinished[0].to(False)),
            *network.make_bundle(MUTABLE_TD_STATE, epoch=mig_epoch, counter=next_mb_counter[0]),
        ),
        why="The TD-scope state is final only when the TD is paused.",
        cite=cite_leaf("EXPORT.STATE.TD", 73),
    ),
    step(
        "export_state_vp",
        SOURCE,
        (i, v),
        when=(
            _in(PAUSED_EXPORT),
            need("stream", i.lt(num_migs - 1)),
            need("not_exported_yet", vcpu_export_count[v].ne(export_count)),
            need("not_unfinished", not_(unfinished[i]), *repaired("R1")),
        ),
        then=(
            vcpu_export_count[v].to(export_count),
            total_mb_count.to(total_mb_count + 1),
            next_mb_counter[i].to(next_mb_counter[i] + 1),
            only(unrepaired("R1"), unfinished[i].to(False)),
            *network.make_bundle(
                MUTABLE_VCPU_STATE, epoch=mig_epoch, counter=next_mb_counter[i], stream=i
            ),
        ),
        why="Each vCPU is exported once per session, while the TD is paused.",
        cite=cite_leaf("EXPORT.STATE.VP", 74),
    ),
    step(
        "export_track_start",
        SOURCE,
        when=(
            # The table admits the leaf in LIVE_EXPORT too; asking for the start token there is
            # refused.
            need("op_state", op_state.in_(LIVE_EXPORT, PAUSED_EXPORT)),
            need("paused", op_state.eq(PAUSED_EXPORT)),
            need("dirty_count", dirty_count.eq(0)),
            _no_unfinished_call(),
        ),
        then=(
            op_state.to(POST_EXPORT),
            mig_epoch.to(START_EPOCH),
            total_mb_count.to(total_mb_count + 1),
            next_mb_counter[0].to(1),
            only(unrepaired("R14"), unfinished[0].to(False)),
            *network.make_bundle(
                EPOCH_TOKEN, epoch=START_EPOCH, counter=0, total=total_mb_count + 1
            ),
            network.started.to(any_of(network.started, network.observed)),
            network.start_while_paused.to(
                choose(network.observed, op_state.eq(PAUSED_EXPORT), network.start_while_paused)
            ),
            network.start_dirty_pages.to(
                choose(network.observed, dirty_pages, network.start_dirty_pages)
            ),
            network.token_position[START_EPOCH].to(
                choose(network.observed, network.log_length, network.token_position[START_EPOCH])
            ),
        ),
        why="The start token may leave only when no exported page has a newer version behind it.",
        cite=cite_leaf("EXPORT.TRACK", 71) + ", in-order done",
    ),
    step(
        "export_abort",
        SOURCE,
        when=(_in(LIVE_EXPORT, PAUSED_EXPORT),),
        then=_session_end,
        why="Before the start token the source may take the TD back at any time.",
        cite=cite_leaf("EXPORT.ABORT", 64),
    ),
    step(
        "export_abort_with_token",
        SOURCE,
        when=(
            _in(POST_EXPORT),
            need("abort_token", implies(network.observed, network.abort_token)),
        ),
        then=_session_end,
        why="After the start token only the destination's abort token gives the TD back.",
        cite=cite_leaf("EXPORT.ABORT", 64),
    ),
    step(
        "export_restore",
        SOURCE,
        (p,),
        when=(_in(RUNNABLE), need("sept_state", page[p].in_(*EXPORTED))),
        then=(_returned, mig_count.to(mig_count - 1)),
        why="After an abort every exported page is taken out of the session before the next one.",
        cite=cite_leaf("EXPORT.RESTORE", 66),
    ),
)
