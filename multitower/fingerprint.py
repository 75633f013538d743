"""A short digest of a model's tensors, to tell whether it is still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Give a short digest of tensors: names, shapes, dtypes and a sample of the values.

    >>> from multitower.testing import tiny_tower
    >>> one, same, other = (fingerprint(tiny_tower(seed).state_dict()) for seed in (1, 1, 2))
    >>> one == same, one == other
    (True, False)
    """
    digest = hashlib.sha256()
    for name, tensor in (part for entry in sorted(tensors.items()) for part in plain_parts(*entry)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)].cpu()
        digest.update(bytes(sample.contiguous().view(torch.uint8).tolist()))
    return digest.hexdigest()[:32]


def plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Give the plain tensors, by name, of which a packed one is made; a plain tensor is its only part.

    >>> import torch
    >>> [(name, tuple(part.shape)) for name, part in plain_parts("weight", torch.zeros(2, 3))]
    [('weight', (2, 3))]
    """
    if not is_packed(tensor):
        yield name, tensor
        return
    keys, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # what makes it packed
    for key in keys:
        yield from plain_parts(f"{name}.{key}", getattr(tensor, key))


def is_packed(tensor: Tensor) -> bool:
    """Say whether a tensor is of another library's class that holds several plain ones."""
    foreign = type(tensor).__module__.partition(".")[0] != "torch"
    return foreign and hasattr(tensor, "__tensor_flatten__")
