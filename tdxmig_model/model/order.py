"""The order model: how OP_STATE moves, what a session begins with, and the order of bundles.

It adds nothing but ghosts to the leaf model: the OP_STATE before the last move, whether a session
has just begun, and which bundles an import has begun with.
"""

from __future__ import annotations

from collections.abc import Callable

from tdxmig_model.expr import (
    BOOL,
    Addition,
    Assign,
    Bound,
    Node,
    Property,
    Variable,
    addition,
    all_of,
    any_of,
    choose,
    forall,
    implies,
    mapping,
    not_,
    scalar,
    superpose,
)
from tdxmig_model.model import destination as d
from tdxmig_model.model import network as n
from tdxmig_model.model import source_state as s
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.words import (
    DESTINATION,
    FAILED_IMPORT,
    LIVE_EXPORT,
    LIVE_IMPORT,
    MEM,
    MEMORY_IMPORT,
    MESSAGE,
    MUTABLE_TD_STATE,
    MUTABLE_VCPU_STATE,
    OP_STATE,
    PAUSED_EXPORT,
    POST_EXPORT,
    POST_IMPORT,
    RUNNABLE,
    SOURCE,
    STATE_IMPORT,
    STREAM,
    UNINITIALIZED,
)

source_before = scalar(
    "source_op_state_before", OP_STATE, RUNNABLE, SOURCE, ghost=True, doc="before the last move"
)
destination_before = scalar(
    "destination_op_state_before", OP_STATE, UNINITIALIZED, DESTINATION, ghost=True
)
source_began = scalar("source_session_just_began", BOOL, False, SOURCE, ghost=True)
destination_began = scalar("destination_session_just_began", BOOL, False, DESTINATION, ghost=True)
begun = mapping(
    "destination_begun_with", (MESSAGE,), BOOL, False, DESTINATION, ghost=True, doc="MBMD accepted"
)

_SIDES: dict[str, tuple[Variable, Variable, Variable, tuple[str, ...]]] = {
    SOURCE: (
        s.op_state,
        source_before,
        source_began,
        ("export_state_immutable", "export_state_immutable_other"),
    ),
    DESTINATION: (
        d.op_state,
        destination_before,
        destination_began,
        ("import_state_immutable",),
    ),
}
_BEGINS = ("import_mem_begin", "import_state_td", "import_state_vp")


def _additions() -> dict[str, Addition]:
    """What each row of the leaf model tells the ghosts."""
    found: dict[str, Addition] = {}
    for row in LEAF.steps:
        op_state, before, began, starts = _SIDES[row.actor]
        then: list[Assign] = [began.to(row.name in starts)]
        if op_state.name in row.writes():
            then.append(before.to(op_state))
        if row.name in _BEGINS:
            then.append(begun[d.m].to(True))
        found[row.name] = addition(*then)
    return found


_in_order = d.op_state.in_(MEMORY_IMPORT, STATE_IMPORT)


def _counted_kind(m: Node) -> Node:
    """A bundle that has an MB_COUNTER of its own; tokens and the immutable state have 0."""
    return n.log_kind[m].in_(MEM, MUTABLE_TD_STATE, MUTABLE_VCPU_STATE)


def _in_log(m: Node) -> Node:
    return all_of(m.ge(0), m.lt(n.log_length), _counted_kind(m))


def _one_counter(a: Node, b: Node) -> Node:
    """One counter numbers both: of one stream, and on stream 0 of one epoch as well."""
    return all_of(
        n.log_stream[a].eq(n.log_stream[b]),
        any_of(n.log_stream[a].ne(0), n.log_epoch[a].eq(n.log_epoch[b])),
    )


