"""Checks of gradients, losses and frozen towers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...batch.collate import Example, Segment
from ...model import FusedModel
from ...run.output import token_loss
from ...run.request import may_have_labels
from ..compare import assert_close, tolerance
from .case import Streams, opened, rounding, streams_of, visible
from .definition import defined_logits


def check_gradients(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that exactly the trained parameters get gradients, finite and equal to the reference's.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_gradients(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    In a trained tower these are the parameters that get one when it runs alone; in links and input adapters
    all, if the examples use them. All segments are taken as targets; if none has two tokens, nothing is
    checked.

    Raises:
        AssertionError: A gradient is missing, unexpected or wrong.
    """
    model = opened(model).train()
    streams = streams_of(model, [[_as_targets(entry) for entry in example] for example in examples])
    if not any(may_have_labels(stream) for stream in streams.values()):
        return
    expected = _trained(model, streams)
    model.zero_grad()
    loss = model(streams).loss
    if loss.requires_grad:
        loss.backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found <= expected, f"these receive a gradient, but are not trained: {_some(found - expected)}"
    assert found >= expected, f"these are trained, but receive no gradient: {_some(expected - found)}"
    bad = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    }
    assert not bad, f"the gradients of these are not finite: {_some(bad)}"
    _check_values(model.eval(), streams)


def check_frozen(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that frozen towers stay in eval mode, and out of autograd below the first trained input.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_frozen(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    Trained inputs of a tower are its input adapter and its incoming links.

    Raises:
        AssertionError: A frozen tower or a part of it is in training mode, or is in autograd too early or not
            at all.
    """
    model = opened(model).train()
    for name, spec in model.graph.towers.items():
        if spec.train == "none":
            inside = [path for path, module in model.tower(name).named_modules() if module.training]
            assert not inside, f"frozen tower {name!r} is in training mode: {_some(set(inside))}"
            trained = [path for path, each in model.tower(name).named_parameters() if each.requires_grad]
            assert not trained, f"frozen tower {name!r} has trained parameters: {_some(set(trained))}"
        else:
            assert model.tower(name).training, f"tower {name!r} is trained, but not in training mode"
    assert all(part.training for part in (*model.links.values(), *model.adapters.values())), (
        "links and input adapters are trained, but not in training mode"
    )
    streams = streams_of(model, examples)
    states = model.run(streams)
    for name, spec in model.graph.towers.items():
        if spec.train != "none" or name not in streams:
            continue
        first, possible = (
            -1 if spec.adapter is not None else _first_layer_fed(model, streams, name, seen=seen)
            for seen in (True, False)
        )
        outputs = {layer: state for (tower, layer), state in states.given.items() if tower == name}
        outputs[model.tower(name).depth + 1] = states.hidden[name]
        for layer, state in outputs.items():
            if layer <= possible:
                assert not state.requires_grad, (
                    f"frozen tower {name!r} is in autograd at layer {layer}, where nothing trained feeds it"
                )
            if layer > first:
                assert state.requires_grad, (
                    f"frozen tower {name!r} passes on no gradient at layer {layer} to what feeds it"
                )


def check_losses(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that ``logits=False``, which skips computation, changes no loss and no gradient.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> speech, text = mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7], target=True)
    >>> check_losses(tiny_model(), [[speech, text]])

    Raises:
        AssertionError: A loss or gradient differs.
    """
    model = opened(model)
    streams = streams_of(model, examples)
    whole, lean = model(streams), model(streams, logits=False)
    assert not lean.logits, "logits=False gives logits"
    assert list(lean.losses) == list(whole.losses), f"without logits there are losses of {list(lean.losses)}"
    for name, loss in whole.losses.items():
        what = f"tower {name!r} has another loss without logits"
        assert_close(lean.losses[name], loss, what, rounding(model))
    if whole.loss is None or not whole.loss.requires_grad:
        return
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    expected = _gradients(whole.loss, parameters)
    needed = any(bool(gradient.any()) for gradient in expected.values())
    assert lean.loss.requires_grad or not needed, "without logits the loss has no gradient"
    if lean.loss.requires_grad:
        for name, gradient in _gradients(lean.loss, parameters).items():
            assert_close(
                gradient, expected[name], f"{name} has another gradient without logits", rounding(model)
            )


def _gradients(loss: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def _check_values(model: FusedModel, streams: Streams) -> None:
    """Compare gradients with those through the reference implementation."""
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    loss = model(streams).loss
    if not loss.requires_grad:
        return
    logits = defined_logits(model, streams)
    losses = [token_loss(logits[name], stream["labels"]) for name, stream in streams.items()]
    defined = torch.stack([each.to(loss.device) for each in losses]).sum()
    found, expected = _gradients(loss, parameters), _gradients(defined, parameters)
    within = 8 * max(rounding(model), tolerance(loss.dtype))  # rounding adds up over both passes
    for name, gradient in found.items():
        assert_close(
            gradient, expected[name], f"the gradient of {name} is not that of the definition", within
        )


def _first_layer_fed(model: FusedModel, streams: Streams, name: str, *, seen: bool) -> int:
    """Return the first layer after which a link updates a tower; if ``seen``, a link with visible tokens."""
    layers = [
        tap.target_layer
        for tap in model.schedule.taps
        if tap.target == name and _is_used(model, streams, tap.link, seen=seen)
    ]
    return min(layers, default=model.tower(name).depth + 1)


def _trained(model: FusedModel, streams: Streams) -> set[str]:
    """Return the names of parameters that should get a gradient."""
    names = set()
    for name, stream in streams.items():
        tower = model.tower(name)
        parameters = {path: each for path, each in tower.named_parameters() if each.requires_grad}
        if parameters:
            loss = tower(stream["tokens"]).float().square().mean()
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            names |= {
                f"towers.{name}.{path}"
                for path, gradient in zip(parameters, gradients, strict=True)
                if gradient is not None
            }
        if name in model.adapters:
            names |= {f"adapters.{name}.{path}" for path, _ in model.adapters[name].named_parameters()}
    for link in model.graph.links:
        if _is_used(model, streams, link, seen=True):
            names |= {f"links.{link}.{path}" for path, _ in model.links[link].named_parameters()}
    return names


def _is_used(model: FusedModel, streams: Streams, link: str, *, seen: bool) -> bool:
    spec = model.graph.links[link]
    if spec.source not in streams or spec.target not in streams:
        return False
    return not seen or any(place for row in visible(streams, spec) for place in row)


def _as_targets(entry: Segment | tuple[Segment, ...]) -> Segment | tuple[Segment, ...]:
    if isinstance(entry, tuple):
        return tuple(dataclasses.replace(each, target=True) for each in entry)
    return dataclasses.replace(entry, target=True)


def _some(names: set[str]) -> str:
    first = sorted(name or "the whole" for name in names)
    return ", ".join(first[:4]) + (f" and {len(first) - 4} more" if len(first) > 4 else "")
