"""Batches without padding: the examples of a stream one after the other, in one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .stream import EXAMPLES, IGNORE, Batch, Stream
from .tower import Tower

APART = 2**40
"""How far apart the clocks of two packed examples are set: further than any example is long, in tokens."""


def pack(batch: Batch) -> Batch:
    """Take the padding out of a batch: each stream becomes one row of all its examples.

    >>> import multitower as mt
    >>> text = [mt.Segment("text", tokens, target=True) for tokens in ([3, 5, 4], [3, 4])]
    >>> batch = mt.pack(mt.collate([[each] for each in text]))
    >>> for key in ("tokens", "times", "labels", "examples"):
    ...     print(key, batch["streams"]["text"][key].tolist())
    tokens [[3, 5, 4, 3, 4]]
    times [[0, 1, 2, 0, 1]]
    labels [[-100, 5, 4, -100, 4]]
    examples [[0, 0, 0, 1, 1]]

    Losses and gradients are those of the padded batch, up to rounding; logits have shape (1, tokens,
    vocabulary). No token reads another example's. It saves the work on padding, which is worth it where
    lengths are unlike. Every tower must tell examples apart by their positions (``Tower.packs``).

    Attention runs over all pairs of tokens of a row and closes those of two examples, which costs more than
    padding where examples are long, unless its kernel leaves such blocks out: see
    ``FusedModel.set_attn_implementation`` for links and, for towers, that of transformers.

    Args:
        batch: As ``collate`` gives it, with or without states that were kept.

    Raises:
        ValueError: The batch is packed already.
    """
    return {**batch, "streams": {name: _packed(name, each) for name, each in batch["streams"].items()}}


def embed(name: str, tower: Any, stream: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
    """Embed the tokens of a stream, packed or not; see ``Tower.embed``."""
    check_packs(name, tower, stream)
    placed = {"positions": positions(stream[EXAMPLES])} if EXAMPLES in stream else {}
    embedded: tuple[Tensor, Any] = tower.embed(stream["tokens"], **placed)
    return embedded


def check_packs(name: str, tower: Tower, stream: Mapping[str, Tensor]) -> None:
    """Check that a tower can take a stream as it is.

    Raises:
        ValueError: The stream is packed, and the tower cannot tell examples apart.
    """
    if EXAMPLES in stream and not _packs(tower):
        raise ValueError(
            f"stream {name!r} is packed, but tower {name!r} cannot tell examples in one row apart "
            f"({type(tower.native).__name__}); leave out multitower.pack"
        )


def positions(examples: Tensor) -> Tensor:
    """Say where in its example each token of a packed row stands.

    >>> positions(torch.tensor([[0, 0, 2, 2, 2]])).tolist()
    [[0, 1, 0, 1, 2]]

    Args:
        examples: int64, shape (1, length), ascending.
    """
    places = torch.arange(examples.shape[1], device=examples.device)
    return places - torch.searchsorted(examples, examples)


def moments(stream: Mapping[str, Tensor]) -> Tensor:
    """Give the time of each token on a clock on which packed examples lie far apart.

    Args:
        stream: With "times" and, where it is packed, "examples".
    """
    return stream["times"] + 2 * APART * stream[EXAMPLES] if EXAMPLES in stream else stream["times"]


def reach(window: int | None, stream: Mapping[str, Tensor]) -> int | None:
    """Say how many ticks of that clock a token sees back: never as far as another example."""
    return min(window or APART, APART) if EXAMPLES in stream else window


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # of torch
def _packs(tower: Tower) -> bool:
    return tower.packs


def _packed(name: str, stream: Stream) -> Stream:
    if EXAMPLES in stream:
        raise ValueError(f"stream {name!r} is packed already")
    mask = stream["mask"]
    packed = {key: value[mask][None] for key, value in stream.items()}
    packed[EXAMPLES] = mask.nonzero()[:, 0][None]
    if "labels" in packed:  # the first token of a row is never predicted
        packed["labels"] = packed["labels"].masked_fill(positions(packed[EXAMPLES]) == 0, IGNORE)
    return packed
