"""The published permissions, and row by row what the models have otherwise, with the reason."""

from __future__ import annotations

import csv
from pathlib import Path

from tdxmig_model.model.words import DESTINATION, OP_STATE, SOURCE

SPECS = Path(__file__).resolve().parent.parent / "specs"
States = frozenset[str]


def table(name: str) -> list[dict[str, str]]:
    """The rows of a file of facts."""
    with (SPECS / name).open(newline="") as opened:
        return list(csv.DictReader(opened))


# Both tables have TDH.SERVTD.BIND; that of host leaves speaks of the TD that a leaf is called on.
LEAVES = {
    row["leaf_name"]: row for name in ("op_state_other.csv", "op_state.csv") for row in table(name)
}
ENTRIES = table("sept_state.csv")
ALL_STATES = frozenset(OP_STATE.members)
ACCEPT = "TDG.MEM.PAGE.ACCEPT"


def published(leaf: str) -> States:
    """The OP_STATEs that the tables allow; a guest calls what it calls wherever it may run."""
    row = LEAVES["TDH.VP.ENTER" if leaf == ACCEPT else leaf]
    return frozenset(name for name in OP_STATE.members if row[name] == "1")


def entries(*columns: str) -> States:
    """The Secure EPT entry states with a 1 in every one of these columns."""
    return frozenset(row["state"] for row in ENTRIES if all(row[c] == "1" for c in columns))


def states(*names: str) -> States:
    """A set of states by name."""
    return frozenset(names)


# --- where each model has an OP_STATE, and a Secure EPT entry ------------------------------------

NO_OP_STATE = {
    "lifecycle": "hosts have phases; the rows are events, not leaves",
    "key_words": "who may write a key, and when, is in the model of keys",
    "calls": "one call and what comes between; of OP_STATE only whether an import has failed",
}
BOTH = {SOURCE: "source_op_state", DESTINATION: "destination_op_state"}
VARIABLES: dict[str, dict[str, str]] = {
    "leaf": BOTH,
    "order": BOTH,
    "memory": BOTH,
    "control": {DESTINATION: "control_op_state"},
    "keys": {SOURCE: "op_state"},
    "bindings": {SOURCE: "bindings_op_state"},
    "terms": {SOURCE: "role", DESTINATION: "role"},
    "forks": BOTH,
    "locks": {SOURCE: "locks_op_state"},
    "import locks": {DESTINATION: "import_op_state"},
    "guest pages": {SOURCE: "pages_source", DESTINATION: "pages_destination"},
}
LEAF_MODELS = ("leaf", "order", "memory")
PAGES = {SOURCE: "source_page", DESTINATION: "destination_page"}
ENTRY_VARIABLES: dict[str, dict[str, str]] = {
    "leaf": PAGES,
    "order": PAGES,
    "memory": PAGES,
    "import locks": {DESTINATION: "import_page"},
    "guest pages": {SOURCE: "pages_here", DESTINATION: "pages_there"},
}

