"""Digests of a model's tensors, to tell whether it is still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

WHOLE, SAMPLED = "sha256:", "sampled:"
"""How a fingerprint begins that is made of all values, and one that is made of some."""


def fingerprint(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of tensors: names, shapes, dtypes and all values, whatever their order and device.

    >>> from multitower.testing import tiny_tower
    >>> one, same, other = (fingerprint(tiny_tower(seed).state_dict()) for seed in (1, 1, 2))
    >>> one == same, one == other
    (True, False)

    Tensors are read one after the other: what an iterator gives need never be in memory as a whole.
    """
    if isinstance(tensors, Mapping):
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(_digests, tensors.keys(), tensors.values()))
    else:
        digests = [_digests(*entry) for entry in tensors]
    every = sorted(digest for each in digests for digest in each)
    return WHOLE + hashlib.sha256("\n".join(every).encode()).hexdigest()


def sampled_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a quick digest of tensors: names, shapes, dtypes and up to 64 values or a few more of each.

    Checkpoints of format version 1 hold such.
    """
    digest = hashlib.sha256()
    for name, tensor in (part for entry in sorted(tensors.items()) for part in plain_parts(*entry)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        digest.update(_bytes(flat[:: max(1, len(flat) // 64)]))
    return SAMPLED + digest.hexdigest()[:32]


def same_fingerprint(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], expected: str) -> bool:
    """Return whether tensors have a fingerprint, of whichever of the two kinds.

    >>> tensors = {"a": torch.zeros(2)}
    >>> same_fingerprint(tensors, fingerprint(tensors)), same_fingerprint(tensors, "sampled:0")
    (True, False)
    """
    if expected.startswith(SAMPLED):
        return sampled_fingerprint(dict(tensors)) == expected
    return fingerprint(tensors) == expected


def plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Return the plain tensors, by name, of which a packed one is made; a plain tensor is its only part.

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
    """Return whether a tensor is of another library's class that holds several plain ones."""
    foreign = type(tensor).__module__.partition(".")[0] != "torch"
    return foreign and hasattr(tensor, "__tensor_flatten__")


def _digests(name: str, tensor: Tensor) -> list[str]:
    digests = []
    for key, part in plain_parts(name, tensor):
        digest = hashlib.sha256(f"{tuple(part.shape)} {part.dtype} ".encode())
        digest.update(_bytes(part))
        digests.append(f"{key} {digest.hexdigest()}")
    return digests


def _bytes(tensor: Tensor) -> Any:
    """Return the values of a tensor as a buffer, which is no copy where that can be."""
    return tensor.detach().reshape(-1).cpu().contiguous().view(torch.uint8).numpy()
