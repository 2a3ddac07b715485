"""The state of the source TD that the model follows, by the names of its TDCS fields."""

from __future__ import annotations

from tdxmig_model.expr import BOOL, INT, count, mapping, scalar
from tdxmig_model.model.words import (
    BLOCKEDW,
    EXPORTED_BLOCKEDW,
    EXPORTED_DIRTY,
    EXPORTED_DIRTY_BLOCKEDW,
    MAPPED,
    OP_STATE,
    PAGE,
    PENDING,
    PENDING_BLOCKEDW,
    PENDING_EXPORTED_BLOCKEDW,
    PENDING_EXPORTED_DIRTY,
    PENDING_EXPORTED_DIRTY_BLOCKEDW,
    RUNNABLE,
    SEPT,
    SOURCE,
    STREAM,
    VCPU,
)

op_state = scalar("source_op_state", OP_STATE, RUNNABLE, SOURCE)
key_set = scalar("source_mig_dec_key_set", BOOL, False, SOURCE, doc="MIG_DEC_KEY_SET")
# Both TDs are built with one backward and one forward stream; more can be created.
num_migs = scalar("source_num_migs", INT, 2, SOURCE, doc="NUM_MIGS, the backward stream included")
export_count = scalar("source_export_count", INT, 0, SOURCE, doc="EXPORT_COUNT")
mig_epoch = scalar("source_mig_epoch", INT, 0, SOURCE, doc="MIG_EPOCH")
total_mb_count = scalar("source_total_mb_count", INT, 0, SOURCE, doc="TOTAL_MB_COUNT")
mig_count = scalar("source_mig_count", INT, 0, SOURCE, doc="MIG_COUNT")
dirty_count = scalar("source_dirty_count", INT, 0, SOURCE, doc="DIRTY_COUNT")
td_epoch = scalar("source_td_epoch", INT, 1, SOURCE, doc="TD_EPOCH")
bw_epoch = scalar("source_bw_epoch", INT, 0, SOURCE, doc="BW_EPOCH")
refcount = scalar("source_refcount", INT, 0, SOURCE, doc="vCPUs entered in this TD_EPOCH")
refcount_previous = scalar(
    "source_refcount_previous", INT, 0, SOURCE, doc="vCPUs still inside from the TD_EPOCH before"
)
next_mb_counter = mapping("source_next_mb_counter", (STREAM,), INT, 0, SOURCE)
unfinished = mapping(
    "source_unfinished", (STREAM,), BOOL, False, SOURCE, doc="an EXPORT.MEM that has not ended"
)
unfinished_bundle = mapping("source_unfinished_bundle", (STREAM,), INT, 0, SOURCE)
page = mapping("source_page", (PAGE,), SEPT, MAPPED, SOURCE, doc="Secure-EPT entry state")
vcpu_export_count = mapping(
    "source_vcpu_export_count", (VCPU,), INT, 0, SOURCE, doc="TDVPS.EXPORT_COUNT"
)

VARIABLES = (
    op_state,
    key_set,
    num_migs,
    export_count,
    mig_epoch,
    total_mb_count,
    mig_count,
    dirty_count,
    td_epoch,
    bw_epoch,
    refcount,
    refcount_previous,
    next_mb_counter,
    unfinished,
    unfinished_bundle,
    page,
    vcpu_export_count,
)

EXPORTED = (
    EXPORTED_BLOCKEDW,
    EXPORTED_DIRTY,
    EXPORTED_DIRTY_BLOCKEDW,
    PENDING_EXPORTED_BLOCKEDW,
    PENDING_EXPORTED_DIRTY,
    PENDING_EXPORTED_DIRTY_BLOCKEDW,
)
EXPORTED_AND_DIRTY = (
    EXPORTED_DIRTY,
    EXPORTED_DIRTY_BLOCKEDW,
    PENDING_EXPORTED_DIRTY,
    PENDING_EXPORTED_DIRTY_BLOCKEDW,
)
FIRST_TIME = (MAPPED, BLOCKEDW, PENDING, PENDING_BLOCKEDW)
WRITE_BLOCKED = (
    BLOCKEDW,
    EXPORTED_BLOCKEDW,
    EXPORTED_DIRTY_BLOCKEDW,
    PENDING_BLOCKEDW,
    PENDING_EXPORTED_BLOCKEDW,
    PENDING_EXPORTED_DIRTY_BLOCKEDW,
)
PENDING_STATES = (
    PENDING,
    PENDING_BLOCKEDW,
    PENDING_EXPORTED_BLOCKEDW,
    PENDING_EXPORTED_DIRTY,
    PENDING_EXPORTED_DIRTY_BLOCKEDW,
)

exported_pages = count("exported pages", PAGE, lambda p: page[p].in_(*EXPORTED))
dirty_pages = count("exported dirty pages", PAGE, lambda p: page[p].in_(*EXPORTED_AND_DIRTY))
unfinished_calls = count("unfinished EXPORT.MEM calls", STREAM, lambda s: unfinished[s])
