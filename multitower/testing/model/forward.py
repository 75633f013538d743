"""Checks of a fused forward: identity, visibility, causality."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...batch.collate import Example
from ...compile.schedule import Tap
from ...model import FusedModel
from ..compare import assert_close, assert_equal
from .case import alone, closed, native_logits, opened, remembered, rounding, streams_of, visible


@torch.no_grad()
def check_identity(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that with closed gates every tower's logits equal its model's own, bit for bit.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_identity(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    A "paper" adapter has no gate: its tower is compared with itself after that adapter. A tower with
    ``memory="segment"`` is compared, up to rounding, with its model on each segment.

    Raises:
        AssertionError: The logits of some tower differ.
    """
    model = closed(model)
    streams = streams_of(model, examples)
    for name, logits in model(streams).logits.items():
        stream, spec = streams[name], model.graph.towers[name]
        what = f"tower {name!r}: with closed gates the logits are not its own"
        own = native_logits(model.unimodal(name))
        if spec.adapter == "paper":
            assert_equal(logits, alone(model, name, stream), what)
        elif spec.memory == "all":
            assert_equal(logits, own(stream["tokens"]), what)
        else:
            for part in remembered(model, name, stream):
                assert_close(logits[part], own(stream["tokens"][part]), what, rounding(model))


@torch.no_grad()
def check_unimodal(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that ``unimodal`` returns each tower without links and input adapters, even with open gates.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_unimodal(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    Raises:
        AssertionError: The logits of some tower differ.
    """
    towers, model = model.towers, opened(model)
    for name, stream in streams_of(model, examples).items():
        logits = native_logits(model.unimodal(name))(stream["tokens"])
        for expected, than in ((model.tower(name), "its layers give"), (towers[name], "it gave before")):
            mode = expected.training
            before = expected.eval()(stream["tokens"])
            expected.train(mode)
            assert_equal(logits, before, f"tower {name!r}: unimodal gives other logits than {than}")


@torch.no_grad()
def check_sight(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that a tap adds exactly zero to tokens that see nothing, and something to all others.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_sight(tiny_model(), [[mt.Segment("speech", [1, 5, 2])], [mt.Segment("text", [1, 7])]])

    So a row with only one modality has the same logits as without links, bit for bit.

    Raises:
        AssertionError: A tap changes a token that sees nothing, or does not change one that sees others.
    """
    model = opened(model)
    streams, updates = streams_of(model, examples), dict[Tap, Tensor]()

    def keep(tap: Tap) -> None:
        def hook(module: nn.Module, args: object, update: Tensor) -> None:
            updates[tap] = update

        model.tap(tap).register_forward_hook(hook)

    for tap in model.schedule.taps:
        keep(tap)
    logits = model(streams).logits
    seeing = {
        name: torch.zeros(len(stream["mask"]), dtype=torch.bool, device=logits[name].device)
        for name, stream in streams.items()
    }
    for tap in model.schedule.taps:
        if tap.source in streams and tap.target in streams:
            link = model.graph.links[tap.link]
            seen = visible(streams, link)
            sees = torch.tensor([[bool(place) for place in row] for row in seen]).to(
                logits[tap.target].device
            )
            seeing[tap.target] |= sees.any(1)
            where = f"link {tap.link!r}, tap {tap.key}"
            if tap not in updates:
                assert not sees.any(), f"{where} does not run, though there is something to see"
                continue
            adds = updates[tap].ne(0).any(-1)
            blind = streams[tap.target]["mask"] & ~sees
            assert not (adds & blind).any(), f"{where} adds something to a token that sees nothing"
            if link.feed_forward or link.projection != "relu":  # a ReLU may output only zeros
                assert adds[sees].all(), f"{where} adds nothing to a token that sees others"
    for name, stream in streams.items():
        expected = alone(model, name, stream)
        assert_equal(
            logits[name][~seeing[name]],
            expected[~seeing[name]],
            f"tower {name!r}: a row that sees no other tower has other logits than without links",
        )


@torch.no_grad()
def check_causality(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that no token changes earlier logits of any tower, or another tower's logits of the same time.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_causality(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    Each token of each example is changed in turn, to cover every path through the graph.

    Raises:
        AssertionError: Some logit depends on a token that it must not see; the message names both.
    """
    model = opened(model)
    for number, example in enumerate(examples):
        streams = streams_of(model, [example])
        places = [
            (name, place, time)
            for name, stream in streams.items()
            for place, time in enumerate(stream["times"][0].tolist())
        ]
        rows = {
            name: {key: value.repeat(1 + len(places), 1) for key, value in stream.items() if key != "labels"}
            for name, stream in streams.items()
        }
        for row, (name, place, _) in enumerate(places, 1):
            tokens = rows[name]["tokens"]
            tokens[row, place] = (tokens[row, place] + 1) % model.tower(name).vocab_size
        for reader, logits in model(rows).logits.items():
            times = streams[reader]["times"][0]
            for row, (name, _, time) in enumerate(places, 1):
                hidden = times < time if reader == name else times <= time
                assert_close(
                    logits[row, hidden],
                    logits[0, hidden],
                    f"example {number}: the token of {name!r} at time {time} changes logits of {reader!r} at "
                    f"time {times[hidden].tolist()}",
                    rounding(model),
                )
