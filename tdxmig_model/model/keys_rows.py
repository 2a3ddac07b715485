"""The keys, versions and IVs of one TD: its slots, its sessions, and all that it ever encrypts.

The TD may be imported once and exported any number of times, with any number of streams.  A key is
its number: 0 is the key of 256 zero bits, and what the random number generator of any module makes
is a number that no key had before.  The host chooses what is written as MIG_DEC_KEY among all keys
that exist, old ones and the TD's own among them.

Only what matters to keys is followed.  LIVE_EXPORT stands for the paused states after it too,
MEMORY_IMPORT for all that comes before the commit, and key slots are written at any time.  The log
has one entry for each encryption: a call that fails or is interrupted has used what it encrypted
until then.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Assign,
    Literal,
    Need,
    Node,
    choose,
    index,
    mapping,
    need,
    not_,
    only,
    param,
    scalar,
    step,
)
from tdxmig_model.model.words import (
    FAILED_IMPORT,
    LIVE_EXPORT,
    LIVE_IMPORT,
    MEMORY_IMPORT,
    MODULE,
    NETWORK,
    OP_STATE,
    RUNNABLE,
    SOURCE,
    UNINITIALIZED,
    cite_leaf,
    repaired,
    unrepaired,
)

KEY = index("Key")
VERSION = index("Version")
COUNTER = index("Counter")
USE = index("Use")
LINK = index("Link")
"""The forward streams of the TD, by their number."""

ZERO_KEY = 0

known = scalar("known_keys", INT, 2, NETWORK, doc="how many keys exist, the zero key included")

op_state = scalar("op_state", OP_STATE, UNINITIALIZED, SOURCE)
starting = scalar("starting", BOOL, False, SOURCE, doc="EXPORT.STATE.IMMUTABLE is interrupted")
enc_key = scalar("mig_enc_key", INT, 1, SOURCE, doc="MIG_ENC_KEY, random since the TD was made")
dec_key = scalar("mig_dec_key", INT, ZERO_KEY, SOURCE, doc="MIG_DEC_KEY")
dec_key_set = scalar("mig_dec_key_set", BOOL, False, SOURCE, doc="MIG_DEC_KEY_SET")
version = scalar("mig_version", INT, 0, SOURCE, doc="MIG_VERSION")
enc_working = scalar("mig_enc_working_key", INT, ZERO_KEY, SOURCE, doc="MIG_ENC_WORKING_KEY")
dec_working = scalar("mig_dec_working_key", INT, ZERO_KEY, SOURCE, doc="MIG_DEC_WORKING_KEY")
working_version = scalar("mig_working_version", INT, 0, SOURCE, doc="MIG_WORKING_VERSION")
initialized = mapping("initialized", (LINK,), BOOL, False, SOURCE, doc="INITIALIZED of the link")
stream_key = mapping("stream_key", (LINK,), INT, ZERO_KEY, SOURCE, doc="key of the AES context")
iv_counter = mapping("iv_counter", (LINK,), INT, 0, SOURCE, doc="IV_COUNTER")
back_initialized = scalar("backward_initialized", BOOL, False, SOURCE)
back_iv = scalar("backward_iv_counter", INT, 0, SOURCE, doc="IV_COUNTER of the backward stream")

# Ghosts: every encryption, and what the sessions began with.
log_length = scalar("log_length", INT, 0, NETWORK, ghost=True, doc="how much was encrypted")
log_key = mapping("log_key", (USE,), INT, 0, NETWORK, ghost=True)
log_stream = mapping("log_stream", (USE,), INT, 0, NETWORK, ghost=True)
log_iv = mapping("log_iv", (USE,), INT, 0, NETWORK, ghost=True)
log_forward = mapping("log_forward", (USE,), BOOL, False, NETWORK, ghost=True)
log_session = mapping("log_session", (USE,), INT, 0, NETWORK, ghost=True)
log_version = mapping("log_version", (USE,), INT, 0, NETWORK, ghost=True)
sessions = scalar("sessions", INT, 0, SOURCE, ghost=True, doc="how many sessions began")
written_in = scalar("dec_key_written_in", INT, 0, SOURCE, ghost=True, doc="sessions at that time")
session_written_in = scalar("session_key_written_in", INT, -1, SOURCE, ghost=True)
session_enc = scalar("session_enc_key", INT, 0, SOURCE, ghost=True)
session_dec = scalar("session_dec_key", INT, 0, SOURCE, ghost=True)
session_version = scalar("session_version", INT, 0, SOURCE, ghost=True)
previous_enc = scalar("previous_enc_key", INT, 0, SOURCE, ghost=True)
previous_dec = scalar("previous_dec_key", INT, 0, SOURCE, ghost=True)

VARIABLES = (
    *(known, op_state, starting, enc_key, dec_key, dec_key_set, version),
    *(enc_working, dec_working, working_version, initialized, stream_key, iv_counter),
    *(back_initialized, back_iv),
    *(log_length, log_key, log_stream, log_iv, log_forward, log_session, log_version),
    *(sessions, written_in, session_written_in, previous_enc, previous_dec),
    *(session_enc, session_dec, session_version),
)

k = param("k", KEY)
i = param("stream", LINK)
c = param("counter", COUNTER)
v = param("version", VERSION)


def _in(*states: Literal) -> Need:
    return need("op_state", op_state.in_(*states))


def _log(
    key: Node,
    stream: Node | int,
    iv: Node | int,
    *,
    forward: bool,
    session: Node = sessions,
) -> tuple[Assign, ...]:
    """One more encryption; its version is the row's."""
    here = log_length
    return (
        log_length.to(here + 1),
        log_key[here].to(key),
        log_stream[here].to(stream),
        log_iv[here].to(iv),
        log_forward[here].to(forward),
        log_session[here].to(session),
    )


