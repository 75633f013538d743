"""Examples as lists of segments, and their batches."""

from .collate import Batch, Example, Segment, collate, count_targets, to_device
from .corrupt import corrupt_history, corrupt_sources
from .pack import pack
from .places import measure_pace

__all__ = [
    "Batch",
    "Example",
    "Segment",
    "collate",
    "corrupt_history",
    "corrupt_sources",
    "count_targets",
    "measure_pace",
    "pack",
    "to_device",
]
