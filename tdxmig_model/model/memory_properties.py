"""What is claimed of page contents, and the lemmas that make the claims inductive.

The order of the log carries the freshness proof: epochs never fall along it, an epoch token counts
every bundle before it, and a page is imported at most once in an epoch.  So what the destination
holds of a page when it takes the start token is the last copy that the source made.
"""

from __future__ import annotations

from tdxmig_model.expr import (
    Property,
    all_of,
    any_of,
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
    being_made,
    blackout,
    entry_is_of,
    exported_clean,
    imports,
    in_order,
    last,
    nobody_writes,
    pages,
)
from tdxmig_model.model.words import (
    EXPORTED_BLOCKEDW,
    LIVE_EXPORT,
    MAPPED,
    MEMORY_IMPORT,
    PENDING,
    POST_IMPORT,
    STATE_IMPORT,
)

PROPERTIES = (
    Property(
        "P13",
        implies(
            after_start,
            pages(
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
        witness=all_of(after_start, d.page[0].eq(MAPPED), x.version[0].gt(0)),
    ),
    Property(
        "P15",
        pages(
            lambda p: implies(
                all_of(before_start, exported_clean(p)),
                any_of(x.counted[x.sent_bundle[p]], being_made(x.sent_bundle[p])),
            ),
            lambda p: s.page[p],
        ),
        "A page that counts as exported is in a bundle that counts, or that is being made.",
        "leaf",
        "TDH.EXPORT.MEM, TOTAL_MB_COUNT",
        guards=(("export_mem_migrate", "unfinished"),),
        witness=all_of(before_start, s.page[0].eq(EXPORTED_BLOCKEDW)),
    ),
    Property(
        "P16",
        pages(
            lambda p: implies(
                all_of(s.op_state.eq(LIVE_EXPORT), s.page[p].eq(EXPORTED_BLOCKEDW)),
                all_of(not_(x.writable[p]), nobody_writes(p)),
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
        imports(
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
        witness=all_of(in_order, d.page[0].eq(MAPPED), d.page_epoch[0].gt(0)),
    ),
    Property(
        "P18",
        pages(lambda p: x.late_imports[p].le(1), lambda p: x.late_imports[p]),
        "After the start token a page is imported at most once.",
        "leaf",
        "TDH.IMPORT.MEM out of order: MIGRATE alone, over FREE or REMOVED alone",
        guards=(("import_mem_migrate", "sept_state"), ("import_mem_remigrate", "in_order")),
        witness=x.late_imports[0].eq(1),
    ),
    Property(
        "P19",
        pages(
            lambda p: implies(
                all_of(
                    d.op_state.in_(MEMORY_IMPORT, STATE_IMPORT, POST_IMPORT),
                    d.page[p].in_(MAPPED, PENDING),
                ),
                all_of(x.imported[last(p)], entry_is_of(*last(p), p)),
            ),
            lambda p: d.page[p],
        ),
        "While an import goes on, every private page of the TD came from the source.",
        "leaf",
        "TDH.IMPORT.MEM, page MACs",
        guards=(("import_mem_migrate", "page_mac"),),
        witness=all_of(in_order, d.page[0].eq(MAPPED)),
    ),
    Property(
        "P5",
        implies(
            any_of(blackout, x.resumed_as_paused),
            pages(lambda p: x.version[p].eq(x.version_at_pause[p]), lambda p: x.version[p]),
        ),
        "A source that takes its TD back finds every page as it was when the TD was paused.",
        "leaf",
        "TDH.EXPORT.PAUSE, TDH.EXPORT.ABORT, TDH.VP.ENTER",
        guards=(("export_pause", "no_vcpu_inside"), ("vp_enter", "op_state")),
        witness=all_of(x.resumed_as_paused, s.mig_count.gt(0)),
    ),
)
