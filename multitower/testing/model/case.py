"""What checks of models have in common: open and closed copies, their streams, what may be seen."""

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
    """Return the tolerance of a fused model: that of its coarsest dtype, since its towers read each other.

    >>> from multitower.testing import tiny_model
    >>> rounding(tiny_model())
    0.0001
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if any(isinstance(model.tower(name), TransformersTower) for name in model.towers):
        dtypes.add(torch.float32)  # many of them take norms and rotary tables in it, whatever their weights
    return max(map(tolerance, dtypes))


def native_logits(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what ``unimodal`` gives as a function from tokens to logits."""
    model: Any = module
    if isinstance(base_model(model), Tower):
        return lambda tokens: model(tokens)
    return lambda tokens: model(input_ids=tokens, use_cache=False).logits


def closed(model: FusedModel) -> FusedModel:
    """Return a copy in eval mode with every gate closed."""
    return open_links(copy.deepcopy(model).eval(), scale=0.0)


def opened(model: FusedModel) -> FusedModel:
    """Return a copy in eval mode with every gate open, each by another width."""
    return open_links(copy.deepcopy(model).eval(), seed=1)


def streams_of(model: FusedModel, examples: Sequence[Example]) -> dict[str, Stream]:
    """Collate examples, each stream to where its tower takes it."""
    return {
        name: {key: value.to(model.tower(name).device) for key, value in stream.items()}
        for name, stream in collate(examples)["streams"].items()
    }


def remembered(model: FusedModel, name: str, stream: Stream) -> list[tuple[slice, slice]]:
    """Return the parts of a stream, rows and tokens, each of which its tower attends to by itself."""
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
    """Run one tower with its input adapter, and without any link."""
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
    """Return, for each row and place in the target's stream, the places in the source's that it may read.

    Written down from what is promised, not from how it is done: strictly earlier, real, within the window.
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
