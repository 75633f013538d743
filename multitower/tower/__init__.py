"""Towers: pretrained decoders, run layer by layer."""

from ..errors import TowerError
from .base import Tower
from .load import as_tower
from .shell import Inject
from .transformers import TransformersTower

__all__ = ["Inject", "Tower", "TowerError", "TransformersTower", "as_tower"]
