"""Fuse independently pretrained decoders into one model, by cross-attention.

>>> import multitower as mt
>>> from multitower.testing import tiny_tower          # stands for any pretrained decoder
>>> graph = mt.FusionGraph()
>>> graph.add_tower("speech", tiny_tower(seed=0), train="all")
>>> graph.add_tower("text", tiny_tower(seed=1))
>>> graph.add_link("speech", "text", interleave=(1, 1))
>>> graph.add_link("text", "speech", interleave=(1, 1))
>>> model = graph.compile()
>>> batch = mt.collate([[mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 3, 2], target=True)]])
>>> sorted(model(**batch).losses)
['speech', 'text']
"""

from . import baseline, batch, errors, inspect, plugins, train
from .base.logs import set_verbosity
from .base.version import __version__ as __version__
from .batch.collate import Segment, collate
from .batch.pack import pack
from .checkpoint.load import load_tower
from .declare.graph import FusionGraph
from .model import FusedModel
from .pipeline.pipeline import Pipeline
from .plugins.modality import Modality
from .tower import Tower, TransformersTower
from .train.resume import load_training, save_training

__all__ = [
    "FusedModel",
    "FusionGraph",
    "Modality",
    "Pipeline",
    "Segment",
    "Tower",
    "TransformersTower",
    "collate",
    "load_tower",
    "load_training",
    "pack",
    "save_training",
    "set_verbosity",
]

_PUBLIC_MODULES = [baseline, batch, errors, inspect, plugins, train]


def __dir__() -> list[str]:
    return [*__all__, *(module.__name__.rpartition(".")[2] for module in _PUBLIC_MODULES), "__version__"]
