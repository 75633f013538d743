"""A modality of multitower for tunes in ABC notation."""

from .modality import MusicModality

__all__ = ["MusicModality"]
