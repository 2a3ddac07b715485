"""The model of keys: what one TD encrypts, in any number of sessions, streams and IVs."""

from __future__ import annotations

from tdxmig_model.expr import System
from tdxmig_model.model import keys_rows as rows
from tdxmig_model.model.keys_properties import GOALS, LEMMAS, PROPERTIES
from tdxmig_model.model.words import ALL_PROFILES

KEYS = System(
    name="keys",
    variables=rows.VARIABLES,
    steps=rows.SLOTS + rows.EXPORTS + rows.IMPORTS,
    properties=PROPERTIES + LEMMAS,
    goals=GOALS,
    assumptions=(
        "a key from the random number generator is one that no key was before",
        "integers are unbounded: no IV_COUNTER wraps",
        "MIG_VERSION may be any number; release 1.5.01 accepts only 0",
        "the immutable state of an export is one encryption",
    ),
    profiles=ALL_PROFILES,
)
