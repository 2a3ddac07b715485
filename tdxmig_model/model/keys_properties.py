"""What is claimed of the keys, versions and IVs of one TD, and the lemmas that carry it."""

from __future__ import annotations

from tdxmig_model.expr import Goal, Node, Property, all_of, any_of, forall, implies, not_
from tdxmig_model.model import keys_rows as r
from tdxmig_model.model.words import (
    FAILED_IMPORT,
    LIVE_EXPORT,
    LIVE_IMPORT,
    MEMORY_IMPORT,
    RUNNABLE,
    UNINITIALIZED,
)

_exporting = any_of(r.starting, r.op_state.eq(LIVE_EXPORT))
_importing = r.op_state.in_(MEMORY_IMPORT, FAILED_IMPORT)


def _logged(m: Node) -> Node:
    return all_of(m.ge(0), m.lt(r.log_length))


def _every_use(body: object) -> Node:
    """For every encryption."""
    assert callable(body)
    return forall({"m": r.USE}, lambda m: implies(_logged(m), body(m)), lambda m: (r.log_key[m],))


def _every_pair(body: object) -> Node:
    """For every two encryptions."""
    assert callable(body)
    return forall(
        {"a": r.USE, "b": r.USE},
        lambda a, b: implies(all_of(a.ge(0), a.lt(b), b.lt(r.log_length)), body(a, b)),
        lambda a, b: (r.log_key[a], r.log_key[b]),
    )


PROPERTIES = (
    Property(
        "L13",
        implies(
            r.sessions.ge(1),
            all_of(
                r.enc_working.eq(r.session_enc),
                r.dec_working.eq(r.session_dec),
                r.working_version.eq(r.session_version),
                r.enc_key.ne(r.enc_working),
                forall(
                    {"s": r.LINK},
                    lambda s: implies(
                        all_of(_exporting, r.initialized[s]), r.stream_key[s].eq(r.enc_working)
                    ),
                    lambda s: (r.initialized[s],),
                ),
            ),
        ),
        "A session has the keys and the version of the instant at which it began, "
        "and its streams use its keys.",
        "leaf",
        "TDH.EXPORT.STATE.IMMUTABLE, TDH.IMPORT.STATE.IMMUTABLE (the key part of P7)",
        guards=(("import_bundle", "epoch"),),
        witness=all_of(r.sessions.eq(2), _exporting, r.initialized[1]),
    ),
    Property(
        "P27",
        _every_pair(
            lambda a, b: not_(
                all_of(
                    r.log_key[a].eq(r.log_key[b]),
                    r.log_stream[a].eq(r.log_stream[b]),
                    r.log_iv[a].eq(r.log_iv[b]),
                )
            )
        ),
        "No IV is used twice with a key.",
        "leaf",
        "MIG_ENC_KEY, IV_COUNTER and the stream index in the IV",
        guards=(("export_bundle", "op_state"), ("abort_import", "op_state")),
        witness=all_of(r.log_length.eq(3), r.log_key[0].ne(r.log_key[2]), r.log_iv[1].eq(2)),
    ),
    Property(
        "P28",
        all_of(
            _every_use(
                lambda m: implies(r.log_session[m].eq(r.sessions), r.log_key[m].ne(r.dec_working))
            ),
            _every_pair(
                lambda a, b: implies(
                    r.log_key[a].eq(r.log_key[b]),
                    all_of(
                        r.log_forward[a].eq(r.log_forward[b]),
                        r.log_session[a].eq(r.log_session[b]),
                    ),
                )
            ),
            implies(r.sessions.ge(1), r.enc_working.ne(r.dec_working)),
        ),
        "The two directions never share a key.",
        "leaf",
        "MIG_ENC_WORKING_KEY, MIG_DEC_WORKING_KEY",
        guards=(
            ("start_export", "not_own_key"),
            ("start_import", "not_own_key"),
            ("import_bundle", "epoch"),
        ),
        witness=all_of(r.sessions.eq(2), r.log_length.eq(3)),
    ),
    Property(
        "P29",
        implies(
            r.sessions.ge(1),
            all_of(
                r.session_written_in.eq(r.sessions - 1),
                r.dec_working.ne(r.previous_dec),
                r.dec_working.ne(r.previous_enc),
                r.dec_working.ne(r.ZERO_KEY),
            ),
        ),
        "The decryption key of a session was written after the session before began, "
        "and is none of that session's keys.",
        "leaf",
        "MIG_DEC_KEY, MIG_DEC_KEY_SET",
        guards=(
            ("start_export", "mig_dec_key_set"),
            ("start_export", "not_zero"),
            ("start_export", "not_previous_dec_key"),
            ("start_export", "not_previous_enc_key"),
            ("start_import", "mig_dec_key_set"),
            ("start_import", "not_zero"),
        ),
        witness=r.sessions.eq(2),
    ),
    Property(
        "P11",
        _every_pair(
            lambda a, b: implies(
                r.log_session[a].eq(r.log_session[b]), r.log_version[a].eq(r.log_version[b])
            )
        ),
        "All bundles of a session carry the version that it began with.",
        "leaf",
        "MIG_VERSION, MIG_WORKING_VERSION",
        guards=(("export_token", "first_stream"),),
        witness=all_of(r.log_length.eq(2), r.version.ne(r.working_version)),
    ),
)

