"""Explicit search of a finite instance: every state breadth first, or directed to a formula."""

from tdxmig_model.explore.directed import Directed, directed
from tdxmig_model.explore.search import Exploration, TraceStep, explore

__all__ = ["Directed", "Exploration", "TraceStep", "directed", "explore"]
