"""Every model of the project, in the order in which verdicts are given."""

from __future__ import annotations

from tdxmig_model.model.control_properties import CONTROL
from tdxmig_model.model.leaf import LEAF
from tdxmig_model.model.lifecycle import LIFECYCLE
from tdxmig_model.model.order import ORDER

SYSTEMS = (LIFECYCLE, LEAF, ORDER, CONTROL)
