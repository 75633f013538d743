"""Noise in the tokens of training batches, so that what pairs there are go further."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .collate import IGNORE, Batch, Stream


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
    """Replace some tokens of the segments that are given, not learnt, by others.

    >>> import torch, multitower as mt
    >>> example = [mt.Segment("speech", [0, 5, 6, 7, 8, 1]), mt.Segment("text", [0, 7, 1], target=True)]
    >>> noise = torch.Generator().manual_seed(1)
    >>> batch = mt.batch.corrupt_sources(mt.collate([example]), {"speech": 0.5}, generator=noise)
    >>> batch["streams"]["speech"]["tokens"].tolist()
    [[0, 6, 8, 7, 5, 1]]

    Where pairs are few and a source says a thing in many tokens, as speech does, this keeps a tower from
    learning pairs by heart: with 250 pairs of spoken digits it halves the errors of recognition
    (``docs/learning.md``). Where each token of a source counts, as those of a text do when it is read aloud,
    it harms. Use it in training alone. Tokens equal to the first or the last of a row stay, so that begin and
    end do. Source: masked inputs in SpecAugment (arXiv 1904.08779); here tokens are replaced.

    Args:
        batch: As ``collate`` gives it, packed or not.
        rates: By stream the share of its given tokens that are replaced, from 0 to 1, each by another of the
            batch's own given tokens of that stream, drawn at random.
        generator: Draws the noise, on the CPU; torch's own unless given.

    Raises:
        ValueError: A rate is not between 0 and 1.
    """
    streams = dict(batch["streams"])
    for name, rate in _checked(rates, streams):
        stream = streams[name]
        tokens, given = stream["tokens"], stream["mask"]
        if "labels" in stream:
            learnt = stream["labels"] != IGNORE
            given = given & ~learnt & ~_next(learnt)
        last = stream["mask"].sum(1, keepdim=True).sub(1).clamp(min=0)
        edges = torch.cat([tokens[:, :1], tokens.gather(1, last)])
        inner = given & ~torch.isin(tokens, edges)
        streams[name] = {**stream, "tokens": _noisy(tokens, inner, rate, generator)}
    return {**batch, "streams": streams}


def _checked(rates: Mapping[str, float], streams: Mapping[str, Stream]) -> Iterator[tuple[str, float]]:
    """Yield the rates of those streams that a batch has."""
    for name, rate in rates.items():
        if not 0 <= rate <= 1:
            raise ValueError(
                f"stream {name!r}: the share of tokens to replace is {rate!r}, not between 0 and 1"
            )
        if name in streams:
            yield name, rate


def _next(flags: Tensor) -> Tensor:
    """Return for each place of a row what stands at the next one; False at the last."""
    return torch.nn.functional.pad(flags[:, 1:], (0, 1))


def _noisy(tokens: Tensor, inner: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Replace a share of the inner tokens, each by another inner one."""
    pool = tokens[inner]
    if not len(pool):
        return tokens
    drawn = torch.rand(tokens.shape, generator=generator).to(tokens.device) < rate
    others = torch.randint(len(pool), tokens.shape, generator=generator).to(tokens.device)
    return torch.where(inner & drawn, pool[others], tokens)
