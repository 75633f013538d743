"""What is special about models with quantised weights, whichever library quantised them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def quantisation_of(model: nn.Module) -> str:
    """Say what a model's quantised weights are; empty if it has none.

    >>> quantisation_of(nn.Linear(2, 2))
    ''
    >>> import torch
    >>> quantisation_of(nn.Linear(2, 2).to(torch.float8_e4m3fn))
    'float8_e4m3fn'
    """
    for parameter in model.parameters():
        if _is_packed(parameter):
            return type(parameter).__name__
        if not parameter.is_floating_point() or parameter.element_size() == 1:
            return str(parameter.dtype).removeprefix("torch.")
    quantizer = getattr(model, "hf_quantizer", None)
    return "" if quantizer is None else type(quantizer).__name__


def can_be_stored(model: Any) -> bool:
    """Say whether a checkpoint of a model can be written that gives the same weights back."""
    if not quantisation_of(model):
        return True
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and bool(quantizer.is_serializable())


def plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Give the plain tensors, by name, of which a packed one is made; a plain tensor is its only part.

    >>> import torch
    >>> [(name, tuple(part.shape)) for name, part in plain_parts("weight", torch.zeros(2, 3))]
    [('weight', (2, 3))]
    """
    if not _is_packed(tensor):
        yield name, tensor
        return
    keys, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # what makes it packed
    for key in keys:
        yield from plain_parts(f"{name}.{key}", getattr(tensor, key))


def _is_packed(tensor: Tensor) -> bool:
    """Whether a tensor is of another library's class that holds several plain ones."""
    foreign = type(tensor).__module__.partition(".")[0] != "torch"
    return foreign and hasattr(tensor, "__tensor_flatten__")
