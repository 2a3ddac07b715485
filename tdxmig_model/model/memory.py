"""The memory model: what pages hold, superposed on the leaf model.

The rows of the leaf model gain the entries of their GPA lists and the versions of the pages.  New
rows are the guest's writes, and list entries that fail and are sent as NOP.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    Addition,
    Assign,
    Literal,
    Need,
    Node,
    addition,
    all_of,
    any_of,
    choose,
    implies,
    need,
    only,
    step,
    superpose,
)
from tdxmig_model.model import destination as d
from tdxmig_model.model import memory_state as x
from tdxmig_model.model import network as n
from tdxmig_model.model import source as rows
from tdxmig_model.model import source_state as s
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.memory_lemmas import LEMMAS
from tdxmig_model.model.memory_properties import PROPERTIES
from tdxmig_model.model.words import (
    BLOCKEDW,
    CANCEL,
    DESTINATION,
    EXPORTED_BLOCKEDW,
    EXPORTED_DIRTY,
    EXPORTED_DIRTY_BLOCKEDW,
    LIVE_EXPORT,
    LIVE_IMPORT,
    MAPPED,
    MEMORY_IMPORT,
    MIGRATE,
    MODULE,
    NOP,
    PAUSED_EXPORT,
    POST_EXPORT,
    POST_IMPORT,
    REMIGRATE,
    SOURCE,
    STATE_IMPORT,
    repaired,
    unrepaired,
)

p = rows.p
i = rows.i
_exporting = need("op_state", s.op_state.in_(LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT))
_importing = need("op_state", d.op_state.in_(MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT, LIVE_IMPORT))
_made = s.unfinished_bundle[i]
_here = x.log_entries[_made]


def _append(operation: Literal, pending: Node | bool, content: bool) -> tuple[Assign, ...]:
    """One more entry at the end of the list of the bundle that stream i makes."""

    def put(new: Node | int | bool, old: Node) -> Node:
        return choose(n.observed, new, old)

    more: tuple[Assign, ...] = (
        x.log_entries[_made].to(_here + choose(n.observed, 1, 0)),
        x.entry_operation[_made, _here].to(put(operation, x.entry_operation[_made, _here])),
    )
    if content:
        more += (
            x.entry_page[_made, _here].to(put(p, x.entry_page[_made, _here])),
            x.entry_pending[_made, _here].to(put(pending, x.entry_pending[_made, _here])),
            x.entry_version[_made, _here].to(put(x.version[p], x.entry_version[_made, _here])),
        )
    return more


def _sends() -> tuple[Assign, ...]:
    """The page's newest in-order entry is this one."""
    return (
        x.sent_bundle[p].to(choose(n.observed, _made, x.sent_bundle[p])),
        x.sent_entry[p].to(choose(n.observed, _here, x.sent_entry[p])),
    )


# An EXPORT.MEM that was interrupted is resumed in the same epoch or not at all.
_same_epoch = need("resumed_epoch", implies(n.observed, n.log_epoch[_made].eq(s.mig_epoch)))
_pending = s.page[p].in_(*s.PENDING_STATES)
# Repair R11: an exported page is not writable, whatever it was before.
_closed = only(repaired("R11"), x.writable[p].to(False))
# While the TD runs, translations of a page that was writable until now are as new as can be.
_just_closed = only(
    repaired("R11"),
    x.blocked_at[p].to(
        choose(all_of(s.op_state.eq(LIVE_EXPORT), x.writable[p]), s.td_epoch, x.blocked_at[p])
    ),
)

_read = d.unfinished_bundle[i]
_next = x.progress[i]


# An IMPORT.MEM that was interrupted is resumed in the same epoch or not at all.
_resumed = need("resumed_epoch", n.log_epoch[_read].eq(d.mig_epoch))


def _takes(operation: Literal, pending: bool | None) -> tuple[Need, ...]:
    """The next entry of the bundle is of this kind and page: its MAC verifies for nothing else."""
    kind = all_of(
        x.entry_page[_read, _next].eq(p),
        x.entry_operation[_read, _next].eq(operation),
        *(() if pending is None else (x.entry_pending[_read, _next].eq(pending),)),
    )
    return (
        need("next_entry", _next.lt(x.log_entries[_read])),
        need("page_mac", kind),
        _resumed,
    )


def _imports(operation: Literal, pending: bool | None) -> Addition:
    late = d.op_state.in_(POST_IMPORT, LIVE_IMPORT)
    return addition(
        x.progress[i].to(_next + 1),
        x.imported[_read, _next].to(True),
        x.held_version[p].to(x.entry_version[_read, _next]),
        x.last_bundle[p].to(_read),
        x.last_entry[p].to(_next),
        x.late_imports[p].to(x.late_imports[p] + choose(late, 1, 0)),
        needs=_takes(operation, pending),
    )


def _accepts(position: Node) -> tuple[Assign, ...]:
    """The ghost end of the accepted bundles moves behind this one."""
    return (
        x.accepted_end.to(
            choose(position.lt(x.accepted_end), x.accepted_end, position + 1),
        ),
    )


_inside = need("inside", any_of(s.refcount.gt(0), s.refcount_previous.gt(0)))
_resumes = x.resumed_as_paused.to(s.op_state.in_(PAUSED_EXPORT, POST_EXPORT))

