"""Small grey images, as a modality of multitower."""

from .modality import ImageModality

__all__ = ["ImageModality"]
