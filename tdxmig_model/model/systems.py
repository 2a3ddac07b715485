"""Every model of the project, in the order in which verdicts are given."""

from __future__ import annotations

from tdxmig_model.model.bindings import BINDINGS
from tdxmig_model.model.calls import CALLS
from tdxmig_model.model.control_properties import CONTROL
from tdxmig_model.model.forks import FORKS
from tdxmig_model.model.guest_pages import GUEST_PAGES
from tdxmig_model.model.import_locks import IMPORT_LOCKS
from tdxmig_model.model.key_words import KEY_WORDS
from tdxmig_model.model.keys import KEYS
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.locks_system import LOCKS
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.model.order import ORDER
from tdxmig_model.model.terms import TERMS

SYSTEMS = (
    LIFECYCLE,
    LEAF,
    ORDER,
    MEMORY,
    CONTROL,
    KEYS,
    KEY_WORDS,
    BINDINGS,
    TERMS,
    FORKS,
    LOCKS,
    IMPORT_LOCKS,
    CALLS,
    GUEST_PAGES,
)
