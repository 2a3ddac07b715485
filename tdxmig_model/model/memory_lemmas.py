"""The lemmas that make the claims about page contents inductive, of the source and then of the
destination.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    Property,
    all_of,
    any_of,
    forall,
    implies,
    not_,
)
from tdxmig_model.model import destination as d
from tdxmig_model.model import memory_state as x
from tdxmig_model.model import network as n
from tdxmig_model.model import source_state as s
from tdxmig_model.model.memory_formulas import (
    after_start,
    before_start,
    blackout,
    bundles,
    copy_was_sent,
    entries,
    entry_is_of,
    exported_clean,
    given_up,
    imports,
    in_order,
    in_session,
    is_current,
    is_entry,
    last,
    pages,
    sent,
    streams,
)
from tdxmig_model.model.words import (
    BLOCKEDW,
    CANCEL,
    ENTRY,
    EPOCH_TOKEN,
    EXPORTED_BLOCKEDW,
    EXPORTED_DIRTY_BLOCKEDW,
    FREE,
    LIVE_EXPORT,
    MAPPED,
    MEM,
    MEMORY_IMPORT,
    MESSAGE,
    MIGRATE,
    MUTABLE_TD_STATE,
    MUTABLE_VCPU_STATE,
    NOP,
    PENDING,
    PENDING_BLOCKEDW,
    PENDING_EXPORTED_DIRTY_BLOCKEDW,
    REMOVED,
    START_EPOCH,
    STATE_IMPORT,
    STREAM,
    UNINITIALIZED,
)

SOURCE_LEMMAS = (
    Property(
        "tlb",
        all_of(
            s.bw_epoch.le(s.td_epoch),
            implies(blackout, s.bw_epoch.lt(s.td_epoch)),
            pages(lambda p: x.blocked_at[p].le(s.bw_epoch), lambda p: x.blocked_at[p]),
        ),
        "BW_EPOCH is the newest TD_EPOCH in which any page was write-blocked.",
        "lemma",
    ),
    Property(
        "write_blocked",
        pages(
            lambda p: all_of(
                implies(s.page[p].in_(BLOCKEDW, PENDING_BLOCKEDW), not_(x.writable[p])),
                implies(
                    all_of(
                        s.op_state.eq(LIVE_EXPORT),
                        s.page[p].in_(
                            EXPORTED_BLOCKEDW,
                            EXPORTED_DIRTY_BLOCKEDW,
                            PENDING_EXPORTED_DIRTY_BLOCKEDW,
                        ),
                    ),
                    not_(x.writable[p]),
                ),
            ),
            lambda p: s.page[p],
        ),
        "A write-blocked entry has W = 0.",
        "lemma",
    ),
    Property(
        "resumed",
        implies(x.resumed_as_paused, all_of(s.refcount.eq(0), s.refcount_previous.eq(0))),
        "Nobody is in a TD that was resumed and not entered yet.",
        "lemma",
    ),
    Property(
        "making",
        forall(
            {"i": STREAM},
            lambda i: implies(
                all_of(n.observed, s.unfinished[i]),
                all_of(
                    s.unfinished_bundle[i].ge(0),
                    s.unfinished_bundle[i].lt(n.log_length),
                    n.log_kind[s.unfinished_bundle[i]].eq(MEM),
                    not_(n.log_complete[s.unfinished_bundle[i]]),
                    n.log_stream[s.unfinished_bundle[i]].eq(i),
                    n.log_epoch[s.unfinished_bundle[i]].eq(s.mig_epoch),
                ),
            ),
            lambda i: (s.unfinished[i],),
        ),
        "An EXPORT.MEM that is under way makes a memory bundle of its stream, of this epoch.",
        "lemma",
    ),
    Property(
        "sent",
        pages(
            lambda p: all_of(
                implies(not_(n.used), x.sent_bundle[p].lt(0)),
                implies(
                    x.sent_bundle[p].ge(0),
                    all_of(entry_is_of(*sent(p), p), n.log_epoch[x.sent_bundle[p]].lt(START_EPOCH)),
                ),
            ),
            lambda p: x.sent_bundle[p],
        ),
        "The newest in-order entry of a page is an entry of that page.",
        "lemma",
    ),
    Property(
        "sent_latest",
        entries(
            lambda m, k: implies(
                n.log_epoch[m].lt(START_EPOCH),
                all_of(
                    x.sent_bundle[x.entry_page[m, k]].ge(0),
                    n.log_epoch[m].le(n.log_epoch[x.sent_bundle[x.entry_page[m, k]]]),
                ),
            )
        ),
        "No in-order entry of a page is of a later epoch than its newest one.",
        "lemma",
    ),
    Property(
        "exported_was_sent",
        pages(
            lambda p: all_of(
                implies(before_start, s.page[p].in_(*s.EXPORTED).eq(copy_was_sent(p))),
                implies(all_of(given_up, copy_was_sent(p)), s.page[p].in_(*s.EXPORTED)),
            ),
            lambda p: s.page[p],
            lambda p: x.sent_bundle[p],
        ),
        "The exported pages are those whose newest in-order entry carries them.",
        "lemma",
    ),
    Property(
        "sent_current",
        pages(
            lambda p: all_of(
                implies(all_of(before_start, exported_clean(p)), is_current(p)),
                implies(all_of(given_up, copy_was_sent(p)), is_current(p)),
            ),
            lambda p: s.page[p],
            lambda p: x.sent_bundle[p],
        ),
        "What was sent of a clean page is what it holds.",
        "lemma",
    ),
    Property(
        "late_entries",
        entries(
            lambda m, k: implies(
                n.log_epoch[m].eq(START_EPOCH),
                all_of(
                    x.entry_operation[m, k].eq(MIGRATE),
                    implies(
                        given_up,
                        all_of(
                            x.entry_version[m, k].eq(x.version[x.entry_page[m, k]]),
                            x.entry_pending[m, k].eq(
                                s.page[x.entry_page[m, k]].in_(*s.PENDING_STATES)
                            ),
                        ),
                    ),
                ),
            )
        ),
        "What is sent after the start token is what the paused pages hold.",
        "lemma",
    ),
    Property(
        "totals",
        all_of(
            implies(n.observed, s.total_mb_count.eq(n.log_length)),
            bundles(
                lambda m: all_of(
                    implies(n.log_kind[m].eq(EPOCH_TOKEN), n.log_total[m].eq(m + 1)),
                    implies(n.log_kind[m].eq(MEM), x.counted[m]),
                )
            ),
        ),
        "A token counts every bundle before it, and itself.",
        "lemma",
    ),
    Property(
        "epochs_rise",
        forall(
            {"a": MESSAGE, "b": MESSAGE},
            lambda a, b: implies(
                all_of(a.ge(0), a.lt(b), b.lt(n.log_length)),
                all_of(
                    n.log_epoch[a].le(n.log_epoch[b]),
                    implies(n.log_kind[b].eq(EPOCH_TOKEN), n.log_epoch[a].lt(n.log_epoch[b])),
                ),
            ),
            lambda a, b: (n.log_epoch[a], n.log_epoch[b]),
        ),
        "Epochs never fall along the log, and a token is of a later epoch than all before it.",
        "lemma",
    ),
)

DESTINATION_LEMMAS = (
    Property(
        "taking",
        all_of(
            streams(
                lambda i, b: all_of(
                    n.log_stream[b].eq(i),
                    x.begun[b],
                    x.progress[i].le(x.log_entries[b]),
                    implies(in_order, all_of(not_(d.accepted[b]), n.log_epoch[b].eq(d.mig_epoch))),
                )
            ),
            forall(
                {"i": STREAM, "k": ENTRY},
                lambda i, k: implies(
                    all_of(
                        in_session,
                        d.unfinished[i],
                        k.ge(0),
                        k.lt(x.progress[i]),
                        n.log_epoch[d.unfinished_bundle[i]].lt(START_EPOCH),
                        x.entry_operation[d.unfinished_bundle[i], k].ne(NOP),
                    ),
                    x.imported[d.unfinished_bundle[i], k],
                ),
                lambda i, k: (
                    x.imported[d.unfinished_bundle[i], k],
                    x.entry_operation[d.unfinished_bundle[i], k],
                ),
            ),
        ),
        "What comes before the next entry of an import that is under way has been imported.",
        "lemma",
    ),
    Property(
        "imported",
        all_of(
            imports(
                lambda m, k: all_of(
                    is_entry(m, k),
                    n.log_epoch[m].le(d.mig_epoch),
                    x.last_bundle[x.entry_page[m, k]].ge(0),
                )
            ),
            implies(
                d.op_state.eq(UNINITIALIZED),
                forall(
                    {"m": MESSAGE, "k": ENTRY},
                    lambda m, k: not_(x.imported[m, k]),
                    lambda m, k: (x.imported[m, k],),
                ),
            ),
            forall(
                {"m": MESSAGE},
                lambda m: all_of(
                    implies(x.begun[m], m.lt(n.log_length)),
                    implies(d.op_state.eq(UNINITIALIZED), not_(x.begun[m])),
                    implies(all_of(in_session, x.begun[m]), n.log_epoch[m].le(d.mig_epoch)),
                ),
                lambda m: (x.begun[m],),
            ),
        ),
        "What was imported is an entry of the log, of an epoch that has begun.",
        "lemma",
    ),
    Property(
        "accepted_entries",
        all_of(
            forall(
                {"m": MESSAGE, "k": ENTRY},
                lambda m, k: implies(
                    all_of(
                        in_session,
                        d.accepted[m],
                        is_entry(m, k),
                        n.log_epoch[m].lt(START_EPOCH),
                    ),
                    x.imported[m, k],
                ),
                lambda m, k: (x.imported[m, k], x.entry_operation[m, k]),
            ),
            bundles(
                lambda m: implies(
                    all_of(in_session, d.accepted[m]),
                    all_of(
                        implies(n.log_kind[m].eq(MEM), n.log_complete[m]),
                        n.log_epoch[m].le(d.mig_epoch),
                    ),
                )
            ),
        ),
        "Every entry of an accepted in-order bundle has been imported.",
        "lemma",
    ),
    Property(
        "last",
        pages(
            lambda p: all_of(
                implies(in_session, d.page[p].eq(FREE).eq(x.last_bundle[p].lt(0))),
                implies(
                    all_of(in_session, x.last_bundle[p].ge(0)),
                    all_of(x.imported[last(p)], x.entry_page[last(p)].eq(p)),
                ),
                implies(
                    d.op_state.eq(UNINITIALIZED),
                    all_of(d.page[p].eq(FREE), x.last_bundle[p].lt(0)),
                ),
            ),
            lambda p: d.page[p],
            lambda p: x.last_bundle[p],
        ),
        "A page that is not free was imported last by an entry of its own.",
        "lemma",
    ),
    Property(
        "held",
        pages(
            lambda p: all_of(
                d.page[p].in_(FREE, REMOVED, MAPPED, PENDING),
                implies(
                    in_session,
                    all_of(
                        implies(
                            d.page[p].eq(MAPPED),
                            all_of(
                                x.entry_operation[last(p)].ne(CANCEL),
                                x.held_version[p].eq(x.entry_version[last(p)]),
                                not_(x.entry_pending[last(p)]),
                            ),
                        ),
                        implies(
                            d.page[p].eq(PENDING),
                            all_of(
                                x.entry_operation[last(p)].ne(CANCEL),
                                x.entry_pending[last(p)],
                            ),
                        ),
                        implies(d.page[p].eq(REMOVED), x.entry_operation[last(p)].eq(CANCEL)),
                        implies(
                            d.page[p].ne(FREE), d.page_epoch[p].eq(n.log_epoch[x.last_bundle[p]])
                        ),
                    ),
                ),
            ),
            lambda p: d.page[p],
        ),
        "A page holds what its last entry carried, and its epoch is that entry's.",
        "lemma",
    ),
    Property(
        "counters",
        bundles(
            lambda m: implies(
                all_of(
                    in_order,
                    any_of(d.accepted[m], x.begun[m]),
                    n.log_epoch[m].eq(d.mig_epoch),
                    n.log_kind[m].in_(MEM, MUTABLE_TD_STATE, MUTABLE_VCPU_STATE),
                ),
                n.log_counter[m].lt(d.expected_mb_counter[n.log_stream[m]]),
            )
        ),
        "What was taken of this epoch has a lower counter than the one that is expected.",
        "lemma",
    ),
    Property(
        "accepted_total",
        all_of(
            x.accepted_end.ge(0),
            forall(
                {"m": MESSAGE},
                lambda m: implies(d.accepted[m], m.lt(x.accepted_end)),
                lambda m: (d.accepted[m],),
            ),
            implies(in_order, all_of(x.accepted_end.gt(0), d.accepted[x.accepted_end - 1])),
            implies(
                d.op_state.eq(UNINITIALIZED),
                all_of(
                    x.accepted_end.eq(0),
                    forall(
                        {"e": MESSAGE},
                        lambda e: x.accepted_bundles.below(e).eq(0),
                        lambda e: (x.accepted_bundles.below(e),),
                    ),
                ),
            ),
            implies(
                in_order,
                forall(
                    {"e": MESSAGE},
                    lambda e: implies(
                        x.accepted_end.le(e), x.accepted_bundles.below(e).eq(d.total_mb_count)
                    ),
                    lambda e: (x.accepted_bundles.below(e), n.log_total[e]),
                ),
            ),
        ),
        "TOTAL_MB_COUNT of the destination is the number of accepted bundles.",
        "lemma",
    ),
    Property(
        "token_counts_all",
        forall(
            {"a": MESSAGE, "b": MESSAGE},
            lambda a, b: implies(
                all_of(
                    in_order,
                    a.lt(b),
                    b.lt(n.log_length),
                    n.log_kind[b].eq(EPOCH_TOKEN),
                    n.log_epoch[b].gt(d.mig_epoch),
                    n.log_total[b].eq(d.total_mb_count + 1),
                ),
                d.accepted[a],
            ),
            lambda a, b: (n.log_epoch[a], n.log_total[b]),
        ),
        "A token that can be accepted comes after accepted bundles alone.",
        "lemma",
    ),
    Property(
        "nothing_left_behind",
        bundles(
            lambda m: implies(all_of(in_session, n.log_epoch[m].lt(d.mig_epoch)), d.accepted[m])
        ),
        "Every bundle of an earlier epoch has been accepted.",
        "lemma",
    ),
    Property(
        "late",
        pages(
            lambda p: all_of(
                x.late_imports[p].ge(0),
                implies(
                    d.op_state.in_(UNINITIALIZED, MEMORY_IMPORT, STATE_IMPORT),
                    x.late_imports[p].eq(0),
                ),
                implies(
                    all_of(after_start, x.late_imports[p].ge(1)),
                    all_of(d.page[p].in_(MAPPED, PENDING), d.page_epoch[p].eq(d.mig_epoch)),
                ),
            ),
            lambda p: x.late_imports[p],
        ),
        "A page that came after the start token is there, and of the start epoch.",
        "lemma",
    ),
)

LEMMAS = SOURCE_LEMMAS + DESTINATION_LEMMAS
