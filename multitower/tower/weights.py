"""Quantised weights, and weights offloaded by accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..storage.fingerprint import is_packed


def quantisation_of(model: nn.Module) -> str:
    """Return the name of a model's quantised dtype or quantizer; empty if it is not quantised."""
    for parameter in model.parameters():
        if is_packed(parameter):
            return type(parameter).__name__
        if not parameter.is_floating_point() or parameter.element_size() == 1:
            return str(parameter.dtype).removeprefix("torch.")
    quantizer = getattr(model, "hf_quantizer", None)
    return "" if quantizer is None else type(quantizer).__name__


def can_be_stored(model: Any) -> bool:
    """Whether a checkpoint of a model can restore the same weights."""
    if not quantisation_of(model):
        return True
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and bool(quantizer.is_serializable())


def execution_device(model: nn.Module) -> torch.device:
    """Return the device of a model's input, also if its weights are offloaded."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    executed = (getattr(hook, "execution_device", None) for _, _, hook in _hooks(model))
    return next((torch.device(each) for each in executed if each is not None), device)


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of a model are loaded only while it runs."""
    return any(getattr(hook, "offload", False) for _, _, hook in _hooks(model))


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Return a model's state dict including offloaded weights."""
    state: dict[str, Any] = model.state_dict()
    for path, module, hook in _hooks(model):
        if getattr(hook, "offload", False):
            for name in module.state_dict():
                key = f"{path}.{name}" if path else name
                if isinstance(state[key], Tensor) and state[key].is_meta and name in hook.weights_map:
                    state[key] = hook.weights_map[name]
    return state


def _hooks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Yield accelerate's hooks with the paths of their modules, and the modules."""
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            yield path, module, each