_WORKING_VERSION = (log_version[log_length].to(working_version),)


def _session_needs(repair: str) -> tuple[Need, ...]:
    """What the start of a session asks of the slots; a repair adds the last four conjuncts."""
    return (
        need("mig_dec_key_set", dec_key_set),
        need("not_zero", dec_key.ne(ZERO_KEY), *repaired(repair)),
        need("not_own_key", dec_key.ne(enc_key), *repaired(repair)),
        need("not_previous_dec_key", dec_key.ne(dec_working), *repaired(repair)),
        need("not_previous_enc_key", dec_key.ne(enc_working), *repaired(repair)),
    )


_SESSION_START: tuple[Assign, ...] = (
    enc_working.to(enc_key),
    enc_key.to(known),
    known.to(known + 1),
    dec_working.to(dec_key),
    dec_key_set.to(False),
    working_version.to(version),
    initialized.fill(lambda s: s.eq(0)),
    back_initialized.to(False),
    sessions.to(sessions + 1),
    session_written_in.to(written_in),
    session_enc.to(enc_key),
    session_dec.to(dec_key),
    session_version.to(version),
    previous_enc.to(enc_working),
    previous_dec.to(dec_working),
)


def _used(*, key: Node) -> tuple[Assign, ...]:
    """The stream counts one IV; on its first use in a session it takes the session's key."""
    return (
        initialized[i].to(True),
        stream_key[i].to(choose(initialized[i], stream_key[i], key)),
        iv_counter[i].to(choose(initialized[i], iv_counter[i] + 1, 1)),
    )


_sent = (
    *_used(key=enc_working),
    *_log(
        choose(initialized[i], stream_key[i], enc_working),
        i,
        choose(initialized[i], iv_counter[i] + 1, 1),
        forward=True,
    ),
)

SLOTS = (
    step(
        "read_enc_key",
        SOURCE,
        when=(),
        then=(
            enc_key.to(known),
            known.to(known + 1),
            only(repaired("R6"), dec_key_set.to(False)),
        ),
        why="The MigTD that reads MIG_ENC_KEY gets a new one.",
        cite=f"TDG.SERVTD.RD of MIG_ENC_KEY, TDCALL 18; {MODULE}",
    ),
    step(
        "read_enc_key_without_entropy",
        SOURCE,
        when=(),
        then=(enc_key.to(ZERO_KEY),),
        why="Without entropy the read fails, and the slot is left zero.",
        cite=f"TDG.SERVTD.RD of MIG_ENC_KEY, TDCALL 18; {MODULE}",
        profiles=unrepaired("R6"),
    ),
    step(
        "another_module_makes_a_key",
        NETWORK,
        when=(),
        then=(known.to(known + 1),),
        why="The modules of peers make keys of their own.",
        cite=f"TDG.SERVTD.RD of MIG_ENC_KEY, TDCALL 18; {MODULE}",
    ),
    step(
        "write_dec_key",
        SOURCE,
        (k,),
        when=(need("known", k.lt(known)),),
        then=(dec_key.to(k), dec_key_set.to(True), written_in.to(sessions)),
        why="The MigTD writes the key that it was given by whoever the host let it talk to.",
        cite=f"TDG.SERVTD.WR of MIG_DEC_KEY, TDCALL 20; {MODULE}",
    ),
    step(
        "write_version",
        SOURCE,
        (v,),
        when=(need("changed", version.ne(v)),),
        then=(version.to(v),),
        why="The MigTD may choose a version at any time.",
        cite=f"TDG.SERVTD.WR of MIG_VERSION, TDCALL 20; {MODULE}",
    ),
)

