"""Shared code of the checks of models: copies with open and closed gates, streams, visible tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...batch.collate import Example, Stream, collate
from ...declare.spec import LinkSpec
from ...model import FusedModel
from ...tower import Tower, TransformersTower
from ...tower.peft_tower import base_model
from ..compare import tolerance
from ..tiny import open_links

Streams = Mapping[str, Stream]


def rounding(model: FusedModel) -> float:
    """Return a model's tolerance: that of its coarsest dtype, because its towers read each other.

    >>> from multitower.testing import tiny_model
    >>> rounding(tiny_model())
    0.0001
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if any(isinstance(model.tower(name), TransformersTower) for name in model.towers):
        dtypes.add(torch.float32)  # many compute norms and rotary tables in float32, whatever their dtype
    return max(map(tolerance, dtypes))


def native_logits(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return a function from tokens to the logits of a model from ``unimodal``."""
    model: Any = module
    if isinstance(base_model(model), Tower):
        return lambda tokens: model(tokens)
    return lambda tokens: model(input_ids=tokens, use_cache=False).logits


def closed(model: FusedModel) -> FusedModel:
    """Return a copy in eval mode whose links and adapters are the identity."""
    return open_links(copy.deepcopy(model).eval(), scale=0.0)


def opened(model: FusedModel) -> FusedModel:
    """Return a copy in eval mode whose links and adapters contribute, at random."""
    return open_links(copy.deepcopy(model).eval(), seed=1)


def streams_of(model: FusedModel, examples: Sequence[Example]) -> dict[str, Stream]:
    """Collate examples, with each stream on its tower's device."""
    return {
        name: {key: value.to(model.tower(name).device) for key, value in stream.items()}
        for name, stream in collate(examples)["streams"].items()
    }


def remembered(model: FusedModel, name: str, stream: Stream) -> list[tuple[slice, slice]]:
    """Return the parts (rows, tokens) of a stream to which its tower attends separately."""
    if model.graph.towers[name].memory == "all":
        return [(slice(None), slice(None))]
    parts = []
    for row, (times, mask) in enumerate(zip(stream["times"].tolist(), stream["mask"].tolist(), strict=True)):
        start = 0
        for place in range(1, len(times) + 1):
            if place == len(times) or not mask[place] or times[place] != times[place - 1] + 1:
                parts += [(slice(row, row + 1), slice(start, place))] if mask[start] else []
                start = place
    return parts


def alone(model: FusedModel, name: str, stream: Stream) -> Tensor:
    """Return the logits of one tower with its input adapter, without links."""
    tower: Any = model.tower(name)
    tokens = stream["tokens"]
    if model.graph.towers[name].memory == "all":
        embedded, context = tower.embed(tokens)
    else:
        positions = torch.zeros_like(tokens)
        for part in remembered(model, name, stream):
            positions[part] = torch.arange(tokens[part].shape[1], device=tokens.device)
        embedded, context = tower.embed(tokens, positions=positions)
    hidden = model.adapt(name, embedded)
    for layer in range(1, tower.depth + 1):
        hidden = tower.layer(layer, hidden, context)
    logits: Tensor = tower.head(hidden, context)
    return logits


def visible(streams: Streams, link: LinkSpec) -> list[list[list[int]]]:
    """Return, for each row and target token, the indices of the source tokens that it may attend to.

    This follows the specification, not the implementation: strictly earlier, not padding, within the window.
    """
    source, target = streams[link.source], streams[link.target]
    keys = [
        [(place, time) for place, (time, real) in enumerate(zip(times, mask, strict=True)) if real]
        for times, mask in zip(source["times"].tolist(), source["mask"].tolist(), strict=True)
    ]
    return [
        [
            [
                place
                for place, then in row
                if then < now and (link.window is None or now - then <= link.window)
            ]
            if real
            else []
            for now, real in zip(times, mask, strict=True)
        ]
        for row, times, mask in zip(keys, target["times"].tolist(), target["mask"].tolist(), strict=True)
    ]
