"""What the models do not state: the rest of the threat model of TDX migration, and why.

A property of this list is neither proved nor refuted by `verify`.  One that a model states after
all is left out of the answer, so the list never hides a verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

CONTENT = "what a page, field or vCPU holds is not in the model"
KEYS = "keys are names in the model; the AEAD is assumed to be ideal"
EXCHANGE = "the key exchange of MigTD is outside the model; it is assumed"
BYTES = "lists and buffers are bytes, which the model does not have; the parsers are tested"
CALLS = "a call is one step or a sequence of steps of the model; locks are in the software module"
PATHS = "a path property, which no invariant states"
COPIES = "the model has one destination for each session key"


@dataclass(frozen=True, slots=True)
class NotStated:
    """A property of the threat model without a formula here."""

    identifier: str
    sentence: str
    reason: str

    def as_json(self) -> dict[str, str]:
        """The property as plain data."""
        return {"id": self.identifier, "sentence": self.sentence, "reason": self.reason}


_ALL = (
    NotStated("P3", "An accepted abort token means that its maker failed for ever.", COPIES),
    NotStated("P4", "At most one destination takes a source session over.", COPIES),
    NotStated("P5", "A source that takes its TD back has lost and changed nothing.", CONTENT),
    NotStated("P6", "OP_STATE moves only as its table says.", "true of every row as written"),
    NotStated("P7", "A session starts with fresh epoch, counters, streams and keys.", KEYS),
    NotStated("P8", "Bundles are accepted in order and without gaps on each stream.", CALLS),
    NotStated("P9", "An accepted bundle is of this session, direction and stream.", KEYS),
    NotStated("P11", "The version is latched for a whole session.", CONTENT),
    NotStated("P13", "No page on the destination is older than on the paused source.", CONTENT),
    NotStated("P15", "A failed or dropped export leaves no trace that counts.", CONTENT),
    NotStated("P16", "A page exported while live can no longer be written.", CONTENT),
    NotStated("P17", "A page is imported again only over one of an earlier epoch.", CONTENT),
    NotStated("P18", "After the start token each page is imported at most once.", CONTENT),
    NotStated("P19", "No private page comes from anywhere but the source.", CONTENT),
    NotStated("P20", "The imported state is the exported state.", CONTENT),
    NotStated("P21", "During an unfinished immutable import nothing else changes it.", CALLS),
    NotStated("P22", "Every required field was written by the import.", CONTENT),
    NotStated("P23", "Attributes and XFAM stay sane across a migration.", CONTENT),
    NotStated("P24", "The list parser reads nothing outside its list.", BYTES),
    NotStated("P25", "Nothing decrypted is visible before its MAC verified.", BYTES),
    NotStated("P26", "No undefined byte leaves the TDX module.", BYTES),
    NotStated("P27", "No key is used twice with one IV.", KEYS),
    NotStated("P28", "The two directions never share a key.", KEYS),
    NotStated("P29", "A decryption key serves one session.", KEYS),
    NotStated("P30", "Both keys of a session come from one exchange.", EXCHANGE),
    NotStated("P31", "A key is one written value, not a mixture.", EXCHANGE),
    NotStated("P32", "Every header field is authenticated.", BYTES),
    NotStated("P33", "No key is left after a session.", KEYS),
    NotStated("P34", "The peer of the key exchange is the attested one.", EXCHANGE),
    NotStated("P35", "No message of one mode is accepted in another.", EXCHANGE),
    NotStated("P36", "Each message of an exchange takes effect at most once.", EXCHANGE),
    NotStated("P37", "Keys are written to the TD they were meant for.", EXCHANGE),
    NotStated("P38", "Keys are released only if both policies accept.", EXCHANGE),
    NotStated("P39", "The binding to a service TD does not change on the way.", EXCHANGE),
    NotStated("P40", "A failed call changes nothing.", CALLS),
    NotStated("P41", "A resumed call is the call that was interrupted.", CALLS),
    NotStated("P42", "Shared memory is read once.", BYTES),
    NotStated("P43", "OP_STATE is stable during a leaf.", CALLS),
    NotStated("P44", "Locks are taken in order and released.", CALLS),
    NotStated("P45", "Honest hosts without loss complete the migration.", PATHS),
    NotStated("P46", "No state is stuck.", PATHS),
    NotStated("P47", "A failed migration can be repeated.", PATHS),
    NotStated("P48", "What the guest could accept it can still accept.", CONTENT),
    NotStated("P49", "No counter wraps.", "integers are unbounded in the model"),
)


def not_stated(stated: Iterable[str]) -> list[NotStated]:
    """The properties of the threat model that are not among the stated ones."""
    known = set(stated)
    return [p for p in _ALL if p.identifier not in known]
