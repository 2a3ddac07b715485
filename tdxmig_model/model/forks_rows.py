"""One source, any number of destinations, and the key exchanges between their MigTDs.

The host may begin exchanges with any destination, stop each one anywhere, and deliver any token to
anyone.  MigTDs are honest: a key is given to one destination, an answer is installed once, and a
new exchange ends the one before it on the same side.  What the rest follows from is the TDX module.

An exchange is named by its number.  Each side makes one key in it, so that number also names the
source's key and the destination's key of the exchange; 0 is a key that no other side has.  A MAC is
ideal: a token of a session is known by the key that it was made with.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Literal,
    index,
    mapping,
    need,
    not_,
    only,
    param,
    scalar,
    sort,
    step,
)
from tdxmig_model.model.words import (
    DESTINATION,
    FAILED_IMPORT,
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
    UNINITIALIZED,
    cite_leaf,
    repaired,
    unrepaired,
)

TD = sort("Td")
EXCHANGE = index("Exchange")

exchanges = scalar("exchanges", INT, 1, NETWORK, doc="the number of the next key exchange")
peer = mapping(
    "peer", (EXCHANGE,), TD, Literal(0, TD), NETWORK, doc="the destination of an exchange"
)
answered = mapping("answered", (EXCHANGE,), BOOL, False, NETWORK, doc="the destination answered")
installed = mapping("installed", (EXCHANGE,), BOOL, False, NETWORK, doc="the answer was used")
opened = mapping("opened", (EXCHANGE,), BOOL, False, NETWORK, doc="immutable state under this key")
start_token = mapping("start_token", (EXCHANGE,), BOOL, False, NETWORK, doc="a start token exists")
abort_token = mapping("abort_token", (EXCHANGE,), BOOL, False, NETWORK, doc="an abort token exists")

s_op_state = scalar("source_op_state", OP_STATE, RUNNABLE, SOURCE)
s_enc = scalar("source_mig_enc_key", INT, 0, SOURCE, doc="MIG_ENC_KEY, by its exchange")
s_dec = scalar("source_mig_dec_key", INT, 0, SOURCE, doc="MIG_DEC_KEY, by its exchange")
s_dec_set = scalar("source_mig_dec_key_set", BOOL, False, SOURCE, doc="MIG_DEC_KEY_SET")
s_enc_working = scalar("source_enc_working_key", INT, 0, SOURCE, doc="MIG_ENC_WORKING_KEY")
s_dec_working = scalar("source_dec_working_key", INT, 0, SOURCE, doc="MIG_DEC_WORKING_KEY")

d_op_state = mapping("destination_op_state", (TD,), OP_STATE, UNINITIALIZED, DESTINATION)
d_exchange = mapping(
    "destination_exchange", (TD,), INT, 0, DESTINATION, doc="the exchange of this MigTD"
)
d_enc = mapping("destination_mig_enc_key", (TD,), INT, 0, DESTINATION, doc="MIG_ENC_KEY")
d_dec = mapping("destination_mig_dec_key", (TD,), INT, 0, DESTINATION, doc="MIG_DEC_KEY")
d_dec_set = mapping(
    "destination_mig_dec_key_set", (TD,), BOOL, False, DESTINATION, doc="MIG_DEC_KEY_SET"
)
d_enc_working = mapping("destination_enc_working_key", (TD,), INT, 0, DESTINATION)
d_dec_working = mapping("destination_dec_working_key", (TD,), INT, 0, DESTINATION)
d_failed_live = mapping(
    "destination_failed_live",
    (TD,),
    BOOL,
    False,
    DESTINATION,
    doc="an IMPORT.MEM ended the import while others were in flight",
)

# Ghosts: what has happened, for properties only.
took_over = mapping("took_over", (TD,), BOOL, False, DESTINATION, ghost=True)
accepted = mapping("abort_accepted", (EXCHANGE,), BOOL, False, SOURCE, ghost=True)
accepted_token = mapping("abort_accepted_token", (EXCHANGE,), INT, 0, SOURCE, ghost=True)

VARIABLES = (
    *(exchanges, peer, answered, installed, opened, start_token, abort_token),
    *(s_op_state, s_enc, s_dec, s_dec_set, s_enc_working, s_dec_working),
    *(d_op_state, d_exchange, d_enc, d_dec, d_dec_set, d_enc_working, d_dec_working),
    *(d_failed_live, took_over, accepted, accepted_token),
)

d = param("d", TD)
e = param("e", EXCHANGE)


_READ = f"TDG.SERVTD.RD of MIG_ENC_KEY, TDCALL 18; {MODULE}"
_WRITE = f"TDG.SERVTD.WR of MIG_DEC_KEY, TDCALL 20; {MODULE}"

EXCHANGES = (
    step(
        "begin_exchange",
        SOURCE,
        (d,),
        when=(),
        then=(
            exchanges.to(exchanges + 1),
            peer[exchanges].to(d),
            s_enc.to(exchanges),
            only(repaired("R6"), s_dec_set.to(False)),
        ),
        why="The source's MigTD reads a new MIG_ENC_KEY and gives it to one destination.",
        cite=_READ,
    ),
    step(
        "answer_exchange",
        DESTINATION,
        (e,),
        when=(
            need("begun", e.ge(1)),
            need("in_log", e.lt(exchanges)),
            need("first_time", not_(answered[e])),
        ),
        then=(
            answered[e].to(True),
            d_exchange[peer[e]].to(e),
            d_enc[peer[e]].to(e),
            only(repaired("R6"), d_dec_set[peer[e]].to(False)),
        ),
        why="The destination's MigTD reads a new MIG_ENC_KEY of its TD and sends it back.",
        cite=_READ,
    ),
    step(
        "install_at_destination",
        DESTINATION,
        (e,),
        when=(
            need("answered", answered[e]),
            need("current_exchange", d_exchange[peer[e]].eq(e)),
        ),
        then=(d_dec[peer[e]].to(e), d_dec_set[peer[e]].to(True)),
        why="The destination's MigTD writes the source's key as MIG_DEC_KEY of its TD.",
        cite=_WRITE,
    ),
    step(
        "install_at_source",
        SOURCE,
        (e,),
        when=(
            need("not_blackout", s_op_state.in_(RUNNABLE, LIVE_EXPORT)),
            need("answered", answered[e]),
            need("first_time", not_(installed[e])),
            need("current_exchange", exchanges.eq(e + 1)),
        ),
        then=(s_dec.to(e), s_dec_set.to(True), installed[e].to(True)),
        why="The source's MigTD writes the destination's key as MIG_DEC_KEY, once.",
        cite=_WRITE,
    ),
)

SOURCE_STEPS = (
    step(
        "start_session",
        SOURCE,
        when=(
            need("op_state", s_op_state.eq(RUNNABLE)),
            need("mig_dec_key_set", s_dec_set),
        ),
        then=(
            s_op_state.to(LIVE_EXPORT),
            s_enc_working.to(s_enc),
            s_enc.to(0),
            s_dec_working.to(s_dec),
            s_dec_set.to(False),
            opened[s_enc].to(True),
        ),
        why="A session takes the keys of the slots, and the slots are good for no other session.",
        cite=cite_leaf("EXPORT.STATE.IMMUTABLE", 72),
    ),
    step(
        "pause_session",
        SOURCE,
        when=(need("op_state", s_op_state.eq(LIVE_EXPORT)),),
        then=(s_op_state.to(PAUSED_EXPORT),),
        why="The source TD stops running.",
        cite=cite_leaf("EXPORT.PAUSE", 70),
    ),
    step(
        "issue_start_token",
        SOURCE,
        when=(need("op_state", s_op_state.eq(PAUSED_EXPORT)),),
        then=(s_op_state.to(POST_EXPORT), start_token[s_enc_working].to(True)),
        why="The start token lets the holder of the session's key run the TD.",
        cite=cite_leaf("EXPORT.TRACK", 71) + ", in-order done",
    ),
    step(
        "abort_session",
        SOURCE,
        when=(need("op_state", s_op_state.in_(LIVE_EXPORT, PAUSED_EXPORT)),),
        then=(s_op_state.to(RUNNABLE),),
        why="Before the start token the source takes the TD back by itself.",
        cite=cite_leaf("EXPORT.ABORT", 64),
    ),
    step(
        "abort_session_with_token",
        SOURCE,
        (e,),
        when=(
            need("op_state", s_op_state.eq(POST_EXPORT)),
            need("token_made", abort_token[e]),
            need("token_mac", s_dec_working.eq(e)),
        ),
        then=(
            s_op_state.to(RUNNABLE),
            accepted[s_enc_working].to(True),
            accepted_token[s_enc_working].to(e),
        ),
        why="After the start token it takes an abort token under the session's backward key.",
        cite=cite_leaf("EXPORT.ABORT", 64),
    ),
)

_import_keys = (
    d_enc_working[d].to(d_enc[d]),
    d_enc[d].to(0),
    d_dec_working[d].to(d_dec[d]),
    d_dec_set[d].to(False),
)

DESTINATION_STEPS = (
    step(
        "join_session",
        DESTINATION,
        (d, e),
        when=(
            need("op_state", d_op_state[d].eq(UNINITIALIZED)),
            need("mig_dec_key_set", d_dec_set[d]),
            need("bundle_made", opened[e]),
            need("bundle_mac", d_dec[d].eq(e)),
        ),
        then=(d_op_state[d].to(MEMORY_IMPORT), *_import_keys),
        why="A TD that is being built becomes a destination of the session of its key.",
        cite=cite_leaf("IMPORT.STATE.IMMUTABLE", 85),
    ),
    step(
        "fail_to_join",
        DESTINATION,
        (d,),
        when=(
            need("op_state", d_op_state[d].eq(UNINITIALIZED)),
            need("mig_dec_key_set", d_dec_set[d]),
        ),
        then=(d_op_state[d].to(FAILED_IMPORT), *_import_keys),
        why="A bundle that does not verify fails the import, after the keys were taken.",
        cite=cite_leaf("IMPORT.STATE.IMMUTABLE", 85),
    ),
    step(
        "take_start_token",
        DESTINATION,
        (d, e),
        when=(
            need("op_state", d_op_state[d].eq(MEMORY_IMPORT)),
            need("token_made", start_token[e]),
            need("token_mac", d_dec_working[d].eq(e)),
        ),
        then=(d_op_state[d].to(POST_IMPORT),),
        why="The start token under the session's forward key ends the in-order import.",
        cite=cite_leaf("IMPORT.TRACK", 84),
    ),
    step(
        "commit_import",
        DESTINATION,
        (d,),
        when=(need("op_state", d_op_state[d].eq(POST_IMPORT)),),
        then=(d_op_state[d].to(LIVE_IMPORT), took_over[d].to(True)),
        why="The destination runs the TD while the rest of its memory comes.",
        cite=cite_leaf("IMPORT.COMMIT", 82),
    ),
    step(
        "end_import",
        DESTINATION,
        (d,),
        when=(need("op_state", d_op_state[d].in_(POST_IMPORT, LIVE_IMPORT)),),
        then=(d_op_state[d].to(RUNNABLE), took_over[d].to(True)),
        why="The destination runs the TD and imports no more.",
        cite=cite_leaf("IMPORT.END", 81),
    ),
    step(
        "fail_import",
        DESTINATION,
        (d,),
        when=(need("op_state", d_op_state[d].in_(MEMORY_IMPORT, POST_IMPORT)),),
        then=(d_op_state[d].to(FAILED_IMPORT),),
        why="A failed import before the commit can only be given up.",
        cite=cite_leaf("IMPORT.MEM", 83) + ", fatal errors",
    ),
    step(
        "fail_live_import",
        DESTINATION,
        (d,),
        when=(need("op_state", d_op_state[d].eq(LIVE_IMPORT)),),
        then=(
            d_op_state[d].to(RUNNABLE),
            only(unrepaired("R9"), d_failed_live[d].to(True)),
        ),
        why="After the commit a failure ends the import, and the TD runs on.",
        cite=cite_leaf("IMPORT.MEM", 83) + ", fatal errors",
    ),
    step(
        "fail_in_flight",
        DESTINATION,
        (d,),
        when=(
            need("op_state", d_op_state[d].eq(RUNNABLE)),
            need("in_flight", d_failed_live[d]),
        ),
        then=(d_op_state[d].to(FAILED_IMPORT),),
        why="An IMPORT.MEM that was in flight decides by the OP_STATE that it finds.",
        cite=cite_leaf("IMPORT.MEM", 83) + ", fatal errors",
        profiles=unrepaired("R9"),
    ),
    step(
        "make_abort_token",
        DESTINATION,
        (d,),
        when=(need("op_state", d_op_state[d].in_(MEMORY_IMPORT, POST_IMPORT, FAILED_IMPORT)),),
        then=(d_op_state[d].to(FAILED_IMPORT), abort_token[d_enc_working[d]].to(True)),
        why="A destination that gave the TD up for ever says so under the backward key.",
        cite=cite_leaf("IMPORT.ABORT", 80),
    ),
)
