"""Locks of the source: several logical processors, each in one leaf, by the lock table.

A processor takes the locks of its leaf one by one: TDR, OP_STATE, MIG, the link of the stream, the
Secure EPT entry.  No leaf waits: where a lock is taken, the call ends as BUSY, which here is the
row `release` before any effect.  The model begins in a live export.

A lock is its holders, so no count of holders can be wrong; what counts is who may take it when.
TOTAL_MB_COUNT is added to by a locked instruction: read, and written only if it is still what was
read.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Assign,
    Bound,
    Count,
    Literal,
    MapVariable,
    Need,
    Node,
    Step,
    Variable,
    all_of,
    any_of,
    count,
    enum,
    index,
    mapping,
    member,
    need,
    not_,
    param,
    scalar,
    sort,
    step,
)
from tdxmig_model.model.words import (
    LIVE_EXPORT,
    MODULE,
    OP_STATE,
    PAGE,
    PAUSED_EXPORT,
    POST_EXPORT,
    RUNNABLE,
    SOURCE,
    START_EPOCH,
    cite_leaf,
)

PROCESSOR = sort("Processor")
LINK = index("Link")

MODE = enum("LockMode", "NONE", "SHARED", "EXCLUSIVE")
NONE, SHARED, EXCLUSIVE = (member(MODE, name) for name in MODE.members)

LEAF = enum(
    "LockLeaf",
    "EXPORT_MEM",
    "EXPORT_TRACK",
    "EXPORT_PAUSE",
    "EXPORT_ABORT",
    "EXPORT_UNBLOCKW",
    "VP_ENTER",
)
EXPORT_MEM, EXPORT_TRACK, EXPORT_PAUSE, EXPORT_ABORT, EXPORT_UNBLOCKW, VP_ENTER = (
    member(LEAF, name) for name in LEAF.members
)

STAGE = enum(
    "LockStage", "IDLE", "TDR", "OP_STATE", "MIG", "LINK", "ENTRY", "COUNTING", "GUEST", "DONE"
)
IDLE, HAS_TDR, CHECKED, HAS_MIG, HAS_LINK, HAS_ENTRY, COUNTING, GUEST, DONE = (
    member(STAGE, name) for name in STAGE.members
)

# The lock table: who takes which lock how.
TDR_SHARED = (EXPORT_MEM, EXPORT_TRACK, EXPORT_ABORT, EXPORT_UNBLOCKW, VP_ENTER)
TDR_EXCLUSIVE = (EXPORT_PAUSE,)
OP_STATE_SHARED = (EXPORT_MEM, EXPORT_UNBLOCKW, VP_ENTER)
OP_STATE_EXCLUSIVE = (EXPORT_TRACK, EXPORT_ABORT)
MIG_SHARED = (EXPORT_MEM,)
MIG_EXCLUSIVE = (EXPORT_TRACK, EXPORT_ABORT)

MAY_RUN = (RUNNABLE, LIVE_EXPORT)
ALLOWED = {
    EXPORT_MEM: (LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT),
    EXPORT_TRACK: (LIVE_EXPORT, PAUSED_EXPORT),
    EXPORT_PAUSE: (LIVE_EXPORT,),
    EXPORT_ABORT: (LIVE_EXPORT, PAUSED_EXPORT),
    EXPORT_UNBLOCKW: (RUNNABLE, LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT),
    VP_ENTER: MAY_RUN,
}

# --- variables -----------------------------------------------------------------------------------


def _of_processor(name: str, kind: object, init: object, doc: str, **more: bool) -> MapVariable:
    return mapping(name, (PROCESSOR,), kind, init, SOURCE, doc=doc, **more)  # type: ignore[arg-type]


stage = _of_processor("lp_stage", STAGE, IDLE, "how far the call has come")
leaf = _of_processor("lp_leaf", LEAF, EXPORT_MEM, "the leaf that the processor executes")
holds_tdr = _of_processor("lp_tdr", MODE, NONE, "how it holds the TDR lock")
holds_op_state = _of_processor("lp_op_state", MODE, NONE, "how it holds the OP_STATE lock")
holds_mig = _of_processor("lp_mig", MODE, NONE, "how it holds the MIG lock")
has_link = _of_processor("lp_has_link", BOOL, False, "it holds the lock of a stream's link")
link_of = _of_processor("lp_link", INT, 0, "of which stream")
has_entry = _of_processor("lp_has_entry", BOOL, False, "it holds the lock of a Secure EPT entry")
entry_of = _of_processor("lp_entry", INT, 0, "of which page")
register = _of_processor("lp_register", INT, 0, "TOTAL_MB_COUNT as it was read")
seen_op_state = _of_processor(
    "lp_seen_op_state", OP_STATE, LIVE_EXPORT, "OP_STATE as it was checked", ghost=True
)
seen_epoch = _of_processor(
    "lp_seen_epoch", INT, 0, "MIG_EPOCH as the MIG lock found it", ghost=True
)
seen_version = _of_processor(
    "lp_seen_version", INT, 0, "the page's version when its entry was committed", ghost=True
)

tdr_alone = scalar("tdr_alone", BOOL, False, SOURCE, doc="someone has the TDR alone")
op_state_alone = scalar("op_state_alone", BOOL, False, SOURCE, doc="someone has OP_STATE alone")
mig_alone = scalar("mig_alone", BOOL, False, SOURCE, doc="someone has the MIG lock alone")
link_locked = mapping("link_locked", (LINK,), BOOL, False, SOURCE, doc="MIGSC lock bit")
entry_locked = mapping("entry_locked", (PAGE,), BOOL, False, SOURCE, doc="entry lock bit")
op_state = scalar("locks_op_state", OP_STATE, LIVE_EXPORT, SOURCE, doc="OP_STATE")
mig_epoch = scalar("locks_mig_epoch", INT, 0, SOURCE, doc="MIG_EPOCH")
total_mb = scalar("locks_total_mb_count", INT, 0, SOURCE, doc="TOTAL_MB_COUNT since the start")
writable = mapping("locks_writable", (PAGE,), BOOL, False, SOURCE, doc="the guest may write it")
exported = mapping("locks_exported", (PAGE,), BOOL, False, SOURCE, doc="exported and clean")
version = mapping("locks_version", (PAGE,), INT, 0, SOURCE, ghost=True, doc="guest writes to it")
counted = scalar("locks_counted", INT, 0, SOURCE, ghost=True, doc="bundles and tokens that count")

VARIABLES = (
    stage,
    leaf,
    holds_tdr,
    holds_op_state,
    holds_mig,
    has_link,
    link_of,
    has_entry,
    entry_of,
    register,
    seen_op_state,
    seen_epoch,
    seen_version,
    tdr_alone,
    op_state_alone,
    mig_alone,
    link_locked,
    entry_locked,
    op_state,
    mig_epoch,
    total_mb,
    writable,
    exported,
    version,
    counted,
)


def _sharers(name: str, holds: MapVariable) -> Count:
    def held(element: Bound) -> Node:
        return holds[element].eq(SHARED)

    return count(name, PROCESSOR, held)


tdr_sharers = _sharers("shared holders of the TDR", holds_tdr)
op_state_sharers = _sharers("shared holders of OP_STATE", holds_op_state)
mig_sharers = _sharers("shared holders of MIG", holds_mig)

p = param("processor", PROCESSOR)
f = param("leaf", LEAF)
i = param("link", LINK)
g = param("page", PAGE)

# --- rows ----------------------------------------------------------------------------------------


def _at(*stages: Literal) -> Need:
    """The locks that come before have been taken, in the order of the table."""
    return need("order", stage[p].in_(*stages))


def _is(*leaves: Literal) -> Need:
    return need("leaf", leaf[p].in_(*leaves))


_allowed = need(
    "op_state",
    any_of(*(all_of(leaf[p].eq(of), op_state.in_(*states)) for of, states in ALLOWED.items())),
)
_LOCKS = f"lock table of the SEAMCALL leaves; {MODULE}"


def _taking(
    name: str,
    leaves: tuple[Literal, ...],
    after: Literal,
    free: tuple[Need, ...],
    effects: tuple[Assign, ...],
    why: str,
) -> Step:
    return step(
        name,
        SOURCE,
        (p,),
        when=(_at(after), _is(*leaves), *free),
        then=effects,
        why=why,
        cite=_LOCKS,
    )


def _no_shared(holders: Count) -> Need:
    return need("no_shared_holder", holders.eq(0))


def _no_exclusive(alone: Variable) -> Need:
    return need("no_exclusive_holder", not_(alone))


_checked = (stage[p].to(CHECKED), seen_op_state[p].to(op_state))
_in_mig = (stage[p].to(HAS_MIG), seen_epoch[p].to(mig_epoch))

TAKING = (
    step(
        "take_tdr_shared",
        SOURCE,
        (p, f),
        when=(_at(IDLE), need("leaf", f.in_(*TDR_SHARED)), _no_exclusive(tdr_alone)),
        then=(stage[p].to(HAS_TDR), leaf[p].to(f), holds_tdr[p].to(SHARED)),
        why="A leaf begins with the TDR; most share it.",
        cite=_LOCKS,
    ),
    step(
        "take_tdr_exclusive",
        SOURCE,
        (p, f),
        when=(
            _at(IDLE),
            need("leaf", f.in_(*TDR_EXCLUSIVE)),
            _no_shared(tdr_sharers),
            _no_exclusive(tdr_alone),
        ),
        then=(stage[p].to(HAS_TDR), leaf[p].to(f), holds_tdr[p].to(EXCLUSIVE), tdr_alone.to(True)),
        why="EXPORT.PAUSE wants the TDR alone, so no vCPU can be inside the guest.",
        cite=_LOCKS,
    ),
    _taking(
        "check_op_state",
        TDR_EXCLUSIVE,
        HAS_TDR,
        (_allowed,),
        _checked,
        "An exclusive TDR implies the OP_STATE lock.",
    ),
    _taking(
        "take_op_state_shared",
        OP_STATE_SHARED,
        HAS_TDR,
        (_no_exclusive(op_state_alone), _allowed),
        (holds_op_state[p].to(SHARED), *_checked),
        "OP_STATE is read once, under its lock.",
    ),
    _taking(
        "take_op_state_exclusive",
        OP_STATE_EXCLUSIVE,
        HAS_TDR,
        (_no_shared(op_state_sharers), _no_exclusive(op_state_alone), _allowed),
        (holds_op_state[p].to(EXCLUSIVE), op_state_alone.to(True), *_checked),
        "A leaf that changes OP_STATE or MIG_EPOCH has the OP_STATE lock alone.",
    ),
    _taking(
        "take_mig_shared",
        MIG_SHARED,
        CHECKED,
        (_no_exclusive(mig_alone),),
        (holds_mig[p].to(SHARED), *_in_mig),
        "Memory bundles of several streams are made side by side.",
    ),
    _taking(
        "take_mig_exclusive",
        MIG_EXCLUSIVE,
        CHECKED,
        (_no_shared(mig_sharers), _no_exclusive(mig_alone)),
        (holds_mig[p].to(EXCLUSIVE), mig_alone.to(True), *_in_mig),
        "No memory bundle is under way while a token is made or the session ends.",
    ),
    step(
        "take_link",
        SOURCE,
        (p, i),
        when=(
            _at(HAS_MIG),
            _is(EXPORT_MEM, EXPORT_TRACK),
            need("migs_index", any_of(leaf[p].ne(EXPORT_TRACK), i.eq(0))),
            need("link_free", not_(link_locked[i])),
        ),
        then=(
            stage[p].to(HAS_LINK),
            has_link[p].to(True),
            link_of[p].to(i),
            link_locked[i].to(True),
        ),
        why="A stream serves one call at a time.",
        cite=_LOCKS,
    ),
    step(
        "release",
        SOURCE,
        (p,),
        when=(need("order", not_(stage[p].in_(IDLE, HAS_ENTRY))),),
        then=(
            stage[p].to(IDLE),
            holds_tdr[p].to(NONE),
            tdr_alone.to(all_of(tdr_alone, holds_tdr[p].ne(EXCLUSIVE))),
            holds_op_state[p].to(NONE),
            op_state_alone.to(all_of(op_state_alone, holds_op_state[p].ne(EXCLUSIVE))),
            holds_mig[p].to(NONE),
            mig_alone.to(all_of(mig_alone, holds_mig[p].ne(EXCLUSIVE))),
            leaf[p].to(EXPORT_MEM),
            has_link[p].to(False),
            link_of[p].to(0),
            register[p].to(0),
            seen_op_state[p].to(LIVE_EXPORT),
            seen_epoch[p].to(0),
            seen_version[p].to(0),
            link_locked[link_of[p]].to(all_of(link_locked[link_of[p]], not_(has_link[p]))),
        ),
        why="Every exit gives back what was taken: success, BUSY, another error, interruption.",
        cite=_LOCKS,
    ),
)

WORKING = (
    step(
        "lock_entry",
        SOURCE,
        (p, g),
        when=(
            _at(HAS_LINK),
            _is(EXPORT_MEM),
            need("sept_state", not_(exported[g])),
            need("write_blocked_while_live", any_of(op_state.ne(LIVE_EXPORT), not_(writable[g]))),
            need("entry_free", not_(entry_locked[g])),
        ),
        then=(
            stage[p].to(HAS_ENTRY),
            has_entry[p].to(True),
            entry_of[p].to(g),
            entry_locked[g].to(True),
            exported[g].to(True),
            writable[g].to(False),
            seen_version[p].to(version[g]),
        ),
        why="The entry is locked and becomes exported, before its page is read.",
        cite=cite_leaf("EXPORT.MEM", 68),
    ),
    step(
        "encrypt_page",
        SOURCE,
        (p,),
        when=(_at(HAS_ENTRY),),
        then=(
            stage[p].to(HAS_LINK),
            has_entry[p].to(False),
            entry_of[p].to(0),
            seen_version[p].to(0),
            entry_locked[entry_of[p]].to(False),
        ),
        why="The page is encrypted while its entry is locked.",
        cite=cite_leaf("EXPORT.MEM", 68),
    ),
    step(
        "read_total",
        SOURCE,
        (p,),
        when=(_at(HAS_LINK, COUNTING), _is(EXPORT_MEM)),
        then=(stage[p].to(COUNTING), register[p].to(total_mb)),
        why="The first half of an addition to TOTAL_MB_COUNT, or another attempt at it.",
        cite=cite_leaf("EXPORT.MEM", 68),
    ),
    step(
        "add_to_total",
        SOURCE,
        (p,),
        when=(_at(COUNTING), need("atomic", register[p].eq(total_mb))),
        then=(stage[p].to(DONE), total_mb.to(register[p] + 1), counted.to(counted + 1)),
        why="A locked addition: nobody wrote the counter since it was read.",
        cite=cite_leaf("EXPORT.MEM", 68),
    ),
    step(
        "make_epoch_token",
        SOURCE,
        (p,),
        when=(
            _at(HAS_LINK),
            _is(EXPORT_TRACK),
            need("epoch_overflow", mig_epoch.lt(START_EPOCH - 1)),
        ),
        then=(
            stage[p].to(DONE),
            mig_epoch.to(mig_epoch + 1),
            total_mb.to(total_mb + 1),
            counted.to(counted + 1),
        ),
        why="A new epoch, while no memory bundle is under way.",
        cite=cite_leaf("EXPORT.TRACK", 71),
    ),
    step(
        "make_start_token",
        SOURCE,
        (p,),
        when=(_at(HAS_LINK), _is(EXPORT_TRACK), need("paused", op_state.eq(PAUSED_EXPORT))),
        then=(
            stage[p].to(DONE),
            op_state.to(POST_EXPORT),
            mig_epoch.to(START_EPOCH),
            total_mb.to(total_mb + 1),
            counted.to(counted + 1),
        ),
        why="The start token ends the in-order phase.",
        cite=cite_leaf("EXPORT.TRACK", 71),
    ),
    step(
        "end_session",
        SOURCE,
        (p,),
        when=(_at(HAS_MIG), _is(EXPORT_ABORT)),
        then=(stage[p].to(DONE), op_state.to(RUNNABLE)),
        why="Before the start token the source takes the TD back.",
        cite=cite_leaf("EXPORT.ABORT", 64),
    ),
    step(
        "pause_td",
        SOURCE,
        (p,),
        when=(_at(CHECKED), _is(EXPORT_PAUSE)),
        then=(stage[p].to(DONE), op_state.to(PAUSED_EXPORT)),
        why="The TD can no longer be entered.",
        cite=cite_leaf("EXPORT.PAUSE", 70),
    ),
    step(
        "unblock_page",
        SOURCE,
        (p, g),
        when=(
            _at(CHECKED),
            _is(EXPORT_UNBLOCKW),
            need("sept_state", not_(writable[g])),
            need("entry_free", not_(entry_locked[g])),
        ),
        then=(stage[p].to(DONE), writable[g].to(True), exported[g].to(False)),
        why="The guest may write the page again, which is exported no more or dirty.",
        cite=cite_leaf("EXPORT.UNBLOCKW", 75),
    ),
    step(
        "enter_guest",
        SOURCE,
        (p,),
        when=(_at(CHECKED), _is(VP_ENTER)),
        then=(stage[p].to(GUEST), holds_op_state[p].to(NONE)),
        why="The guest runs with the TDR shared and the OP_STATE lock given back.",
        cite=cite_leaf("VP.ENTER", 0),
    ),
    step(
        "write_page",
        SOURCE,
        (p, g),
        when=(_at(GUEST), need("writable", writable[g])),
        then=(version[g].to(version[g] + 1),),
        why="The guest writes a page that is not write-blocked.",
        cite=cite_leaf("VP.ENTER", 0) + ", in the guest",
    ),
)

STEPS = TAKING + WORKING
