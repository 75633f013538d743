"""Noise in what a tower is given of its own past, so that it learns to look at what it reads of others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .collate import IGNORE, Batch


def corrupt_history(
    batch: Batch, rates: Mapping[str, float], *, generator: torch.Generator | None = None
) -> Batch:
    """Replace some tokens of target segments by others; what is to be predicted stays as it is.

    >>> import torch, multitower as mt
    >>> example = [mt.Segment("text", [0, 7, 1]), mt.Segment("speech", [0, 5, 6, 7, 8, 1], target=True)]
    >>> noise = torch.Generator().manual_seed(1)
    >>> batch = mt.batch.corrupt_history(mt.collate([example]), {"speech": 0.5}, generator=noise)
    >>> batch["streams"]["speech"]["tokens"].tolist(), batch["streams"]["speech"]["labels"].tolist()
    ([[0, 6, 8, 7, 5, 1]], [[-100, 5, 6, 7, 8, 1]])

    A tower that is trained on its own true past learns to continue that, and hardly looks at its source;
    where pairs are few, it learns them by heart. Noise in that past makes the source worth reading. Use it in
    training alone. The first token of a segment and the last stay. Source: word dropout in Bowman et al.,
    "Generating Sentences from a Continuous Space" (arXiv 1511.06349); here tokens are replaced, not dropped.

    Args:
        batch: As ``collate`` gives it, packed or not.
        rates: By stream the share of tokens that are replaced, from 0 to 1, each by another of the batch's
            own target tokens of that stream, drawn at random.
        generator: Draws the noise, on the CPU; torch's own unless given.

    Raises:
        ValueError: A rate is not between 0 and 1, or a stream has no labels.
    """
    streams = dict(batch["streams"])
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(
                f"stream {name!r}: the share of tokens to replace is {rate!r}, not between 0 and 1"
            )
        if name not in streams:
            continue
        if "labels" not in streams[name]:
            raise ValueError(f"stream {name!r} has no labels; corrupt_history takes batches to train on")
        tokens, labels = streams[name]["tokens"], streams[name]["labels"]
        streams[name] = {**streams[name], "tokens": _noisy(tokens, labels != IGNORE, rate, generator)}
    return {**batch, "streams": streams}


def _noisy(tokens: Tensor, predicted: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    inner = predicted.clone()
    inner[:, :-1] &= predicted[:, 1:]
    inner[:, -1:] = False
    pool = tokens[inner]
    if not len(pool):
        return tokens
    drawn = torch.rand(tokens.shape, generator=generator).to(tokens.device) < rate
    others = torch.randint(len(pool), tokens.shape, generator=generator).to(tokens.device)
    return torch.where(inner & drawn, pool[others], tokens)
