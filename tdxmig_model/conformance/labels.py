"""What a module answers where a guard's conjunct does not hold: label -> classes of status.

Written from the checks of the leaves of TDX module 1.5.01 (docstrings of the software module, which
cite the public source): names without TDX_, or the status of a GPA list entry.  A conjunct that is
missing here is no check of a module, but says what a row is.
"""

from __future__ import annotations

from typing import Final

STATUSES: Final[dict[str, frozenset[str]]] = {
    label: frozenset(words.split())
    for label, words in {
        # OP_STATE permission table; an entry that is out of order has a status of its own.
        "op_state": "OP_STATE_INCORRECT",
        "in_order": "OP_STATE_INCORRECT",
        "paused": "OP_STATE_INCORRECT",
        # Session start.
        "mig_count": "PREVIOUS_EXPORT_CLEANUP_INCOMPLETE",
        "min_migs": "MIN_MIGS_NOT_CREATED",
        "mig_dec_key_set": "MIGRATION_DECRYPTION_KEY_NOT_SET",
        # Secure EPT.
        "sept_state": "EPT_ENTRY_STATE_INCORRECT SEPT_ENTRY_STATE_INCORRECT "
        "PAGE_ALREADY_ACCEPTED EPT_VIOLATION IMPORT_MISMATCH",
        # In order a page that is exported and clean is not exported again.
        "out_of_order": "SEPT_ENTRY_STATE_INCORRECT",
        "write_blocked_while_live": "SEPT_ENTRY_STATE_INCORRECT",
        "tlb_tracked": "TLB_TRACKING_NOT_DONE",
        "previous_epoch_left": "PREVIOUS_TLB_EPOCH_BUSY",
        "no_vcpu_inside": "OPERAND_BUSY",
        "may_write": "EPT_VIOLATION",
        # Streams and calls that can be resumed.
        "stream": "OPERAND_INVALID",
        # No call to resume on a stream, or no such stream.
        "unfinished": "INVALID_RESUMPTION MIGRATION_STREAM_STATE_INCORRECT OPERAND_INVALID",
        "not_unfinished": "INVALID_RESUMPTION",
        "no_unfinished_call": "INVALID_RESUMPTION",
        "resumed_epoch": "INVALID_RESUMPTION",
        # Export of state and tokens.
        "not_exported_yet": "VCPU_ALREADY_EXPORTED",
        "epoch_overflow": "MIGRATION_EPOCH_OVERFLOW",
        "dirty_count": "EXPORTED_DIRTY_PAGES_REMAIN",
        "abort_token": "INVALID_MBMD INCORRECT_MBMD_MAC OPERAND_INVALID",
        # Import: the MBMD.
        "mbmd_mac": "INCORRECT_MBMD_MAC INVALID_MBMD",
        "mb_type": "INVALID_MBMD",
        "mig_epoch": "INVALID_MBMD",
        "mb_counter": "INVALID_MBMD",
        "migs_index": "INVALID_MBMD",
        "token_counter": "INVALID_MBMD",
        "total_mb": "INVALID_MBMD",
        # Import: entries and vCPUs.
        "page_mac": "INVALID_PAGE_MAC SEPT_WALK_FAILED",
        "page_macs": "INVALID_PAGE_MAC",
        "not_over_removed": "DISALLOWED_IMPORT_OVER_REMOVED",
        "not_in_this_epoch": "MIGRATED_IN_CURRENT_EPOCH",
        "all_vcpus": "SOME_VCPUS_NOT_MIGRATED",
        "vcpu_state": "VCPU_STATE_INCORRECT",
        "num_migrated_vcpus": "ALL_VCPUS_IMPORTED",
    }.items()
}

OF_ROW: Final[dict[tuple[str, str], frozenset[str]]] = {
    # One leaf, allowed before and after the start token, with a token or without.
    ("export_abort", "op_state"): frozenset({"OPERAND_INVALID"}),
    ("export_abort_with_token", "op_state"): frozenset({"OPERAND_INVALID"}),
}
"""What else a module answers for the conjunct of one row."""

NO_CALL: Final = frozenset(
    {
        # Who is not in the guest cannot leave it, nor do anything there.
        "entered",
        "inside",
        # A page that was not accepted is accepted by the guest before it is written.
        "accepted_page",
        # These say which rows a call is, or what the model looks at; no module checks them.
        "first_observed",
        "next_entry",
        "last_entry",
        "nop_or_late",
        "not_start_token",
        "start_token",
        "before_commit",
        # 512 streams.
        "max_migs",
    }
)
"""Conjuncts whose refusal cannot be seen at a module, each for the reason above."""

NARROWER: Final[dict[str, frozenset[str]]] = {
    # The model lets a guest write through any translation that it may have kept.
    "guest_write": frozenset({"EPT_VIOLATION"}),
    # The bundle says how many streams the source has; the destination needs as many.
    "import_state_immutable": frozenset({"NUM_MIGS_HIGHER_THAN_CREATED"}),
}
"""Rows that the model allows where a module may refuse: what is proved covers more than it does."""

UNOBSERVED: Final = "INVALID_RESUMPTION"
"""What a module may answer to any row of EXPORT.MEM in a session that the model does not observe:
the model does not follow the epoch of a bundle that it does not log.
"""


def expected(row: str, label: str) -> frozenset[str]:
    """The classes of status for a conjunct of a row that does not hold."""
    return STATUSES.get(label, frozenset()) | OF_ROW.get((row, label), frozenset())
