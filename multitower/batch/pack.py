"""Batches with little or no padding: several examples of a stream one after the other in a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .collate import EXAMPLES, IGNORE, PADDING, Batch, Stream
from .places import positions


def pack(batch: Batch, *, one_row: bool = False) -> Batch:
    """Put several examples into a row, so that there is less padding.

    >>> import multitower as mt
    >>> rows = ([3, 5, 4, 6], [3, 4], [3, 7])
    >>> batch = mt.pack(mt.collate([[mt.Segment("text", tokens, target=True)] for tokens in rows]))
    >>> for key in ("tokens", "times", "labels", "examples"):
    ...     print(key, batch["streams"]["text"][key].tolist())
    tokens [[3, 5, 4, 6], [3, 4, 3, 7]]
    times [[0, 1, 2, 3], [0, 1, 0, 1]]
    labels [[-100, 5, 4, 6], [-100, 4, -100, 7]]
    examples [[0, 0, 0, 0], [1, 1, 2, 2]]

    No token reads another example's; losses and gradients are those of the padded batch, up to rounding. It
    saves work where lengths are unlike. Every tower must tell examples apart by their positions
    (``Tower.packs``).

    Args:
        batch: As ``collate`` gives it, with or without states that were kept.
        one_row: Whether all examples come into a single row, without any padding. Attention by sdpa then runs
            over all pairs of its tokens; flex_attention leaves out most of those that are closed (see
            ``FusedModel.set_attn_implementation``). Otherwise no row has more tokens, those of all towers
            together, than the longest example.

    Raises:
        ValueError: The batch is packed already, or is not one that ``collate`` gives.
    """
    if "streams" not in batch:
        raise ValueError(f"pack takes a batch as collate gives it, with 'streams', not {sorted(batch)}")
    streams = batch["streams"]
    for name, stream in streams.items():
        if EXAMPLES in stream:
            raise ValueError(f"stream {name!r} is packed already")
    lengths = torch.stack([stream["mask"].sum(1).cpu() for stream in streams.values()]).sum(0)
    rows = [list(range(len(lengths)))] if one_row else _fitted(lengths)
    return {**batch, "streams": {name: _packed(each, rows) for name, each in streams.items()}}


def _fitted(lengths: Tensor) -> list[list[int]]:
    """Put examples into rows of no more tokens than the longest has, each into the first where it fits."""
    rows: list[list[int]] = [[] for _ in lengths]
    filled, room = torch.zeros_like(lengths), lengths.max()
    for example in lengths.argsort(descending=True, stable=True).tolist():
        row = int((filled + lengths[example] <= room).int().argmax())
        rows[row].append(example)
        filled[row] += lengths[example]
    return sorted(sorted(row) for row in rows if row)


def _packed(stream: Stream, rows: Sequence[Sequence[int]]) -> Stream:
    mask = stream["mask"]
    numbers = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    packed = {
        key: pad_sequence(
            [torch.cat([value[example, mask[example]] for example in row]) for row in rows],
            batch_first=True,
            padding_value={**PADDING, EXAMPLES: len(mask)}.get(key, 0),
        )
        for key, value in {**stream, EXAMPLES: numbers}.items()
    }
    if "labels" in packed:  # the first token of an example is never predicted
        packed["labels"] = packed["labels"].masked_fill(positions(packed[EXAMPLES]) == 0, IGNORE)
    return packed
