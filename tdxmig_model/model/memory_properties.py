"""What is claimed of page contents, and the lemmas that make the claims inductive.

The order of the log carries the freshness proof: epochs never fall along it, an epoch token counts
every bundle before it, and a page is imported at most once in an epoch.  So what the destination
holds of a page when it takes the start token is the last copy that the source made.
"""

from __future__ import annotations

from collections.abc import Callable

from tdxmig_model.expr import (
    Bound,
    Node,
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
    PAGE,
    PAUSED_EXPORT,
    PENDING,
    PENDING_EXPORTED_BLOCKEDW,
    POST_EXPORT,
    POST_IMPORT,
    REMOVED,
    START_EPOCH,
    STATE_IMPORT,
    STREAM,
    UNINITIALIZED,
)

_in_order = d.op_state.in_(MEMORY_IMPORT, STATE_IMPORT)
_after_start = d.op_state.in_(*d.AFTER_START)
_in_session = d.op_state.in_(MEMORY_IMPORT, STATE_IMPORT, *d.AFTER_START)
_before_start = all_of(n.observed, s.op_state.in_(LIVE_EXPORT, PAUSED_EXPORT))
_blackout = s.op_state.in_(PAUSED_EXPORT, POST_EXPORT)
_given_up = all_of(n.observed, s.op_state.eq(POST_EXPORT))


def _pages(body: Callable[[Bound], Node], *triggers: Callable[[Bound], Node]) -> Node:
    """For every page."""
    return forall({"p": PAGE}, body, lambda p: tuple(t(p) for t in triggers))


def _bundles(body: Callable[[Bound], Node]) -> Node:
    """For every bundle of the log."""
    return forall(
        {"m": MESSAGE},
        lambda m: implies(all_of(m.ge(0), m.lt(n.log_length)), body(m)),
        lambda m: (n.log_kind[m], d.accepted[m]),
    )


def _streams(body: Callable[[Bound, Node], Node]) -> Node:
    """For every stream on which an import is under way in a session, with its bundle."""
    return forall(
        {"i": STREAM},
        lambda i: implies(all_of(_in_session, d.unfinished[i]), body(i, d.unfinished_bundle[i])),
        lambda i: (d.unfinished[i],),
    )


def _is_entry(m: Node, k: Node) -> Node:
    """Bundle m is a memory bundle, and k one of its entries that is no NOP."""
    return all_of(
        m.ge(0),
        m.lt(n.log_length),
        n.log_kind[m].eq(MEM),
        k.ge(0),
        k.lt(x.log_entries[m]),
        x.entry_operation[m, k].ne(NOP),
    )


def _entries(body: Callable[[Bound, Bound], Node]) -> Node:
    """For every entry of the log that is no NOP."""
    return forall(
        {"m": MESSAGE, "k": ENTRY},
        lambda m, k: implies(_is_entry(m, k), body(m, k)),
        lambda m, k: (x.entry_operation[m, k], x.entry_page[m, k], x.imported[m, k]),
    )


def _imports(body: Callable[[Bound, Bound], Node]) -> Node:
    """For every entry that the destination imported."""
    return forall(
        {"m": MESSAGE, "k": ENTRY},
        lambda m, k: implies(all_of(_in_session, x.imported[m, k]), body(m, k)),
        lambda m, k: (x.imported[m, k],),
    )


def _sent(p: Node) -> tuple[Node, Node]:
    return x.sent_bundle[p], x.sent_entry[p]


def _last(p: Node) -> tuple[Node, Node]:
    return x.last_bundle[p], x.last_entry[p]


def _copy_was_sent(p: Node) -> Node:
    """The newest in-order entry of the page carries it, or says that it is pending."""
    return all_of(x.sent_bundle[p].ge(0), x.entry_operation[_sent(p)].ne(CANCEL))


def _is_current(p: Node) -> Node:
    """The newest in-order entry of the page is what the page holds now."""
    return all_of(
        x.entry_version[_sent(p)].eq(x.version[p]),
        x.entry_pending[_sent(p)].eq(s.page[p].in_(*s.PENDING_STATES)),
    )


