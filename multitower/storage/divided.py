"""A few values of a tensor that is divided over processes, without making it whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def values_at(tensor: Any, places: Tensor) -> Tensor:
    """Return values of a DTensor by their places in the flat whole; its processes call this together.

    Each process sends those that it has, so that no more is sent than is asked for. A tensor that is divided
    otherwise than by rows, as FSDP2 divides unless told otherwise, is made whole for it.

    Args:
        tensor: The DTensor.
        places: Of integers, (count,), on the CPU.

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
