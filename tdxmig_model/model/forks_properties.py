"""What is claimed of one source and all of its destinations, and the lemmas that carry it."""

from __future__ import annotations

from tdxmig_model.expr import Goal, Node, Property, all_of, any_of, forall, implies, not_
from tdxmig_model.model import forks_rows as f
from tdxmig_model.model.words import (
    FAILED_IMPORT,
    LIVE_EXPORT,
    LIVE_IMPORT,
    MEMORY_IMPORT,
    PAUSED_EXPORT,
    POST_EXPORT,
    POST_IMPORT,
    RUNNABLE,
    UNINITIALIZED,
)


def _owns(d: Node) -> Node:
    return f.d_op_state[d].in_(LIVE_IMPORT, RUNNABLE)


def _begun(e: Node) -> Node:
    """A number that stands for an exchange."""
    return all_of(e.ge(1), e.lt(f.exchanges))


def _imports(d: Node) -> Node:
    return f.d_op_state[d].ne(UNINITIALIZED)


_source_runs = f.s_op_state.in_(RUNNABLE, LIVE_EXPORT)
_exports = f.s_op_state.ne(RUNNABLE)

_every_exchange = {"e": f.EXCHANGE}
_every_td = {"d": f.TD}
_someone_took_over = not_(forall(_every_td, lambda d: not_(f.took_over[d])))

PROPERTIES = (
    Property(
        "P3",
        forall(
            _every_exchange,
            lambda e: implies(
                f.accepted[e],
                all_of(
                    f.d_op_state[f.peer[f.accepted_token[e]]].eq(FAILED_IMPORT),
                    f.d_enc_working[f.peer[f.accepted_token[e]]].eq(f.accepted_token[e]),
                    f.d_dec_working[f.peer[f.accepted_token[e]]].eq(e),
                    not_(f.took_over[f.peer[f.accepted_token[e]]]),
                ),
            ),
            lambda e: (f.accepted[e],),
        ),
        "An abort token that the source accepts was made in this very session, "
        "and its maker never runs.",
        "leaf",
        "TDH.EXPORT.ABORT, TDH.IMPORT.ABORT",
        guards=(
            ("abort_session_with_token", "token_made"),
            ("abort_session_with_token", "token_mac"),
            ("make_abort_token", "op_state"),
            ("fail_import", "op_state"),
            ("join_session", "op_state"),
        ),
        witness=f.accepted[1],
    ),
    Property(
        "P4",
        forall(
            {"a": f.TD, "b": f.TD},
            lambda a, b: implies(all_of(f.took_over[a], f.took_over[b]), a.eq(b)),
            lambda a, b: (f.took_over[a], f.took_over[b]),
        ),
        "At most one destination ever takes the TD over.",
        "leaf",
        "TDH.IMPORT.COMMIT, TDH.IMPORT.END, key exchange of MigTD",
        guards=(
            ("take_start_token", "token_mac"),
            ("abort_session_with_token", "token_made"),
            ("abort_session", "op_state"),
        ),
        witness=_someone_took_over,
    ),
    Property(
        "P30",
        all_of(
            implies(
                _exports,
                all_of(f.s_enc_working.eq(f.s_dec_working), _begun(f.s_enc_working)),
            ),
            forall(
                _every_td,
                lambda d: implies(
                    _imports(d),
                    all_of(
                        f.d_enc_working[d].eq(f.d_dec_working[d]),
                        _begun(f.d_enc_working[d]),
                        f.peer[f.d_enc_working[d]].eq(d),
                    ),
                ),
                lambda d: (f.d_op_state[d],),
            ),
        ),
        "Both keys of a session come from one key exchange with one peer.",
        "leaf",
        "TDG.SERVTD.RD of MIG_ENC_KEY, TDG.SERVTD.WR of MIG_DEC_KEY",
        guards=(
            ("start_session", "mig_dec_key_set"),
            ("join_session", "mig_dec_key_set"),
            ("install_at_source", "first_time"),
            ("install_at_source", "current_exchange"),
            ("install_at_destination", "current_exchange"),
        ),
        witness=all_of(_exports, f.s_enc_working.eq(2)),
    ),
    Property(
        "L11",
        all_of(
            forall(
                _every_td,
                lambda d: implies(_owns(d), not_(_source_runs)),
                lambda d: (f.d_op_state[d],),
            ),
            forall(
                {"a": f.TD, "b": f.TD},
                lambda a, b: implies(all_of(_owns(a), _owns(b)), a.eq(b)),
                lambda a, b: (f.d_op_state[a], f.d_op_state[b]),
            ),
        ),
        "Of a source and all of its destinations at most one can run the TD.",
        "leaf",
        "P1 for any number of destinations: TDH.VP.ENTER, TDH.EXPORT.ABORT, TDH.IMPORT.COMMIT",
        guards=(
            ("abort_session_with_token", "token_made"),
            ("abort_session_with_token", "token_mac"),
            ("abort_session", "op_state"),
            ("take_start_token", "token_made"),
            ("commit_import", "op_state"),
            ("end_import", "op_state"),
        ),
        witness=_someone_took_over,
    ),
    Property(
        "L12",
        forall(
            _every_td,
            lambda d: implies(
                f.took_over[d],
                all_of(
                    _owns(d),
                    f.s_op_state.eq(POST_EXPORT),
                    f.s_enc_working.eq(f.d_dec_working[d]),
                ),
            ),
            lambda d: (f.took_over[d],),
        ),
        "Once any destination has taken the TD over it keeps it, and the source waits for ever.",
        "leaf",
        "P2 for any number of destinations: TDH.IMPORT.COMMIT, TDH.EXPORT.ABORT",
        guards=(
            ("make_abort_token", "op_state"),
            ("fail_import", "op_state"),
            ("join_session", "op_state"),
            ("fail_to_join", "op_state"),
            ("abort_session_with_token", "token_mac"),
        ),
        witness=_someone_took_over,
    ),
)

