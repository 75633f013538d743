"""What a fused model consists of, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..run.fusion import Fusion
from ..tower.peft_tower import base_model
from .openness import openness


def summarize(model: Fusion) -> dict[str, Any]:
    """Return the towers, links and sizes of a model as plain data, which JSON can hold.

    >>> from multitower.testing import tiny_model
    >>> summary = summarize(tiny_model())
    >>> summary["towers"]["text"]["layers"], summary["links"]["speech->text"]["taps"]
    (2, {'1-1': 0.0, '3-2': 0.0})

    Returns:
        "towers" and "links" by name, the first with the class of each decoder, its layers, width, vocabulary
        and source, the second with the options of each link and how open each of its taps is (see
        ``openness``); and for each of them, as for the whole, "parameters" and how many of these are
        "trained". A parameter that several share is counted in each of them, and once in the whole.
    """
    opened = openness(model)
    towers: dict[str, dict[str, Any]] = {}
    for name, spec in model.graph.towers.items():
        tower = model.tower(name)
        towers[name] = {
            "decoder": type(base_model(tower.native)).__name__,
            "layers": tower.depth,
            "width": tower.width,
            "vocabulary": tower.vocab_size,
            "source": spec.source,
            "train": spec.train,
            "adapter": spec.adapter,
            **_sizes([tower.native, *([model.adapters[name]] if name in model.adapters else [])]),
        }
        if name in model.adapters:
            towers[name]["adapter open"] = opened[f"{name} adapter"]
    links = {}
    for name, link in model.graph.links.items():
        taps = {tap.key: module for tap, module in model.taps().items() if tap.link == name}
        options = dataclasses.asdict(link)
        del options["name"], options["taps"]
        links[name] = {
            **options,
            **_sizes(taps.values()),
            "taps": {key: opened[f"{name} {key}"] for key in taps},
        }
    return {"towers": towers, "links": links, **_sizes([model])}


def _sizes(modules: Iterable[nn.Module]) -> dict[str, int]:
    parameters = {id(each): each for module in modules for each in module.parameters()}.values()
    return {
        "parameters": sum(each.numel() for each in parameters),
        "trained": sum(each.numel() for each in parameters if each.requires_grad),
    }
