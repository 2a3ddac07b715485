"""What is claimed of the leaf-level model, and the lemmas that make the claims inductive.

Order is stated by what has happened: "A before B" holds if, in every state, B having happened
implies that A
has.  Ids P1..P50 are the properties of the TDX migration threat model; L1.. are the ordering rules
of the
leaves that have no such id; the lemmas say what the others rest on.
"""

from __future__ import annotations

from tdxmig_model.expr import Goal, Node, Property, all_of, any_of, forall, implies, not_
from tdxmig_model.model import destination as d
from tdxmig_model.model import network as n
from tdxmig_model.model import source_state as s
from tdxmig_model.model.words import (
    EPOCH_TOKEN,
    FAILED_IMPORT,
    IMMUTABLE_TD_STATE,
    LIVE_EXPORT,
    LIVE_IMPORT,
    MEM,
    MEMORY_IMPORT,
    MESSAGE,
    MUTABLE_TD_STATE,
    MUTABLE_VCPU_STATE,
    PAGE,
    PAUSED_EXPORT,
    POST_EXPORT,
    RUNNABLE,
    START_EPOCH,
    STATE_IMPORT,
    STREAM,
    UNINITIALIZED,
    VCPU,
)


def _every_bundle(body: object) -> Node:
    """For every bundle of the log."""
    assert callable(body)
    return forall(
        {"m": MESSAGE},
        lambda m: implies(all_of(m.ge(0), m.lt(n.log_length)), body(m)),
        lambda m: (n.log_kind[m],),
    )


def _every_accepted(body: object) -> Node:
    """For every bundle that the destination imported."""
    assert callable(body)
    return forall(
        {"m": MESSAGE},
        lambda m: implies(d.accepted[m], body(m)),
        lambda m: (d.accepted[m],),
    )


_owns = d.op_state.in_(*d.OWNING)
_after_start = d.op_state.in_(*d.AFTER_START)
_source_runs = any_of(
    s.op_state.in_(RUNNABLE, LIVE_EXPORT, LIVE_IMPORT),
    s.refcount.gt(0),
    s.refcount_previous.gt(0),
)
_in_session = d.op_state.in_(MEMORY_IMPORT, STATE_IMPORT, *d.AFTER_START)