EXPORTS = (
    step(
        "build_td",
        SOURCE,
        when=(_in(UNINITIALIZED),),
        then=(op_state.to(RUNNABLE),),
        why="A TD that is not imported is initialised, measured and finalised.",
        cite=cite_leaf("MNG.INIT", 21) + "; TDH.MR.FINALIZE, leaf 17",
    ),
    step(
        "start_export",
        SOURCE,
        when=(_in(RUNNABLE, LIVE_IMPORT), *_session_needs("R15")),
        then=(
            *_SESSION_START,
            starting.to(True),
            stream_key[0].to(enc_key),
            iv_counter[0].to(1),
            *_log(enc_key, 0, 1, forward=True, session=sessions + 1),
            log_version[log_length].to(version),
        ),
        why="Keys and version are taken from the slots; the call may be interrupted from here on.",
        cite=cite_leaf("EXPORT.STATE.IMMUTABLE", 72),
    ),
    step(
        "finish_start",
        SOURCE,
        when=(_in(RUNNABLE, LIVE_IMPORT), need("starting", starting)),
        then=(op_state.to(LIVE_EXPORT), starting.to(False)),
        why="The call that began the session ends; if it was interrupted, after a RESUME.",
        cite=cite_leaf("EXPORT.STATE.IMMUTABLE", 72),
    ),
    step(
        "export_bundle",
        SOURCE,
        (i,),
        when=(_in(LIVE_EXPORT),),
        then=(*_sent, *_WORKING_VERSION),
        why="The MBMD of a bundle is authenticated, whatever becomes of the call.",
        cite=cite_leaf("EXPORT.MEM", 68) + "; TDH.EXPORT.STATE.TD, TDH.EXPORT.STATE.VP",
    ),
    step(
        "export_entry",
        SOURCE,
        (i,),
        when=(_in(LIVE_EXPORT), need("initialized", initialized[i])),
        then=(*_sent, *_WORKING_VERSION),
        why="Each entry of a memory bundle is encrypted by itself.",
        cite=cite_leaf("EXPORT.MEM", 68),
    ),
    step(
        "export_token",
        SOURCE,
        (i,),
        when=(_in(LIVE_EXPORT), need("first_stream", i.eq(0))),
        then=(
            *_sent,
            only(repaired("R10"), log_version[log_length].to(working_version)),
            only(unrepaired("R10"), log_version[log_length].to(version)),
        ),
        why="An epoch token is authenticated on the first stream.",
        cite=cite_leaf("EXPORT.TRACK", 71),
    ),
    step(
        "abort_export",
        SOURCE,
        when=(_in(LIVE_EXPORT),),
        then=(op_state.to(RUNNABLE), initialized.fill(lambda s: False)),
        why="The session ends, and no stream of it can be used again.",
        cite=cite_leaf("EXPORT.ABORT", 64),
    ),
)

IMPORTS = (
    step(
        "start_import",
        SOURCE,
        when=(_in(UNINITIALIZED), *_session_needs("R5")),
        then=(
            *_SESSION_START,
            op_state.to(MEMORY_IMPORT),
            stream_key[0].to(dec_key),
            iv_counter[0].to(1),
        ),
        why="Keys and version are taken from the slots of the TD that is being built.",
        cite=cite_leaf("IMPORT.STATE.IMMUTABLE", 85),
    ),
    step(
        "import_bundle",
        SOURCE,
        (i, c),
        when=(
            _in(MEMORY_IMPORT, LIVE_IMPORT),
            need("epoch", not_(starting)),
        ),
        then=(
            initialized[i].to(True),
            stream_key[i].to(choose(initialized[i], stream_key[i], dec_working)),
            iv_counter[i].to(c),
        ),
        why="In its epoch a bundle initialises its stream and sets its IV_COUNTER.",
        cite=cite_leaf("IMPORT.MEM", 83),
    ),
    step(
        "refused_bundle",
        SOURCE,
        (i,),
        when=(_in(LIVE_IMPORT), need("starting", starting)),
        then=(
            initialized[i].to(True),
            stream_key[i].to(choose(initialized[i], stream_key[i], dec_working)),
            iv_counter[i].to(choose(initialized[i], iv_counter[i], 0)),
            starting.to(i.ne(0)),
        ),
        why="IMPORT.MEM initialises its stream, drops an unfinished call, and then sees the epoch.",
        cite=cite_leaf("IMPORT.MEM", 83) + ", a bundle of another epoch",
        profiles=unrepaired("R4"),
    ),
    step(
        "commit_td",
        SOURCE,
        when=(_in(MEMORY_IMPORT),),
        then=(op_state.to(LIVE_IMPORT),),
        why="The imported TD runs while the rest of its memory comes.",
        cite=cite_leaf("IMPORT.COMMIT", 82),
    ),
    step(
        "end_of_import",
        SOURCE,
        when=(_in(MEMORY_IMPORT, LIVE_IMPORT),),
        then=(op_state.to(RUNNABLE),),
        why="The import is over, and the TD runs.",
        cite=cite_leaf("IMPORT.END", 81),
    ),
    step(
        "abort_import",
        SOURCE,
        when=(_in(MEMORY_IMPORT, FAILED_IMPORT),),
        then=(
            op_state.to(FAILED_IMPORT),
            back_initialized.to(True),
            back_iv.to(choose(back_initialized, back_iv + 1, 1)),
            *_log(enc_working, 0, choose(back_initialized, back_iv + 1, 1), forward=False),
            *_WORKING_VERSION,
        ),
        why="Each abort token is authenticated anew on the backward stream, whose index is 0.",
        cite=cite_leaf("IMPORT.ABORT", 80),
    ),
)
