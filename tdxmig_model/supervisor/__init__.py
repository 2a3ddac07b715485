"""Both sides as two processes on this host, started, watched and judged; or one side alone."""

from tdxmig_model.supervisor.child import Probe
from tdxmig_model.supervisor.options import SIDES, At, Injected, RunOptions, lifecycle_events
from tdxmig_model.supervisor.remote import Meeting, SideRun, receive_td, send_td
from tdxmig_model.supervisor.result import RunResult
from tdxmig_model.supervisor.run import run_migration
from tdxmig_model.supervisor.sideresult import SideResult, side_result
from tdxmig_model.supervisor.signals import StopSignals

__all__ = [
    "SIDES",
    "At",
    "Injected",
    "Meeting",
    "Probe",
    "RunOptions",
    "RunResult",
    "SideResult",
    "SideRun",
    "StopSignals",
    "lifecycle_events",
    "receive_td",
    "run_migration",
    "send_td",
    "side_result",
]