PROPERTIES = (
    Property(
        "L1",
        all_of(
            _every_bundle(
                lambda m: implies(
                    n.log_kind[m].ne(IMMUTABLE_TD_STATE),
                    all_of(m.gt(0), n.log_kind[0].eq(IMMUTABLE_TD_STATE)),
                )
            ),
            _every_accepted(lambda m: d.accepted[0]),
        ),
        "The immutable state is exported, and imported, before anything else of its session.",
        "leaf",
        "TDH.EXPORT.STATE.IMMUTABLE, TDH.IMPORT.STATE.IMMUTABLE",
        guards=(("import_mem_begin", "op_state"),),
        witness=all_of(n.log_length.gt(1), n.log_kind[1].eq(MEM), d.accepted[1]),
    ),
    Property(
        "P10",
        all_of(
            _every_bundle(
                lambda m: implies(
                    all_of(n.log_kind[m].eq(MEM), n.log_epoch[m].ge(1)),
                    all_of(
                        n.token_position[n.log_epoch[m]].lt(m),
                        n.log_kind[n.token_position[n.log_epoch[m]]].eq(EPOCH_TOKEN),
                        n.log_epoch[n.token_position[n.log_epoch[m]]].eq(n.log_epoch[m]),
                    ),
                )
            ),
            _every_accepted(
                lambda m: implies(
                    all_of(n.log_kind[m].eq(MEM), n.log_epoch[m].ge(1)),
                    d.accepted[n.token_position[n.log_epoch[m]]],
                )
            ),
        ),
        "From epoch 1 on, the epoch token is sent and accepted before the memory of its epoch.",
        "leaf",
        "TDH.EXPORT.TRACK, TDH.IMPORT.TRACK, TDH.IMPORT.MEM",
        guards=(("import_mem_begin", "mig_epoch"),),
        witness=all_of(n.log_kind[2].eq(MEM), n.log_epoch[2].eq(1), d.accepted[2]),
    ),
    Property(
        "L2",
        all_of(
            forall(
                {"a": MESSAGE, "b": MESSAGE},
                lambda a, b: implies(
                    all_of(
                        a.ge(0),
                        a.lt(b),
                        b.lt(n.log_length),
                        n.log_kind[a].eq(EPOCH_TOKEN),
                        n.log_epoch[a].eq(START_EPOCH),
                    ),
                    all_of(n.log_kind[b].eq(MEM), n.log_epoch[b].eq(START_EPOCH)),
                ),
                lambda a, b: (n.log_kind[a], n.log_kind[b]),
            ),
        ),
        "After the start token nothing is sent in order any more.",
        "leaf",
        "TDH.EXPORT.TRACK (in-order done), TDH.EXPORT.MEM",
        guards=(("export_track", "epoch_overflow"), ("export_state_td", "op_state")),
        witness=all_of(n.started, n.log_length.gt(1), n.log_kind[n.log_length - 1].eq(MEM)),
    ),
    Property(
        "L3",
        all_of(
            _every_bundle(
                lambda m: implies(
                    n.log_kind[m].in_(MUTABLE_TD_STATE, MUTABLE_VCPU_STATE), n.session_paused
                )
            ),
            _every_accepted(lambda m: implies(n.log_kind[m].eq(MUTABLE_VCPU_STATE), d.td_imported)),
        ),
        "TD and vCPU state are exported only after the pause; "
        "no vCPU is imported before the TD state.",
        "leaf",
        "TDH.EXPORT.STATE.TD, TDH.EXPORT.STATE.VP, TDH.IMPORT.STATE.VP",
        guards=(
            ("export_state_td", "op_state"),
            ("export_state_vp", "op_state"),
            ("import_state_vp", "op_state"),
        ),
        witness=all_of(d.op_state.eq(STATE_IMPORT), d.migrated_vcpus.gt(0)),
    ),
    Property(
        "L4",
        implies(n.started, all_of(n.start_while_paused, n.start_dirty_pages.eq(0))),
        "The start token is issued only while paused and with no exported page dirty.",
        "leaf",
        "TDH.EXPORT.TRACK (in-order done), DIRTY_COUNT",
        guards=(("export_track_start", "dirty_count"), ("export_track_start", "paused")),
        witness=all_of(n.started, s.mig_count.gt(0)),
    ),
    Property(
        "P12",
        implies(_after_start, forall({"v": VCPU}, lambda v: d.vcpu_imported[v])),
        "The start token is accepted only after every vCPU has been imported.",
        "leaf",
        "TDH.IMPORT.TRACK, NUM_MIGRATED_VCPUS = NUM_VCPUS (the vCPU part of P12)",
        guards=(("import_track_start", "all_vcpus"),),
        witness=_after_start,
    ),
    Property(
        "P1",
        implies(n.used, not_(all_of(_source_runs, any_of(_owns, d.ran)))),
        "Never can both sides run the TD, nor one be inside while the other may enter.",
        "leaf",
        "TDH.VP.ENTER, TDH.EXPORT.PAUSE, TDH.EXPORT.ABORT",
        guards=(
            ("export_abort_with_token", "abort_token"),
            ("export_abort", "op_state"),
            ("export_pause", "no_vcpu_inside"),
        ),
        witness=all_of(_owns, d.ran),
    ),
    Property(
        "P2",
        implies(d.ran, all_of(_owns, n.used, not_(_source_runs))),
        "Once the destination has run the TD it keeps it, and the source never runs it again.",
        "leaf",
        "TDH.VP.ENTER, TDH.IMPORT.ABORT",
        guards=(("import_abort", "op_state"), ("destination_vp_enter", "op_state")),
        witness=d.ran,
    ),
    Property(
        "P50",
        implies(
            all_of(n.started, not_(all_of(n.observed, s.op_state.eq(POST_EXPORT)))),
            all_of(n.abort_token, d.op_state.eq(FAILED_IMPORT)),
        ),
        "After the start token the source gets the TD back only with an abort token, "
        "and then the destination has given it up for ever.",
        "leaf",
        "TDH.EXPORT.ABORT, TDH.IMPORT.ABORT",
        guards=(("export_abort_with_token", "abort_token"),),
        witness=all_of(n.started, s.op_state.eq(RUNNABLE)),
    ),
    Property(
        "L5",
        implies(_owns, all_of(n.started, d.accepted[n.token_position[START_EPOCH]])),
        "The import ends, and the TD may run, only after the start token was accepted.",
        "leaf",
        "TDH.IMPORT.END, TDH.IMPORT.COMMIT",
        guards=(("import_end", "op_state"), ("import_commit", "op_state")),
        witness=d.op_state.eq(RUNNABLE),
    ),
    Property(
        "L38",
        _every_accepted(lambda m: all_of(m.ge(0), m.lt(n.log_length))),
        "Nothing is accepted that the source did not send in this session.",
        "leaf",
        "MAC of the MBMD under the migration session key",
        guards=(
            ("import_state_immutable", "mbmd_mac"),
            ("import_track", "mbmd_mac"),
            ("import_track_start", "mbmd_mac"),
            ("import_state_td", "mbmd_mac"),
            ("import_state_vp", "mbmd_mac"),
        ),
        witness=all_of(d.op_state.eq(RUNNABLE), d.accepted[2]),
    ),
    Property(
        "P14",
        all_of(
            s.mig_count.eq(s.exported_pages),
            implies(
                s.op_state.in_(LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT),
                s.dirty_count.eq(s.dirty_pages),
            ),
        ),
        "MIG_COUNT is the number of exported pages, DIRTY_COUNT that of the dirty ones among them.",
        "leaf",
        "TDH.EXPORT.MEM, TDH.EXPORT.UNBLOCKW (the counting part of P14)",
        guards=(("export_state_immutable", "mig_count"),),
        witness=all_of(s.mig_count.gt(0), s.dirty_count.gt(0)),
    ),
)

