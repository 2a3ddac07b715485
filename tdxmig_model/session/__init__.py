"""One side of a migration: lifecycle, enforcer, engine, backend and transport joined; it waits."""

from tdxmig_model.session.common import (
    DECISION_TIMEOUTS,
    RUNNABLE_STATES,
    USUAL_EPOCHS,
    Activity,
    Ending,
    Hooks,
    NotConverging,
    Progress,
    SessionOptions,
    Side,
    SideOutcome,
    Stopped,
)
from tdxmig_model.session.destination import DestinationSession
from tdxmig_model.session.local import migrate_in_process
from tdxmig_model.session.source import SourceSession
from tdxmig_model.session.stored import StoredDestinationSession, StoredSourceSession

__all__ = [
    "DECISION_TIMEOUTS",
    "RUNNABLE_STATES",
    "USUAL_EPOCHS",
    "Activity",
    "DestinationSession",
    "Ending",
    "Hooks",
    "NotConverging",
    "Progress",
    "SessionOptions",
    "Side",
    "SideOutcome",
    "SourceSession",
    "Stopped",
    "StoredDestinationSession",
    "StoredSourceSession",
    "migrate_in_process",
]