def _exported_clean(p: Node) -> Node:
    return s.page[p].in_(EXPORTED_BLOCKEDW, PENDING_EXPORTED_BLOCKEDW)


def _nobody_writes(p: Node) -> Node:
    """No vCPU has a translation from before the page was write-blocked."""
    return any_of(
        x.blocked_at[p].lt(s.td_epoch - 1),
        all_of(x.blocked_at[p].eq(s.td_epoch - 1), s.refcount_previous.eq(0)),
    )


def _being_made(m: Node) -> Node:
    """The EXPORT.MEM that makes the bundle is under way."""
    return all_of(s.unfinished[n.log_stream[m]], s.unfinished_bundle[n.log_stream[m]].eq(m))


def _entry_is_of(m: Node, k: Node, p: Node) -> Node:
    return all_of(_is_entry(m, k), x.entry_page[m, k].eq(p))


PROPERTIES = (
    Property(
        "P13",
        implies(
            _after_start,
            _pages(
                lambda p: all_of(
                    implies(
                        d.page[p].eq(MAPPED),
                        all_of(
                            x.held_version[p].eq(x.version[p]),
                            not_(s.page[p].in_(*s.PENDING_STATES)),
                        ),
                    ),
                    implies(d.page[p].eq(PENDING), s.page[p].in_(*s.PENDING_STATES)),
                ),
                lambda p: d.page[p],
            ),
        ),
        "Once the start token is accepted, no page of the destination is older than the source's.",
        "leaf",
        "DIRTY_COUNT = 0 for the start token, TOTAL_MB of the tokens, MIG_EPOCH of each page",
        guards=(
            ("export_track_start", "dirty_count"),
            ("import_track_start", "total_mb"),
            ("export_mem_migrate", "tlb_tracked"),
        ),
        witness=all_of(_after_start, d.page[0].eq(MAPPED), x.version[0].gt(0)),
    ),
    Property(
        "P15",
        _pages(
            lambda p: implies(
                all_of(_before_start, _exported_clean(p)),
                any_of(x.counted[x.sent_bundle[p]], _being_made(x.sent_bundle[p])),
            ),
            lambda p: s.page[p],
        ),
        "A page that counts as exported is in a bundle that counts, or that is being made.",
        "leaf",
        "TDH.EXPORT.MEM, TOTAL_MB_COUNT",
        guards=(("export_mem_migrate", "unfinished"),),
        witness=all_of(_before_start, s.page[0].eq(EXPORTED_BLOCKEDW)),
    ),
    Property(
        "P16",
        _pages(
            lambda p: implies(
                all_of(s.op_state.eq(LIVE_EXPORT), s.page[p].eq(EXPORTED_BLOCKEDW)),
                all_of(not_(x.writable[p]), _nobody_writes(p)),
            ),
            lambda p: s.page[p],
        ),
        "A page that was exported live cannot be written by any vCPU until it is unblocked.",
        "leaf",
        "TDH.EXPORT.BLOCKW, TDH.MEM.TRACK, BW_EPOCH and REFCOUNT",
        guards=(
            ("export_mem_migrate", "write_blocked_while_live"),
            ("export_mem_migrate", "tlb_tracked"),
        ),
        witness=all_of(s.op_state.eq(LIVE_EXPORT), s.page[0].eq(EXPORTED_BLOCKEDW)),
    ),
    Property(
        "P17",
        _imports(
            lambda m, k: any_of(
                all_of(
                    x.last_bundle[x.entry_page[m, k]].eq(m), x.last_entry[x.entry_page[m, k]].eq(k)
                ),
                n.log_epoch[m].lt(n.log_epoch[x.last_bundle[x.entry_page[m, k]]]),
            )
        ),
        "A page is imported again, or taken back, only in a later epoch than before.",
        "leaf",
        "TDH.IMPORT.MEM, BEPOCH of the page and the epoch of a REMOVED entry",
        guards=(
            ("import_mem_remigrate", "not_in_this_epoch"),
            ("import_mem_cancel", "not_in_this_epoch"),
            ("import_mem_migrate", "not_over_removed"),
        ),
        witness=all_of(_in_order, d.page[0].eq(MAPPED), d.page_epoch[0].gt(0)),
    ),
    Property(
        "P18",
        _pages(lambda p: x.late_imports[p].le(1), lambda p: x.late_imports[p]),
        "After the start token a page is imported at most once.",
        "leaf",
        "TDH.IMPORT.MEM out of order: MIGRATE alone, over FREE or REMOVED alone",
        guards=(("import_mem_migrate", "sept_state"), ("import_mem_remigrate", "in_order")),
        witness=x.late_imports[0].eq(1),
    ),
    Property(
        "P19",
        _pages(
            lambda p: implies(
                all_of(
                    d.op_state.in_(MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT),
                    d.page[p].in_(MAPPED, PENDING),
                ),
                all_of(x.imported[_last(p)], _entry_is_of(*_last(p), p)),
            ),
            lambda p: d.page[p],
        ),
        "While an import goes on, every private page of the TD came from the source.",
        "leaf",
        "TDH.IMPORT.MEM, page MACs",
        guards=(("import_mem_migrate", "page_mac"),),
        witness=all_of(_in_order, d.page[0].eq(MAPPED)),
    ),
    Property(
        "P5",
        implies(
            any_of(_blackout, x.resumed_as_paused),
            _pages(lambda p: x.version[p].eq(x.version_at_pause[p]), lambda p: x.version[p]),
        ),
        "A source that takes its TD back finds every page as it was when the TD was paused.",
        "leaf",
        "TDH.EXPORT.PAUSE, TDH.EXPORT.ABORT, TDH.VP.ENTER",
        guards=(("export_pause", "no_vcpu_inside"), ("vp_enter", "op_state")),
        witness=all_of(x.resumed_as_paused, s.mig_count.gt(0)),
    ),
)

