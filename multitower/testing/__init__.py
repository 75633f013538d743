"""Tiny random towers and models, and checks for authors of towers; none needs a download."""

from .tiny import TinyTower, open_gates, tiny_model, tiny_tower
from .towers import check_tower, tower_report

__all__ = ["TinyTower", "check_tower", "open_gates", "tiny_model", "tiny_tower", "tower_report"]
