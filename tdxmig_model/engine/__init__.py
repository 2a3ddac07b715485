"""The migration of one TD as sans-I/O generators: no clock, no dice, no sockets, no module.

One generator per lifecycle event.  It yields commands for a backend and records for the wire, and
is sent the result of each command.
"""

from tdxmig_model.engine.commands import Backend, Command, Operation, Result, Send, VcpuExit
from tdxmig_model.engine.destination import DestinationEngine, ImportOutcome
from tdxmig_model.engine.pages import PageSet
from tdxmig_model.engine.precopy import (
    Decision,
    Iteration,
    PreCopy,
    PreCopyLimits,
    WhenNotConverging,
)
from tdxmig_model.engine.source import ExportOutcome, SourceEngine
from tdxmig_model.engine.steps import RamBlock, drive

__all__ = [
    "Backend",
    "Command",
    "Decision",
    "DestinationEngine",
    "ExportOutcome",
    "ImportOutcome",
    "Iteration",
    "Operation",
    "PageSet",
    "PreCopy",
    "PreCopyLimits",
    "RamBlock",
    "Result",
    "Send",
    "SourceEngine",
    "VcpuExit",
    "WhenNotConverging",
    "drive",
]
