"""What a fusion adds to its towers: made for a graph, or taken over from a model that has it already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..declare.spec import LinkSpec, TowerSpec
from ..errors import GraphError
from ..link.cross_attention import GatedCrossAttention, InputAdapter
from ..tower import Tower
from .schedule import Schedule, Tap


def make_adapters(
    specs: Mapping[str, TowerSpec], towers: Mapping[str, Tower], kept: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Return the input adapter of each tower that is declared to have one."""
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
    """Return the modules of each link by the keys of its taps; new ones are the identity."""
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
        )
    except ValueError as error:
        raise GraphError(f"link {tap.link!r}: {error}") from error
    return module.to(**_placement(target))


def _placement(tower: Tower) -> dict[str, Any]:
    """Where a tower's own new modules belong: its device, and the dtype in which it computes, or float32.

    What is trained needs that: in bfloat16, steps of 1e-4 leave most weights where they are. On the meta
    device they stay there, to be filled.
    """
    dtypes = (each.dtype for each in tower.parameters() if each.is_floating_point() and each.itemsize > 1)
    default = torch.get_default_device()
    device = default if default.type == "meta" else tower.device
    dtype = torch.promote_types(next(dtypes, torch.get_default_dtype()), torch.float32)
    return {"device": device, "dtype": dtype}
