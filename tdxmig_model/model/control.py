"""The control state of a destination TD, and the import of immutable state that writes it.

Fields are positions in the TDX module's table, in the order in which a bundle carries them.  What a
field holds is told apart by who it comes from.  TDH.IMPORT.STATE.IMMUTABLE is a sequence of rows:
NEW, one row per field, interruptions and RESUME, the end.  Every field is written before the bundle
is authenticated, and between an interruption and RESUME the host may call any other leaf.

A call of TDH.MNG.INIT that fails leaves behind what it has stored.  It clears NUM_VCPUS first, and
NUM_VCPUS comes in a bundle before everything else that it stores; so an import that it comes into
the middle of ends in a failed cross check, since NUM_VCPUS is 0 then.  That is why P20 is kept even
where P21 is not (CVE-2025-30513, INTEL-SA-01397: the releases affected, and what is different in
them, are not public in such detail).
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Assign,
    Constant,
    Literal,
    Need,
    Node,
    all_of,
    any_of,
    choose,
    enum,
    implies,
    index,
    mapping,
    member,
    need,
    not_,
    only,
    param,
    scalar,
    step,
)
from tdxmig_model.model.words import DESTINATION, MODULE, cite_leaf, repaired

FIELD = index("Field")
NUM_VCPUS = 0
ATTRIBUTES = 1
"""Positions of the two fields that checks look at; NUM_VCPUS comes before all that MNG.INIT sets.

TD_UUID, which comes before NUM_VCPUS and which MNG.INIT leaves alone, is like any later field.
"""
NUM_REQUIRED = Constant("NUM_REQUIRED", value=32, small=3, least=2)
"""Fields before this position must be in a bundle, from here on they may."""
NUM_IMPORTED = Constant("NUM_IMPORTED", value=89, small=4, least=2)
"""Fields from this position on (and not required) are in no bundle; the importer computes them."""

CONTROL_STATE = enum(
    "ControlState",
    "UNINITIALIZED",
    "INITIALIZED",
    "MEMORY_IMPORT",
    "FAILED_IMPORT",
    "START_IMPORT",
)
UNINITIALIZED = member(CONTROL_STATE, "UNINITIALIZED")
INITIALIZED = member(CONTROL_STATE, "INITIALIZED")
MEMORY_IMPORT = member(CONTROL_STATE, "MEMORY_IMPORT")
FAILED_IMPORT = member(CONTROL_STATE, "FAILED_IMPORT")
START_IMPORT = member(CONTROL_STATE, "START_IMPORT")

CALL = enum("ImportCall", "NONE", "RUNNING", "INTERRUPTED")
NO_CALL = member(CALL, "NONE")
RUNNING = member(CALL, "RUNNING")
INTERRUPTED = member(CALL, "INTERRUPTED")

ORIGIN = enum("BundleOrigin", "EXPORTED", "OWN_KEY", "FORGED")
EXPORTED = member(ORIGIN, "EXPORTED")  # By a TDX module.
OWN_KEY = member(ORIGIN, "OWN_KEY")  # Made by someone who knows the key: the owner of the TD.
FORGED = member(ORIGIN, "FORGED")  # Made without the key.

PROVENANCE = enum("Provenance", "INITIAL", "SOURCE", "FOREIGN", "HOST", "COMPUTED")
INITIAL = member(PROVENANCE, "INITIAL")  # Zero: as the TD was created.
FROM_SOURCE = member(PROVENANCE, "SOURCE")
FOREIGN = member(PROVENANCE, "FOREIGN")  # From a bundle that no TDX module exported.
HOST = member(PROVENANCE, "HOST")
COMPUTED = member(PROVENANCE, "COMPUTED")

MASK = enum("WriteMask", "ALL", "NONE", "SOME")
ALL_BITS = member(MASK, "ALL")
SOME_BITS = member(MASK, "SOME")
NO_BITS = member(MASK, "NONE")

REPORT = enum("Report", "NOTHING", "AUTHENTIC", "UNAUTHENTIC")
NOTHING = member(REPORT, "NOTHING")
AUTHENTIC = member(REPORT, "AUTHENTIC")
UNAUTHENTIC = member(REPORT, "UNAUTHENTIC")

op_state = scalar("control_op_state", CONTROL_STATE, UNINITIALIZED, DESTINATION, doc="OP_STATE")
key_set = scalar("control_mig_dec_key_set", BOOL, False, DESTINATION, doc="MIG_DEC_KEY_SET")
has_streams = scalar("control_has_streams", BOOL, False, DESTINATION, doc="NUM_MIGS is at least 2")
call = scalar("control_call", CALL, NO_CALL, DESTINATION, doc="the import and its interruption")
next_field = scalar("control_next_field", INT, 0, DESTINATION, doc="where the parser is")
parse_error = scalar("control_parse_error", BOOL, False, DESTINATION, doc="the first error, kept")
origin = scalar("control_origin", ORIGIN, FORGED, DESTINATION, doc="who made the bundle")
field = mapping("control_field", (FIELD,), PROVENANCE, INITIAL, DESTINATION, doc="whose value")

# Ghosts: what has happened, for properties only.
written = mapping("control_written", (FIELD,), BOOL, False, DESTINATION, ghost=True)
changed = scalar("control_changed_by_another", BOOL, False, DESTINATION, ghost=True)
sane = scalar("control_attributes_sane", BOOL, False, DESTINATION, ghost=True)
resumed = scalar("control_resumed", BOOL, False, DESTINATION, ghost=True)
reported = scalar("control_reported", REPORT, NOTHING, DESTINATION, ghost=True)

VARIABLES = (
    op_state,
    key_set,
    has_streams,
    call,
    next_field,
    parse_error,
    origin,
    field,
    written,
    changed,
    sane,
    resumed,
    reported,
)

f = param("f", FIELD)
complete = param("complete", BOOL)
last = param("last", FIELD)
made_by = param("made_by", ORIGIN)
mask = param("mask", MASK)
value_sane = param("sane", BOOL)


def required(position: Node) -> Node:
    """Whether a bundle must have the field."""
    return position.lt(NUM_REQUIRED)


def importable(position: Node) -> Node:
    """Whether a bundle may have the field."""
    return any_of(required(position), position.lt(NUM_IMPORTED))


unfinished = call.ne(NO_CALL)


IMPORT = cite_leaf("IMPORT.STATE.IMMUTABLE", 85)


def _in(*states: Literal) -> Need:
    """The leaf's row of the OP_STATE permission table."""
    return need("op_state", op_state.in_(*states))


