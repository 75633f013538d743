"""Plugins: modalities and tower loaders of other packages, found by entry points."""

from .entry_points import Plugin, describe, installed, modality_class, tower_loader
from .modality import Modality, check_tokens

__all__ = ["Modality", "Plugin", "check_tokens", "describe", "installed", "modality_class", "tower_loader"]
