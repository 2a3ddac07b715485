"""Explicit search: every reachable state of a finite instance, breadth first."""

from tdxmig_model.explore.search import Exploration, Graph, TraceStep, explore, graph

__all__ = ["Exploration", "Graph", "TraceStep", "explore", "graph"]
