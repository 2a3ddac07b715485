"""The leaf-level model: two TDs, the bundles between them, and an adversary who runs both hosts.

Every leaf may be called at any time in any order.  What is proved here is enforced by the TDX
module
itself; what an honest host adds is the lifecycle model's.
"""

from __future__ import annotations

from tdxmig_model.expr import System
from tdxmig_model.model import destination, network, source, source_state
from tdxmig_model.model.leaf_properties import GOALS, LEMMAS, PROPERTIES
from tdxmig_model.model.words import ALL_PROFILES

LEAF = System(
    name="leaf",
    variables=source_state.VARIABLES + network.VARIABLES + destination.VARIABLES,
    steps=source.STEPS + destination.STEPS,
    properties=PROPERTIES + LEMMAS,
    goals=GOALS,
    assumptions=(
        "AES-256-GCM is an ideal AEAD: nothing outside the log of bundles can be imported",
        "the migration session keys are fresh and given to this destination only (MigTD)",
        "bundles of other sessions are under other keys and are refused",
        "entries of a memory bundle are authentic one by one; what a page holds is not modelled",
        "a TD that became RUNNABLE on the destination starts no export of its own in this model",
        "counters are unbounded integers; the TDX module checks EXPORT_COUNT and MIG_EPOCH itself",
    ),
    profiles=ALL_PROFILES,
)
