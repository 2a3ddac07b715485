"""Texts for other tools: a finite instance of a system as TLA+ and Promela, the wire for Wireshark.

The first two have exactly the states of `explore` for the same sizes and ceilings: every row is
one atomic step, and what `expr.finite` clips is part of the text.  SMT-LIB, the unbounded export,
is not here: it is printed from the encoding of `smt`.
"""

from tdxmig_model.export.promela import promela
from tdxmig_model.export.tla import module_name, tla, tla_config
from tdxmig_model.export.wireshark import wireshark

__all__ = ["module_name", "promela", "tla", "tla_config", "wireshark"]
