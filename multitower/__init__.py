"""Fuse independently pretrained decoders into one model, by gated cross-attention.

>>> import multitower as mt
>>> from multitower.testing import tiny_tower          # stands for any pretrained decoder
>>> graph = mt.FusionGraph()
>>> graph.add_tower("speech", tiny_tower(seed=0), train="all")
>>> graph.add_tower("text", tiny_tower(seed=1))
>>> graph.add_link("speech", "text", interleave=(1, 1))
>>> graph.add_link("text", "speech", interleave=(1, 1))
>>> model = graph.compile()
>>> batch = mt.collate([[mt.Segment("speech", [0, 5, 6, 1]), mt.Segment("text", [0, 3, 1], target=True)]])
>>> sorted(model(**batch).losses)
['speech', 'text']
"""

from .checkpoint import load_tower
from .corruption import corrupt_history
from .cost import Estimate
from .draw import draw_graph
from .expansion import VocabularyExpansion
from .files import CheckpointError
from .fused import FusedModel
from .graph import FusionGraph
from .kept import KeptStates
from .logs import set_verbosity
from .modality import Modality
from .output import FusedOutput
from .packing import pack
from .pipeline import Pipeline
from .plugins import PluginError
from .spec import GraphError
from .stream import Segment, collate, to_device
from .tower import Tower, TowerError, TransformersTower

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Estimate",
    "FusedModel",
    "FusedOutput",
    "FusionGraph",
    "GraphError",
    "KeptStates",
    "Modality",
    "Pipeline",
    "PluginError",
    "Segment",
    "Tower",
    "TowerError",
    "TransformersTower",
    "VocabularyExpansion",
    "collate",
    "corrupt_history",
    "draw_graph",
    "load_tower",
    "pack",
    "set_verbosity",
    "to_device",
]
