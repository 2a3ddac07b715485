"""Both sides as two processes on this host: started, watched, stopped, reaped, and judged."""

from tdxmig_model.supervisor.child import Probe
from tdxmig_model.supervisor.options import SIDES, At, Injected, RunOptions, lifecycle_events
from tdxmig_model.supervisor.result import RunResult
from tdxmig_model.supervisor.run import run_migration
from tdxmig_model.supervisor.signals import StopSignals

__all__ = [
    "SIDES",
    "At",
    "Injected",
    "Probe",
    "RunOptions",
    "RunResult",
    "StopSignals",
    "lifecycle_events",
    "run_migration",
]
