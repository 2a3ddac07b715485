"""Every model of the project, in the order in which verdicts are given."""

from __future__ import annotations

from tdxmig_model.model.control_properties import CONTROL
from tdxmig_model.model.forks import FORKS
from tdxmig_model.model.key_words import KEY_WORDS
from tdxmig_model.model.keys import KEYS
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.memory import MEMORY
from tdxmig_model.model.order import ORDER
from tdxmig_model.model.terms import TERMS

SYSTEMS = (LIFECYCLE, LEAF, ORDER, MEMORY, CONTROL, KEYS, KEY_WORDS, TERMS, FORKS)
