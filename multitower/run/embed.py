"""Embed streams, and check that the tower has enough positions and supports packing."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..batch.collate import EXAMPLES, values_at_hand
from ..batch.places import positions
from ..tower import Tower


def embed(name: str, tower: Any, stream: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
    """Embed the tokens of a stream, packed or not; see ``Tower.embed``."""
    check_packs(name, tower, stream)
    places = positions(stream[EXAMPLES]) if EXAMPLES in stream else None
    check_stream(name, tower, stream, places)
    if places is not None and tower.hard_limit is not None:  # padding may exceed the last position
        places = places.masked_fill(~stream["mask"], 0)
    placed = {} if places is None else {"positions": places}
    embedded: tuple[Tensor, Any] = tower.embed(stream["tokens"], **placed)
    return embedded


def check_packs(name: str, tower: Tower, stream: Mapping[str, Tensor]) -> None:
    """Check that a tower supports packing if its stream is packed."""
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


def check_room(name: str, tower: Tower, times: Tensor, where: str) -> None:
    """Check that a tower has enough positions for its tokens in one example, given by their times."""
    limit = tower.hard_limit
    if limit is not None and len(times) > limit:
        raise ValueError(
            f"{where} has {len(times)} tokens of {_called(name, tower)}, which has only {limit} "
            f"positions; its segment at time {int(times[limit])} goes beyond. {_ADVICE}"
        )


def check_stream(name: str, tower: Tower, stream: Mapping[str, Tensor], places: Tensor | None) -> None:
    """Check that a tower has a position for each token of a stream.

    The shape decides, except in packed rows, which may be longer than each of their examples. Their values
    are inspected only on the CPU: elsewhere, that would synchronise with the device.
    """
    limit, tokens, mask = tower.hard_limit, stream["tokens"], stream["mask"]
    if limit is None or tokens.shape[1] <= limit:
        return
    if places is not None:
        beyond = (places >= limit) & mask if values_at_hand(tokens) else mask[:0]
        for row, place in beyond.nonzero()[:1].tolist():
            example = stream[EXAMPLES][row, place]
            own = (stream[EXAMPLES][row] == example) & mask[row]
            check_room(name, tower, stream["times"][row, own], f"example {int(example)} of the packed batch")
        return
    if not (torch.compiler.is_compiling() or tokens.is_meta or isinstance(mask, FakeTensor)):
        row = int(mask.sum(1).argmax())  # synchronises, but an error is certain by now
        check_room(name, tower, stream["times"][row, mask[row]], f"row {row} of the batch")
    raise ValueError(
        f"the stream of {_called(name, tower)} is {tokens.shape[1]} tokens long, padding included, but the "
        f"tower has only {limit} positions. {_ADVICE}"
    )


def bounded(decoder: Any, name: str, tower: Tower) -> Any:
    """Make a tower's decoder raise an error before it decodes beyond the tower's last position.

    The length of the padded batch counts, because rows that have ended continue with padding.
    """
    limit = tower.hard_limit
    if limit is None:
        return decoder
    prepare = decoder.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def prepare_inputs(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] > limit:
            raise ValueError(
                f"{_called(name, tower)} has positions for {limit} tokens, all of which are taken, and is to "
                "decode further; pass a smaller max_new_tokens, or give shorter examples. Where no limit is "
                "given, decoding ends at the last position"
            )
        return prepare(input_ids, *args, **kwargs)

    decoder.prepare_inputs_for_generation = prepare_inputs
    return decoder


_ADVICE = "Give it shorter or fewer segments, or a tower with more positions"


def _called(name: str, tower: Tower) -> str:
    return f"tower {name!r} ({type(tower.native).__name__})"
