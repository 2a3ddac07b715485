"""A system and an instance as plain Python functions, and as NumPy functions for bulk steps."""

from tdxmig_model.compile.bulk import Bulk
from tdxmig_model.compile.steps import Compiled, CompiledStep, Conjunct

__all__ = ["Bulk", "Compiled", "CompiledStep", "Conjunct"]
