"""Explicit search: every reachable state of a finite instance, breadth first."""

from tdxmig_model.explore.search import Exploration, TraceStep, explore

__all__ = ["Exploration", "TraceStep", "explore"]
