"""A modality of multitower for small grey images."""

from .modality import ImageModality

__all__ = ["ImageModality"]
