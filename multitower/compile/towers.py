"""Towers that are one model: weights shared, told apart by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import nn

from ..declare.spec import TowerSpec
from ..errors import GraphError
from ..tower import Tower, as_tower
from ..tower.peft_tower import with_adapters


def load_towers(
    specs: Mapping[str, TowerSpec],
    modules: Mapping[str, nn.Module],
    present: Mapping[str, Tower] | None = None,
    *,
    empty: bool = False,
) -> dict[str, Tower]:
    """Return the tower of each declaration; what is one model is loaded once.

    Two towers are one model when the same module was given for both, or when both stay frozen and come from
    the same path or Hub id. Those that are present are taken as they are. If ``empty``, what a folder or a
    Hub id holds is made on the meta device, without reading weights.
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
    """Return which towers are the model of an earlier one, and of which.

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
    """Check that two towers that share weights are declared to learn in the same way."""
    if (one.train, one.peft) != (other.train, other.peft):
        how = f"train={one.train!r} and train={other.train!r}"
        if one.train == other.train:
            how = f"unlike peft configs and train={one.train!r}"
        raise GraphError(
            f"towers {one.name!r} and {other.name!r} share their weights, but are declared with {how}; "
            "declare both alike, or give one of them a copy of the model"
        )


def _key(spec: TowerSpec, module: nn.Module | None) -> object:
    """Return what towers that are one model have in common, or None for a model of its own."""
    if module is not None:
        return id(module.native if isinstance(module, Tower) else module)
    return spec.source if spec.train == "none" else None
