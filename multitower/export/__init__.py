"""A fused model as programs that run without this library."""

from .decoder import DecoderPrograms, export_decoder
from .tower import export_tower

__all__ = ["DecoderPrograms", "export_decoder", "export_tower"]