# Smaller models join states that they need not tell apart; a name that is not here stands for
# itself.  The leaf models are compared in all eleven states, the others in those that they have.
JOINED: dict[str, dict[str, tuple[str, ...]]] = {
    # keys
    "op_state": {
        "LIVE_EXPORT": ("LIVE_EXPORT", "PAUSED_EXPORT", "POST_EXPORT"),
        "MEMORY_IMPORT": ("MEMORY_IMPORT", "STATE_IMPORT", "POST_IMPORT"),
    },
    # Repair R3 has this state; release 1.5.01 does not, and so neither does the table.
    "control_op_state": {"START_IMPORT": ()},
    # terms
    "role": {
        "NONE": ("UNINITIALIZED", "INITIALIZED", "RUNNABLE"),
        "IMPORTS": ("MEMORY_IMPORT", "STATE_IMPORT", "POST_IMPORT", "LIVE_IMPORT"),
        "RUNS": ("RUNNABLE",),
        "STARTS": ("RUNNABLE",),
        "STARTS_WHILE_IMPORTING": ("LIVE_IMPORT",),
        "EXPORTS": ("LIVE_EXPORT", "PAUSED_EXPORT", "POST_EXPORT"),
    },
    "pages_source": {
        "RUNNING": ("RUNNABLE",),
        "MIGRATING": ("LIVE_EXPORT", "PAUSED_EXPORT"),
        "HANDED_OVER": ("POST_EXPORT",),
    },
    "pages_destination": {
        "IDLE": ("UNINITIALIZED",),
        "MIGRATING": ("MEMORY_IMPORT", "STATE_IMPORT", "POST_IMPORT"),
        "RUNNING": ("LIVE_IMPORT", "RUNNABLE"),
        "FAILED": ("FAILED_IMPORT",),
    },
}
JOINED_IN_FORKS = {"destination_op_state": {"MEMORY_IMPORT": ("MEMORY_IMPORT", "STATE_IMPORT")}}

# --- OP_STATE: what is different -----------------------------------------------------------------

# Reasons of rows that check nothing themselves.
EXIT = "the end of a TD's run, which no leaf checks"
EARLIER = "OP_STATE was checked when the call took its locks"
INSIDE = "OP_STATE was checked when the call began or was resumed"
UNCHECKED = (EXIT, EARLIER, INSIDE)
# Reasons of rows that have a part of their leaf's states.
IN_ORDER = "only while in order, by the flags of sept_state.csv; the leaf has another row"
PART = "the leaf has other rows, and together they have its states"
SMALLER = "what the leaf does in its other states is not in this model"
START = "the leaf may run in LIVE_EXPORT too, and refuses to make a start token there"

Differences = dict[tuple[str, str], tuple[States, str]]
EXPORTS_IN_ORDER = states("LIVE_EXPORT", "PAUSED_EXPORT")
IMPORTS_IN_ORDER = states("MEMORY_IMPORT", "STATE_IMPORT")
IMPORTED = states("POST_IMPORT", "LIVE_IMPORT", "RUNNABLE", "FAILED_IMPORT")