LEMMAS = (
    Property(
        "exchange_numbers",
        all_of(
            f.exchanges.ge(1),
            f.s_enc.ge(0),
            f.s_enc.lt(f.exchanges),
            any_of(f.s_enc.eq(0), f.s_enc.eq(f.exchanges - 1)),
            implies(f.s_dec_set, all_of(f.s_dec.eq(f.exchanges - 1), f.s_dec.eq(f.s_enc))),
            implies(f.s_dec_set, all_of(f.s_dec.ge(1), f.installed[f.s_dec])),
            implies(all_of(f.exchanges.gt(1), f.s_enc.eq(0)), f.installed[f.exchanges - 1]),
            forall(
                _every_exchange,
                lambda e: implies(f.answered[e], _begun(e)),
                lambda e: (f.answered[e],),
            ),
            forall(
                _every_exchange,
                lambda e: implies(f.installed[e], _begun(e)),
                lambda e: (f.installed[e],),
            ),
        ),
        "The slots of the source hold keys of the last exchange, or none.",
        "lemma",
    ),
    Property(
        "sessions",
        all_of(
            f.s_op_state.in_(RUNNABLE, LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT),
            forall(
                _every_exchange,
                lambda e: implies(f.opened[e], all_of(_begun(e), f.s_enc.ne(e))),
                lambda e: (f.opened[e],),
            ),
            forall(
                _every_exchange,
                lambda e: implies(
                    f.start_token[e],
                    all_of(
                        f.opened[e],
                        any_of(
                            f.accepted[e],
                            all_of(f.s_op_state.eq(POST_EXPORT), f.s_enc_working.eq(e)),
                        ),
                    ),
                ),
                lambda e: (f.start_token[e],),
            ),
            implies(_exports, f.opened[f.s_enc_working]),
            forall(
                _every_exchange,
                lambda e: implies(f.accepted[e], all_of(f.opened[e], f.accepted_token[e].eq(e))),
                lambda e: (f.accepted[e],),
            ),
            implies(_exports, not_(f.accepted[f.s_enc_working])),
            f.s_enc_working.eq(f.s_dec_working),
            any_of(f.s_enc_working.eq(0), f.opened[f.s_enc_working]),
        ),
        "Each key of the source serves one session, which waits in POST_EXPORT for its token.",
        "lemma",
    ),
    Property(
        "destinations",
        forall(
            _every_td,
            lambda d: all_of(
                f.d_op_state[d].in_(
                    UNINITIALIZED, MEMORY_IMPORT, POST_IMPORT, LIVE_IMPORT, RUNNABLE, FAILED_IMPORT
                ),
                implies(
                    f.d_dec_set[d],
                    all_of(
                        _begun(f.d_dec[d]),
                        f.d_exchange[d].eq(f.d_dec[d]),
                        f.peer[f.d_dec[d]].eq(d),
                        any_of(_imports(d), f.d_enc[d].eq(f.d_dec[d])),
                    ),
                ),
                implies(
                    f.d_exchange[d].ge(1),
                    all_of(
                        _begun(f.d_exchange[d]),
                        f.peer[f.d_exchange[d]].eq(d),
                        any_of(_imports(d), f.d_enc[d].eq(f.d_exchange[d])),
                    ),
                ),
                f.d_exchange[d].ge(0),
                implies(
                    any_of(_owns(d), f.d_op_state[d].eq(POST_IMPORT)),
                    f.start_token[f.d_dec_working[d]],
                ),
                implies(f.took_over[d], _owns(d)),
            ),
            lambda d: (f.d_op_state[d],),
        ),
        "A destination has the keys of its own exchanges, and a start token before it may commit.",
        "lemma",
    ),
    Property(
        "abort_tokens",
        forall(
            _every_exchange,
            lambda e: implies(
                f.abort_token[e],
                all_of(
                    _begun(e),
                    f.d_op_state[f.peer[e]].eq(FAILED_IMPORT),
                    f.d_enc_working[f.peer[e]].eq(e),
                    f.d_dec_working[f.peer[e]].eq(e),
                    not_(f.took_over[f.peer[e]]),
                ),
            ),
            lambda e: (f.abort_token[e],),
        ),
        "Who made an abort token has failed for ever.",
        "lemma",
    ),
)

GOALS = (
    Goal(
        "second_destination_takes_over",
        all_of(f.exchanges.eq(3), f.accepted[1], f.took_over[f.peer[2]]),
        "After an abort token from one destination another one takes the TD over.",
    ),
)