_ADDITIONS = {
    "export_blockw": addition(x.writable[p].to(False), x.blocked_at[p].to(s.td_epoch)),
    "export_unblockw": addition(x.writable[p].to(True)),
    "page_accept": addition(
        x.writable[p].to(True), x.version[p].to(x.version[p] + 1), needs=(_inside,)
    ),
    "vp_enter": addition(x.resumed_as_paused.to(False)),
    "export_mem_begin": addition(
        x.log_entries[n.log_length].to(choose(n.observed, 0, x.log_entries[n.log_length])),
        only(
            repaired("R14"),
            x.counted[n.log_length].to(choose(n.observed, True, x.counted[n.log_length])),
        ),
    ),
    "export_mem_migrate": addition(
        _append(MIGRATE, _pending, True), _sends(), _closed, _just_closed, needs=(_same_epoch,)
    ),
    "export_mem_remigrate": addition(
        _append(REMIGRATE, _pending, True), _sends(), _closed, _just_closed, needs=(_same_epoch,)
    ),
    "export_mem_cancel": addition(
        _append(CANCEL, False, True), _sends(), x.writable[p].to(True), needs=(_same_epoch,)
    ),
    "export_mem_out_of_order": addition(
        _append(MIGRATE, _pending, True), _closed, needs=(_same_epoch,)
    ),
    "export_mem_end": addition(
        only(unrepaired("R14"), x.counted[_made].to(choose(n.observed, True, x.counted[_made]))),
        needs=(_same_epoch,),
    ),
    "export_pause": addition(x.version_at_pause.fill(lambda page: x.version[page])),
    "export_abort": addition(_resumes),
    "export_abort_with_token": addition(_resumes),
    "export_restore": addition(x.writable[p].to(True)),
    "import_state_immutable": addition(
        x.accepted_end.to(d.m + 1), x.progress.fill(lambda stream: 0)
    ),
    "import_mem_begin": addition(x.progress[i].to(0), x.begun[d.m].to(True)),
    "import_mem_migrate": _imports(MIGRATE, False),
    "import_mem_migrate_pending": _imports(MIGRATE, True),
    "import_mem_remigrate": _imports(REMIGRATE, False),
    "import_mem_remigrate_pending": _imports(REMIGRATE, True),
    "import_mem_cancel": _imports(CANCEL, None),
    "import_mem_end": addition(
        _accepts(_read),
        needs=(need("last_entry", _next.eq(x.log_entries[_read])), _resumed),
    ),
    "import_track": addition(_accepts(d.m)),
    "import_track_start": addition(_accepts(d.m)),
    "import_state_td": addition(_accepts(d.m)),
    "import_state_vp": addition(_accepts(d.m)),
}

_written: Node = any_of(
    x.writable[p],
    x.blocked_at[p].ge(s.td_epoch),
    all_of(x.blocked_at[p].eq(s.td_epoch - 1), s.refcount_previous.gt(0)),
)

STEPS = (
    step(
        "guest_write",
        SOURCE,
        (p,),
        when=(
            _inside,
            need(
                "accepted_page",
                s.page[p].in_(
                    MAPPED,
                    BLOCKEDW,
                    EXPORTED_BLOCKEDW,
                    EXPORTED_DIRTY,
                    EXPORTED_DIRTY_BLOCKEDW,
                ),
            ),
            # A vCPU that has not left since the page was blocked may have kept a translation.
            need("may_write", _written),
        ),
        then=(x.version[p].to(x.version[p] + 1),),
        why="The guest writes a page that it can write, or that its vCPU still thinks it can.",
        cite=f"Secure-EPT entry W, TD_EPOCH and REFCOUNT; {MODULE}",
    ),
    step(
        "export_mem_failed_entry",
        SOURCE,
        (i,),
        when=(_exporting, need("unfinished", s.unfinished[i]), _same_epoch),
        then=_append(NOP, False, False),
        why="An entry that cannot be exported is sent as NOP with its status, and changes nothing.",
        cite=f"TDH.EXPORT.MEM, leaf 68; {MODULE}",
        part_of="export_mem",
    ),
    step(
        "import_mem_nop",
        DESTINATION,
        (i,),
        when=(
            _importing,
            need("unfinished", d.unfinished[i]),
            _resumed,
            need("next_entry", _next.lt(x.log_entries[_read])),
            need(
                "nop_or_late",
                any_of(
                    x.entry_operation[_read, _next].eq(NOP),
                    d.op_state.in_(POST_IMPORT, LIVE_IMPORT),
                ),
            ),
        ),
        then=(x.progress[i].to(_next + 1),),
        why="A NOP entry changes nothing, and out of order neither does one that is refused.",
        cite=f"TDH.IMPORT.MEM, leaf 83; {MODULE}",
        part_of="import_mem",
    ),
)

MEMORY = superpose(
    LEAF,
    "memory",
    variables=x.VARIABLES,
    additions=_ADDITIONS,
    steps=STEPS,
    properties=PROPERTIES + LEMMAS,
    assumptions=(
        "what a page holds is its version; the destination's guest does not write in this model",
        "a vCPU that is in the guest may have cached any translation since it was entered",
    ),
)