LEAF_ROWS: dict[str, tuple[States, str]] = {
    "vp_exit": (ALL_STATES, EXIT),
    "vp_exit_previous": (ALL_STATES, EXIT),
    "export_mem_migrate": (EXPORTS_IN_ORDER, IN_ORDER),
    "export_mem_remigrate": (EXPORTS_IN_ORDER, IN_ORDER),
    "export_mem_cancel": (EXPORTS_IN_ORDER, IN_ORDER),
    "export_mem_out_of_order": (states("POST_EXPORT"), IN_ORDER),
    "export_track_start": (states("PAUSED_EXPORT"), START),
    "export_abort": (EXPORTS_IN_ORDER, PART),
    "export_abort_with_token": (states("POST_EXPORT"), PART),
    "import_mem_remigrate": (IMPORTS_IN_ORDER, IN_ORDER),
    "import_mem_remigrate_pending": (IMPORTS_IN_ORDER, IN_ORDER),
    "import_mem_cancel": (IMPORTS_IN_ORDER, IN_ORDER),
    "import_failure_live": (states("LIVE_IMPORT"), PART),
}
CONTROL_STATES = states(
    "UNINITIALIZED", "INITIALIZED", "MEMORY_IMPORT", "FAILED_IMPORT", "START_IMPORT"
)
CONTROL_ROWS: Differences = {
    ("control", "control_set_migration_key"): (
        CONTROL_STATES,
        "repair R3 has one more state, in which MIG_DEC_KEY can be written as in any other",
    ),
    **{
        ("control", f"import_state_immutable_{row}"): (CONTROL_STATES, INSIDE)
        for row in ("field", "skip", "error", "interrupt", "end", "report")
    },
    **{
        ("control", f"import_state_immutable_{row}"): (
            states("UNINITIALIZED", "START_IMPORT"),
            "repair R3: an import that has begun is in START_IMPORT; in 1.5.01 it has no state",
        )
        for row in ("resume", "fail")
    },
}
PAGES_ROWS: Differences = {
    ("guest pages", "export_guest_page"): (states("MIGRATING"), SMALLER),
    ("guest pages", "cancel_guest_page"): (states("MIGRATING"), SMALLER),
    ("guest pages", "convert_on_source"): (states("RUNNING", "MIGRATING"), SMALLER),
    ("guest pages", "abort_pages"): (states("MIGRATING"), PART),
    ("guest pages", "abort_pages_with_token"): (states("HANDED_OVER"), PART),
    ("guest pages", "import_guest_page"): (states("MIGRATING"), SMALLER),
    ("guest pages", "import_guest_cancel"): (states("MIGRATING"), SMALLER),
    ("guest pages", "end_import_of_pages"): (states("MIGRATING"), SMALLER),
    ("guest pages", "give_pages_up"): (states("MIGRATING"), SMALLER),
    ("guest pages", "convert_on_destination"): (states("RUNNING"), SMALLER),
}
OTHER_ROWS: Differences = {
    ("keys", "refused_bundle"): (
        states("LIVE_IMPORT"),
        "in MEMORY_IMPORT a bundle that is refused ends the import",
    ),
    ("terms", "end_of_start"): (
        states("STARTS", "STARTS_WHILE_IMPORTING"),
        "the end of a call that has begun",
    ),
    ("terms", "touch_stream"): (states("STARTS_WHILE_IMPORTING"), PART),
    ("terms", "accept"): (states("IMPORTS"), PART),
    ("forks", "issue_start_token"): (states("PAUSED_EXPORT"), START),
    ("forks", "abort_session"): (EXPORTS_IN_ORDER, PART),
    ("forks", "abort_session_with_token"): (states("POST_EXPORT"), PART),
    ("forks", "fail_import"): (states("MEMORY_IMPORT", "POST_IMPORT"), PART),
    ("forks", "fail_live_import"): (states("LIVE_IMPORT"), PART),
    ("forks", "fail_in_flight"): (states("RUNNABLE"), EARLIER),
    ("bindings", "fail_bound_td"): (
        states("MEMORY_IMPORT", "STATE_IMPORT", "POST_IMPORT"),
        "a failed import that is aborted again fails no more",
    ),
    ("bindings", "give_bound_td"): (states("PAUSED_EXPORT"), START),
    ("bindings", "take_bound_td"): (states("STATE_IMPORT"), SMALLER),
    ("locks", "make_start_token"): (states("PAUSED_EXPORT"), START),
    ("import locks", "run_imported_guest"): (IMPORTED, EARLIER),
}
LATER_ROWS = (
    *("lock_entry", "encrypt_page", "read_total", "add_to_total", "make_epoch_token"),
    *("end_session", "pause_td", "enter_guest", "write_page"),
)
DIFFERENCES: Differences = {
    **{(model, row): found for model in LEAF_MODELS for row, found in LEAF_ROWS.items()},
    **CONTROL_ROWS,
    **PAGES_ROWS,
    **OTHER_ROWS,
    **{("locks", row): (ALL_STATES, EARLIER) for row in LATER_ROWS},
}
UNREPAIRED: Differences = {
    ("import locks", "import_entry"): (IMPORTED, EARLIER),
    ("import locks", "fail_entry"): (IMPORTED, EARLIER),
}
"""What is different in tdx-1.5.01 only."""

