"""The modules of a fused model: its towers, and the links and input adapters that it adds."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..declare.spec import LinkSpec, TowerSpec
from ..errors import GraphError
from ..link.cross_attention import GatedCrossAttention, InputAdapter
from ..tower import Tower, as_tower
from ..tower.peft_tower import with_adapters
from .schedule import Schedule, Tap


def load_towers(
    specs: Mapping[str, TowerSpec],
    modules: Mapping[str, nn.Module],
    present: Mapping[str, Tower] | None = None,
    *,
    empty: bool = False,
) -> dict[str, Tower]:
    """Return the tower of each declaration, loading each model once.

    Two towers share a model if they were declared with the same module, or if both are frozen and have the
    same path or Hub id. Towers in ``present`` are not loaded. If ``empty``, models from folders and Hub ids
    are created on the meta device, without reading weights.
    """
    towers = dict(present or {})
    first: dict[object, str] = {}
    for name, tower in towers.items():
        first.setdefault(id(tower.native), name)
        first.setdefault(_key(specs[name], None), name)
    for name, spec in specs.items():
        if name in towers:
            continue
        key = _key(spec, modules.get(name))
        if key is not None and key in first:
            check_trained_alike(specs[first[key]], spec)
            towers[name] = towers[first[key]]
            continue
        prepare = functools.partial(with_adapters, declared=spec.peft) if spec.train == "lora" else None
        towers[name] = as_tower(name, modules.get(name, spec.source), prepare, empty=empty)
        first[key] = name
    return {name: towers[name] for name in specs}


def shared_with(towers: Mapping[str, Tower]) -> dict[str, str]:
    """Return the towers that share the model of an earlier one, and the latter's name.

    >>> from multitower.testing import tiny_tower
    >>> one, other = tiny_tower(), tiny_tower()
    >>> shared_with({"a": one, "b": other, "c": one})
    {'c': 'a'}
    """
    first: dict[int, str] = {}
    return {
        name: first[id(tower.native)]
        for name, tower in towers.items()
        if first.setdefault(id(tower.native), name) != name
    }


def check_trained_alike(one: TowerSpec, other: TowerSpec) -> None:
    """Check that two towers with shared weights are declared with the same training."""
    if (one.train, one.peft) != (other.train, other.peft):
        how = f"train={one.train!r} and train={other.train!r}"
        if one.train == other.train:
            how = f"unlike peft configs and train={one.train!r}"
        raise GraphError(
            f"towers {one.name!r} and {other.name!r} share their weights, but are declared with {how}; "
            "declare both alike, or give one of them a copy of the model"
        )


def make_adapters(
    specs: Mapping[str, TowerSpec], towers: Mapping[str, Tower], kept: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return the input adapter of each tower that is declared with one."""
    return {
        name: kept[name]
        if name in kept
        else InputAdapter(towers[name].width, spec.adapter).to(**_placement(towers[name]))
        for name, spec in specs.items()
        if spec.adapter is not None
    }


def make_links(
    specs: Mapping[str, LinkSpec],
    schedule: Schedule,
    towers: Mapping[str, Tower],
    kept: Mapping[Tap, GatedCrossAttention],
) -> dict[str, dict[str, nn.Module]]:
    """Return each link's modules by the keys of its taps; new ones are initialised as the identity."""
    links: dict[str, dict[str, nn.Module]] = {name: {} for name in specs}
    for tap in schedule.taps:
        module = kept[tap] if tap in kept else _make_tap(tap, specs[tap.link], towers)
        links[tap.link][tap.key] = module
    return links


def _make_tap(tap: Tap, spec: LinkSpec, towers: Mapping[str, Tower]) -> GatedCrossAttention:
    source, target = towers[tap.source], towers[tap.target]
    try:
        module = GatedCrossAttention(
            source.width,
            target.width,
            heads=spec.heads,
            gate=spec.gate,
            projection=spec.projection,
            position=spec.position,
            pace=spec.pace,
            feed_forward=spec.feed_forward,
            relative=spec.relative,
        )
    except ValueError as error:
        raise GraphError(f"link {tap.link!r}: {error}") from error
    return module.to(**_placement(target))


def _placement(tower: Tower) -> dict[str, Any]:
    """Return device and dtype for a tower's links and input adapters: the tower's own, but at least float32.

    In bfloat16, steps of 1e-4 would leave most weights unchanged. Under ``torch.device("meta")``, the device
    is meta, for values that are loaded later.
    """
    dtypes = (each.dtype for each in tower.parameters() if each.is_floating_point() and each.itemsize > 1)
    default = torch.get_default_device()
    device = default if default.type == "meta" else tower.device
    dtype = torch.promote_types(next(dtypes, torch.get_default_dtype()), torch.float32)
    return {"device": device, "dtype": dtype}


def _key(spec: TowerSpec, module: nn.Module | None) -> object:
    """Return a key that towers with a shared model have in common; None for a model of its own."""
    if module is not None:
        return id(module.native if isinstance(module, Tower) else module)
    return spec.source if spec.train == "none" else None
