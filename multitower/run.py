"""Run a schedule on a batch, as far as something depends on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attention import FLEX, Visibility, block_visibility, has_flex, visibility
from .frozen import brought_states
from .link import add
from .output import FusedOutput, States, head_loss, token_loss
from .packing import embed, moments, reach
from .rotary import Rotations
from .schedule import Tap
from .targets import may_have_labels, watch_targets
from .tower import Tower

if TYPE_CHECKING:
    from .fused import FusedModel

Streams = Mapping[str, Mapping[str, Tensor]]


def run(
    model: FusedModel, streams: Streams, wanted: Mapping[str, int], *, output_attentions: bool = False
) -> States:
    """Run the steps that are needed; see ``FusedModel.run``."""
    _check_wanted(model, streams, wanted)
    seen = visibilities(model, streams, flex=model.attn_implementation == FLEX and not output_attentions)
    states = States({}, {}, brought_states(model, streams), {})
    steps = model.schedule.needed(wanted, seen, states.given)
    towers = {step.tower: model.tower(step.tower) for step in steps}
    rotations = Rotations({name: stream["times"] for name, stream in streams.items()})
    read_layers = model.schedule.read_layers
    for step in steps:
        name, layer = step.tower, step.layer
        if step.taps:
            x = update(model, step.taps, states.hidden[name], rotations, seen, states, output_attentions)
        elif layer:
            x = towers[name].layer(layer, states.hidden[name], states.contexts[name])
        else:
            x, states.contexts[name] = embedded(model, name, towers[name], streams[name])
        if not step.taps and (name, layer) in read_layers:
            states.given[name, layer] = x
        states.hidden[name] = x
    return states


def embedded(model: FusedModel, name: str, tower: Tower, stream: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
    """Return what enters a tower's first layer, input adapter included, and the context of its layers."""
    x, context = embed(name, tower, stream)
    if model._graph.towers[name].train == "none":
        x = x.detach()  # transformers' activation checkpointing asks for its gradient
    return model.adapt(name, x), context


def score(
    model: FusedModel, streams: Streams, states: States, names: Collection[str], *, logits: bool
) -> FusedOutput:
    """Run the heads of some towers on their last states, and take losses; see ``FusedModel.forward``."""
    final = {name: (model.tower(name), states.hidden[name], states.contexts[name]) for name in names}
    scores = {name: tower.head(*state) for name, (tower, *state) in final.items()} if logits else {}
    losses: dict[str, Tensor] = {}
    labelled = {name: stream["labels"] for name, stream in streams.items() if "labels" in stream}
    for name, labels in labelled.items():
        if name in scores:
            losses[name] = token_loss(scores[name], labels)
        elif name in final:
            losses[name] = head_loss(*final[name], labels)
        else:
            losses[name] = torch.zeros((), device=labels.device)
    if model.training and torch.is_grad_enabled():
        watch_targets(model, streams, losses)
    device = next(iter(losses.values())).device if losses else None
    loss = torch.stack([loss.to(device) for loss in losses.values()]).sum() if losses else None
    return FusedOutput(loss, losses, scores, states.attentions)


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


def visibilities(model: FusedModel, streams: Streams, *, flex: bool = False) -> dict[str, Visibility]:
    """Give, for each link that has something to do in this batch, what its queries may see."""
    dtypes = {tap.link: model.tap(tap).query.weight.dtype for tap in model.schedule.taps}
    alike: dict[tuple[object, ...], Visibility] = {}
    when = {name: moments(stream) for name, stream in streams.items()}
    seen = {}
    for link in model._graph.links.values():
        if link.source not in streams or link.target not in streams:
            continue
        key = (link.source, link.target, link.window, dtypes[link.name])
        if key not in alike:
            source = streams[link.source]
            between = (when[link.target], when[link.source], source["mask"], reach(link.window, source))
            blocks = flex and has_flex(when[link.target].device)
            alike[key] = block_visibility(*between) if blocks else visibility(*between, dtypes[link.name])
        seen[link.name] = alike[key]
    return {name: each for name, each in seen.items() if not each.is_blind()}


def with_labels(streams: Streams) -> Collection[str]:
    """Name the streams with labels to predict, or, if there is none, all that say that there is none.

    Values are looked at only on the CPU: elsewhere that would wait for the device.
    """
    labelled = [name for name, stream in streams.items() if "labels" in stream]
    return [name for name in labelled if may_have_labels(streams[name]["labels"])] or labelled


def _check_wanted(model: FusedModel, streams: Streams, wanted: Mapping[str, int]) -> None:
    for name, layer in wanted.items():
        if name not in streams:
            raise ValueError(
                f"layer {layer} of {name!r} is wanted, but the batch has streams for {', '.join(streams)} "
                "alone"
            )
        depth = model.tower(name).depth
        if not 0 <= layer <= depth + 1:
            raise ValueError(
                f"layer {layer} of {name!r} is wanted, which has the layers 1 to {depth} (0 is what enters "
                f"layer 1, {depth + 1} the state that enters the head)"
            )
