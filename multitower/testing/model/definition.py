"""A reference implementation of a fused model: recursive, token by token, without masks or a schedule."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from torch import Tensor

from ...batch.collate import Example
from ...declare.spec import LinkSpec
from ...link.cross_attention import GatedCrossAttention
from ...model import FusedModel
from ..compare import assert_close
from .case import Streams, opened, remembered, rounding, streams_of, visible

SPLIT = "tokens (heads width) -> tokens heads width"


@torch.no_grad()
def check_definition(model: FusedModel, examples: Sequence[Example]) -> None:
    """Check that logits equal those of the reference implementation, which is slow.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> check_definition(tiny_model(), [[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7])]])

    Each tap reads the source layer's output before any tap updates it. The taps after a layer all read the
    target's same state, and their updates are summed. A token attends to strictly earlier ones in its window.

    Raises:
        AssertionError: The logits of some tower differ.
    """
    model = opened(model)
    streams = streams_of(model, examples)
    logits, expected = model(streams).logits, defined_logits(model, streams)
    for name, stream in streams.items():
        assert_close(
            logits[name][stream["mask"]],
            expected[name][stream["mask"]],
            f"tower {name!r}: the logits are not what the definition of its links gives",
            rounding(model),
        )


def defined_logits(model: FusedModel, streams: Streams) -> dict[str, Tensor]:
    """Return each tower's logits from the reference implementation; ignore those at padding."""
    towers = {name: model.tower(name) for name in streams}
    parts = {name: remembered(model, name, stream) for name, stream in streams.items()}
    embedded = {
        name: [towers[name].embed(streams[name]["tokens"][part]) for part in parts[name]] for name in streams
    }

    def joined(name: str, states: Sequence[Tensor]) -> Tensor:
        if len(states) == 1 and states[0].shape[:2] == streams[name]["tokens"].shape:
            return states[0]
        whole = states[0].new_zeros(*streams[name]["tokens"].shape, states[0].shape[-1])
        for part, each in zip(parts[name], states, strict=True):
            whole[part] = each
        return whole

    links = [each for each in model.graph.links.values() if each.source in streams and each.target in streams]
    taps = [
        (link, source_layer, target_layer)
        for link in links
        for source_layer, target_layer in link.resolve(towers[link.source].depth, towers[link.target].depth)
    ]

    @functools.cache
    def given(name: str, layer: int) -> Tensor:
        if layer == 0:
            return model.adapt(name, joined(name, [state for state, _ in embedded[name]]))
        before = updated(name, layer - 1)
        each = zip(parts[name], embedded[name], strict=True)
        return joined(name, [towers[name].layer(layer, before[part], context) for part, (_, context) in each])

    @functools.cache
    def updated(name: str, layer: int) -> Tensor:
        x = given(name, layer)
        update = torch.zeros_like(x)
        for link, source_layer, target_layer in taps:
            if (link.target, target_layer) == (name, layer):
                module = model.links[link.name][f"{source_layer}-{target_layer}"]  # type: ignore[index]  # a ModuleDict
                update += _read(module, x, given(link.source, source_layer), streams, link)
        return x + update

    def scored(name: str) -> Tensor:
        last, each = updated(name, towers[name].depth), zip(parts[name], embedded[name], strict=True)
        return joined(name, [towers[name].head(last[part], context) for part, (_, context) in each])

    return {name: scored(name) for name in towers}


def _read(module: GatedCrossAttention, x: Tensor, source: Tensor, streams: Streams, link: LinkSpec) -> Tensor:
    """Return the update of one tap to the target's state x."""
    weight = module.query.weight
    memory = module.project(module.source_norm(source.to(weight.device, weight.dtype)))
    keys, values = module.key(memory), module.value(memory)
    query_places, key_places = (_places(streams, link, name) for name in (link.target, link.source))
    update = torch.zeros_like(x)
    for row, places in enumerate(visible(streams, link)):
        for place, seen in enumerate(places):
            if seen:
                state = x[row, place].to(weight.dtype)
                query = _heads(
                    module, module.query(module.norm(state))[None], query_places[row][place : place + 1]
                )
                key = _heads(module, keys[row, seen], [key_places[row][each] for each in seen])
                value = rearrange(values[row, seen], SPLIT, heads=module.heads)
                scores = einsum(query, key, "one heads width, keys heads width -> heads keys")
                weights = (scores / query.shape[-1] ** 0.5).softmax(-1)
                read = einsum(weights, value, "heads keys, keys heads width -> heads width")
                read = module.out(rearrange(read, "heads width -> (heads width)"))
                size = state.norm() / len(state) ** 0.5 if module.relative else 1.0
                added = read * _opening(module.attention_gate) * size
                ffn, norm = module.ffn, module.ffn_norm
                if ffn is not None and norm is not None:
                    added = added + ffn(norm(state + added)) * _opening(module.ffn_gate) * size
                update[row, place] = added.to(x.dtype)
    return update


def _places(streams: Streams, link: LinkSpec, name: str) -> list[list[float]]:
    """Return the position of each token for rotary embeddings."""
    rows = [[float(time) for time in times] for times in streams[name]["times"].tolist()]
    if link.position != "segment":
        return rows
    pair = (link.source, link.target)
    stretch = (link.pace if name == link.target else 1.0) / min(1.0, link.pace)
    for row, times in enumerate(rows):
        begins = {
            each: _begins(stream["times"][row].tolist()) for each, stream in streams.items() if each in pair
        }
        every = sorted({begin for each in begins.values() for begin in each if begin >= 0})
        rows[row] = [
            1000.0 * every.index(begin) + (time - begin) * stretch if time >= 0 else 0.0
            for time, begin in zip(times, begins[name], strict=True)
        ]
    return rows


def _begins(times: list[int]) -> list[int]:
    """Return for each token the time at which its run of consecutive tokens starts."""
    begins: list[int] = []
    for place, time in enumerate(times):
        begins.append(begins[-1] if place and time == times[place - 1] + 1 else time)
    return begins


def _heads(module: GatedCrossAttention, states: Tensor, places: list[float]) -> Tensor:
    """Split states of shape (length, width) into heads; rotary positions are applied with complex numbers."""
    heads = rearrange(states, SPLIT, heads=module.heads)
    if module.position is None:
        return heads
    half = heads.shape[-1] // 2
    angles = torch.tensor(places, device=heads.device)[:, None, None] * 10_000.0 ** (
        -torch.arange(half, device=heads.device) / half
    )
    wide = torch.promote_types(heads.dtype, torch.float32)
    numbers = torch.complex(*heads.to(wide).chunk(2, -1))
    turned = numbers * torch.complex(angles.cos().to(wide), angles.sin().to(wide))
    return torch.cat([turned.real, turned.imag], -1).to(heads.dtype)


def _opening(gate: Tensor | None) -> Tensor | float:
    return 1.0 if gate is None else gate.tanh()
