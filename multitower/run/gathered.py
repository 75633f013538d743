"""Gather models that FSDP2 has sharded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")


def is_divided(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model or a part of it."""
    return bool(_divided(model))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all parameters of a sharded model on each process, for decoding or saving.

    All processes must enter and leave together; in between there is no communication. Changes to the weights
    are lost. Without FSDP2, do nothing.
    """
    divided = _divided(model)
    if not divided:
        yield
        return
    from torch.distributed.tensor import DTensor

    for each in divided:
        each.reshard()
    whole: dict[DTensor, nn.Parameter] = {}
    with ExitStack() as restore:
        for module in model.modules():
            parameters: dict[str, Any] = module._parameters
            for name, parameter in list(parameters.items()):
                if isinstance(parameter, DTensor):
                    if parameter not in whole:
                        full = parameter.full_tensor().detach()
                        whole[parameter] = nn.Parameter(full, parameter.requires_grad)
                    restore.callback(parameters.__setitem__, name, parameter)
                    parameters[name] = whole[parameter]
        for module in divided:
            _take_off(module, restore)
        with torch.no_grad():
            yield


def _divided(model: nn.Module) -> list[Any]:
    """Return the FSDP2 modules, without importing FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [each for each in model.modules() if isinstance(each, fsdp.FSDPModule)]


def _take_off(module: nn.Module, restore: ExitStack) -> None:
    """Remove the hooks and methods of FSDP2 from a module; shallow copies of it share its hooks."""
    restore.callback(setattr, module, "__class__", type(module))
    module.__class__ = type(module).__bases__[1]  # FSDP2's class breaks copy.copy, which decoding calls
    for name in HOOKS:
        hooks = getattr(module, name)
        restore.callback(hooks.update, dict(hooks))
        restore.callback(hooks.clear)
        kept = {key: hook for key, hook in hooks.items() if not _is_of_fsdp(hook)}
        hooks.clear()
        hooks.update(kept)
    for name, value in list(vars(module).items()):
        if _is_of_fsdp(getattr(value, "__func__", None)):
            restore.callback(vars(module).__setitem__, name, value)
            del vars(module)[name]


def _is_of_fsdp(function: Any) -> bool:
    code = getattr(function, "__globals__", getattr(getattr(function, "__func__", None), "__globals__", {}))
    return str(code.get("__name__", "")).startswith("torch.distributed.fsdp")
