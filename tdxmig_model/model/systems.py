"""Every model of the project, in the order in which verdicts are given."""

from __future__ import annotations

from tdxmig_model.model.calls import CALLS
from tdxmig_model.model.guest_pages import GUEST_PAGES
from tdxmig_model.model.import_locks import IMPORT_LOCKS
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.locks_system import LOCKS

SYSTEMS = (LIFECYCLE, LEAF, LOCKS, IMPORT_LOCKS, CALLS, GUEST_PAGES)
