"""Model and software TDX module side by side: the same calls, and what each makes of them.

The two halves are independent; here they meet at run time, call by call.
"""

from tdxmig_model.conformance.replay import REPLAYABLE, Replayed, replay_on_modules
from tdxmig_model.conformance.twin import Call, Disagreement, Twin

__all__ = [
    "REPLAYABLE",
    "Call",
    "Disagreement",
    "Replayed",
    "Twin",
    "replay_on_modules",
]
