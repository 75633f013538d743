"""How many positions a transformers model has, where it looks them up in a table that does not grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .probe import LENGTH, evaluated, probe_tokens


@torch.no_grad()
def count_positions(tower: Any) -> int | None:
    """Return for how many tokens a ``TransformersTower`` has positions; None where there is no such table.

    The model is watched while it embeds tokens and runs its first layer. A table is one in which the same
    consecutive places are looked up for all rows: one for each token, behind what the family keeps free. It
    must be of one size for two lengths, since others are made to measure. Tables of ``index_select`` are left
    out: families that use it (XGLM) let them grow. A model on the meta device has no places to look at.
    """
    tokens = probe_tokens(tower.model)
    if tokens.is_meta:
        return None
    found = []
    try:
        with evaluated(tower.model):
            for length in (LENGTH, LENGTH - 2):
                with _Lookups(length) as lookups:
                    hidden, context = tower.embed(tokens[:, :length])
                    tower.layer(1, hidden, context)
                found.append(lookups.rooms)
    except Exception:  # a model that cannot be watched, as flex_attention does not let itself, says nothing
        return None
    return min(set.intersection(*found), default=None)


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Notes for how many tokens the tables have room in which consecutive places are looked up."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.length, self.rooms = length, set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if func is aten.embedding.default:
            self._note(args[0], 0, args[1])
        elif func is aten.gather.default:
            self._note(*args[:3])
        elif func is aten.index.Tensor:
            for dim, places in enumerate(args[1]):
                self._note(args[0], dim, places)
        return func(*args, **(kwargs or {}))

    def _note(self, table: Tensor, dim: int, places: Tensor | None) -> None:
        if (
            places is None
            or places.dtype not in (torch.int32, torch.int64)
            or self.length not in places.shape
        ):
            return
        rows = places.movedim(list(places.shape).index(self.length), -1).reshape(-1, self.length)
        first = int(rows[0, 0])
        if torch.equal(rows, torch.arange(first, first + self.length).to(rows).expand_as(rows)):
            self.rooms.add(table.shape[dim] - first)
