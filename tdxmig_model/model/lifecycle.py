"""The lifecycle as a system: the events of both sides, what is claimed and what is assumed."""

from __future__ import annotations

from tdxmig_model.expr import System
from tdxmig_model.model.lifecycle_events import DESTINATION_STEPS, SOURCE_STEPS, VARIABLES
from tdxmig_model.model.lifecycle_properties import GOALS, LEMMAS, PROPERTIES
from tdxmig_model.model.words import ALL_PROFILES

LIFECYCLE = System(
    name="lifecycle",
    variables=VARIABLES,
    steps=SOURCE_STEPS + DESTINATION_STEPS,
    properties=PROPERTIES + LEMMAS,
    goals=GOALS,
    assumptions=(
        "both hosts follow the lifecycle; records arrive in the order in which they were sent",
        "a confirmation or an abort token reaches the source only if the destination made it",
    ),
    profiles=ALL_PROFILES,
)
