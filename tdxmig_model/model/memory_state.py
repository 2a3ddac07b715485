"""What the memory model adds to the state of the leaf model: page contents and list entries.

A content is a version: a number that grows with each write of the guest.  Versions are ghosts:
no guard reads them, they only say what was copied where.
"""

from __future__ import annotations

from tdxmig_model.expr import BOOL, INT, count, mapping, scalar
from tdxmig_model.model.destination import accepted
from tdxmig_model.model.words import (
    DESTINATION,
    ENTRY,
    MESSAGE,
    NETWORK,
    NOP,
    OPERATION,
    PAGE,
    SOURCE,
    STREAM,
)

# The source: who can write a page.
writable = mapping("source_writable", (PAGE,), BOOL, True, SOURCE, doc="the W bit of the entry")
blocked_at = mapping(
    "source_blocked_at", (PAGE,), INT, 0, SOURCE, doc="TD_EPOCH when W was cleared last"
)
version = mapping("source_version", (PAGE,), INT, 0, SOURCE, ghost=True, doc="content of a page")
version_at_pause = mapping("source_version_at_pause", (PAGE,), INT, 0, SOURCE, ghost=True)
resumed_as_paused = scalar("source_resumed_as_paused", BOOL, False, SOURCE, ghost=True)
sent_bundle = mapping(
    "source_sent_bundle", (PAGE,), INT, -1, SOURCE, ghost=True, doc="last in-order bundle with it"
)
sent_entry = mapping("source_sent_entry", (PAGE,), ENTRY, 0, SOURCE, ghost=True)

# The network: the entries of each memory bundle, in the order of its GPA list.
log_entries = mapping("log_entries", (MESSAGE,), ENTRY, 0, NETWORK, doc="entries of the GPA list")
entry_page = mapping("entry_page", (MESSAGE, ENTRY), PAGE, 0, NETWORK, doc="GPA")
entry_operation = mapping("entry_operation", (MESSAGE, ENTRY), OPERATION, NOP, NETWORK)
entry_pending = mapping("entry_pending", (MESSAGE, ENTRY), BOOL, False, NETWORK)
entry_version = mapping("entry_version", (MESSAGE, ENTRY), INT, 0, NETWORK, ghost=True)
counted = mapping(
    "log_counted", (MESSAGE,), BOOL, False, NETWORK, ghost=True, doc="TOTAL_MB_COUNT has it"
)

# The destination: how far each list was worked off, and what came of it.
progress = mapping("destination_progress", (STREAM,), ENTRY, 0, DESTINATION, doc="next list entry")
begun = mapping("destination_begun", (MESSAGE,), BOOL, False, DESTINATION, ghost=True)
imported = mapping("destination_imported", (MESSAGE, ENTRY), BOOL, False, DESTINATION, ghost=True)
held_version = mapping("destination_version", (PAGE,), INT, 0, DESTINATION, ghost=True)
last_bundle = mapping("destination_last_bundle", (PAGE,), INT, -1, DESTINATION, ghost=True)
last_entry = mapping("destination_last_entry", (PAGE,), ENTRY, 0, DESTINATION, ghost=True)
late_imports = mapping(
    "destination_late_imports",
    (PAGE,),
    INT,
    0,
    DESTINATION,
    ghost=True,
    doc="after the start token",
)
accepted_end = scalar(
    "destination_accepted_end", INT, 0, DESTINATION, ghost=True, doc="behind the last accepted one"
)

VARIABLES = (
    writable,
    blocked_at,
    version,
    version_at_pause,
    resumed_as_paused,
    sent_bundle,
    sent_entry,
    log_entries,
    entry_page,
    entry_operation,
    entry_pending,
    entry_version,
    counted,
    progress,
    begun,
    imported,
    held_version,
    last_bundle,
    last_entry,
    late_imports,
    accepted_end,
)

accepted_bundles = count("accepted bundles", MESSAGE, lambda m: accepted[m])
