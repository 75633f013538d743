"""The modality octets for multitower."""

from .modality import OctetsModality

__all__ = ["OctetsModality"]
