"""Which towers can be trained, and which let gradients through to what feeds them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TowerError
from .base import Tower
from .offload import is_offloaded
from .quantised import quantisation_of


def check_trainable(name: str, tower: Tower) -> None:
    """Check that the weights of a tower can be trained.

    Raises:
        TowerError: They are quantised, or offloaded.
    """
    kind = quantisation_of(tower.native)
    if kind:
        raise TowerError(
            f"tower {name!r} is quantised ({kind}), so that its weights cannot be trained; load it without "
            "quantisation, or keep it frozen with train='none'"
        )
    if is_offloaded(tower.native):
        raise TowerError(
            f"tower {name!r} is offloaded by accelerate, which throws gradients away; load it whole (without "
            "device_map or cpu_offload), or keep it frozen with train='none'"
        )


def warn_of_lost_gradients(name: str, tower: Tower) -> None:
    """Warn where what feeds a quantised tower would be trained with wrong gradients."""
    kind = quantisation_of(tower.native)
    barrier = _gradient_barrier(tower) if kind else ""
    if barrier:
        warnings.warn(
            f"tower {name!r} is quantised ({kind}) so that {barrier!r} passes no gradient on: the links and "
            "the adapter that feed it cannot be trained. Quantise weights only, not activations",
            stacklevel=5,
        )


def _gradient_barrier(tower: Tower) -> str:
    """Name a module of a tower that passes no gradient from what it gives to what it takes; empty if all do.

    Kernels that quantise activations as well as weights have no backward pass. Residual connections go round
    them, so that gradients still arrive, and are wrong.
    """
    barriers: list[str] = []

    def note(name: str, args: tuple[Any, ...], output: Any) -> None:
        if (
            args
            and isinstance(args[0], Tensor)
            and isinstance(output, Tensor)
            and args[0].requires_grad
            and not output.requires_grad
        ):
            barriers.append(name)

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: note(name, args, output))
        for name, module in tower.native.named_modules()
        if _owns_weights(module)
    ]
    mode = tower.training
    tower.eval()
    try:
        with torch.enable_grad():
            hidden, context = tower.embed(torch.zeros(1, 2, dtype=torch.long, device=tower.device))
            hidden = hidden.detach().requires_grad_(True)
            for index in range(1, tower.depth + 1):
                hidden = tower.layer(index, hidden, context)
            tower.head(hidden, context)
    finally:
        tower.train(mode)
        for handle in handles:
            handle.remove()
    return next(iter(barriers), "")


def _owns_weights(module: nn.Module) -> bool:
    """Whether a module has weights of its own; packed integers may be buffers."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(isinstance(each, nn.Parameter) or not each.is_floating_point() for each in own)