# The states in which no row of a model has a leaf that may run there, by its OP_STATE and leaf.
LEAVES_WITHOUT: dict[tuple[str, str, str], tuple[States, str]] = {
    ("forks", "source_op_state", "TDH.EXPORT.TRACK"): (
        states("LIVE_EXPORT"),
        "the model has no epoch token but the start token",
    ),
    ("bindings", "bindings_op_state", "TDH.EXPORT.TRACK"): (
        states("LIVE_EXPORT"),
        "the model has no epoch token but the start token",
    ),
    ("bindings", "bindings_op_state", "TDH.IMPORT.TRACK"): (
        states("MEMORY_IMPORT"),
        "the model has no epoch token but the start token",
    ),
    ("bindings", "bindings_op_state", "TDH.IMPORT.ABORT"): (
        states("FAILED_IMPORT"),
        "a failed import that is aborted again fails no more",
    ),
    ("locks", "locks_op_state", "TDH.EXPORT.TRACK"): (states("LIVE_EXPORT"), START),
    ("guest pages", "pages_source", "TDH.EXPORT.MEM"): (
        states("HANDED_OVER"),
        "every page is exported before the start token",
    ),
    ("guest pages", "pages_source", "TDH.MEM.PAGE.REMOVE"): (
        states("HANDED_OVER"),
        "a guest that does not run asks for no conversion",
    ),
    ("guest pages", "pages_destination", "TDH.MEM.PAGE.REMOVE"): (
        states("MIGRATING", "FAILED"),
        "a guest that does not run asks for no conversion",
    ),
    ("guest pages", "pages_destination", "TDH.IMPORT.MEM"): (
        states("RUNNING"),
        "every page is imported before the end",
    ),
    ("guest pages", "pages_destination", "TDH.IMPORT.END"): (
        states("RUNNING"),
        "the end follows the commit at once",
    ),
    ("guest pages", "pages_destination", "TDH.IMPORT.ABORT"): (
        states("FAILED"),
        "a token that is made again says nothing new",
    ),
}
WITHOUT_IF_HARDENED: dict[tuple[str, str, str], tuple[States, str]] = {
    ("terms", "role", "TDH.IMPORT.MEM"): (
        states("STARTS_WHILE_IMPORTING"),
        "repair R4: no import leaf can use the streams of the new session",
    ),
}

# Leaves of the locks models: the states in which their check passes, without those listed here.
LOCKS_WITHOUT: dict[tuple[str, str], tuple[States, str]] = {
    ("locks", "TDH.EXPORT.ABORT"): (
        states("POST_EXPORT"),
        "the abort with a token, after the start token, is not in this model",
    ),
}

# --- Secure EPT entries --------------------------------------------------------------------------

# Which flag of sept_state.csv a kind of entry asks for; every other row asks for its leaf's column.
KINDS = {
    "export_mem_migrate": "first_time_export_allowed",
    "export_mem_remigrate": "re_export_allowed",
    "export_mem_cancel": "export_cancel_allowed",
    "export_mem_out_of_order": "paused_export_allowed",
    "import_mem_migrate": "first_time_import_allowed",
    "import_mem_migrate_pending": "first_time_import_allowed",
    "import_mem_remigrate": "re_import_allowed",
    "import_mem_remigrate_pending": "re_import_allowed",
    "import_mem_cancel": "import_cancel_allowed",
    "export_guest_page": "first_time_export_allowed",
    "cancel_guest_page": "export_cancel_allowed",
    "import_guest_page": "first_time_import_allowed",
    "import_guest_cancel": "import_cancel_allowed",
    "import_entry": "first_time_import_allowed",
}
LIVE = ("export_mem_migrate", "export_mem_remigrate")
"""Kinds that ask for `live_export_allowed` in LIVE_EXPORT; the guest may write meanwhile."""

ENTRY_DIFFERENCES: Differences = {
    **{
        (model, "import_mem_remigrate_pending"): (
            states("PENDING"),
            "a page that the guest has accepted is never replaced by one that it has not",
        )
        for model in LEAF_MODELS
    },
    ("guest pages", "accept_without_page"): (
        states("FREE", "REMOVED"),
        "the leaf refuses such an entry, and the row is the refusal",
    ),
    ("import locks", "import_entry"): (
        states("FREE"),
        "after the start token a page that was removed was imported in the same epoch",
    ),
}
