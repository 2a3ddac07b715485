"""The network of the leaf-level model: an append-only log of every forward bundle ever made.

The adversary is in the parameters: an import step takes *any* position below the length of the log,
at any
time and any number of times.  Bundles are unforgeable, so nothing outside the log can be imported.

The log follows one arbitrary migration session, the *observed* one.  The source may run other
sessions
before and after it; what those send is protected by other keys and is of no use to the destination
under
study, so it is not logged.  Since the observed session is arbitrary, what is proved of it holds for
all.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Assign,
    Literal,
    Node,
    choose,
    mapping,
    scalar,
)
from tdxmig_model.model.words import (
    BUNDLE,
    EPOCH,
    EPOCH_TOKEN,
    MEM,
    MESSAGE,
    NETWORK,
)

observed = scalar(
    "session_observed", BOOL, False, NETWORK, doc="the source is in the observed session"
)
used = scalar("session_used", BOOL, False, NETWORK, doc="the observed session has begun, once")

log_length = scalar("log_length", INT, 0, NETWORK, doc="how many bundles were made")
log_kind = mapping("log_kind", (MESSAGE,), BUNDLE, MEM, NETWORK, doc="MB_TYPE")
log_epoch = mapping("log_epoch", (MESSAGE,), INT, 0, NETWORK, doc="MIG_EPOCH of the MBMD")
log_counter = mapping("log_counter", (MESSAGE,), INT, 0, NETWORK, doc="MB_COUNTER of the MBMD")
log_stream = mapping("log_stream", (MESSAGE,), INT, 0, NETWORK, doc="MIGS_INDEX of the MBMD")
log_total = mapping("log_total", (MESSAGE,), INT, 0, NETWORK, doc="TOTAL_MB of a token")
log_complete = mapping(
    "log_complete", (MESSAGE,), BOOL, False, NETWORK, doc="the export call that made it ended"
)
abort_token = scalar("abort_token", BOOL, False, NETWORK, doc="the destination made an abort token")

# Ghosts: what has happened, for properties only.
started = scalar("start_token_issued", BOOL, False, NETWORK, ghost=True)
start_while_paused = scalar("start_while_paused", BOOL, False, NETWORK, ghost=True)
start_dirty_pages = scalar("start_dirty_pages", INT, 0, NETWORK, ghost=True)
session_paused = scalar("session_paused", BOOL, False, NETWORK, ghost=True)
token_position = mapping(
    "token_position", (EPOCH,), INT, 0, NETWORK, ghost=True, doc="where the token of an epoch is"
)

VARIABLES = (
    observed,
    used,
    log_length,
    log_kind,
    log_epoch,
    log_counter,
    log_stream,
    log_total,
    log_complete,
    abort_token,
    started,
    start_while_paused,
    start_dirty_pages,
    session_paused,
    token_position,
)


def make_bundle(
    kind: Literal,
    *,
    epoch: Node | int,
    counter: Node | int,
    stream: Node | int = 0,
    total: Node | int = 0,
    complete: bool = True,
    when: Node | None = None,
) -> tuple[Assign, ...]:
    """Append one bundle to the log, if the source is in the observed session (or `when`)."""
    logged = observed if when is None else when
    here = log_length

    def put(value: Node | int | bool, old: Node) -> Node:
        return choose(logged, value, old)

    return (
        log_length.to(log_length + choose(logged, 1, 0)),
        log_kind[here].to(put(kind, log_kind[here])),
        log_epoch[here].to(put(epoch, log_epoch[here])),
        log_counter[here].to(put(counter, log_counter[here])),
        log_stream[here].to(put(stream, log_stream[here])),
        log_total[here].to(put(total, log_total[here])),
        log_complete[here].to(put(complete, log_complete[here])),
    )


def is_token(position: Node | int) -> Node:
    """Whether a position of the log holds an epoch token or the start token."""
    return log_kind[position].eq(EPOCH_TOKEN)
