"""What is claimed of the locks of the source, and the lemmas that make the claims inductive."""

from __future__ import annotations

from tdxmig_model.expr import (
    Goal,
    Literal,
    MapVariable,
    Node,
    Property,
    System,
    all_of,
    any_of,
    forall,
    implies,
    not_,
)
from tdxmig_model.model import locks as s
from tdxmig_model.model.words import ALL_PROFILES, PAUSED_EXPORT, POST_EXPORT


def _every(body: object) -> Node:
    """For every processor."""
    assert callable(body)
    return forall({"p": s.PROCESSOR}, body, lambda p: (s.stage[p],))


def _pairs(body: object) -> Node:
    """For every two different processors."""
    assert callable(body)
    return forall(
        {"p": s.PROCESSOR, "q": s.PROCESSOR},
        lambda p, q: implies(p.ne(q), body(p, q)),
        lambda p, q: (s.stage[p], s.stage[q]),
    )


def _excludes(holds: MapVariable) -> Node:
    return _pairs(
        lambda p, q: implies(holds[p].eq(s.EXCLUSIVE), holds[q].eq(s.NONE)),
    )


def _wrongly_held(
    p: Node, holds: MapVariable, alone: tuple[Literal, ...], *before: Literal
) -> Node:
    """What is never so: held too early, or less strictly than the table says.

    A call that is DONE may hold nothing of what its leaf shares.
    """
    early = s.stage[p].in_(*before)
    return any_of(
        all_of(early, holds[p].ne(s.NONE)),
        all_of(not_(early), s.leaf[p].in_(*alone), holds[p].ne(s.EXCLUSIVE)),
        all_of(not_(s.stage[p].in_(*before, s.DONE)), holds[p].eq(s.NONE)),
    )


def _with_link(p: Node) -> Node:
    return s.stage[p].in_(s.HAS_LINK, s.HAS_ENTRY, s.COUNTING)


_NO_LINK = (s.EXPORT_PAUSE, s.EXPORT_UNBLOCKW, s.VP_ENTER)
_acting = (s.CHECKED, s.HAS_MIG, s.HAS_LINK, s.HAS_ENTRY, s.COUNTING)

PROPERTIES = (
    Property(
        "P43",
        _every(
            lambda p: all_of(
                implies(s.stage[p].in_(*_acting), s.op_state.eq(s.seen_op_state[p])),
                implies(
                    s.stage[p].in_(s.HAS_MIG, s.HAS_LINK, s.HAS_ENTRY, s.COUNTING),
                    s.mig_epoch.eq(s.seen_epoch[p]),
                ),
            )
        ),
        "OP_STATE and MIG_EPOCH do not change between a leaf's check and its last effect.",
        "leaf",
        "OP_STATE lock and MIG lock; TDH.EXPORT.MEM, TDH.EXPORT.TRACK, TDH.EXPORT.PAUSE",
        guards=(
            ("take_op_state_exclusive", "no_shared_holder"),
            ("take_op_state_shared", "no_exclusive_holder"),
            ("take_tdr_exclusive", "no_shared_holder"),
        ),
        witness=all_of(
            s.counted.gt(1),
            not_(
                forall({"p": s.PROCESSOR}, lambda p: s.stage[p].ne(s.HAS_LINK)),
            ),
        ),
    ),
    Property(
        "P44",
        all_of(
            _excludes(s.holds_tdr),
            _excludes(s.holds_op_state),
            _excludes(s.holds_mig),
            _pairs(
                lambda p, q: implies(
                    all_of(s.has_link[p], s.has_link[q]), s.link_of[p].ne(s.link_of[q])
                )
            ),
            _pairs(
                lambda p, q: implies(
                    all_of(s.has_entry[p], s.has_entry[q]), s.entry_of[p].ne(s.entry_of[q])
                )
            ),
            _every(
                lambda p: not_(
                    any_of(
                        all_of(s.holds_op_state[p].ne(s.NONE), s.holds_tdr[p].eq(s.NONE)),
                        all_of(s.holds_mig[p].ne(s.NONE), s.holds_op_state[p].eq(s.NONE)),
                        all_of(s.has_link[p], s.holds_mig[p].eq(s.NONE)),
                        all_of(s.has_entry[p], not_(s.has_link[p])),
                        all_of(s.stage[p].eq(s.IDLE), s.holds_tdr[p].ne(s.NONE)),
                    )
                )
            ),
            s.total_mb.eq(s.counted),
        ),
        "A lock is held only with those before it, exclusively by one alone, and by no call "
        "that has ended; no addition to TOTAL_MB_COUNT is lost.",
        "leaf",
        "locks of the TDX module; TDH.EXPORT.MEM, TDH.EXPORT.TRACK",
        guards=(
            ("take_tdr_shared", "no_exclusive_holder"),
            ("take_tdr_exclusive", "no_shared_holder"),
            ("take_tdr_exclusive", "no_exclusive_holder"),
            ("take_op_state_shared", "no_exclusive_holder"),
            ("take_op_state_exclusive", "no_shared_holder"),
            ("take_op_state_exclusive", "no_exclusive_holder"),
            ("take_mig_shared", "order"),
            ("take_link", "order"),
            ("take_link", "link_free"),
            ("lock_entry", "order"),
            ("release", "order"),
            ("add_to_total", "atomic"),
        ),
        witness=all_of(s.total_mb.gt(0), s.op_state.eq(PAUSED_EXPORT)),
    ),
    Property(
        "L39",
        _every(lambda p: implies(s.stage[p].eq(s.GUEST), s.op_state.in_(*s.MAY_RUN))),
        "A vCPU is inside the guest only while the TD may run.",
        "leaf",
        "TDH.VP.ENTER, TDH.EXPORT.PAUSE",
        guards=(
            ("take_tdr_exclusive", "no_shared_holder"),
            ("take_op_state_shared", "op_state"),
        ),
        witness=not_(forall({"p": s.PROCESSOR}, lambda p: s.stage[p].ne(s.GUEST))),
    ),
    Property(
        "L50",
        _every(lambda p: implies(s.has_entry[p], s.version[s.entry_of[p]].eq(s.seen_version[p]))),
        "A page does not change between the commit of its entry and its encryption.",
        "leaf",
        "TDH.EXPORT.MEM, TDH.EXPORT.UNBLOCKW, the lock of a Secure EPT entry",
        guards=(("unblock_page", "entry_free"),),
        witness=not_(forall({"p": s.PROCESSOR}, lambda p: not_(s.has_entry[p]))),
    ),
)


