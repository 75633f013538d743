"""Tunes in ABC notation, as a modality of multitower."""

from .modality import MusicModality

__all__ = ["MusicModality"]
