"""The codec between raw data and the tokens of one tower."""

from __future__ import annotations

import os
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class Modality(Protocol):
    """What a modality plugin offers: raw data to the tokens of one tower, and back.

    >>> import multitower as mt
    >>> from multitower_text import TextModality
    >>> text = TextModality()                     # bytes: needs no files
    >>> isinstance(text, mt.Modality)
    True
    >>> text.decode(text.encode("two towers"))
    'two towers'

    The core never imports a plugin; anything with these members is a modality.
    """

    @property
    def vocab_size(self) -> int:
        """Number of token ids, begin and end included; every id is in ``range(vocab_size)``."""
        ...

    @property
    def begin(self) -> int:
        """Id of the token that opens every encoded segment."""
        ...

    @property
    def end(self) -> int:
        """Id of the token that closes every encoded segment."""
        ...

    def encode(self, raw: Any) -> torch.Tensor:
        """Give the tokens of one piece of raw data: int64, shape (length,), begin and end included."""
        ...

    def decode(self, tokens: torch.Tensor) -> Any:
        """Give the raw data of tokens of shape (length,), with or without begin and end."""
        ...

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write all that ``from_pretrained`` needs into a folder: JSON and safetensors only."""
        ...

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Modality:
        """Load what ``save_pretrained`` wrote."""
        ...
