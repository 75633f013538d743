"""What is special about models with quantised weights, whichever library quantised them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..storage.fingerprint import is_packed


def quantisation_of(model: nn.Module) -> str:
    """Return what a model's quantised weights are; empty if it has none.

    >>> quantisation_of(nn.Linear(2, 2))
    ''
    >>> import torch
    >>> quantisation_of(nn.Linear(2, 2).to(torch.float8_e4m3fn))
    'float8_e4m3fn'
    """
    for parameter in model.parameters():
        if is_packed(parameter):
            return type(parameter).__name__
        if not parameter.is_floating_point() or parameter.element_size() == 1:
            return str(parameter.dtype).removeprefix("torch.")
    quantizer = getattr(model, "hf_quantizer", None)
    return "" if quantizer is None else type(quantizer).__name__


def can_be_stored(model: Any) -> bool:
    """Return whether a checkpoint of a model can be written that gives the same weights back."""
    if not quantisation_of(model):
        return True
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and bool(quantizer.is_serializable())
