"""Noise in the tokens of training batches, against overfitting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .collate import IGNORE, STATES, Batch, Stream


def corrupt_history(
    batch: Batch, rates: Mapping[str, float], *, generator: torch.Generator | None = None
) -> Batch:
    """Replace some input tokens of target segments at random; labels do not change.

    >>> import torch, multitower as mt
    >>> example = [mt.Segment("text", [0, 7, 1]), mt.Segment("speech", [0, 5, 6, 7, 8, 1], target=True)]
    >>> noise = torch.Generator().manual_seed(1)
    >>> batch = mt.batch.corrupt_history(mt.collate([example]), {"speech": 0.5}, generator=noise)
    >>> batch["streams"]["speech"]["tokens"].tolist(), batch["streams"]["speech"]["labels"].tolist()
    ([[0, 6, 8, 7, 5, 1]], [[-100, 5, 6, 7, 8, 1]])

    A tower that is trained with its own true past learns to continue that, and hardly attends to its source;
    with few examples, it memorises them. Noise in the past makes the source useful. Use this only in
    training. The first and the last token of a segment never change. Source: word dropout in Bowman et al.,
    "Generating Sentences from a Continuous Space" (arXiv 1511.06349); here tokens are replaced, not dropped.

    Args:
        batch: A batch from ``collate``, packed or not.
        rates: For each stream, the share of tokens to replace, from 0 to 1, each with a random target token
            of that stream in the batch.
        generator: A generator on the CPU; torch's default if None.

    Raises:
        ValueError: A rate is not between 0 and 1, or a stream has no labels.
    """
    streams = dict(batch["streams"])
    for name, rate in _checked(rates, streams):
        if "labels" not in streams[name]:
            raise ValueError(f"stream {name!r} has no labels; corrupt_history takes batches to train on")
        tokens, predicted = streams[name]["tokens"], streams[name]["labels"] != IGNORE
        inner = predicted & _next(predicted)
        streams[name] = {**streams[name], "tokens": _noisy(tokens, inner, rate, generator)}
    return {**batch, "streams": streams}


def corrupt_sources(
    batch: Batch, rates: Mapping[str, float], *, generator: torch.Generator | None = None
) -> Batch:
    """Replace some tokens of non-target segments at random.

    >>> import torch, multitower as mt
    >>> example = [mt.Segment("speech", [0, 5, 6, 7, 8, 1]), mt.Segment("text", [0, 7, 1], target=True)]
    >>> noise = torch.Generator().manual_seed(1)
    >>> batch = mt.batch.corrupt_sources(mt.collate([example]), {"speech": 0.5}, generator=noise)
    >>> batch["streams"]["speech"]["tokens"].tolist()
    [[0, 6, 8, 7, 5, 1]]

    With few examples, and sources with many redundant tokens such as speech, this keeps a tower from
    memorising them: with 250 pairs of spoken digits it halves the errors of recognition
    (``docs/learning.md``). It harms where each source token counts, as in a text to be read aloud. Use it
    only in training. Tokens equal to the first or last token of any row never change, so begin and end tokens
    are kept. Source: masked inputs in SpecAugment (arXiv 1904.08779); here tokens are replaced.

    Args:
        batch: A batch from ``collate``, packed or not.
        rates: For each stream, the share of non-target tokens to replace, from 0 to 1, each with another one
            of that stream in the batch, at random.
        generator: A generator on the CPU; torch's default if None.

    Raises:
        ValueError: A rate is not between 0 and 1, or a stream has kept states, which come from other tokens.
    """
    streams = dict(batch["streams"])
    for name, rate in _checked(rates, streams):
        stream = streams[name]
        if rate and any(key.startswith(STATES) for key in stream):
            raise ValueError(
                f"stream {name!r} has kept states, which are read in place of its tokens: noise in "
                "these would change nothing; leave out the noise, or the kept states"
            )
        tokens, given = stream["tokens"], stream["mask"]
        if "labels" in stream:
            learnt = stream["labels"] != IGNORE
            given = given & ~learnt & ~_next(learnt)
        counts = stream["mask"].sum(1, keepdim=True)
        edges = torch.cat([tokens[:, :1], tokens.gather(1, (counts - 1).clamp(min=0))], 1)
        edges = edges[counts[:, 0] > 0]  # rows without tokens hold padding
        inner = given & ~torch.isin(tokens, edges)
        streams[name] = {**stream, "tokens": _noisy(tokens, inner, rate, generator)}
    return {**batch, "streams": streams}


def _checked(rates: Mapping[str, float], streams: Mapping[str, Stream]) -> Iterator[tuple[str, float]]:
    """Yield the rates of streams that are in the batch."""
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(
                f"stream {name!r}: the share of tokens to replace is {rate!r}, not between 0 and 1"
            )
        if name in streams:
            yield name, rate


def _next(flags: Tensor) -> Tensor:
    """Shift rows of flags to the left by one, filling with False."""
    return torch.nn.functional.pad(flags[:, 1:], (0, 1))


def _noisy(tokens: Tensor, inner: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Replace a share of the tokens in ``inner``, each by a random one of these."""
    pool = tokens[inner]
    if not len(pool):
        return tokens
    drawn = torch.rand(tokens.shape, generator=generator).to(tokens.device) < rate
    others = torch.randint(len(pool), tokens.shape, generator=generator).to(tokens.device)
    return torch.where(inner & drawn, pool[others], tokens)
