"""What a fusion adds to its towers: made for a graph, or taken over from a model that has it already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .link import GatedCrossAttention, InputAdapter
from .schedule import Schedule, Tap
from .spec import GraphError, LinkSpec, TowerSpec
from .tower import Tower

if TYPE_CHECKING:
    from .fused import FusedModel


def make_adapters(
    specs: Mapping[str, TowerSpec], towers: Mapping[str, Tower], kept: FusedModel | None
) -> dict[str, nn.Module]:
    """Give the input adapter of each tower that is declared to have one.

    >>> from multitower.testing import tiny_tower
    >>> specs = {"text": TowerSpec("text", None, adapter="residual"), "speech": TowerSpec("speech", None)}
    >>> list(make_adapters(specs, {"text": tiny_tower(), "speech": tiny_tower()}, None))
    ['text']

    Args:
        specs: The towers as declared.
        towers: The towers.
        kept: A model whose adapters are taken over, where it has them.
    """
    have: Mapping[str, nn.Module] = {} if kept is None else dict(kept.adapters.items())
    return {
        name: have[name]
        if name in have
        else InputAdapter(towers[name].width, spec.adapter).to(**_placement(towers[name]))
        for name, spec in specs.items()
        if spec.adapter is not None
    }


def make_links(
    specs: Mapping[str, LinkSpec], schedule: Schedule, towers: Mapping[str, Tower], kept: FusedModel | None
) -> dict[str, dict[str, nn.Module]]:
    """Give the modules of each link by the keys of its taps; new ones are the identity.

    Args:
        specs: The links as declared.
        schedule: What was made of them.
        towers: The towers.
        kept: A model whose taps are taken over, where it has them.

    Raises:
        GraphError: The heads do not fit the target's width.
    """
    have = {} if kept is None else {tap: kept.tap(tap) for tap in kept.schedule.taps}
    links: dict[str, dict[str, nn.Module]] = {name: {} for name in specs}
    for tap in schedule.taps:
        module = have[tap] if tap in have else _make_tap(tap, specs[tap.link], towers)
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
            feed_forward=spec.feed_forward,
        )
    except ValueError as error:
        raise GraphError(f"link {tap.link!r}: {error}") from error
    return module.to(**_placement(target))


def _placement(tower: Tower) -> dict[str, Any]:
    """Where a tower's own new modules belong: its device and the dtype in which it computes.

    On the meta device they stay there, to be filled.
    """
    dtypes = (each.dtype for each in tower.parameters() if each.is_floating_point() and each.itemsize > 1)
    default = torch.get_default_device()
    device = default if default.type == "meta" else tower.device
    return {"device": device, "dtype": next(dtypes, torch.get_default_dtype())}