LEMMAS = (
    Property(
        "session",
        all_of(
            implies(not_(n.used), all_of(n.log_length.eq(0), not_(n.observed), not_(n.started))),
            implies(n.used, n.log_length.ge(1)),
            implies(
                n.observed,
                all_of(n.used, s.op_state.in_(LIVE_EXPORT, PAUSED_EXPORT, POST_EXPORT)),
            ),
            n.log_length.ge(0),
            s.refcount.ge(0),
            s.refcount_previous.ge(0),
            implies(
                any_of(s.refcount.gt(0), s.refcount_previous.gt(0)),
                s.op_state.in_(RUNNABLE, LIVE_EXPORT, LIVE_IMPORT),
            ),
        ),
        "The log is empty until the observed session begins; it lasts while exporting.",
        "lemma",
    ),
    Property(
        "source_pages",
        forall(
            {"p": PAGE},
            lambda p: s.page[p].in_(*s.FIRST_TIME, *s.EXPORTED),
            lambda p: (s.page[p],),
        ),
        "Nothing in this model removes a page of the source, or blocks it for reading.",
        "lemma",
    ),
    Property(
        "epoch_range",
        all_of(
            s.mig_epoch.ge(0),
            s.mig_epoch.le(START_EPOCH),
            implies(s.op_state.in_(LIVE_EXPORT, PAUSED_EXPORT), s.mig_epoch.lt(START_EPOCH)),
            implies(s.op_state.eq(POST_EXPORT), s.mig_epoch.eq(START_EPOCH)),
            d.mig_epoch.ge(0),
            d.mig_epoch.le(START_EPOCH),
        ),
        "Only a source in POST_EXPORT is in the start epoch.",
        "lemma",
    ),
    Property(
        "log_shape",
        _every_bundle(
            lambda m: all_of(
                any_of(
                    all_of(m.eq(0), n.log_kind[m].eq(IMMUTABLE_TD_STATE)),
                    all_of(m.gt(0), n.log_kind[m].ne(IMMUTABLE_TD_STATE)),
                ),
                implies(m.eq(0), n.log_epoch[m].eq(0)),
            )
        ),
        "The log begins with the immutable state and holds it once.",
        "lemma",
    ),
    Property(
        "log_epochs",
        _every_bundle(
            lambda m: all_of(
                n.log_epoch[m].ge(0),
                n.log_epoch[m].le(START_EPOCH),
                implies(n.observed, n.log_epoch[m].le(s.mig_epoch)),
                implies(n.log_epoch[m].eq(START_EPOCH), n.started),
                implies(n.log_kind[m].eq(EPOCH_TOKEN), n.log_epoch[m].ge(1)),
            )
        ),
        "No bundle is of a later epoch than the source; the start token begins the start epoch.",
        "lemma",
    ),
    Property(
        "tokens",
        all_of(
            _every_bundle(
                lambda m: implies(
                    n.log_kind[m].eq(EPOCH_TOKEN), n.token_position[n.log_epoch[m]].eq(m)
                )
            ),
            implies(
                all_of(n.observed, s.mig_epoch.ge(1)),
                all_of(
                    n.token_position[s.mig_epoch].ge(0),
                    n.token_position[s.mig_epoch].lt(n.log_length),
                    n.log_kind[n.token_position[s.mig_epoch]].eq(EPOCH_TOKEN),
                    n.log_epoch[n.token_position[s.mig_epoch]].eq(s.mig_epoch),
                ),
            ),
        ),
        "Each epoch has one token, and the current epoch's token is in the log.",
        "lemma",
    ),
    Property(
        "started",
        all_of(
            implies(
                n.started,
                any_of(
                    all_of(n.observed, s.op_state.eq(POST_EXPORT)),
                    all_of(not_(n.observed), n.abort_token),
                ),
            ),
            implies(all_of(n.observed, s.op_state.eq(POST_EXPORT)), n.started),
            implies(n.abort_token, d.op_state.eq(FAILED_IMPORT)),
            implies(
                all_of(n.observed, s.op_state.in_(PAUSED_EXPORT, POST_EXPORT)), n.session_paused
            ),
        ),
        "After the start token the source waits in POST_EXPORT, or was given an abort token.",
        "lemma",
    ),
    Property(
        "accepted",
        all_of(
            implies(
                d.op_state.eq(UNINITIALIZED), forall({"m": MESSAGE}, lambda m: not_(d.accepted[m]))
            ),
            implies(_in_session, d.accepted[0]),
            implies(
                all_of(_in_session, d.mig_epoch.ge(1)),
                all_of(
                    n.token_position[d.mig_epoch].ge(0),
                    n.token_position[d.mig_epoch].lt(n.log_length),
                    d.accepted[n.token_position[d.mig_epoch]],
                    n.log_epoch[n.token_position[d.mig_epoch]].eq(d.mig_epoch),
                    n.log_kind[n.token_position[d.mig_epoch]].eq(EPOCH_TOKEN),
                ),
            ),
            implies(all_of(_in_session, n.observed), d.mig_epoch.le(s.mig_epoch)),
            implies(_after_start, all_of(n.started, d.mig_epoch.eq(START_EPOCH))),
            implies(d.op_state.in_(MEMORY_IMPORT, STATE_IMPORT), d.mig_epoch.lt(START_EPOCH)),
        ),
        "What was imported is in the log; the destination's epoch is that of a token it accepted.",
        "lemma",
    ),
    Property(
        "destination_bundles",
        forall(
            {"i": STREAM},
            lambda i: implies(
                all_of(_in_session, d.unfinished[i]),
                all_of(
                    d.unfinished_bundle[i].ge(0),
                    d.unfinished_bundle[i].lt(n.log_length),
                    n.log_kind[d.unfinished_bundle[i]].eq(MEM),
                    n.log_epoch[d.unfinished_bundle[i]].le(d.mig_epoch),
                    implies(
                        n.log_epoch[d.unfinished_bundle[i]].ge(1),
                        d.accepted[n.token_position[n.log_epoch[d.unfinished_bundle[i]]]],
                    ),
                ),
            ),
            lambda i: (d.unfinished[i],),
        ),
        "An import that is under way is of a memory bundle in the log, of an epoch already begun.",
        "lemma",
    ),
    Property(
        "vcpus",
        all_of(
            d.migrated_vcpus.eq(d.imported_vcpus),
            implies(d.op_state.in_(UNINITIALIZED, MEMORY_IMPORT), d.migrated_vcpus.eq(0)),
            implies(d.op_state.in_(STATE_IMPORT, *d.AFTER_START), d.td_imported),
            d.op_state.in_(*d.POSSIBLE),
        ),
        "NUM_MIGRATED_VCPUS counts the imported vCPUs, and none comes before the TD state.",
        "lemma",
    ),
)

GOALS = (
    Goal(
        "cold",
        all_of(d.op_state.eq(RUNNABLE), d.ran, n.log_epoch[n.log_length - 1].eq(START_EPOCH)),
        "A migration completes and the destination runs.",
    ),
    Goal(
        "abort_before_start_token",
        all_of(n.used, not_(n.started), s.op_state.eq(RUNNABLE)),
        "The source takes the TD back before the start token.",
    ),
    Goal(
        "abort_after_start_token",
        all_of(n.started, s.op_state.eq(RUNNABLE), d.op_state.eq(FAILED_IMPORT)),
        "The source takes the TD back after the start token, with an abort token.",
    ),
    Goal(
        "second_session",
        all_of(n.used, not_(n.observed), s.op_state.eq(LIVE_EXPORT)),
        "After an abort another session begins.",
    ),
    Goal(
        "re_export",
        all_of(s.mig_epoch.eq(1), s.dirty_count.gt(0)),
        "A page becomes dirty in a later epoch.",
    ),
)
