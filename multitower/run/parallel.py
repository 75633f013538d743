"""What several processes of a training do together, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from .request import trains_in_parallel

T = TypeVar("T")


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
