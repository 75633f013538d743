"""Export fused models as programs that need only torch."""

from .decoder import DecoderPrograms, export_decoder
from .tower import export_tower

__all__ = ["DecoderPrograms", "export_decoder", "export_tower"]
