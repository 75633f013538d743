"""Towers: pretrained decoders, seen layer by layer."""

from .base import Inject, Tower, TowerError
from .load import as_tower
from .transformers import TransformersTower

__all__ = ["Inject", "Tower", "TowerError", "TransformersTower", "as_tower"]
