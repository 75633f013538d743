"""Packed batches: several examples per row, with little or no padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .collate import EXAMPLES, IGNORE, PADDING, Batch, Stream
from .places import positions


def pack(batch: Batch, *, one_row: bool = False) -> Batch:
    """Pack several examples into each row, to reduce padding.

    >>> import multitower as mt
    >>> rows = ([3, 5, 4, 6], [3, 4], [3, 7])
    >>> batch = mt.pack(mt.collate([[mt.Segment("text", tokens, target=True)] for tokens in rows]))
    >>> for key in ("tokens", "times", "labels", "examples"):
    ...     print(key, batch["streams"]["text"][key].tolist())
    tokens [[3, 5, 4, 6], [3, 4, 3, 7]]
    times [[0, 1, 2, 3], [0, 1, 0, 1]]
    labels [[-100, 5, 4, 6], [-100, 4, -100, 7]]
    examples [[0, 0, 0, 0], [1, 1, 2, 2]]

    No token attends to another example's; losses and gradients equal those of the padded batch, up to
    rounding. Packing pays off if lengths differ. Every tower must support it (``Tower.packs``).

    Args:
        batch: A batch from ``collate``, with or without cached states.
        one_row: Whether to put all examples into a single row, without any padding. SDPA then computes scores
            for all pairs of its tokens; FlexAttention skips most of the masked ones (see
            ``FusedModel.set_attn_implementation``). Otherwise, no row has more tokens, counted over all
            towers, than the longest example.

    Raises:
        ValueError: The batch is already packed, or is not from ``collate``.
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
    """Assign examples to rows of at most the longest example's number of tokens, by first fit decreasing."""
    rows: list[list[int]] = [[] for _ in lengths]
    filled, room = torch.zeros_like(lengths), lengths.max()
    for example in lengths.argsort(descending=True, stable=True).tolist():
        row = int((filled + lengths[example] <= room).int().argmax())
        rows[row].append(example)
        filled[row] += lengths[example]
    return sorted(sorted(row) for row in rows if row)


def _packed(stream: Stream, rows: Sequence[Sequence[int]]) -> Stream:
    mask, padding = stream["mask"], {**PADDING, EXAMPLES: len(stream["mask"])}
    numbers = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)

    def joined(value: Tensor, fill: int) -> Tensor:
        if not mask.any():  # towers cannot run on no column at all
            return value.new_full((len(rows), 1, *value.shape[2:]), fill)
        parts = [torch.cat([value[example, mask[example]] for example in row]) for row in rows]
        return pad_sequence(parts, batch_first=True, padding_value=fill)

    packed = {key: joined(value, padding.get(key, 0)) for key, value in {**stream, EXAMPLES: numbers}.items()}
    if "labels" in packed:  # the first token of an example is never predicted
        packed["labels"] = packed["labels"].masked_fill(positions(packed[EXAMPLES]) == 0, IGNORE)
    return packed