PROPERTIES = (
    Property(
        "P6",
        all_of(
            any_of(
                s.op_state.eq(source_before),
                all_of(source_before.in_(RUNNABLE, LIVE_IMPORT), s.op_state.eq(LIVE_EXPORT)),
                all_of(source_before.eq(LIVE_EXPORT), s.op_state.eq(PAUSED_EXPORT)),
                all_of(source_before.eq(PAUSED_EXPORT), s.op_state.eq(POST_EXPORT)),
                all_of(
                    source_before.in_(LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT),
                    s.op_state.eq(RUNNABLE),
                ),
            ),
            any_of(
                d.op_state.eq(destination_before),
                all_of(destination_before.eq(UNINITIALIZED), d.op_state.eq(MEMORY_IMPORT)),
                all_of(destination_before.eq(MEMORY_IMPORT), d.op_state.eq(STATE_IMPORT)),
                all_of(destination_before.eq(STATE_IMPORT), d.op_state.eq(POST_IMPORT)),
                all_of(destination_before.eq(POST_IMPORT), d.op_state.eq(LIVE_IMPORT)),
                all_of(destination_before.in_(POST_IMPORT, LIVE_IMPORT), d.op_state.eq(RUNNABLE)),
                all_of(
                    destination_before.in_(
                        UNINITIALIZED, MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT, FAILED_IMPORT
                    ),
                    d.op_state.eq(FAILED_IMPORT),
                ),
            ),
        ),
        "OP_STATE moves only along the transitions of its table.",
        "leaf",
        "OP_STATE permission table; TDH.EXPORT and TDH.IMPORT leaves",
        guards=(
            ("export_pause", "op_state"),
            ("import_state_td", "op_state"),
            ("import_commit", "op_state"),
        ),
        witness=all_of(source_before.eq(PAUSED_EXPORT), s.op_state.eq(POST_EXPORT)),
    ),
    Property(
        "P7",
        all_of(
            implies(
                source_began,
                all_of(
                    s.op_state.eq(LIVE_EXPORT),
                    s.mig_epoch.eq(0),
                    s.total_mb_count.eq(1),
                    s.dirty_count.eq(0),
                    s.dirty_pages.eq(0),
                    not_(s.key_set),
                    forall(
                        {"i": STREAM},
                        lambda i: all_of(
                            not_(s.unfinished[i]),
                            s.next_mb_counter[i].eq(choose(i.eq(0), 1, 0)),
                        ),
                        lambda i: (s.unfinished[i], s.next_mb_counter[i]),
                    ),
                ),
            ),
            implies(
                destination_began,
                all_of(
                    d.op_state.eq(MEMORY_IMPORT),
                    d.mig_epoch.eq(0),
                    d.total_mb_count.eq(1),
                    not_(d.key_set),
                    forall(
                        {"i": STREAM},
                        lambda i: all_of(
                            not_(d.unfinished[i]),
                            d.expected_mb_counter[i].eq(choose(i.eq(0), 1, 0)),
                        ),
                        lambda i: (d.unfinished[i], d.expected_mb_counter[i]),
                    ),
                ),
            ),
        ),
        "A session begins in epoch 0: one bundle, no dirty page, unused streams, no key left.",
        "leaf",
        "TDH.EXPORT.STATE.IMMUTABLE, TDH.IMPORT.STATE.IMMUTABLE",
        guards=(("export_state_immutable", "mig_count"),),
        witness=all_of(source_began, s.export_count.gt(1)),
    ),
    Property(
        "P8",
        implies(
            _in_order,
            forall(
                {"a": MESSAGE, "b": MESSAGE},
                lambda a, b: implies(
                    all_of(
                        a.lt(b),
                        _in_log(a),
                        begun[b],
                        n.log_stream[a].eq(n.log_stream[b]),
                        n.log_epoch[a].eq(n.log_epoch[b]),
                        n.log_epoch[a].eq(d.mig_epoch),
                    ),
                    begun[a],
                ),
                lambda a, b: (begun[a], begun[b]),
            ),
        ),
        "Within an epoch the bundles of a stream are accepted in their order, and without a gap.",
        "leaf",
        "MB_COUNTER of the MBMD, NEXT_MB_COUNTER and EXPECTED_MB_COUNTER",
        guards=(("import_mem_begin", "mb_counter"), ("import_state_vp", "mb_counter")),
        witness=all_of(_in_order, begun[1], begun[2]),
    ),
)


def _of_log(body: Callable[[Bound], Node]) -> Node:
    """For every bundle of the log with a counter of its own."""
    return forall(
        {"m": MESSAGE},
        lambda m: implies(_in_log(m), body(m)),
        lambda m: (n.log_counter[m], n.log_kind[m], begun[m]),
    )


LEMMAS = (
    Property(
        "source_counters",
        all_of(
            forall(
                {"i": STREAM},
                lambda i: all_of(
                    s.next_mb_counter[i].ge(0),
                    d.expected_mb_counter[i].ge(0),
                    implies(all_of(n.observed, i.eq(0)), s.next_mb_counter[i].ge(1)),
                    implies(
                        all_of(
                            n.observed,
                            _in_order,
                            any_of(i.ne(0), s.mig_epoch.eq(d.mig_epoch)),
                        ),
                        d.expected_mb_counter[i].le(s.next_mb_counter[i]),
                    ),
                ),
                lambda i: (s.next_mb_counter[i], d.expected_mb_counter[i]),
            ),
            _of_log(
                lambda m: all_of(
                    n.log_stream[m].ge(0),
                    n.log_counter[m].ge(0),
                    implies(n.log_stream[m].eq(0), n.log_counter[m].ge(1)),
                    implies(
                        all_of(
                            n.observed,
                            any_of(n.log_stream[m].ne(0), n.log_epoch[m].eq(s.mig_epoch)),
                        ),
                        n.log_counter[m].lt(s.next_mb_counter[n.log_stream[m]]),
                    ),
                )
            ),
        ),
        "The next counter of a stream is above those that were used.",
        "lemma",
    ),
    Property(
        "counters_rise",
        forall(
            {"a": MESSAGE, "b": MESSAGE},
            lambda a, b: implies(
                all_of(a.lt(b), _in_log(a), _in_log(b), _one_counter(a, b)),
                n.log_counter[a].lt(n.log_counter[b]),
            ),
            lambda a, b: (n.log_counter[a], n.log_counter[b]),
        ),
        "Counters rise along the log.",
        "lemma",
    ),
    Property(
        "begun",
        all_of(
            forall(
                {"m": MESSAGE},
                lambda m: all_of(
                    implies(begun[m], _in_log(m)),
                    implies(d.op_state.eq(UNINITIALIZED), not_(begun[m])),
                    implies(all_of(_in_order, begun[m]), n.log_epoch[m].le(d.mig_epoch)),
                ),
                lambda m: (begun[m],),
            ),
            _of_log(
                lambda m: implies(
                    all_of(_in_order, n.log_epoch[m].eq(d.mig_epoch)),
                    begun[m].eq(n.log_counter[m].lt(d.expected_mb_counter[n.log_stream[m]])),
                )
            ),
            _of_log(
                lambda m: implies(
                    all_of(
                        _in_order,
                        n.log_stream[m].ne(0),
                        n.log_epoch[m].gt(d.mig_epoch),
                    ),
                    d.expected_mb_counter[n.log_stream[m]].le(n.log_counter[m]),
                )
            ),
        ),
        "The bundles of this epoch that an import has begun with are those below the counter.",
        "lemma",
    ),
)

ORDER = superpose(
    LEAF,
    "order",
    variables=(source_before, destination_before, source_began, destination_began, begun),
    additions=_additions(),
    steps=(),
    properties=PROPERTIES + LEMMAS,
)
