"""Models with frozen sources, batches for them, and the cached states in a batch."""

from __future__ import annotations

import random

import torch

import multitower as mt
from models import segment
from multitower.batch.collate import Batch
from multitower.testing import open_links, tiny_tower


def fused(
    dtype: torch.dtype = torch.float32,
    *,
    speech: torch.nn.Module | None = None,
    adapter: str | None = None,
    train: str = "none",
    layers: tuple[int, ...] = (1, 3),
) -> mt.FusedModel:
    """Link a trained tower to two frozen sources, to "speech" by two links."""
    graph = mt.FusionGraph()
    speech = speech or tiny_tower(1, depth=4, width=12, vocab_size=14).to(dtype)
    graph.add_tower("speech", speech, adapter=adapter, train=train)
    graph.add_tower("image", tiny_tower(2, depth=2, width=6).to(dtype), adapter=None)
    graph.add_tower("text", tiny_tower(3, depth=3, width=8, vocab_size=20).to(dtype), train="all")
    graph.add_link("speech", "text", taps=[(layer, 1 + layer % 3) for layer in layers])
    graph.add_link("speech", "text", taps=[(layers[0], 1)], name="again", position="rotary")
    graph.add_link("image", "text", taps=[(2, 3)], window=5)
    torch.manual_seed(5)
    return open_links(graph.compile(), seed=7)


def row(seed: int) -> list[mt.Segment]:
    """Return a random row; lengths differ, and some rows have no speech."""
    draw = random.Random(seed)
    parts = [
        segment("speech", *(draw.randint(2, 13) for _ in range(draw.randint(0, 9)))),
        segment("text", *(draw.randint(2, 19) for _ in range(draw.randint(1, 7))), target=True),
        segment("image", *(draw.randint(2, 15) for _ in range(draw.randint(0, 5)))),
        segment("text", *(draw.randint(2, 19) for _ in range(draw.randint(1, 7))), target=True),
    ]
    return parts if draw.random() < 0.8 else parts[1:]


def data(batches: int = 4, rows: int = 3) -> list[Batch]:
    return [mt.collate([row(rows * number + each) for each in range(rows)]) for number in range(batches)]


def brought(batch: Batch) -> set[str]:
    return {f"{name} {key}" for name, each in batch["streams"].items() for key in each if key[:5] == "layer"}
