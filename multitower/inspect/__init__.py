"""What a fusion looks like, what it costs, and what its links contribute."""

from .cost import Cost, Estimate
from .draw import draw_graph
from .estimate import estimate

__all__ = ["Cost", "Estimate", "draw_graph", "estimate"]
