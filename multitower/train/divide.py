"""Shard fused models with FSDP2, with units derived from the graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from ..run.fusion import Fusion
from ..tower import Tower

Frozen = Literal["root", "per_layer", "replicate"]
POLICIES = ("root", "per_layer", "replicate")
METHODS = {"tower": ("embed", "head", "head_at"), "tap": ("read", "weights"), "model": ("run",)}


def shard(
    model: Fusion,
    mesh: DeviceMesh,
    *,
    frozen: Frozen = "per_layer",
    mixed_precision: MixedPrecisionPolicy | None = None,
    **options: Any,
) -> Fusion:
    """Shard a model over a device mesh, in place, by ``torch.distributed.fsdp.fully_shard``.

    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> from multitower.testing import tiny_model
    >>> model = shard(tiny_model(), init_device_mesh("cuda", (8,)))     # doctest: +SKIP

    Each layer of a tower, each tap and each input adapter is a unit, gathered when it runs; the rest of a
    tower (embeddings, norm, head, tied or not) is one more. If dtypes differ within a unit, as with float32
    adapters on a bfloat16 model, the parameters of each dtype are a unit of their own.

    Args:
        model: The model. Create the optimizer after this call, since parameters are replaced.
        mesh: A device mesh with one dimension, or two for hybrid sharding.
        frozen: How to treat frozen towers: "per_layer" shards them like the others; "root" puts all of them
            into the model's root unit, gathered once per step and kept until its end; "replicate" keeps a
            full copy on every process, without communication.
        mixed_precision: The dtypes of computation and of gradient reduction.
        options: Other arguments of ``fully_shard``, such as ``reshard_after_forward`` or ``offload_policy``.

    Returns:
        The model.

    Raises:
        ValueError: ``frozen`` is none of these.
    """
    if frozen not in POLICIES:
        raise ValueError(f"frozen={frozen!r} is none of {', '.join(map(repr, POLICIES))}")
    if mixed_precision is not None:
        options["mp_policy"] = mixed_precision
    ignored: set[nn.Parameter] = set()
    for name, tower in _towers(model):
        if model.graph.towers[name].train == "none" and frozen != "per_layer":
            if frozen == "replicate":
                ignored.update(tower.parameters())
            continue
        layers = list(_layers(tower))
        for layer in layers:
            _divide(layer, mesh, options)
        _divide(tower, mesh, options)
        for method in (*METHODS["tower"], *(() if layers else ("layer",))):
            register_fsdp_forward_method(tower, method)
    for module in (*model.taps().values(), *model.adapters.values()):
        _divide(module, mesh, options)
        for method in METHODS["tap"]:
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)
    _divide(model, mesh, {**options, "ignored_params": ignored})
    for method in METHODS["model"]:
        register_fsdp_forward_method(model, method)
    return model


def _towers(model: Fusion) -> Iterator[tuple[str, Tower]]:
    """Yield each tower once, under its first name."""
    seen: set[int] = set()
    for name in model.towers:
        tower = model.tower(name)
        if id(tower) not in seen:
            seen.add(id(tower))
            yield name, tower


def _layers(tower: Tower) -> Iterator[nn.Module]:
    """Yield the layers of a tower, if it records the path of their list."""
    path = getattr(tower, "path", None)
    if path is not None:
        yield from tower.get_submodule(f"model.{path}").children()


def _divide(module: nn.Module, mesh: DeviceMesh, options: dict[str, Any]) -> None:
    """Make a module a unit; parameters not of its predominant dtype become units of their own first."""
    sizes: dict[torch.dtype, int] = {}
    ignored = options.get("ignored_params", set())
    for parameter in module.parameters():
        if not isinstance(parameter, DTensor) and parameter not in ignored:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    most = max(sizes, key=sizes.__getitem__, default=None)
    for dtype in sizes:
        if dtype != most:
            owners = [
                each
                for each in module.modules()
                if any(
                    own.dtype == dtype and not isinstance(own, DTensor) and own not in ignored
                    for own in each.parameters(recurse=False)
                )
            ]
            fully_shard(owners, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)