LEMMAS = (
    Property(
        "key_numbers",
        all_of(
            r.known.ge(2),
            r.enc_key.ge(1),
            r.enc_key.lt(r.known),
            r.dec_key.ge(0),
            r.dec_key.lt(r.known),
            r.enc_working.ge(0),
            r.enc_working.lt(r.known),
            r.dec_working.ge(0),
            r.dec_working.lt(r.known),
            r.enc_key.ne(r.enc_working),
            r.enc_key.ne(r.dec_working),
            r.sessions.ge(0),
            r.written_in.le(r.sessions),
            implies(r.dec_key_set, r.written_in.eq(r.sessions)),
            any_of(r.dec_key.eq(r.dec_working), r.written_in.eq(r.sessions)),
            implies(
                r.sessions.eq(0),
                all_of(r.enc_working.eq(r.ZERO_KEY), r.dec_working.eq(r.ZERO_KEY)),
            ),
            implies(r.sessions.ge(1), r.enc_working.ge(1)),
        ),
        "Every key is one that exists, and MIG_ENC_KEY is new.",
        "lemma",
    ),
    Property(
        "phases",
        all_of(
            r.op_state.in_(
                UNINITIALIZED, RUNNABLE, LIVE_EXPORT, MEMORY_IMPORT, LIVE_IMPORT, FAILED_IMPORT
            ),
            implies(r.starting, r.op_state.in_(RUNNABLE, LIVE_IMPORT)),
            implies(r.op_state.eq(UNINITIALIZED), all_of(r.sessions.eq(0), not_(r.starting))),
            implies(any_of(_exporting, _importing), r.sessions.ge(1)),
            implies(r.sessions.eq(0), r.log_length.eq(0)),
        ),
        "An import is the first session of a TD, if it is one.",
        "lemma",
    ),
    Property(
        "log",
        all_of(
            r.log_length.ge(0),
            _every_use(
                lambda m: all_of(
                    r.log_key[m].ge(1),
                    r.log_key[m].lt(r.known),
                    r.log_key[m].ne(r.enc_key),
                    r.log_session[m].ge(1),
                    r.log_session[m].le(r.sessions),
                    implies(
                        r.log_session[m].eq(r.sessions),
                        all_of(
                            r.log_key[m].eq(r.enc_working),
                            r.log_version[m].eq(r.working_version),
                        ),
                    ),
                    implies(r.log_key[m].eq(r.enc_working), r.log_session[m].eq(r.sessions)),
                )
            ),
        ),
        "What was encrypted in this session is under its key, and nothing else is.",
        "lemma",
    ),
    Property(
        "counters",
        all_of(
            _every_use(
                lambda m: implies(
                    all_of(_exporting, r.log_session[m].eq(r.sessions)),
                    all_of(
                        r.log_forward[m],
                        r.initialized[r.log_stream[m]],
                        r.log_iv[m].le(r.iv_counter[r.log_stream[m]]),
                    ),
                )
            ),
            _every_use(
                lambda m: implies(
                    all_of(_importing, r.log_session[m].eq(r.sessions)),
                    all_of(
                        not_(r.log_forward[m]),
                        r.back_initialized,
                        r.log_iv[m].le(r.back_iv),
                    ),
                )
            ),
        ),
        "A stream that was used in the session is in use, and counts on.",
        "lemma",
    ),
)

GOALS = (
    Goal(
        "second_session",
        all_of(r.sessions.eq(2), r.op_state.eq(LIVE_EXPORT), r.log_length.eq(3)),
        "After an abort another session of the TD sends something.",
    ),
    Goal(
        "export_after_import",
        all_of(r.op_state.eq(LIVE_EXPORT), r.initialized[0], r.previous_dec.ne(0)),
        "A TD that was imported is exported.",
    ),
)
