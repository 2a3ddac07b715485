"""What the models do not state of the threat model of TDX migration, and why.

Such a property is neither proved nor refuted by `verify`.  ``specs/rules.toml`` has the same list.
"""

from __future__ import annotations

from dataclasses import dataclass

BYTES = (
    "a record is authentic as a whole or not in the models, by the assumption of an ideal AEAD; "
    "which bytes of it are under the MAC is a matter of the formats"
)
KEYS = "keys are names in the models, and where a copy of one is left cannot be said of a name"
EXCHANGE = (
    "the messages, modes and attestation of MigTD's key exchange are outside the models, which "
    "begin with the keys that it writes"
)
POLICY = "policies and measurements are evaluated by MigTD, of which the models have only the keys"
BINDING = "the models have one TD for each service TD, and none can mistake its target"


@dataclass(frozen=True, slots=True)
class NotStated:
    """A property of the threat model without a formula here."""

    identifier: str
    sentence: str
    reason: str

    def as_json(self) -> dict[str, str]:
        """The property as plain data."""
        return {"id": self.identifier, "sentence": self.sentence, "reason": self.reason}


NOT_STATED = (
    NotStated("P32", "Every header field of an accepted bundle is authenticated.", BYTES),
    NotStated("P33", "No working key is left after a session.", KEYS),
    NotStated("P34", "The peer of the key exchange is the attested one.", EXCHANGE),
    NotStated("P35", "No message of one mode is accepted in another.", EXCHANGE),
    NotStated("P36", "Each message of an exchange takes effect at most once.", EXCHANGE),
    NotStated("P37", "Keys are written to the TD they were meant for.", BINDING),
    NotStated("P38", "Keys are released only if both policies accept.", POLICY),
)