_SOURCE_LEMMAS = (
    Property(
        "tlb",
        all_of(
            s.bw_epoch.le(s.td_epoch),
            implies(_blackout, s.bw_epoch.lt(s.td_epoch)),
            _pages(lambda p: x.blocked_at[p].le(s.bw_epoch), lambda p: x.blocked_at[p]),
        ),
        "BW_EPOCH is the newest TD_EPOCH in which any page was write-blocked.",
        "lemma",
    ),
    Property(
        "write_blocked",
        _pages(
            lambda p: all_of(
                implies(s.page[p].eq(BLOCKEDW), not_(x.writable[p])),
                implies(
                    all_of(
                        s.op_state.eq(LIVE_EXPORT),
                        s.page[p].in_(EXPORTED_BLOCKEDW, EXPORTED_DIRTY_BLOCKEDW),
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
                ),
            ),
            lambda i: (s.unfinished[i],),
        ),
        "An EXPORT.MEM that is under way makes a memory bundle of its stream.",
        "lemma",
    ),
    Property(
        "sent",
        _pages(
            lambda p: all_of(
                implies(not_(n.used), x.sent_bundle[p].lt(0)),
                implies(
                    x.sent_bundle[p].ge(0),
                    all_of(
                        _entry_is_of(*_sent(p), p), n.log_epoch[x.sent_bundle[p]].lt(START_EPOCH)
                    ),
                ),
            ),
            lambda p: x.sent_bundle[p],
        ),
        "The newest in-order entry of a page is an entry of that page.",
        "lemma",
    ),
    Property(
        "sent_latest",
        _entries(
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
        _pages(
            lambda p: all_of(
                implies(_before_start, s.page[p].in_(*s.EXPORTED).eq(_copy_was_sent(p))),
                implies(all_of(_given_up, _copy_was_sent(p)), s.page[p].in_(*s.EXPORTED)),
            ),
            lambda p: s.page[p],
            lambda p: x.sent_bundle[p],
        ),
        "The exported pages are those whose newest in-order entry carries them.",
        "lemma",
    ),
    Property(
        "sent_current",
        _pages(
            lambda p: all_of(
                implies(all_of(_before_start, _exported_clean(p)), _is_current(p)),
                implies(all_of(_given_up, _copy_was_sent(p)), _is_current(p)),
            ),
            lambda p: s.page[p],
            lambda p: x.sent_bundle[p],
        ),
        "What was sent of a clean page is what it holds.",
        "lemma",
    ),
    Property(
        "late_entries",
        _entries(
            lambda m, k: implies(
                n.log_epoch[m].eq(START_EPOCH),
                all_of(
                    x.entry_operation[m, k].eq(MIGRATE),
                    implies(
                        _given_up,
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
            _bundles(
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

_DESTINATION_LEMMAS = (
    Property(
        "taking",
        all_of(
            _streams(
                lambda i, b: all_of(
                    n.log_stream[b].eq(i),
                    x.begun[b],
                    x.progress[i].le(x.log_entries[b]),
                    implies(_in_order, all_of(not_(d.accepted[b]), n.log_epoch[b].eq(d.mig_epoch))),
                )
            ),
            forall(
                {"i": STREAM, "k": ENTRY},
                lambda i, k: implies(
                    all_of(
                        _in_session,
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
            _imports(
                lambda m, k: all_of(
                    _is_entry(m, k),
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
                    implies(all_of(_in_session, x.begun[m]), n.log_epoch[m].le(d.mig_epoch)),
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
                        _in_session,
                        d.accepted[m],
                        _is_entry(m, k),
                        n.log_epoch[m].lt(START_EPOCH),
                    ),
                    x.imported[m, k],
                ),
                lambda m, k: (x.imported[m, k], x.entry_operation[m, k]),
            ),
            _bundles(
                lambda m: implies(
                    all_of(_in_session, d.accepted[m]),
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
        _pages(
            lambda p: all_of(
                implies(_in_session, d.page[p].eq(FREE).eq(x.last_bundle[p].lt(0))),
                implies(
                    all_of(_in_session, x.last_bundle[p].ge(0)),
                    all_of(x.imported[_last(p)], x.entry_page[_last(p)].eq(p)),
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
        _pages(
            lambda p: all_of(
                d.page[p].in_(FREE, REMOVED, MAPPED, PENDING),
                implies(
                    _in_session,
                    all_of(
                        implies(
                            d.page[p].eq(MAPPED),
                            all_of(
                                x.entry_operation[_last(p)].ne(CANCEL),
                                x.held_version[p].eq(x.entry_version[_last(p)]),
                                not_(x.entry_pending[_last(p)]),
                            ),
                        ),
                        implies(
                            d.page[p].eq(PENDING),
                            all_of(
                                x.entry_operation[_last(p)].ne(CANCEL),
                                x.entry_pending[_last(p)],
                            ),
                        ),
                        implies(d.page[p].eq(REMOVED), x.entry_operation[_last(p)].eq(CANCEL)),
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
        _bundles(
            lambda m: implies(
                all_of(
                    _in_order,
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
            implies(_in_order, all_of(x.accepted_end.gt(0), d.accepted[x.accepted_end - 1])),
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
                _in_order,
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
                    _in_order,
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
        _bundles(
            lambda m: implies(all_of(_in_session, n.log_epoch[m].lt(d.mig_epoch)), d.accepted[m])
        ),
        "Every bundle of an earlier epoch has been accepted.",
        "lemma",
    ),
    Property(
        "late",
        _pages(
            lambda p: all_of(
                x.late_imports[p].ge(0),
                implies(
                    d.op_state.in_(UNINITIALIZED, MEMORY_IMPORT, STATE_IMPORT),
                    x.late_imports[p].eq(0),
                ),
                implies(
                    all_of(_after_start, x.late_imports[p].ge(1)), d.page[p].in_(MAPPED, PENDING)
                ),
            ),
            lambda p: x.late_imports[p],
        ),
        "A page that came after the start token is there.",
        "lemma",
    ),
)

LEMMAS = _SOURCE_LEMMAS + _DESTINATION_LEMMAS
