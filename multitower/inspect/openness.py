"""How much links and input adapters contribute: by their weights, and on a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..link.attention import Visibility
from ..link.cross_attention import GatedCrossAttention, InputAdapter
from ..run.fusion import Fusion


def openness(model: Fusion) -> dict[str, float]:
    """Return how open each tap and input adapter is: 0 at initialisation, about 1 if fully open.

    >>> from multitower.testing import tiny_model
    >>> found = openness(tiny_model())
    >>> found["speech->text 1-1"], found["speech->text 3-2"]
    (0.0, 0.0)

    This is the norm of its last linear layer, relative to the default initialisation of such a layer, times
    abs(tanh(gate)) if it has a gate; with a feed-forward, the larger of both. It needs no batch;
    ``FusedModel.contributions`` measures updates on one.
    """
    found = {f"{name} adapter": _of_adapter(each) for name, each in model.adapters.items()}
    found |= {f"{tap.link} {tap.key}": _of_tap(each) for tap, each in model.taps().items()}
    return found


def _of_tap(tap: GatedCrossAttention) -> float:
    attention = _relative(tap.out) * _gate(tap.attention_gate)
    last = None if tap.ffn is None else tap.ffn[-1]
    return max(attention, _relative(last) * _gate(tap.ffn_gate)) if isinstance(last, nn.Linear) else attention


def _of_adapter(adapter: nn.Module) -> float:
    assert isinstance(adapter, InputAdapter)
    last = adapter.mlp[-1]
    assert isinstance(last, nn.Linear)
    return _relative(last) * _gate(adapter.gate)


def _relative(layer: nn.Linear) -> float:
    """Return the norm of a layer's weights, relative to the default initialisation of ``nn.Linear``."""
    norm = float(layer.weight.detach().float().norm())
    return norm / math.sqrt(layer.out_features / 3)


def _gate(gate: nn.Parameter | None) -> float:
    return 1.0 if gate is None else abs(float(gate.detach().float().tanh()))


@torch.no_grad()
def contributions(model: Fusion, streams: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Return how large updates are, relative to the states that they are added to; see ``FusedModel``."""
    found: dict[str, float] = {}

    def of_tap(name: str) -> Callable[..., None]:
        def note(module: Any, inputs: tuple[Tensor, Any, Visibility], update: Tensor) -> None:
            x, _, seen, *_ = inputs
            real = torch.ones_like(x[..., :1], dtype=torch.bool) if seen.sees is None else seen.sees
            found[name] = _ratio(update, x, real)

        return note

    def of_adapter(name: str) -> Callable[..., None]:
        def note(module: Any, inputs: tuple[Tensor], adapted: Tensor) -> None:
            real = streams[name]["mask"].to(adapted.device)[..., None]
            found[f"{name} adapter"] = _ratio(adapted - inputs[0], inputs[0], real)

        return note

    with ExitStack() as hooks:
        for name, adapter in model.adapters.items():
            hooks.callback(adapter.register_forward_hook(of_adapter(name)).remove)
        for tap in model.schedule.taps:
            hook = of_tap(f"{tap.link} {tap.key}")
            hooks.callback(model.tap(tap).register_forward_hook(hook).remove)
        model.run(streams)
    return dict(sorted(found.items()))


def _ratio(update: Tensor, state: Tensor, real: Tensor) -> float:
    """Return the median over real tokens, which an attention sink's huge state does not move."""
    parts, wholes = (each.float().norm(dim=-1)[real[..., 0]] for each in (update, state))
    ratios = parts / wholes.clamp(min=torch.finfo(torch.float32).tiny)
    return float(ratios.median()) if len(ratios) else 0.0
