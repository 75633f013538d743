"""Run a schedule on a batch, as far as something depends on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .link import Visibility, add, visibility
from .output import States
from .schedule import Tap
from .stream import IGNORE, values_at_hand

if TYPE_CHECKING:
    from .fused import FusedModel

Streams = Mapping[str, Mapping[str, Tensor]]


def run(
    model: FusedModel, streams: Streams, wanted: Mapping[str, int], *, output_attentions: bool = False
) -> States:
    """Run the steps that are needed; see ``FusedModel.run``."""
    seen = visibilities(model, streams)
    steps = model.schedule.needed(wanted, seen)
    running = {step.tower for step in steps}
    states = States({}, {}, {}, {})
    for name, stream in streams.items():
        if name in running:
            embedded, states.contexts[name] = model.tower(name).embed(stream["tokens"])
            if model._graph.towers[name].train == "none":
                embedded = embedded.detach()  # transformers' activation checkpointing asks for its gradient
            states.hidden[name] = model.adapt(name, embedded)
    read_layers = model.schedule.read_layers
    for step in steps:
        x = states.hidden[step.tower]
        if step.taps:
            x = update(model, step.taps, x, streams, seen, states, output_attentions)
        else:
            x = model.tower(step.tower).layer(step.layer, x, states.contexts[step.tower])
            if (step.tower, step.layer) in read_layers:
                states.given[step.tower, step.layer] = x
        states.hidden[step.tower] = x
    return states


def update(
    model: FusedModel,
    taps: Sequence[Tap],
    x: Tensor,
    streams: Streams,
    seen: Mapping[str, Visibility],
    states: States,
    output_attentions: bool,
) -> Tensor:
    """Give the state x after a layer with what its taps add; all of them read it as it is."""
    updates = []
    for tap in taps:
        module, times = model.tap(tap), streams[tap.target]["times"]
        source = module.read(states.given[tap.source, tap.source_layer], streams[tap.source]["times"])
        updates.append(module(x, times, source, seen[tap.link]))
        if output_attentions:
            weights = module.weights(x, times, source, seen[tap.link])
            states.attentions.setdefault(tap.link, {})[tap.key] = weights
    return add(x, updates)


def visibilities(model: FusedModel, streams: Streams) -> dict[str, Visibility]:
    """Give, for each link that has something to do in this batch, what its queries may see."""
    dtypes = {tap.link: model.tap(tap).query.weight.dtype for tap in model.schedule.taps}
    alike: dict[tuple[object, ...], Visibility] = {}
    seen = {}
    for link in model._graph.links.values():
        if link.source not in streams or link.target not in streams:
            continue
        key = (link.source, link.target, link.window, dtypes[link.name])
        if key not in alike:
            source, target = streams[link.source], streams[link.target]
            alike[key] = visibility(
                target["times"], source["times"], source["mask"], link.window, dtypes[link.name]
            )
        seen[link.name] = alike[key]
    return {name: each for name, each in seen.items() if not each.is_blind()}


def with_labels(streams: Streams) -> Collection[str]:
    """Name the streams with labels to predict, or, if there is none, all that say that there is none.

    Values are looked at only on the CPU: elsewhere that would wait for the device.
    """
    labelled = [name for name, stream in streams.items() if "labels" in stream]
    return [name for name in labelled if _may_have_any(streams[name]["labels"])] or labelled


def _may_have_any(labels: Tensor) -> bool:
    return not values_at_hand(labels) or bool((labels[:, 1:] != IGNORE).any())
