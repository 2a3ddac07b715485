"""What is claimed of the control state of a destination TD, for any number of fields."""

from __future__ import annotations

from tdxmig_model.expr import (
    Goal,
    Node,
    Property,
    System,
    all_of,
    any_of,
    choose,
    forall,
    implies,
    not_,
)
from tdxmig_model.model import control as c
from tdxmig_model.model.words import ALL_PROFILES, repaired

_imported = c.op_state.eq(c.MEMORY_IMPORT)
_running = c.call.eq(c.RUNNING)


def _every_field(body: object) -> Node:
    assert callable(body)
    return forall({"i": c.FIELD}, body, lambda i: (c.field[i],))


PROPERTIES = (
    Property(
        "P20",
        implies(
            _imported,
            all_of(
                c.origin.ne(c.FORGED),
                implies(
                    c.origin.eq(c.EXPORTED),
                    _every_field(
                        lambda i: c.field[i].eq(choose(c.importable(i), c.FROM_SOURCE, c.COMPUTED))
                    ),
                ),
            ),
        ),
        "Imported control state equals what the source exported, field by field, "
        "and the importer computes the rest.",
        "leaf",
        "TDH.IMPORT.STATE.IMMUTABLE, TDH.MNG.INIT (immutable state)",
        guards=(
            ("import_state_immutable_end", "mbmd_mac"),
            ("mng_init", "op_state"),
        ),
        witness=all_of(_imported, c.origin.eq(c.EXPORTED)),
    ),
    Property(
        "P21",
        implies(any_of(_running, _imported), not_(c.changed)),
        "An import of immutable state goes on, and ends, only if no other leaf has changed the TD "
        "since it began.",
        "leaf",
        "TDH.IMPORT.STATE.IMMUTABLE, START_IMPORT",
        guards=(
            ("mng_init", "op_state"),
            ("control_mig_stream_create", "op_state"),
        ),
        witness=all_of(_imported, c.resumed),
    ),
    Property(
        "P22",
        implies(
            _imported,
            forall(
                {"i": c.FIELD},
                lambda i: implies(all_of(i.ge(0), c.required(i)), c.written[i]),
                lambda i: (c.written[i],),
            ),
        ),
        "Each required field of imported state was written, in full, by the import itself.",
        "leaf",
        "TDH.IMPORT.STATE.IMMUTABLE, required fields and write masks of metadata lists",
        guards=(
            ("import_state_immutable_field", "no_write_mask"),
            ("import_state_immutable_end", "required_fields"),
        ),
        witness=all_of(_imported, c.origin.eq(c.OWN_KEY)),
    ),
    Property(
        "P23",
        implies(_imported, c.sane),
        "The ATTRIBUTES of imported state are those of a migratable TD, without debugging.",
        "leaf",
        "TDH.IMPORT.STATE.IMMUTABLE, check of ATTRIBUTES (the ATTRIBUTES part of P23)",
        guards=(
            ("import_state_immutable_field", "attributes_valid"),
            ("import_state_immutable_field", "no_write_mask"),
            ("import_state_immutable_end", "required_fields"),
            ("mng_init", "op_state"),
        ),
        witness=_imported,
    ),
    Property(
        "P25",
        c.reported.ne(c.UNAUTHENTIC),
        "What was found in a bundle is reported only after its MAC has verified.",
        "leaf",
        "TDH.IMPORT.STATE.IMMUTABLE, errors of metadata lists",
        guards=(("import_state_immutable_report", "mbmd_mac"),),
        witness=c.reported.eq(c.AUTHENTIC),
    ),
)

LEMMAS = (
    Property(
        "control_calls",
        all_of(
            c.next_field.ge(0),
            implies(
                c.call.ne(c.NO_CALL),
                c.op_state.in_(c.UNINITIALIZED, c.INITIALIZED, c.START_IMPORT),
            ),
            implies(_running, c.op_state.ne(c.INITIALIZED)),
            implies(c.op_state.eq(c.START_IMPORT), c.call.ne(c.NO_CALL)),
        ),
        "An unfinished import has not ended.",
        "lemma",
    ),
    Property(
        "control_fields",
        implies(
            all_of(
                c.call.ne(c.NO_CALL),
                c.origin.eq(c.EXPORTED),
                c.field[c.NUM_VCPUS].ne(c.INITIAL),
                c.next_field.gt(0),
            ),
            _every_field(
                lambda i: implies(
                    all_of(i.ge(0), i.lt(c.next_field), c.importable(i)),
                    c.field[i].eq(c.FROM_SOURCE),
                )
            ),
        ),
        "As long as NUM_VCPUS was not cleared, the fields that came are the source's.",
        "lemma",
    ),
    Property(
        "control_written",
        implies(
            c.call.ne(c.NO_CALL),
            forall(
                {"i": c.FIELD},
                lambda i: implies(all_of(i.ge(0), i.lt(c.next_field), c.required(i)), c.written[i]),
                lambda i: (c.written[i],),
            ),
        ),
        "Every required field that came was written, since no list has a write mask.",
        "lemma",
        profiles=frozenset(repaired("R2")),
    ),
    Property(
        "control_attributes",
        implies(
            all_of(
                c.call.ne(c.NO_CALL),
                c.written[c.ATTRIBUTES],
                not_(c.changed),
            ),
            c.sane,
        ),
        "ATTRIBUTES that were written in full, and left alone since, are those that were checked.",
        "lemma",
    ),
    Property(
        "control_exclusive",
        implies(
            c.call.ne(c.NO_CALL),
            all_of(
                c.op_state.eq(c.START_IMPORT),
                not_(c.changed),
                implies(
                    all_of(c.origin.eq(c.EXPORTED), c.next_field.gt(0)),
                    c.field[c.NUM_VCPUS].eq(c.FROM_SOURCE),
                ),
            ),
        ),
        "An unfinished import has an OP_STATE of its own, in which nothing else happens.",
        "lemma",
        profiles=frozenset(repaired("R3")),
    ),
)

GOALS = (
    Goal(
        "control_import",
        all_of(_imported, c.origin.eq(c.EXPORTED), c.next_field.gt(2)),
        "What a source exported is imported.",
    ),
    Goal(
        "control_resumed_import",
        all_of(_imported, c.origin.eq(c.EXPORTED), c.resumed),
        "What a source exported is imported in parts.",
    ),
    Goal(
        "control_failed",
        all_of(c.op_state.eq(c.FAILED_IMPORT), c.reported.eq(c.NOTHING)),
        "An import fails for good.",
    ),
)

CONTROL = System(
    name="control",
    variables=c.VARIABLES,
    steps=c.STEPS,
    properties=PROPERTIES + LEMMAS,
    goals=GOALS,
    assumptions=(
        "AES-256-GCM is an ideal AEAD: a bundle that verifies was made by someone who has its key",
        "the owner of a TD may know its session's key, so that bundles with any content verify",
        "the fields are those that the source's TD has: its export carries each of them in full",
        "NUM_VCPUS is imported before every field that TDH.MNG.INIT stores",
    ),
    profiles=ALL_PROFILES,
)
