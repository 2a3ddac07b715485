"""The service TD of a TD: which MigTD is bound to it, and which one writes its keys.

A TD has one slot.  A service TD is known by its UUID, here its number, and measured by its TDINFO
hash, which the host chooses when it builds one and which stays.  The slot may be told a hash before
(PREBIND), and any service TD with the hash of the slot may take the place of the one that is bound.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Goal,
    Literal,
    Need,
    Property,
    System,
    all_of,
    choose,
    enum,
    implies,
    index,
    mapping,
    member,
    need,
    not_,
    param,
    scalar,
    step,
)
from tdxmig_model.model.words import (
    ALL_PROFILES,
    FAILED_IMPORT,
    INITIALIZED,
    LIVE_EXPORT,
    LIVE_IMPORT,
    MEMORY_IMPORT,
    MODULE,
    NETWORK,
    OP_STATE,
    PAUSED_EXPORT,
    POST_EXPORT,
    POST_IMPORT,
    RUNNABLE,
    SOURCE,
    STATE_IMPORT,
    UNINITIALIZED,
    cite_leaf,
)

SERVICE = index("ServiceTd")
INFO = index("InfoHash")
SLOT = enum("BindingState", "NOT_BOUND", "PREBOUND", "BOUND")
NOT_BOUND, PREBOUND, BOUND = (member(SLOT, name) for name in SLOT.members)

built = mapping("service_td_built", (SERVICE,), BOOL, False, NETWORK, doc="it has a TDINFO now")
info = mapping("service_td_info", (SERVICE,), INT, 0, NETWORK, doc="its TDINFO hash")

op_state = scalar("bindings_op_state", OP_STATE, UNINITIALIZED, SOURCE, doc="OP_STATE")
slot = scalar("binding_state", SLOT, NOT_BOUND, SOURCE, doc="SERVTD_BINDING_STATE")
bound_info = scalar("binding_info", INT, 0, SOURCE, doc="SERVTD_INFO_HASH")
bound_uuid = scalar("binding_uuid", INT, 0, SOURCE, doc="SERVTD_UUID")

# Ghosts: what the TD was bound to first, who wrote its keys, and how things were at the beginning
# of a blackout or an import.
first_info = scalar("first_binding_info", INT, 0, SOURCE, ghost=True)
writes = scalar("key_writes", INT, 0, SOURCE, ghost=True)
writer_info = scalar("key_writer_info", INT, 0, SOURCE, ghost=True)
writer_bound = scalar("key_writer_bound", BOOL, True, SOURCE, ghost=True)
kept_slot = scalar("kept_binding_state", SLOT, NOT_BOUND, SOURCE, ghost=True)
kept_uuid = scalar("kept_binding_uuid", INT, 0, SOURCE, ghost=True)
kept_writes = scalar("kept_key_writes", INT, 0, SOURCE, ghost=True)

s = param("s", SERVICE)
h = param("h", INFO)

_blackout = op_state.in_(PAUSED_EXPORT, POST_EXPORT)
_half_imported = op_state.in_(MEMORY_IMPORT, STATE_IMPORT)
_keeps = (kept_slot.to(slot), kept_uuid.to(bound_uuid), kept_writes.to(writes))


def _in(*states: Literal) -> Need:
    return need("op_state", op_state.in_(*states))


SLOT_STEPS = (
    step(
        "build_service_td",
        NETWORK,
        (s, h),
        when=(need("new", not_(built[s])),),
        then=(built[s].to(True), info[s].to(h)),
        why="The host builds service TDs of its own choice; what one is measured as stays.",
        cite=cite_leaf("MR.FINALIZE", 17),
    ),
    step(
        "prebind_service_td",
        SOURCE,
        (h,),
        when=(_in(UNINITIALIZED, INITIALIZED), need("not_bound", slot.ne(BOUND))),
        then=(slot.to(PREBOUND), bound_info.to(h), first_info.to(h)),
        why="The hash is there before the service TD is, and can be measured with the TD.",
        cite=cite_leaf("SERVTD.PREBIND", 49),
    ),
    step(
        "bind_service_td",
        SOURCE,
        (s,),
        when=(
            _in(UNINITIALIZED, INITIALIZED, RUNNABLE, LIVE_EXPORT, POST_IMPORT, LIVE_IMPORT),
            need("service_td", built[s]),
            need(
                "first_time", implies(slot.eq(NOT_BOUND), op_state.in_(UNINITIALIZED, INITIALIZED))
            ),
            need("info_hash", implies(slot.ne(NOT_BOUND), bound_info.eq(info[s]))),
        ),
        then=(
            slot.to(BOUND),
            bound_info.to(info[s]),
            bound_uuid.to(s),
            first_info.to(choose(slot.eq(NOT_BOUND), info[s], first_info)),
        ),
        why="A TD is bound before it runs; later another service TD with the same hash may come.",
        cite=cite_leaf("SERVTD.BIND", 48),
    ),
    step(
        "write_bound_key",
        SOURCE,
        (s,),
        when=(
            need("op_state", not_(_blackout)),
            need("service_td", built[s]),
            need("bound", slot.eq(BOUND)),
            need("caller_uuid", bound_uuid.eq(s)),
            need("info_hash", bound_info.eq(info[s])),
        ),
        then=(
            writes.to(writes + 1),
            writer_info.to(info[s]),
            writer_bound.to(all_of(writer_bound, slot.eq(BOUND), bound_uuid.eq(s))),
        ),
        why="The service TD that is bound writes keys, except in the blackout.",
        cite=f"TDG.SERVTD.WR of MIG_DEC_KEY, TDCALL 20; {MODULE}",
    ),
)

OP_STATE_STEPS = (
    step(
        "initialize_bound_td",
        SOURCE,
        when=(_in(UNINITIALIZED),),
        then=(op_state.to(INITIALIZED),),
        why="A TD that is not imported is built.",
        cite=cite_leaf("MNG.INIT", 21),
    ),
    step(
        "finalize_bound_td",
        SOURCE,
        when=(_in(INITIALIZED),),
        then=(op_state.to(RUNNABLE),),
        why="The TD is measured and may run.",
        cite=cite_leaf("MR.FINALIZE", 17),
    ),
    step(
        "export_bound_td",
        SOURCE,
        when=(_in(RUNNABLE, LIVE_IMPORT),),
        then=(op_state.to(LIVE_EXPORT),),
        why="A session begins, and the TD runs on.",
        cite=cite_leaf("EXPORT.STATE.IMMUTABLE", 72),
    ),
    step(
        "pause_bound_td",
        SOURCE,
        when=(_in(LIVE_EXPORT),),
        then=(op_state.to(PAUSED_EXPORT), *_keeps),
        why="The blackout begins.",
        cite=cite_leaf("EXPORT.PAUSE", 70),
    ),
    step(
        "give_bound_td",
        SOURCE,
        when=(_in(PAUSED_EXPORT),),
        then=(op_state.to(POST_EXPORT),),
        why="The start token is made.",
        cite=cite_leaf("EXPORT.TRACK", 71),
    ),
    step(
        "take_bound_td_back",
        SOURCE,
        when=(_in(LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT),),
        then=(op_state.to(RUNNABLE),),
        why="The session is aborted; what that needs is in other models.",
        cite=cite_leaf("EXPORT.ABORT", 64),
    ),
    step(
        "import_bound_td",
        SOURCE,
        when=(_in(UNINITIALIZED),),
        then=(op_state.to(MEMORY_IMPORT), *_keeps),
        why="The immutable state of the source is here.",
        cite=cite_leaf("IMPORT.STATE.IMMUTABLE", 85),
    ),
    step(
        "import_bound_td_state",
        SOURCE,
        when=(_in(MEMORY_IMPORT),),
        then=(op_state.to(STATE_IMPORT),),
        why="The mutable TD state is here.",
        cite=cite_leaf("IMPORT.STATE.TD", 86),
    ),
    step(
        "take_bound_td",
        SOURCE,
        when=(_in(STATE_IMPORT),),
        then=(op_state.to(POST_IMPORT),),
        why="The start token is taken.",
        cite=cite_leaf("IMPORT.TRACK", 84),
    ),
    step(
        "commit_bound_td",
        SOURCE,
        when=(_in(POST_IMPORT),),
        then=(op_state.to(LIVE_IMPORT),),
        why="The TD runs while the rest of its memory comes.",
        cite=cite_leaf("IMPORT.COMMIT", 82),
    ),
    step(
        "end_import_of_bound_td",
        SOURCE,
        when=(_in(POST_IMPORT, LIVE_IMPORT),),
        then=(op_state.to(RUNNABLE),),
        why="The import is over, and the TD runs.",
        cite=cite_leaf("IMPORT.END", 81),
    ),
    step(
        "fail_bound_td",
        SOURCE,
        when=(_in(MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT),),
        then=(op_state.to(FAILED_IMPORT),),
        why="An import that fails before the commit is over for good.",
        cite=cite_leaf("IMPORT.ABORT", 80) + ", and fatal errors of an import",
    ),
)

PROPERTIES = (
    Property(
        "L37",
        all_of(writer_bound, implies(writes.ge(1), writer_info.eq(first_info))),
        "Keys are written only by the service TD that is bound, and it has the TDINFO hash that "
        "the TD was bound to first.",
        "leaf",
        "TDG.SERVTD.WR, TDH.SERVTD.BIND (what of P37 the TDX module enforces)",
        guards=(
            ("bind_service_td", "info_hash"),
            ("prebind_service_td", "not_bound"),
            ("write_bound_key", "bound"),
            ("write_bound_key", "caller_uuid"),
        ),
        witness=all_of(writes.eq(2), writer_info.eq(1)),
    ),
    Property(
        "P39",
        all_of(
            implies(
                op_state.in_(PAUSED_EXPORT, POST_EXPORT, MEMORY_IMPORT, STATE_IMPORT),
                all_of(slot.eq(kept_slot), bound_uuid.eq(kept_uuid)),
            ),
            implies(_blackout, writes.eq(kept_writes)),
            implies(slot.ne(NOT_BOUND), bound_info.eq(first_info)),
        ),
        "A TD keeps its service TD while it is paused or half imported, and its keys while it is "
        "paused; whoever is bound has the hash of the first.",
        "leaf",
        "TDH.SERVTD.BIND, TDG.SERVTD.WR (the binding of this TD; the hash is exported with it)",
        guards=(
            ("bind_service_td", "op_state"),
            ("bind_service_td", "info_hash"),
            ("write_bound_key", "op_state"),
        ),
        witness=all_of(_blackout, slot.eq(BOUND), writes.ge(1)),
    ),
)

LEMMAS = (
    Property(
        "bound_service_td",
        implies(slot.eq(BOUND), all_of(built[bound_uuid], info[bound_uuid].eq(bound_info))),
        "The service TD that is bound exists, and has the hash of the slot.",
        "lemma",
    ),
    Property(
        "written_when_bound",
        all_of(writes.ge(0), implies(writes.ge(1), slot.eq(BOUND))),
        "No key is written before a service TD is bound.",
        "lemma",
    ),
)

BINDINGS = System(
    name="bindings",
    variables=(
        *(built, info, op_state, slot, bound_info, bound_uuid),
        *(first_info, writes, writer_info, writer_bound, kept_slot, kept_uuid, kept_writes),
    ),
    steps=SLOT_STEPS + OP_STATE_STEPS,
    properties=PROPERTIES + LEMMAS,
    goals=(
        Goal(
            "rebound_service_td",
            all_of(op_state.eq(LIVE_EXPORT), writes.eq(2), bound_uuid.ne(kept_uuid)),
            "Another service TD of the same hash takes the place of the one that is bound.",
        ),
        Goal(
            "bound_by_prebinding",
            all_of(op_state.eq(POST_EXPORT), slot.eq(PREBOUND)),
            "A TD is exported whose service TD never came.",
        ),
    ),
    assumptions=(
        "a TDINFO hash is that of one measurement, and a UUID that of one TD",
        "a TD has one slot for service TDs, and only migration TDs are bound",
    ),
    profiles=ALL_PROFILES,
)
