"""How much batches have to be learnt from."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .collate import IGNORE, Batch


def count_targets(batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return, by tower, how many tokens are to be predicted in several batches: ``num_items_in_batch``.

    >>> import multitower as mt
    >>> examples = [[mt.Segment("text", [0, *[5] * length, 1], target=True)] for length in (2, 6)]
    >>> batches = [mt.collate([example]) for example in examples]
    >>> {name: count.item() for name, count in mt.batch.count_targets(batches).items()}
    {'text': 10}

    Losses that are divided by these, ``model(**batch, num_items_in_batch=counts)``, add up to the loss of one
    batch of all the examples.

    Args:
        batches: As ``collate`` gives them, packed or not; a stream without labels counts as nothing.

    Returns:
        For each stream that has labels an int64 scalar, on their device.
    """
    counts: dict[str, Tensor] = {}
    for batch in batches:
        for name, stream in batch["streams"].items():
            if "labels" in stream:
                here = (stream["labels"][:, 1:] != IGNORE).sum()
                counts[name] = counts[name] + here if name in counts else here
    return counts
