"""Set which parameters of a model are trained, and group them for an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..declare.graph import FusionGraph
from ..errors import TowerError
from ..tower import Tower
from ..tower.peft_tower import check_trained
from ..tower.probe import evaluated
from ..tower.weights import is_offloaded, quantisation_of
from .modules import check_trained_alike


def set_trained(
    graph: FusionGraph,
    towers: Mapping[str, Tower],
    before: FusionGraph | None = None,
    kept: Mapping[str, Tower] | None = None,
) -> None:
    """Set ``requires_grad`` on the towers' parameters as the graph declares.

    Towers in ``kept`` are left as they are; warnings that ``before``, their graph, raised are not repeated.
    """
    owners: dict[int, str] = {}
    for name, tower in towers.items():
        for parameter in tower.parameters():
            check_trained_alike(graph.towers[owners.setdefault(id(parameter), name)], graph.towers[name])
    kept = kept or {}
    settled = set(kept.values())
    for name, spec in graph.towers.items():
        tower = towers[name]
        if tower in settled:
            continue
        if spec.train == "all":
            _check_trainable(name, tower)
        if spec.train == "lora":
            check_trained(name, tower.native)
        else:
            tower.requires_grad_(spec.train == "all")
    warned = set() if before is None else {kept[name] for name in _fed(before)}
    for name in _fed(graph):
        if towers[name] not in warned:
            _warn_of_lost_gradients(name, towers[name])


def _fed(graph: FusionGraph) -> list[str]:
    """Return the names of towers with an input adapter or an incoming link."""
    targets = {link.target for link in graph.links.values()}
    return [name for name, spec in graph.towers.items() if spec.adapter is not None or name in targets]


def _check_trainable(name: str, tower: Tower) -> None:
    """Check that a tower's weights can be trained: neither quantised nor offloaded."""
    kind = quantisation_of(tower.native)
    if kind:
        raise TowerError(
            f"tower {name!r} is quantised ({kind}), so that its weights cannot be trained; load it without "
            "quantisation, or keep it frozen with train='none'"
        )
    if is_offloaded(tower.native):
        raise TowerError(
            f"tower {name!r} is offloaded by accelerate, which discards gradients; load it whole (without "
            "device_map or cpu_offload), or keep it frozen with train='none'"
        )


def _warn_of_lost_gradients(name: str, tower: Tower) -> None:
    """Warn if what feeds a quantised tower would get wrong gradients."""
    kind = quantisation_of(tower.native)
    barrier = _gradient_barrier(tower) if kind else ""
    if barrier:
        warnings.warn(
            f"tower {name!r} is quantised ({kind}) so that {barrier!r} passes no gradient on: the links and "
            "the adapter that feed it cannot be trained. Quantise weights only, not activations",
            stacklevel=5,
        )


def _gradient_barrier(tower: Tower) -> str:
    """Return the name of a module that blocks the gradient from its output to its input; empty if none does.

    Kernels that also quantise activations have no backward pass. Residual connections bypass them, so
    gradients still arrive, but wrong ones.
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
    try:
        with evaluated(tower), torch.enable_grad():
            hidden, context = tower.embed(torch.zeros(1, 2, dtype=torch.long, device=tower.device))
            hidden = hidden.detach().requires_grad_(True)
            hidden = tower.run_layers(hidden, context)
            tower.head(hidden, context)
    finally:
        for handle in handles:
            handle.remove()
    return next(iter(barriers), "")


def _owns_weights(module: nn.Module) -> bool:
    """Whether a module itself has weights; packed integers may be buffers."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(isinstance(each, nn.Parameter) or not each.is_floating_point() for each in own)


def parameter_groups(
    model: nn.Module,
    lr: float,
    rates: Mapping[str, float | Mapping[str, float] | None],
    gate_lr: float | None,
) -> list[dict[str, Any]]:
    """Return optimizer groups, one per learning rate, with and without weight decay; see ``FusedModel``."""
    unused = {(kind, name) for kind, given in rates.items() if isinstance(given, Mapping) for name in given}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    coarse: dict[str, torch.dtype] = {}
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, name, *_ = path.split(".")
        unused.discard((kind, name))
        if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
            coarse[f"model.{kind}[{name!r}]"] = parameter.dtype
        given = rates[kind]
        rate = given.get(name) if isinstance(given, Mapping) else given
        if kind != "towers" and path.endswith("gate"):
            rate = 10 * lr if gate_lr is None else gate_lr
        decays = parameter.dim() > 1
        groups.setdefault((lr if rate is None else rate, decays), []).append(parameter)
    if unused:
        named = ", ".join(f"{kind}: {name!r}" for kind, name in sorted(unused))
        raise ValueError(f"there is a learning rate for what has no trained parameters ({named})")
    for part, dtype in coarse.items():
        warnings.warn(
            f"{part} is trained in {dtype}, in which most small updates round to nothing: convert it by "
            f"{part}.float() before you make the optimizer, and train under torch.autocast (bf16=True)",
            stacklevel=3,
        )
    return [
        {"params": parameters, "lr": rate, **({} if decays else {"weight_decay": 0.0})}
        for (rate, decays), parameters in groups.items()
    ]
