"""Checks that the order of declarations, batching, padding and packing do not matter."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from ...batch.collate import PADDING, Example, Stream
from ...batch.pack import pack
from ...declare.graph import FusionGraph
from ...model import FusedModel
from ..compare import assert_close, tolerance
from .case import Streams, opened, rounding, streams_of


@torch.no_grad()
def check_order(model: FusedModel, examples: Sequence[Example], *, seed: int = 0) -> None:
    """Check that the order of towers, links, streams and rows does not matter, and neither do link names.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_order(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    Args:
        model: The model.
        examples: The examples to run it on.
        seed: Seed for the other order.

    Raises:
        AssertionError: Another order changes logits or the loss.
    """
    model = opened(model)
    shuffled = _declared_anew(model, random.Random(seed))
    streams = streams_of(model, examples)
    expected, found = model(streams), shuffled(dict(reversed(streams.items())))
    _compare(found.logits, expected.logits, streams, "declared in another order", rounding(model))
    rows = list(range(len(examples)))
    random.Random(seed).shuffle(rows)
    mixed = model({name: {key: each[rows] for key, each in one.items()} for name, one in streams.items()})
    logits = {name: each[rows] for name, each in expected.logits.items()}
    moved = {name: {"mask": stream["mask"][rows]} for name, stream in streams.items()}
    _compare(mixed.logits, logits, moved, "with rows in another order", rounding(model))
    within = max(rounding(model), tolerance(expected.loss.dtype))
    for loss in (found.loss, mixed.loss):
        assert_close(loss, expected.loss, "the loss depends on the order", within)


@torch.no_grad()
def check_rows(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that a batch gives the same logits as its rows one by one.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_rows(tiny_model(), [[mt.Segment("speech", [1, 5, 2])], [mt.Segment("text", [1, 7])]])

    Raises:
        AssertionError: The logits of some row differ.
    """
    model = opened(model)
    together = model(streams_of(model, examples)).logits
    for row, example in enumerate(examples):
        streams = streams_of(model, [example])
        for name, logits in model(streams).logits.items():
            assert_close(
                together[name][row, : logits.shape[1]],
                logits[0],
                f"tower {name!r}: row {row} of the batch has other logits than alone",
                rounding(model),
            )


@torch.no_grad()
def check_padding(model: FusedModel, examples: Sequence[Example], *, seed: int = 0) -> None:
    """Check that neither the amount of padding nor the tokens and times in it matter.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_padding(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    Args:
        model: The model.
        examples: The examples to run it on.
        seed: Seed for the amount of padding and its tokens and times.

    Raises:
        AssertionError: Other padding changes logits or the loss.
    """
    model = opened(model)
    generator = torch.Generator().manual_seed(seed)
    streams = streams_of(model, examples)
    padded = {
        name: _padded(stream, model.tower(name).vocab_size, generator) for name, stream in streams.items()
    }
    expected, found = model(streams), model(padded)
    logits = {name: each[:, : expected.logits[name].shape[1]] for name, each in found.logits.items()}
    _compare(logits, expected.logits, streams, "with other padding", rounding(model))
    within = max(rounding(model), tolerance(expected.loss.dtype))
    assert_close(found.loss, expected.loss, "the loss depends on the padding", within)


@torch.no_grad()
def check_packing(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that packed examples give the same results as in separate rows.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_packing(tiny_model(), [[mt.Segment("speech", [1, 5, 2])], [mt.Segment("text", [1, 7])]])

    Raises:
        AssertionError: Logits or the loss differ, or a packed batch runs though a tower does not support it.
    """
    model = opened(model)
    streams = streams_of(model, examples)
    unable = [name for name in streams if not model.tower(name).packs]
    if unable:
        try:
            model(pack({"streams": streams})["streams"])
        except ValueError:
            return
        raise AssertionError(f"packed batches run, though tower {unable[0]!r} cannot tell examples apart")
    expected = model(streams)
    within = max(rounding(model), tolerance(expected.loss.dtype))
    for one_row in (False, True):
        packed = pack({"streams": streams}, one_row=one_row)["streams"]
        found = model(packed)
        for name, logits in expected.logits.items():
            real = packed[name]["mask"]
            order = packed[name]["examples"][real].argsort(stable=True)
            assert_close(
                found.logits[name][real][order],
                logits[streams[name]["mask"]],
                f"tower {name!r}: the logits are others in a packed batch",
                rounding(model),
            )
        for loss in (found.loss, model(packed, logits=False).loss):
            assert_close(loss, expected.loss, "the loss of a packed batch is another", within)


def _padded(stream: Stream, vocabulary: int, generator: torch.Generator) -> Stream:
    rows, extra = len(stream["mask"]), int(torch.randint(0, 4, (), generator=generator))
    longer = {
        key: torch.cat([value, value.new_full((rows, extra), PADDING[key])], 1)
        for key, value in stream.items()
    }
    shape, real = longer["mask"].shape, longer["mask"]
    tokens = torch.randint(0, vocabulary, shape, generator=generator).to(real.device)
    times = torch.randint(-1, int(longer["times"].max()) + 3, shape, generator=generator).to(real.device)
    return {
        **longer,
        "tokens": torch.where(real, longer["tokens"], tokens),
        "times": torch.where(real, longer["times"], times),
    }


def _declared_anew(model: FusedModel, chance: random.Random) -> FusedModel:
    """Return a model with the same towers and weights, declared in another order with other link names."""
    declared = model.graph.to_dict()
    for part in ("towers", "links"):
        chance.shuffle(declared[part])
    backwards = sorted(model.graph.links, reverse=True)
    renamed = {name: f"link{number:09}" for number, name in enumerate(backwards)}
    for link in declared["links"]:
        link["name"] = renamed[link["name"]]
    towers = {name: model.tower(name) for name in reversed(list(model.graph.towers))}
    with torch.random.fork_rng(devices=[]):
        twin = FusedModel(FusionGraph.from_dict(declared), towers).eval()
    twin.adapters.load_state_dict(model.adapters.state_dict())
    for name, other in renamed.items():
        twin.links[other].load_state_dict(model.links[name].state_dict())
    return twin


def _compare(
    found: dict[str, Tensor], expected: dict[str, Tensor], streams: Streams, how: str, within: float
) -> None:
    for name, logits in expected.items():
        real = streams[name]["mask"]
        assert_close(found[name][real], logits[real], f"tower {name!r}: the logits are others {how}", within)
