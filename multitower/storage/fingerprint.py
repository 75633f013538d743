"""Fingerprints of a model's tensors, to detect changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

SAMPLE = 64
"""Number of values sampled at the start, the middle and the end of a tensor."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, shapes, dtypes and all values; order and device do not matter.

    >>> from multitower.testing import tiny_tower
    >>> one, same, other = (fingerprint(tiny_tower(seed).state_dict()) for seed in (1, 1, 2))
    >>> one == same, one == other
    (True, False)
    """
    return _digest(tensors, lambda tensor: [tensor.reshape(-1)])


def sampled_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a cheap digest of names, shapes, dtypes, and three runs of up to 64 values of each tensor.

    It detects other weights while reading only a few pages of each tensor; it may miss single changed values.
    For a tensor sharded by FSDP2, it is the digest of the full tensor; all processes must call this together,
    and exchange only the sample.
    """
    return _digest(tensors, lambda tensor: [_sample(tensor)])


def plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors inside a packed (for instance quantised) one; a plain tensor yields itself.

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
    """Whether a tensor is of another library's wrapper subclass, which holds several plain tensors."""
    foreign = type(tensor).__module__.partition(".")[0] != "torch"
    return foreign and hasattr(tensor, "__tensor_flatten__")


def _digest(tensors: Mapping[str, Tensor], pieces: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in (part for entry in sorted(tensors.items()) for part in plain_parts(*entry)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        for piece in pieces(tensor.detach()):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return f"sha256:{digest.hexdigest()}"


def _sample(tensor: Tensor) -> Tensor:
    size = tensor.numel()
    middle = size // 2
    if hasattr(tensor, "full_tensor"):
        runs = ((0, SAMPLE), (middle, middle + SAMPLE), (max(0, size - SAMPLE), size))
        return _values_at(tensor, torch.cat([torch.arange(begin, min(end, size)) for begin, end in runs]))
    flat = tensor.reshape(-1)
    return torch.cat([flat[:SAMPLE], flat[middle : middle + SAMPLE], flat[-SAMPLE:]])


def _values_at(tensor: Any, places: Tensor) -> Tensor:
    """Return values of a DTensor by their flat indices; all processes must call this together.

    Each process contributes the values that it holds, so only these are sent. A tensor not sharded by rows
    (FSDP2's default) is gathered in full.

    Returns:
        (count,), in the dtype of the tensor, on its device.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, by_rows = tensor.device_mesh, Shard(0)
    if tensor.placements.count(by_rows) != 1 or not all(
        each == by_rows or each.is_replicate() for each in tensor.placements
    ):
        flat: Tensor = tensor.full_tensor().reshape(-1)
        return flat[places.to(flat.device)]
    local = tensor.to_local().reshape(-1)
    _, first = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    own = places - first[0] * (tensor.numel() // len(tensor))
    here = (own >= 0) & (own < len(local))
    values = local.new_zeros(len(places))
    values[here.to(local.device)] = local[own[here].to(local.device)]
    sum_of = [Partial() if each == by_rows else Replicate() for each in tensor.placements]
    summed: Tensor = DTensor.from_local(values.view(torch.uint8), mesh, sum_of).full_tensor()
    return summed.view(tensor.dtype)
