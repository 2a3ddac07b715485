"""The model of forks: one source, any number of destinations, and the exchanges of their keys.

What one module cannot tell by itself is judged here: that a token is of this session, that one
destination at most takes a TD over, and that both keys of a session come from one peer.
"""

from __future__ import annotations

from tdxmig_model.expr import System
from tdxmig_model.model import forks_rows as rows
from tdxmig_model.model.forks_properties import GOALS, LEMMAS, PROPERTIES
from tdxmig_model.model.words import ALL_PROFILES

FORKS = System(
    name="forks",
    variables=rows.VARIABLES,
    steps=rows.EXCHANGES + rows.SOURCE_STEPS + rows.DESTINATION_STEPS,
    properties=PROPERTIES + LEMMAS,
    goals=GOALS,
    assumptions=(
        "MigTDs are attested and honest; a key is given to one destination, an answer is used once",
        "a MigTD reads its own key first, and a new exchange ends the one before it",
        "AES-256-GCM is an ideal AEAD: a token or bundle under a key was made with that key",
        "a TD that a destination took over begins no export of its own in this model",
        "keys are whole here; the words of a key are in the model of key words",
    ),
    profiles=ALL_PROFILES,
)
