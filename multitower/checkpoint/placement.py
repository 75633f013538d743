"""Device and dtype of a loaded model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..tower import Tower
from ..tower.weights import is_offloaded, quantisation_of

DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device]


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that was named; None if each tensor keeps its own."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is None or dtype == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize == 1:
        raise ValueError(f"dtype={dtype!r}: give a floating point dtype, as torch.bfloat16, or 'auto'")
    return found


def as_devices(device_map: DeviceMap | None, towers: list[str]) -> dict[str, torch.device]:
    """Return the device of each tower that ``device_map`` places."""
    if device_map is None:
        return {}
    places = device_map if isinstance(device_map, Mapping) else dict.fromkeys(towers, device_map)
    if unknown := set(places) - set(towers):
        raise ValueError(f"device_map={sorted(unknown)}: the checkpoint has the towers {', '.join(towers)}")
    try:
        return {name: torch.empty(0, device=place).device for name, place in places.items()}
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"device_map={device_map!r}: give a device that is there, or one for each tower; a model that is "
            f"spread over several is given as a module, with towers={{...}} ({error})"
        ) from error


def check_movable(name: str, tower: Tower, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Check that a tower can be moved to a device and converted to a dtype."""
    kind = quantisation_of(tower.native)
    if kind and dtype is not None:
        raise CheckpointError(
            f"tower {name!r} is quantised ({kind}), so it cannot be converted; leave dtype out"
        )
    if is_offloaded(tower.native) and (dtype is not None or device is not None):
        raise CheckpointError(f"tower {name!r} is offloaded; give dtype and device_map where you load it")


@torch.no_grad()
def move(module: nn.Module, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Move a model to a device and convert it to a dtype, one tensor at a time; None changes nothing.

    Non-persistent buffers, such as rotary tables, keep their dtype. Tensors of transformers'
    ``_keep_in_fp32_modules`` are converted to float32.
    """
    if dtype is not None:
        saved, kept = set(module.state_dict()), _kept_in_float32(module, dtype)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point() and (name in saved or isinstance(tensor, nn.Parameter)):
                wanted = torch.float32 if any(re.search(each, name) for each in kept) else dtype
                tensor.data = tensor.data.to(device=device, dtype=wanted)
    if device is not None:
        module.to(device)
    config: Any = getattr(module, "config", None)
    if dtype is not None and hasattr(config, "dtype"):
        config.dtype = dtype


def _kept_in_float32(module: Any, dtype: torch.dtype) -> set[str]:
    kept: set[str] = set()
    for each in module.modules():
        if dtype == torch.float16:
            kept |= set(getattr(each, "_keep_in_fp32_modules", None) or ())
        if dtype in (torch.float16, torch.bfloat16):
            kept |= set(getattr(each, "_keep_in_fp32_modules_strict", None) or ())
    return kept
