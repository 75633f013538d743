"""Inspect a fused model: drawings, costs, and how much its links contribute."""

from .cost import Cost, Estimate
from .draw import draw_attention, draw_estimate, draw_graph, draw_history
from .estimate import estimate
from .openness import openness
from .summary import summarize

__all__ = [
    "Cost",
    "Estimate",
    "draw_attention",
    "draw_estimate",
    "draw_graph",
    "draw_history",
    "estimate",
    "openness",
    "summarize",
]
