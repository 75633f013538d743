"""The tokens of a stream embedded by their tower, packed or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..batch.collate import EXAMPLES
from ..batch.pack import positions
from ..tower import Tower
from .max_positions import check_stream


def embed(name: str, tower: Any, stream: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
    """Embed the tokens of a stream, packed or not; see ``Tower.embed``."""
    check_packs(name, tower, stream)
    places = positions(stream[EXAMPLES]) if EXAMPLES in stream else None
    check_stream(name, tower, stream, places)
    if places is not None and tower.hard_limit is not None:  # padding may be longer than any example
        places = places.masked_fill(~stream["mask"], 0)
    placed = {} if places is None else {"positions": places}
    embedded: tuple[Tensor, Any] = tower.embed(stream["tokens"], **placed)
    return embedded


def check_packs(name: str, tower: Tower, stream: Mapping[str, Tensor]) -> None:
    """Check that a tower can take a stream as it is.

    Raises:
        ValueError: The stream is packed, and the tower cannot tell examples apart.
    """
    if EXAMPLES in stream and not _packs(tower):
        config = getattr(tower.native, "config", None)
        attention = getattr(config, "_attn_implementation", None)
        raise ValueError(
            f"stream {name!r} is packed, but tower {name!r} cannot tell examples in one row apart "
            f"({type(tower.native).__name__}{f' by {attention}' if attention else ''}); leave out "
            "multitower.pack, or, if it is for the way in which the tower attends, choose 'sdpa' by "
            f"model.unimodal({name!r}).set_attn_implementation"
        )


def _packs(tower: Tower) -> bool:
    return tower.packs


_packs._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch's assume_constant_result; it imports dynamo
