"""Training in several processes: all of them run the same, whatever their batches hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch.collate import EXAMPLES, IGNORE, Streams
from .request import brings_states

T = TypeVar("T")


def trains_in_parallel() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def with_all(streams: Streams, towers: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Return a batch with a stream of each tower: one token of padding for a tower that it lacks.

    >>> import multitower as mt
    >>> batch = mt.collate([[mt.Segment("text", [1, 5, 2], target=True)]])
    >>> found = with_all(batch["streams"], ["speech", "text"])
    >>> [found["speech"][key].tolist() for key in ("tokens", "mask", "labels")]
    [[[0]], [[False]], [[-100]]]

    Each stream gets labels, none to predict where it had none, so that its loss is zero, and so are the
    gradients of all that it depends on alone.
    """
    some = next(iter(streams.values()))["tokens"]
    zeros = some.new_zeros(len(some), 1)
    padding = {"tokens": zeros, "times": zeros, "mask": zeros.bool()}
    if any(EXAMPLES in stream for stream in streams.values()):
        padding[EXAMPLES] = zeros
    full = {name: dict(streams.get(name, padding)) for name in towers}
    for stream in full.values():
        if not brings_states(stream):
            stream.setdefault("labels", torch.full_like(stream["tokens"], IGNORE))
    return full


def on_first(step: Callable[[], T]) -> T:
    """Have the first process do something, and all of them get what comes of it, or fail with its error."""
    if not trains_in_parallel():
        return step()
    answer: list[Any] = [None]

    def first() -> None:
        if dist.get_rank() == 0:
            answer[0] = step()

    all_or_none(first)
    dist.broadcast_object_list(answer)
    result: T = answer[0]
    return result


def all_or_none(step: Callable[[], None]) -> None:
    """Do something in each process; where one fails, all fail with its error, and none waits for it."""
    if not trains_in_parallel():
        return step()
    own: Exception | None = None
    try:
        step()
    except Exception as error:
        own = error
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, own)
    if own is not None:
        raise own
    for each in errors:
        if each is not None:
            raise each
    return None