_lock = need("tdr_lock", call.ne(RUNNING))
_running = need("running", call.eq(RUNNING))
_interrupted = need("interrupted", call.eq(INTERRUPTED))
_authentic = need("mbmd_mac", origin.ne(FORGED))
_other = changed.to(any_of(changed, unfinished))
_failed: tuple[Assign, ...] = (
    op_state.to(FAILED_IMPORT),
    call.to(NO_CALL),
    # What the call kept for a RESUME is gone, and with it what was to be remembered of it.
    next_field.to(0),
    parse_error.to(False),
    origin.to(FORGED),
    written.fill(lambda i: False),
    changed.to(False),
    resumed.to(False),
)

STEPS = (
    step(
        "mng_init",
        DESTINATION,
        (complete, last, value_sane),
        when=(_in(UNINITIALIZED), _lock),
        then=(
            op_state.to(choose(complete, INITIALIZED, op_state)),
            field.fill(
                lambda i: choose(
                    i.eq(NUM_VCPUS),
                    INITIAL,
                    choose(any_of(complete, i.le(last)), HOST, field[i]),
                )
            ),
            sane.to(choose(any_of(complete, last.ge(ATTRIBUTES)), value_sane, sane)),
            _other,
        ),
        why="TD_PARAMS is checked and stored item by item; a call that fails keeps what it stored.",
        cite=cite_leaf("MNG.INIT", 21),
    ),
    step(
        "control_mig_stream_create",
        DESTINATION,
        when=(_in(UNINITIALIZED, INITIALIZED), _lock),
        then=(has_streams.to(True), _other),
        why="An import needs a forward and a backward stream.",
        cite=cite_leaf("MIG.STREAM.CREATE", 96),
    ),
    step(
        "control_set_migration_key",
        DESTINATION,
        when=(_lock,),
        then=(key_set.to(True),),
        why="The MigTD may set the key of the next session at any time.",
        cite=f"TDG.SERVTD.WR of MIG_DEC_KEY, TDCALL 20; {MODULE}",
    ),
    step(
        "import_state_immutable_new",
        DESTINATION,
        (made_by,),
        when=(
            _in(UNINITIALIZED),
            _lock,
            need("min_migs", has_streams),
            need("mig_dec_key_set", key_set),
        ),
        then=(
            call.to(RUNNING),
            only(repaired("R3"), op_state.to(START_IMPORT)),
            key_set.to(False),
            next_field.to(0),
            parse_error.to(False),
            origin.to(made_by),
            written.fill(lambda i: False),
            changed.to(False),
            resumed.to(False),
        ),
        why="A session begins with a fresh key; the pages of the bundle are anyone's.",
        cite=IMPORT,
    ),
    step(
        "import_state_immutable_field",
        DESTINATION,
        (f, mask, value_sane),
        when=(
            _running,
            need("order", f.eq(next_field)),
            need("importable", importable(f)),
            need("no_write_mask", mask.eq(ALL_BITS), *repaired("R2")),
            need(
                "attributes_valid",
                implies(all_of(f.eq(ATTRIBUTES), mask.ne(NO_BITS)), value_sane),
            ),
            need(
                "as_exported",
                implies(origin.eq(EXPORTED), all_of(mask.eq(ALL_BITS), value_sane)),
            ),
        ),
        then=(
            next_field.to(next_field + 1),
            field[f].to(
                choose(
                    mask.eq(NO_BITS),
                    field[f],
                    choose(origin.eq(EXPORTED), FROM_SOURCE, FOREIGN),
                )
            ),
            written[f].to(any_of(written[f], mask.eq(ALL_BITS))),
            # Under a mask of some bits the others stay: zero at first, else what was there.
            sane.to(
                choose(
                    all_of(f.eq(ATTRIBUTES), mask.ne(NO_BITS)),
                    all_of(value_sane, any_of(mask.eq(ALL_BITS), field[f].eq(INITIAL), sane)),
                    sane,
                )
            ),
        ),
        why="A field is checked and written as soon as its page is decrypted, before the MAC.",
        cite=IMPORT,
        part_of="import_state_immutable",
    ),
    step(
        "import_state_immutable_skip",
        DESTINATION,
        (f,),
        when=(
            _running,
            need("order", f.eq(next_field)),
            need("optional", not_(required(f))),
            need("importable", importable(f)),
            need("as_exported", origin.ne(EXPORTED)),
        ),
        then=(next_field.to(next_field + 1),),
        why="A field that is not required may be missing.",
        cite=IMPORT,
        part_of="import_state_immutable",
    ),
    step(
        "import_state_immutable_error",
        DESTINATION,
        when=(_running, need("as_exported", origin.ne(EXPORTED))),
        then=(parse_error.to(True),),
        why="An error in the lists is remembered until the MAC has been checked.",
        cite=IMPORT,
        part_of="import_state_immutable",
    ),
    step(
        "import_state_immutable_interrupt",
        DESTINATION,
        when=(_running,),
        then=(call.to(INTERRUPTED),),
        why="The host's interrupts end the call after any page; what was written stays.",
        cite=IMPORT,
        part_of="import_state_immutable",
    ),
    step(
        "import_state_immutable_resume",
        DESTINATION,
        when=(_in(UNINITIALIZED, START_IMPORT), _interrupted),
        then=(call.to(RUNNING), resumed.to(True)),
        why="The same call with the same operands goes on where it was interrupted.",
        cite=IMPORT,
        part_of="import_state_immutable",
    ),
    step(
        "import_state_immutable_end",
        DESTINATION,
        when=(
            _running,
            need("required_fields", next_field.ge(NUM_REQUIRED)),
            _authentic,
            need("no_parse_error", not_(parse_error)),
            need("num_vcpus", field[NUM_VCPUS].ne(INITIAL)),
            need("as_exported", implies(origin.eq(EXPORTED), next_field.ge(NUM_IMPORTED))),
        ),
        then=(
            op_state.to(MEMORY_IMPORT),
            call.to(NO_CALL),
            field.fill(lambda i: choose(importable(i), field[i], COMPUTED)),
        ),
        why="The MAC verifies, every required field was there, and the cross checks hold.",
        cite=IMPORT,
        part_of="import_state_immutable",
    ),
    step(
        "import_state_immutable_report",
        DESTINATION,
        when=(_running, _authentic, need("parse_error", parse_error)),
        then=(*_failed, reported.to(choose(origin.eq(FORGED), UNAUTHENTIC, AUTHENTIC))),
        why="Once the MAC has verified the first error is reported, with what was found.",
        cite=IMPORT,
        part_of="import_state_immutable",
    ),
    step(
        "import_state_immutable_fail",
        DESTINATION,
        when=(
            need("unfinished", unfinished),
            _in(UNINITIALIZED, START_IMPORT),
        ),
        then=_failed,
        why="A failed MAC, operand or cross check, and a RESUME of another call, are fatal.",
        cite=IMPORT,
        part_of="import_state_immutable",
    ),
)
