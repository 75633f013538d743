"""A fused pair and a third tower to add to it, for tests of surgery."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import multitower as mt
from models import EXAMPLES, pair, segment
from multitower.testing import tiny_tower

WITH_MUSIC = [
    [segment("speech", 5, 6, 7), segment("music", 4, 9), segment("text", 9, 3, target=True)],
    [segment("music", 2, 3, 4), segment("text", 4, 5), segment("speech", 9, 3, 2, target=True)],
    [segment("music", 8, target=True)],
]


def music(**options: int) -> nn.Module:
    return tiny_tower(**{"seed": 11, "depth": 3, "width": 4, "vocab_size": 12, **options})


def with_music(model: mt.FusedModel, tower: nn.Module | None = None, **options: str) -> mt.FusedModel:
    """Add a tower, linked in both directions with both towers of ``pair``."""
    graph = model.graph
    graph.add_tower("music", tower or music(), **options)
    for other in ("speech", "text"):
        graph.add_link("music", other, interleave=1)
        graph.add_link(other, "music", interleave=1, projection="linear")
    return model.extend(graph)


def without(examples: list[list[mt.Segment]], *names: str) -> dict:
    streams = mt.collate(examples)["streams"]
    return {name: stream for name, stream in streams.items() if name not in names}


def assert_same(logits: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        assert torch.equal(logits[name], values), name


def steps(model: mt.FusedModel, count: int = 5, examples: list[list[mt.Segment]] = EXAMPLES) -> None:
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2))
    for _ in range(count):
        optimizer.zero_grad()
        model(**mt.collate(examples)).loss.backward()
        optimizer.step()


def trained_pair() -> mt.FusedModel:
    model = pair(gates=True, train="all").train()
    steps(model)
    return model.eval()