LEMMAS = (
    Property(
        "lock_stages",
        _every(
            lambda p: all_of(
                not_(_wrongly_held(p, s.holds_tdr, s.TDR_EXCLUSIVE, s.IDLE)),
                not_(
                    any_of(
                        all_of(
                            not_(s.leaf[p].in_(*s.TDR_EXCLUSIVE)),
                            _wrongly_held(
                                p,
                                s.holds_op_state,
                                s.OP_STATE_EXCLUSIVE,
                                s.IDLE,
                                s.HAS_TDR,
                                s.GUEST,
                            ),
                        ),
                        all_of(
                            s.stage[p].in_(s.IDLE, s.HAS_TDR, s.GUEST),
                            s.holds_op_state[p].ne(s.NONE),
                        ),
                    )
                ),
                any_of(
                    s.stage[p].eq(s.DONE),
                    not_(
                        _wrongly_held(
                            p, s.holds_mig, s.MIG_EXCLUSIVE, s.IDLE, s.HAS_TDR, s.CHECKED, s.GUEST
                        )
                    ),
                ),
                not_(
                    any_of(
                        all_of(_with_link(p), not_(s.has_link[p])),
                        all_of(_with_link(p), s.leaf[p].in_(*_NO_LINK)),
                        all_of(not_(_with_link(p)), s.stage[p].ne(s.DONE), s.has_link[p]),
                        all_of(s.stage[p].eq(s.HAS_ENTRY), not_(s.has_entry[p])),
                        all_of(s.stage[p].ne(s.HAS_ENTRY), s.has_entry[p]),
                        all_of(
                            s.stage[p].eq(s.CHECKED),
                            s.leaf[p].eq(s.VP_ENTER),
                            not_(s.op_state.in_(*s.MAY_RUN)),
                        ),
                    )
                ),
            )
        ),
        "What a call holds is what its leaf takes up to where it has come.",
        "lemma",
    ),
    Property(
        "lock_leaves",
        forall(
            {"p": s.PROCESSOR},
            lambda p: not_(
                any_of(
                    all_of(s.stage[p].eq(s.IDLE), s.leaf[p].ne(s.EXPORT_MEM)),
                    all_of(s.stage[p].eq(s.GUEST), s.leaf[p].ne(s.VP_ENTER)),
                    all_of(
                        s.stage[p].in_(s.HAS_MIG, s.HAS_LINK, s.HAS_ENTRY, s.COUNTING),
                        not_(s.leaf[p].in_(*s.MIG_SHARED, *s.MIG_EXCLUSIVE)),
                    ),
                    all_of(s.holds_mig[p].ne(s.NONE), s.leaf[p].in_(*s.TDR_EXCLUSIVE)),
                    all_of(s.holds_mig[p].eq(s.EXCLUSIVE), s.holds_op_state[p].ne(s.EXCLUSIVE)),
                )
            ),
            lambda p: (s.stage[p], s.leaf[p]),
        ),
        "A call goes only where its leaf goes, and has MIG alone only with OP_STATE alone.",
        "lemma",
    ),
    Property(
        "lock_bits",
        _every(
            lambda p: all_of(
                implies(s.holds_tdr[p].eq(s.EXCLUSIVE), s.tdr_alone),
                implies(s.holds_op_state[p].eq(s.EXCLUSIVE), s.op_state_alone),
                implies(s.holds_mig[p].eq(s.EXCLUSIVE), s.mig_alone),
                implies(s.has_link[p], s.link_locked[s.link_of[p]]),
                implies(
                    s.has_entry[p],
                    all_of(
                        s.entry_locked[s.entry_of[p]],
                        not_(s.writable[s.entry_of[p]]),
                        s.exported[s.entry_of[p]],
                    ),
                ),
            )
        ),
        "A lock bit is set while its lock is held, and a locked page is not writable.",
        "lemma",
    ),
    Property(
        "lock_op_states",
        s.op_state.in_(*s.MAY_RUN, PAUSED_EXPORT, POST_EXPORT),
        "The TD is in an export, or has taken itself back.",
        "lemma",
    ),
)


GOALS = (
    Goal(
        "two_bundles_at_once",
        not_(
            forall(
                {"p": s.PROCESSOR, "q": s.PROCESSOR},
                lambda p, q: not_(
                    all_of(p.ne(q), s.stage[p].eq(s.COUNTING), s.stage[q].eq(s.COUNTING))
                ),
            )
        ),
        "Two memory bundles are counted at the same time.",
    ),
    Goal("handed_over", s.op_state.eq(POST_EXPORT), "The start token is made."),
)

LOCKS = System(
    name="locks",
    variables=s.VARIABLES,
    steps=s.STEPS,
    properties=PROPERTIES + LEMMAS,
    goals=GOALS,
    assumptions=(
        "the model of the locks begins in a live export, with every page write-blocked and tracked",
        "a lock is taken or refused in one instruction; between two rows anything may happen",
    ),
    profiles=ALL_PROFILES,
)
