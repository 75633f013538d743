"""Text for `multitower`: bytes, or any transformers tokenizer."""

from .modality import TextModality

__all__ = ["TextModality"]
