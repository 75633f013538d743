"""Run a schedule on a batch, as far as something depends on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .frozen import brought_states
from .link import Visibility, add, visibility
from .output import States
from .rotary import Rotations
from .schedule import Tap
from .stream import IGNORE

if TYPE_CHECKING:
    from .fused import FusedModel

Streams = Mapping[str, Mapping[str, Tensor]]


def run(
    model: FusedModel, streams: Streams, wanted: Mapping[str, int], *, output_attentions: bool = False
) -> States:
    """Run the steps that are needed; see ``FusedModel.run``."""
    seen = visibilities(model, streams)
    states = States({}, {}, brought_states(model, streams), {})
    steps = model.schedule.needed(wanted, seen, states.given)
    running = {step.tower for step in steps}
    rotations = Rotations({name: stream["times"] for name, stream in streams.items()})
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
            x = update(model, step.taps, x, rotations, seen, states, output_attentions)
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
    rotations: Rotations,
    seen: Mapping[str, Visibility],
    states: States,
    output_attentions: bool,
) -> Tensor:
    """Give the state x after a layer with what its taps add; all of them read it as it is."""
    updates = []
    for tap in taps:
        module = model.tap(tap)
        source = module.read(states.given[tap.source, tap.source_layer], rotations.of(tap.source, module))
        turn = rotations.of(tap.target, module)
        updates.append(module(x, source, seen[tap.link], turn))
        if output_attentions:
            weights = module.weights(x, source, seen[tap.link], turn)
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
    asked = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    return not asked or bool((labels[:, 1:] != IGNORE).any())
