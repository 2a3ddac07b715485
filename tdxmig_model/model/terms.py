"""The model of terms: who may take what was encrypted for whom.

Any number of TDs are exported and imported, in any number of sessions, with any number of streams.
What they encrypt is kept for ever, and the host offers any of it to any TD on any stream.  The keys
that TDs decrypt with are chosen by the host among all that exist.  A MAC is ideal: it verifies
under the key, and with the stream in the IV, that the term was made with.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    BOOL,
    INT,
    Assign,
    Goal,
    Node,
    Property,
    System,
    all_of,
    any_of,
    choose,
    enum,
    forall,
    implies,
    index,
    mapping,
    members,
    need,
    not_,
    param,
    scalar,
    sort,
    step,
)
from tdxmig_model.model.words import (
    ALL_PROFILES,
    DESTINATION,
    NETWORK,
    SOURCE,
    cite_leaf,
    unrepaired,
)

TD = sort("Td")
KEY = index("Key")
LINK = index("Link")
TERM = index("Term")
RECEIPT = index("Receipt")
ROLE = enum("Role", "NONE", "IMPORTS", "RUNS", "STARTS", "STARTS_WHILE_IMPORTING", "EXPORTS")
NONE, IMPORTS, RUNS, STARTS, STARTS_WHILE_IMPORTING, EXPORTS = members(ROLE)

# What a step does to a TD is a change of the network's: every TD is on either side.
known = scalar("keys_made", INT, 1, NETWORK, doc="how many keys exist; 0 is the zero key")
role = mapping("role", (TD,), ROLE, NONE, NETWORK, doc="OP_STATE, as far as it matters here")
enc = mapping("enc_working_key", (TD,), INT, 0, NETWORK, doc="MIG_ENC_WORKING_KEY")
dec = mapping("dec_working_key", (TD,), INT, 0, NETWORK, doc="MIG_DEC_WORKING_KEY")
initialized = mapping("stream_initialized", (TD, LINK), BOOL, False, NETWORK, doc="INITIALIZED")
context = mapping("stream_context", (TD, LINK), INT, 0, NETWORK, doc="the key of a stream")
terms = scalar("terms", INT, 0, NETWORK, doc="how many terms were made")
term_key = mapping("term_key", (TERM,), INT, 0, NETWORK)
term_stream = mapping("term_stream", (TERM,), INT, 0, NETWORK, doc="MIGS_INDEX in the IV")
term_forward = mapping("term_forward", (TERM,), BOOL, False, NETWORK, doc="by its MB_TYPE")

# Ghosts.  A session is known by the key that its TD encrypts with: keys are fresh.
term_session = mapping("term_session", (TERM,), INT, 0, NETWORK, ghost=True)
receipts = scalar("receipts", INT, 0, NETWORK, ghost=True, doc="how many terms were accepted")
receipt_term = mapping("receipt_term", (RECEIPT,), INT, 0, NETWORK, ghost=True)
receipt_session = mapping("receipt_session", (RECEIPT,), INT, 0, NETWORK, ghost=True)
receipt_stream = mapping("receipt_stream", (RECEIPT,), INT, 0, NETWORK, ghost=True)
receipt_forward = mapping("receipt_forward", (RECEIPT,), BOOL, False, NETWORK, ghost=True)

VARIABLES = (
    *(known, role, enc, dec, initialized, context, terms, term_key, term_stream, term_forward),
    *(term_session, receipts, receipt_term, receipt_session, receipt_stream, receipt_forward),
)

t = param("t", TD)
k = param("k", KEY)
i = param("stream", LINK)
m = param("m", TERM)


def _new_session(first_context: Node) -> tuple[Assign, ...]:
    """Fresh keys; of the forward streams only the first one is initialised."""
    return (
        enc[t].to(known),
        known.to(known + 1),
        dec[t].to(k),
        initialized.fill(lambda td, s: choose(td.eq(t), s.eq(0), initialized[td, s])),
        context[t, 0].to(first_context),
    )


_made = need("key_exists", k.lt(known))
_offered = need("term_made", m.lt(terms))
_mac = need("mac", term_key[m].eq(dec[t]))


def _receipt(stream: Node | int, *, forward: bool) -> tuple[Assign, ...]:
    """One more term was accepted."""
    return (
        receipts.to(receipts + 1),
        receipt_term[receipts].to(m),
        receipt_session[receipts].to(dec[t]),
        receipt_stream[receipts].to(stream),
        receipt_forward[receipts].to(forward),
    )


STEPS = (
    step(
        "begin_import",
        DESTINATION,
        (t, k),
        when=(need("role", role[t].eq(NONE)), _made),
        then=(role[t].to(IMPORTS), *_new_session(k)),
        why="A TD becomes a destination: its keys are of this session, its streams begin anew.",
        cite=cite_leaf("IMPORT.STATE.IMMUTABLE", 85),
    ),
    step(
        "begin_export",
        SOURCE,
        (t, k),
        when=(need("role", role[t].ne(EXPORTS)), _made),
        then=(
            role[t].to(
                choose(role[t].in_(IMPORTS, STARTS_WHILE_IMPORTING), STARTS_WHILE_IMPORTING, STARTS)
            ),
            *_new_session(known),
        ),
        why="A TD becomes a source, even while it imports; the call may be interrupted.",
        cite=cite_leaf("EXPORT.STATE.IMMUTABLE", 72),
    ),
    step(
        "end_of_start",
        SOURCE,
        (t,),
        when=(need("role", role[t].in_(STARTS, STARTS_WHILE_IMPORTING)),),
        then=(role[t].to(EXPORTS),),
        why="The call that began the session ends.",
        cite=cite_leaf("EXPORT.STATE.IMMUTABLE", 72),
    ),
    step(
        "touch_stream",
        DESTINATION,
        (t, i),
        when=(
            need("role", role[t].eq(STARTS_WHILE_IMPORTING)),
            need("new", not_(initialized[t, i])),
        ),
        then=(initialized[t, i].to(True), context[t, i].to(dec[t])),
        why="The OP_STATE is still that of an import, so IMPORT.MEM initialises a stream.",
        cite=cite_leaf("IMPORT.MEM", 83),
        profiles=unrepaired("R4"),
    ),
    step(
        "send",
        SOURCE,
        (t, i),
        when=(need("role", role[t].eq(EXPORTS)),),
        then=(
            initialized[t, i].to(True),
            context[t, i].to(choose(initialized[t, i], context[t, i], enc[t])),
            terms.to(terms + 1),
            term_key[terms].to(choose(initialized[t, i], context[t, i], enc[t])),
            term_stream[terms].to(i),
            term_forward[terms].to(True),
            term_session[terms].to(enc[t]),
        ),
        why="A bundle, an entry or an epoch token is encrypted on a forward stream.",
        cite=cite_leaf("EXPORT.MEM", 68) + ", and the other exports",
    ),
    step(
        "send_back",
        DESTINATION,
        (t,),
        when=(need("role", role[t].eq(IMPORTS)),),
        then=(
            terms.to(terms + 1),
            term_key[terms].to(enc[t]),
            term_stream[terms].to(0),
            term_forward[terms].to(False),
            term_session[terms].to(enc[t]),
        ),
        why="An abort token goes back on the backward stream, whose index is 0.",
        cite=cite_leaf("IMPORT.ABORT", 80),
    ),
    step(
        "accept",
        DESTINATION,
        (t, m, i),
        when=(
            need("role", role[t].eq(IMPORTS)),
            _offered,
            need("mb_type", term_forward[m]),
            need("stream_in_iv", term_stream[m].eq(i)),
            need("mac", term_key[m].eq(choose(initialized[t, i], context[t, i], dec[t]))),
        ),
        then=(
            initialized[t, i].to(True),
            context[t, i].to(choose(initialized[t, i], context[t, i], dec[t])),
            *_receipt(i, forward=True),
        ),
        why="A destination takes a bundle that verifies on the stream on which it is offered.",
        cite=cite_leaf("IMPORT.MEM", 83) + ", and the other imports",
    ),
    step(
        "accept_back",
        SOURCE,
        (t, m),
        when=(
            need("role", role[t].eq(EXPORTS)),
            _offered,
            need("mb_type", not_(term_forward[m])),
            need("stream_in_iv", term_stream[m].eq(0)),
            _mac,
        ),
        then=(
            role[t].to(RUNS),
            initialized.fill(lambda td, s: all_of(initialized[td, s], td.ne(t))),
            *_receipt(0, forward=False),
        ),
        why="A source takes an abort token that verifies on the backward stream.",
        cite=cite_leaf("EXPORT.ABORT", 64),
    ),
)


def _every_term(body: object) -> Node:
    assert callable(body)
    return forall(
        {"m": TERM},
        lambda m: implies(all_of(m.ge(0), m.lt(terms)), body(m)),
        lambda m: (term_key[m],),
    )


PROPERTIES = (
    Property(
        "P9",
        forall(
            {"g": RECEIPT},
            lambda g: implies(
                all_of(g.ge(0), g.lt(receipts)),
                all_of(
                    term_session[receipt_term[g]].eq(receipt_session[g]),
                    term_stream[receipt_term[g]].eq(receipt_stream[g]),
                    any_of(
                        all_of(term_forward[receipt_term[g]], receipt_forward[g]),
                        all_of(not_(term_forward[receipt_term[g]]), not_(receipt_forward[g])),
                    ),
                ),
            ),
            lambda g: (receipt_term[g],),
        ),
        "A bundle is accepted only by the session, direction and stream that it was made for.",
        "leaf",
        "MAC, MB_TYPE and IV of every bundle; INITIALIZED",
        guards=(
            ("accept", "mb_type"),
            ("accept", "stream_in_iv"),
            ("accept", "mac"),
            ("accept_back", "mb_type"),
            ("accept_back", "stream_in_iv"),
            ("accept_back", "mac"),
        ),
        witness=all_of(receipts.eq(2), receipt_forward[0], not_(receipt_forward[1])),
    ),
    Property(
        "contexts",
        all_of(
            known.ge(1),
            terms.ge(0),
            receipts.ge(0),
            forall({"t": TD}, lambda t: all_of(enc[t].lt(known), dec[t].lt(known))),
            forall(
                {"t": TD, "s": LINK},
                lambda t, s: implies(
                    initialized[t, s],
                    all_of(
                        implies(role[t].eq(IMPORTS), context[t, s].eq(dec[t])),
                        implies(
                            role[t].in_(STARTS, STARTS_WHILE_IMPORTING, EXPORTS),
                            context[t, s].eq(enc[t]),
                        ),
                        role[t].in_(IMPORTS, STARTS, STARTS_WHILE_IMPORTING, EXPORTS),
                    ),
                ),
                lambda t, s: (initialized[t, s],),
            ),
        ),
        "A stream that is in use has the key of its session and direction.",
        "lemma",
    ),
    Property(
        "made",
        all_of(
            _every_term(
                lambda m: all_of(
                    term_session[m].eq(term_key[m]),
                    any_of(term_forward[m], term_stream[m].eq(0)),
                )
            ),
            forall(
                {"g": RECEIPT},
                lambda g: implies(
                    all_of(g.ge(0), g.lt(receipts)),
                    all_of(receipt_term[g].ge(0), receipt_term[g].lt(terms)),
                ),
                lambda g: (receipt_term[g],),
            ),
            forall(
                {"m": TERM},
                lambda m: implies(m.ge(terms), not_(term_forward[m])),
                lambda m: (term_forward[m],),
            ),
        ),
        "Every term is under the key of the session that made it; abort tokens are on stream 0.",
        "lemma",
    ),
)

TERMS = System(
    name="terms",
    variables=VARIABLES,
    steps=STEPS,
    properties=PROPERTIES,
    goals=(
        Goal(
            "both_directions",
            all_of(receipts.eq(2), receipt_forward[0], not_(receipt_forward[1])),
            "A destination takes a bundle, and a source an abort token.",
        ),
    ),
    assumptions=(
        "the key that a session encrypts with is fresh, as the model of keys has it",
        "AES-256-GCM is an ideal AEAD, with MB_TYPE in the AAD and the stream in the IV",
    ),
    profiles=ALL_PROFILES,
)
