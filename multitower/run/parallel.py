"""Steps that all processes of a training take together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from .request import trains_in_parallel

T = TypeVar("T")


def on_first(step: Callable[[], T]) -> T:
    """Run a step on the first process; all processes get its result, or raise its error."""
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
    """Run a step on each process; if one fails, all raise an error, and none waits for it."""
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
