"""Examples as lists of segments, and batches of them."""

from .collate import Batch, Example, Segment, collate, to_device
from .corrupt import corrupt_history
from .pack import pack

__all__ = ["Batch", "Example", "Segment", "collate", "corrupt_history", "pack", "to_device"]
