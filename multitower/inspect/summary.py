"""A summary of a fused model as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..run.fusion import Fusion
from ..tower.peft_tower import base_model
from .openness import openness


def summarize(model: Fusion) -> dict[str, Any]:
    """Return the towers, links and sizes of a model as JSON-serialisable data.

    >>> from multitower.testing import tiny_model
    >>> summary = summarize(tiny_model())
    >>> summary["towers"]["text"]["layers"], summary["links"]["speech->text"]["taps"]
    (2, {'1-1': 0.0, '3-2': 0.0})

    Returns:
        "towers" by name, with class, number of layers, width, vocabulary size and source; "links" by name,
        with their options and how open each tap is (see ``openness``). Each of them, and the model, has its
        number of "parameters" and of "trained" ones. Shared parameters count in each tower or link, and once
        in the model.
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
