"""One interruptible leaf on one stream: NEW, RESUME, what the host does in between, how it fails.

The call processes a list, entry by entry.  Between two entries it may be interrupted; then the
module keeps a record of it, and the host may do anything: another leaf, another epoch, another
session, other contents of shared memory, RESUME with other operands, or nothing ever again.  One
logical processor: what two of them do to each other is the model of the locks.

`depends` stands for all fields of the TD that the call reads or writes; ghosts remember the NEW
that a call began with.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Goal,
    Literal,
    Need,
    Node,
    Property,
    System,
    all_of,
    any_of,
    enum,
    implies,
    index,
    member,
    need,
    not_,
    only,
    param,
    scalar,
    step,
)
from tdxmig_model.model.words import (
    ALL_PROFILES,
    MODULE,
    SOURCE,
    repaired,
    unrepaired,
)

OPERANDS = index("Operands")
VALUE = index("Value")

LEAF = enum("InterruptibleLeaf", "EXPORT_MEM", "IMPORT_STATE_IMMUTABLE", "EXPORT_STATE_IMMUTABLE")
EXPORT_MEM, IMPORT_IMMUTABLE, EXPORT_IMMUTABLE = (member(LEAF, name) for name in LEAF.members)
CALL = enum("CallStage", "NONE", "BETWEEN_ENTRIES", "ENTRY_READ", "ENTRY_USED")
NO_CALL, BETWEEN, READ, USED = (member(CALL, name) for name in CALL.members)

# --- variables -----------------------------------------------------------------------------------

stage = scalar("call_stage", CALL, NO_CALL, SOURCE, doc="where the running call is")
leaf = scalar("call_leaf", LEAF, EXPORT_MEM, SOURCE, doc="its leaf")
operands = scalar("call_operands", OPERANDS, 0, SOURCE, doc="its operands")
copy = scalar("call_copy", VALUE, 0, SOURCE, doc="the word of shared memory as it was read")
counts = scalar("call_counts", BOOL, False, SOURCE, doc="its bundle is in TOTAL_MB_COUNT")

interrupted = scalar("record_valid", BOOL, False, SOURCE, doc="there is an interrupted call")
saved_leaf = scalar("record_leaf", LEAF, EXPORT_MEM, SOURCE)
saved_operands = scalar("record_operands", OPERANDS, 0, SOURCE)
saved_epoch = scalar("record_epoch", INT, 0, SOURCE)
saved_counts = scalar("record_counts", BOOL, False, SOURCE)

epoch = scalar("calls_mig_epoch", INT, 0, SOURCE, doc="MIG_EPOCH")
session = scalar("calls_session", INT, 0, SOURCE, doc="which session it is; not compared")
stream_ready = scalar("stream_ready", BOOL, False, SOURCE, doc="the stream is initialised")
depends = scalar("depends", INT, 0, SOURCE, doc="a version of the fields that the call depends on")
failed = scalar("calls_failed_import", BOOL, False, SOURCE, doc="OP_STATE is FAILED_IMPORT")
shared = scalar("shared_word", VALUE, 0, SOURCE, doc="a word of shared memory, the host's")

begun_leaf = scalar("begun_leaf", LEAF, EXPORT_MEM, SOURCE, ghost=True)
begun_operands = scalar("begun_operands", OPERANDS, 0, SOURCE, ghost=True)
begun_epoch = scalar("begun_epoch", INT, 0, SOURCE, ghost=True)
begun_session = scalar("begun_session", INT, 0, SOURCE, ghost=True)
begun_depends = scalar("begun_depends", INT, 0, SOURCE, ghost=True)
checked = scalar("checked_value", VALUE, 0, SOURCE, ghost=True, doc="what the checks saw")
used = scalar("used_value", VALUE, 0, SOURCE, ghost=True, doc="what the effect used")
committed = scalar("commits", INT, 0, SOURCE, ghost=True, doc="effects since the call's NEW")
left_behind = scalar(
    "left_behind",
    BOOL,
    False,
    SOURCE,
    ghost=True,
    doc="a failed call had effects that do not count",
)

VARIABLES = (
    stage,
    leaf,
    operands,
    copy,
    counts,
    interrupted,
    saved_leaf,
    saved_operands,
    saved_epoch,
    saved_counts,
    epoch,
    session,
    stream_ready,
    depends,
    failed,
    shared,
    begun_leaf,
    begun_operands,
    begun_epoch,
    begun_session,
    begun_depends,
    checked,
    used,
    committed,
    left_behind,
)

f = param("leaf", LEAF)
o = param("operands", OPERANDS)
w = param("word", VALUE)

# --- rows ----------------------------------------------------------------------------------------

_IMMUTABLE = f"TDH.EXPORT.STATE.IMMUTABLE, leaf 72; TDH.IMPORT.STATE.IMMUTABLE, leaf 85; {MODULE}"
_MEM = f"TDH.EXPORT.MEM, leaf 68; {MODULE}"
_ANY = f"TDH.EXPORT.MEM and the other interruptible leaves; {MODULE}"


def _at(*stages: Literal) -> Need:
    return need("stage", stage.in_(*stages))


_alive = need("op_state", not_(failed))


def _unfinished(*leaves: Literal) -> Node:
    return all_of(interrupted, stream_ready, saved_leaf.in_(*leaves))


_no_start_import = need(
    "no_unfinished_import", not_(_unfinished(IMPORT_IMMUTABLE)), *repaired("R3")
)
_no_start_export = need("no_unfinished_start", not_(_unfinished(EXPORT_IMMUTABLE)), *repaired("R4"))
_no_export_mem = need("no_unfinished_memory", not_(_unfinished(EXPORT_MEM)), *repaired("R1"))
_same = all_of(
    f.eq(saved_leaf),
    o.eq(saved_operands),
    any_of(f.ne(EXPORT_MEM), epoch.eq(saved_epoch)),
)
_begin = (
    stage.to(BETWEEN),
    leaf.to(f),
    operands.to(o),
    interrupted.to(False),
    stream_ready.to(True),
    begun_leaf.to(f),
    begun_operands.to(o),
    begun_epoch.to(epoch),
    begun_depends.to(depends),
    committed.to(0),
)


def _resumed_wrongly(recorded: Literal) -> tuple[Need, ...]:
    """A RESUME with another leaf, other operands or in another epoch than was recorded."""
    return (
        _at(NO_CALL),
        _alive,
        need("stream_initialized", stream_ready),
        need("interrupted", interrupted),
        need("leaf", saved_leaf.eq(recorded)),
        need("different", not_(_same)),
    )


_over = (stage.to(NO_CALL), copy.to(0))

STEPS = (
    step(
        "begin_memory",
        SOURCE,
        (f, o),
        when=(
            _at(NO_CALL),
            _alive,
            need("leaf", f.eq(EXPORT_MEM)),
            _no_start_import,
            _no_start_export,
            _no_export_mem,
        ),
        then=(
            *_begin,
            begun_session.to(session),
            only(repaired("R1"), counts.to(True)),
            only(unrepaired("R1"), counts.to(False)),
        ),
        why="NEW: a bundle of memory of the current epoch.",
        cite=_MEM,
    ),
    step(
        "begin_immutable",
        SOURCE,
        (f, o),
        when=(
            _at(NO_CALL),
            _alive,
            need("leaf", f.in_(EXPORT_IMMUTABLE, IMPORT_IMMUTABLE)),
            _no_start_import,
            _no_start_export,
            _no_export_mem,
        ),
        then=(*_begin, begun_session.to(session + 1), session.to(session + 1), counts.to(True)),
        why="NEW: a session begins, for which keys and counters are set.",
        cite=_IMMUTABLE,
    ),
    step(
        "read_word",
        SOURCE,
        when=(_at(BETWEEN),),
        then=(stage.to(READ), copy.to(shared), checked.to(shared)),
        why="A list entry is copied once from shared memory, and the copy is checked.",
        cite=_ANY,
    ),
    step(
        "use_word",
        SOURCE,
        (w,),
        when=(_at(READ), need("single_read", w.eq(copy))),
        then=(stage.to(USED), used.to(w), committed.to(committed + 1)),
        why="What takes effect is the copy, whatever shared memory holds by now.",
        cite=_ANY,
    ),
    step(
        "finish_entry",
        SOURCE,
        when=(_at(USED),),
        then=(stage.to(BETWEEN), copy.to(0)),
        why="The entry is done: its buffer was good.",
        cite=_ANY,
    ),
    step(
        "fail_after_commit",
        SOURCE,
        when=(_at(USED), need("leaf", leaf.eq(EXPORT_MEM))),
        then=(*_over, left_behind.to(any_of(left_behind, not_(counts)))),
        why="The buffer of the entry is bad, which is noticed after the entry was committed.",
        cite=_MEM,
        profiles=unrepaired("R1"),
    ),
    step(
        "fail_in_list",
        SOURCE,
        when=(_at(READ), need("leaf", leaf.eq(EXPORT_MEM))),
        then=(
            *_over,
            left_behind.to(any_of(left_behind, all_of(committed.gt(0), not_(counts)))),
        ),
        why="The entry is malformed, and the call ends with what came before it committed.",
        cite=_MEM,
        profiles=unrepaired("R1"),
    ),
    step(
        "skip_in_list",
        SOURCE,
        when=(_at(READ), need("leaf", leaf.eq(EXPORT_MEM))),
        then=(stage.to(BETWEEN), copy.to(0)),
        why="The entry is malformed or has no good buffer: it is skipped, and the call goes on.",
        cite=_MEM,
        profiles=repaired("R1"),
    ),
    step(
        "fail_import",
        SOURCE,
        when=(_at(BETWEEN, READ), need("leaf", leaf.eq(IMPORT_IMMUTABLE))),
        then=(*_over, failed.to(True)),
        why="Whatever is wrong with an import is fatal: nothing of it will ever run.",
        cite=_IMMUTABLE,
    ),
    step(
        "fail_export_start",
        SOURCE,
        when=(_at(BETWEEN, READ), need("leaf", leaf.eq(EXPORT_IMMUTABLE))),
        then=(
            *_over,
            stream_ready.to(False),
            left_behind.to(any_of(left_behind, all_of(committed.gt(0), not_(counts)))),
        ),
        why="A start of an export that fails has used its key up and changed nothing of the TD.",
        cite=_IMMUTABLE,
    ),
    step(
        "complete_call",
        SOURCE,
        when=(_at(BETWEEN),),
        then=(*_over, counts.to(True)),
        why="The list is done, and now at the latest the bundle counts.",
        cite=_ANY,
    ),
    step(
        "interrupt_call",
        SOURCE,
        when=(_at(BETWEEN),),
        then=(
            *_over,
            interrupted.to(True),
            saved_leaf.to(leaf),
            saved_operands.to(operands),
            saved_epoch.to(epoch),
            saved_counts.to(counts),
        ),
        why="A host interrupt is pending: the call is recorded and given up for now.",
        cite=_ANY,
    ),
    step(
        "resume_call",
        SOURCE,
        (f, o),
        when=(
            _at(NO_CALL),
            _alive,
            need("stream_initialized", stream_ready),
            need("interrupted", interrupted),
            need("same_leaf", f.eq(saved_leaf)),
            need("same_operands", o.eq(saved_operands)),
            need("same_epoch", any_of(f.ne(EXPORT_MEM), epoch.eq(saved_epoch))),
        ),
        then=(
            stage.to(BETWEEN),
            leaf.to(f),
            operands.to(o),
            counts.to(saved_counts),
            interrupted.to(False),
        ),
        why="RESUME of the interrupted call, with all that it was called with.",
        cite=_ANY,
    ),
    step(
        "resume_memory_wrongly",
        SOURCE,
        (f, o),
        when=_resumed_wrongly(EXPORT_MEM),
        then=(interrupted.to(False),),
        why="A RESUME that does not match loses the record.",
        cite=_MEM,
        profiles=unrepaired("R1"),
    ),
    step(
        "resume_start_wrongly",
        SOURCE,
        (f, o),
        when=_resumed_wrongly(EXPORT_IMMUTABLE),
        then=(interrupted.to(False),),
        why="A RESUME that does not match loses the record.",
        cite=_IMMUTABLE,
        profiles=unrepaired("R4"),
    ),
    step(
        "resume_import_wrongly",
        SOURCE,
        (f, o),
        when=_resumed_wrongly(IMPORT_IMMUTABLE),
        then=(interrupted.to(False), failed.to(True)),
        why="A RESUME of an import that does not match is fatal.",
        cite=_IMMUTABLE,
    ),
    step(
        "next_epoch",
        SOURCE,
        when=(_at(NO_CALL), _alive, _no_start_import, _no_start_export, _no_export_mem),
        then=(epoch.to(epoch + 1),),
        why="A token between interruption and RESUME: the epoch is another one.",
        cite=f"TDH.EXPORT.TRACK, leaf 71; {MODULE}",
    ),
    step(
        "abort_session",
        SOURCE,
        when=(_at(NO_CALL), _alive, _no_start_import, need("stream_initialized", stream_ready)),
        then=(stream_ready.to(False), session.to(session + 1), epoch.to(0)),
        why="The session ends, and no stream is initialised any more.",
        cite=f"TDH.EXPORT.ABORT, leaf 64; {MODULE}",
    ),
    step(
        "write_fields",
        SOURCE,
        when=(
            _at(NO_CALL),
            _alive,
            need("not_exporting", not_(_unfinished(EXPORT_MEM))),
            _no_start_import,
            _no_start_export,
        ),
        then=(depends.to(depends + 1),),
        why="Another leaf writes fields of the TD: MNG.INIT, SERVTD.BIND, MIG.STREAM.CREATE.",
        cite=f"TDH.MNG.INIT, leaf 21; TDH.MIG.STREAM.CREATE, leaf 96; {MODULE}",
    ),
    step(
        "write_shared",
        SOURCE,
        (w,),
        when=(need("other", w.ne(shared)),),
        then=(shared.to(w),),
        why="The host writes shared memory whenever it likes.",
        cite="the host; TDH.EXPORT.MEM reads its lists from shared memory",
    ),
)

# --- claims --------------------------------------------------------------------------------------

_running = stage.ne(NO_CALL)
_live_record = all_of(interrupted, stream_ready)

PROPERTIES = (
    Property(
        "P40",
        not_(left_behind),
        "A call that fails has changed nothing that counts and is not in a bundle that counts.",
        "leaf",
        "TDH.EXPORT.MEM, TDH.EXPORT.STATE.IMMUTABLE, TDH.IMPORT.STATE.IMMUTABLE",
        guards=(("fail_after_commit", "leaf"),),
        witness=all_of(committed.gt(0), stage.eq(NO_CALL), not_(interrupted)),
    ),
    Property(
        "P41",
        implies(
            _running,
            all_of(
                leaf.eq(begun_leaf),
                operands.eq(begun_operands),
                session.eq(begun_session),
                implies(leaf.eq(EXPORT_MEM), epoch.eq(begun_epoch)),
                depends.eq(begun_depends),
            ),
        ),
        "A RESUME continues the same call, and nothing that it depends on was written since.",
        "leaf",
        "RESUME of TDH.EXPORT.MEM, TDH.EXPORT.STATE.IMMUTABLE and TDH.IMPORT.STATE.IMMUTABLE",
        guards=(
            ("resume_call", "stream_initialized"),
            ("resume_call", "interrupted"),
            ("resume_call", "same_leaf"),
            ("resume_call", "same_operands"),
            ("resume_call", "same_epoch"),
            ("write_fields", "no_unfinished_import"),
            ("write_fields", "no_unfinished_start"),
            ("write_fields", "not_exporting"),
        ),
        witness=all_of(_running, committed.gt(0), stage.eq(READ)),
    ),
    Property(
        "P42",
        implies(stage.eq(USED), used.eq(checked)),
        "The value that takes effect is the value that was checked, whatever the host writes.",
        "leaf",
        "GPA lists, buffer lists and MBMDs of the migration leaves",
        guards=(("use_word", "single_read"),),
        witness=all_of(stage.eq(USED), used.ne(shared)),
    ),
)

LEMMAS = (
    Property(
        "call_record",
        all_of(
            implies(_live_record, saved_leaf.eq(begun_leaf)),
            implies(_live_record, saved_operands.eq(begun_operands)),
            implies(all_of(_live_record, saved_leaf.eq(EXPORT_MEM)), saved_epoch.eq(begun_epoch)),
            implies(_live_record, session.eq(begun_session)),
            implies(_running, stream_ready),
            implies(_running, not_(interrupted)),
            implies(stage.eq(READ), copy.eq(checked)),
            any_of(counts, leaf.eq(EXPORT_MEM)),
            implies(all_of(_live_record, saved_leaf.ne(EXPORT_MEM)), saved_counts),
        ),
        "What is recorded of an interrupted call is what its NEW was called with.",
        "lemma",
    ),
    Property(
        "call_dependence",
        all_of(
            implies(_live_record, depends.eq(begun_depends)),
            implies(all_of(_live_record, saved_leaf.eq(EXPORT_MEM)), epoch.eq(begun_epoch)),
        ),
        "Nothing that an interrupted call depends on is written while it can be resumed.",
        "lemma",
    ),
    Property(
        "call_counts",
        all_of(implies(_running, counts), implies(_live_record, saved_counts)),
        "A call counts from its first entry on.",
        "lemma",
        profiles=frozenset(repaired("R1")),
    ),
)

GOALS = (
    Goal(
        "resumed",
        all_of(stage.eq(NO_CALL), committed.gt(1), not_(interrupted), saved_operands.gt(0)),
        "A call was interrupted, resumed and completed.",
    ),
    Goal("memory_changed", all_of(stage.eq(USED), copy.ne(shared)), "The host writes in between."),
)

CALLS = System(
    name="calls",
    variables=VARIABLES,
    steps=STEPS,
    properties=PROPERTIES + LEMMAS,
    goals=GOALS,
    assumptions=(
        "what is copied from shared memory is not fetched again by the compiler",
        "the fields that a call depends on are one version number; who reads which is not modelled",
    ),
    profiles=ALL_PROFILES,
)
