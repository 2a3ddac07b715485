"""Explicit search of a finite instance: every state breadth first, directed to a formula,
or one actor after the other."""

from tdxmig_model.explore.directed import Directed, directed
from tdxmig_model.explore.phases import Phased, box_of, in_phases
from tdxmig_model.explore.search import Exploration, Graph, TraceStep, explore, graph, moves_of

__all__ = [
    "Directed",
    "Exploration",
    "Graph",
    "Phased",
    "TraceStep",
    "box_of",
    "directed",
    "explore",
    "graph",
    "in_phases",
    "moves_of",
]
