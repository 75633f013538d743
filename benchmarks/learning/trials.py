"""Experiments with links outside of the library, by name; some patch it in this process.

- ``"stop gradient": True``: no gradient flows through a link to its source (knowledge insulation, arXiv
  2505.23705).
- ``"q/k norms": True``: queries and keys are normalised for each head (as in Mllama's cross-attention).
- ``"warm start": True``: queries, keys, values and norms are initialised from the target's layer after the
  tap (T5Gemma, arXiv 2504.06225).
- ``"alignment": weight``: a loss on attention far off the diagonal, whose weight decays to zero over half of
  the steps (guided attention, arXiv 1710.08969).
- ``"drop": share``: this fraction of the batches has no source.
- ``"guidance": scale``: classifier-free guidance of synthesis against the speech tower alone, by
  transformers' ``UnbatchedClassifierFreeGuidanceLogitsProcessor``.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from data import Corpus
from torch import Tensor, nn

import multitower as mt
from multitower.link.attention import rotate
from multitower.link.cross_attention import GatedCrossAttention, KeysValues


def change_library(trials: Mapping[str, Any], corpus: Corpus) -> None:
    """Patch the links of the library; must be called before any is created."""
    if trials.get("stop gradient"):
        read = GatedCrossAttention.read
        GatedCrossAttention.read = lambda tap, source, *rest: read(tap, source.detach(), *rest)
    if trials.get("q/k norms"):
        _normalise_queries_and_keys()


def start_warm(model: mt.FusedModel) -> None:
    """Copy a target layer's self-attention, except its output projection, into the tap before it."""
    for tap in model.schedule.taps:
        layers = model.unimodal(tap.target).model.layers
        layer, module = layers[min(tap.target_layer, len(layers) - 1)], model.tap(tap)
        own = layer.self_attn
        with torch.no_grad():
            for new, old in (
                (module.query, own.q_proj),
                (module.key, own.k_proj),
                (module.value, own.v_proj),
                (module.norm, layer.input_layernorm),
            ):
                new.weight.copy_(old.weight)


def with_dropped_links(
    batches: Iterator[list[list[mt.Segment]]], share: float, seed: int, learning: Collection[str]
) -> Iterator[list[list[mt.Segment]]]:
    """Remove the sources from a share of the batches, if their target tower is trained."""
    draw = random.Random(seed)
    for batch in batches:
        alone = draw.random() < share and batch[0][-1].tower in learning
        yield [[each for each in example if each.target] for example in batch] if alone else batch


class Aligned(nn.Module):
    """A fused model with an additional loss on attention off the diagonal."""

    def __init__(self, model: mt.FusedModel, weight: float, steps: int) -> None:
        super().__init__()
        self.model, self.weight, self.steps, self.count = model, weight, steps, 0

    def forward(self, streams: Mapping[str, Mapping[str, Tensor]]) -> tuple[Tensor]:
        """Return the loss."""
        fade = max(0.0, 1 - 2 * self.count / self.steps)
        self.count += 1
        out = self.model(streams, output_attentions=fade > 0)
        if not fade:
            return (out.loss,)
        target = next(name for name, each in streams.items() if (each["labels"] >= 0).any())
        taps = [tap for link in out.attentions.values() for tap in link.values()]
        off = torch.stack([_off_diagonal(tap, streams, target) for tap in taps]).mean()
        return (out.loss + fade * self.weight * off,)


def guidance(model: mt.FusedModel, scale: float) -> dict[str, Any]:
    """Return the options of ``generate`` that guide speech against the speech tower alone."""
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

    alone = model.unimodal("speech")
    return {"logits_processor": [UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, alone)]}


def _off_diagonal(weights: Tensor, streams: Mapping[str, Mapping[str, Tensor]], target: str) -> Tensor:
    (source,) = (name for name in streams if name != target)
    places = []
    for name in (target, source):
        mask = streams[name]["mask"]
        places.append(torch.arange(mask.shape[1]) / mask.sum(1, keepdim=True))
    distance = places[0][:, :, None] - places[1][:, None]
    cost = (1 - torch.exp(-(distance**2) / (2 * 0.2**2))) * streams[target]["mask"][:, :, None]
    return (weights.mean(1) * cost).sum() / streams[target]["mask"].sum()


def _normalise_queries_and_keys() -> None:
    init, read, forward = (
        GatedCrossAttention.__init__,
        GatedCrossAttention.read,
        GatedCrossAttention.forward,
    )

    @functools.wraps(init)
    def new_init(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.query_scale = torch.nn.Parameter(torch.ones(self.head_width))
        self.key_scale = torch.nn.Parameter(torch.ones(self.head_width))

    def new_turned(self: Any, states: Tensor, rotation: Any) -> Tensor:
        heads = self._split(states)
        scale = self.key_scale if self._reading else self.query_scale
        heads = F.rms_norm(heads, heads.shape[-1:]) * scale
        return heads if rotation is None else rotate(heads, rotation)

    def new_read(self: Any, *args: Any) -> KeysValues:
        self._reading = True
        return read(self, *args)

    def new_forward(self: Any, *args: Any) -> Tensor:
        self._reading = False
        return forward(self, *args)

    GatedCrossAttention.__init__ = new_init
    GatedCrossAttention._turned = new_turned
    GatedCrossAttention.read = new_read
    GatedCrossAttention.forward = new_forward
