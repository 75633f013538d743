"""How far links and input adapters have left the identity that they were at the start."""

from __future__ import annotations

import math

from torch import nn

from ..link.cross_attention import GatedCrossAttention, InputAdapter
from ..run.fusion import Fusion


def openness(model: Fusion) -> dict[str, float]:
    """Return for each tap and input adapter how open it is: 0 at the start, about 1 where it counts in full.

    >>> from multitower.testing import tiny_model
    >>> found = openness(tiny_model())
    >>> found["speech->text 1-1"], found["speech->text 3-2"]
    (0.0, 0.0)

    That is the norm of its last linear layer over the norm that such a layer is initialised with, times tanh
    of its gate if it has one. It needs no batch; ``FusedModel.contributions`` says what a tap changes on one.
    """
    found = {f"{name} adapter": _of_adapter(each) for name, each in model.adapters.items()}
    found |= {f"{tap.link} {tap.key}": _of_tap(module) for tap, module in model.taps().items()}
    return found


def _of_tap(tap: GatedCrossAttention) -> float:
    return _relative(tap.out) * _gate(tap.attention_gate)


def _of_adapter(adapter: nn.Module) -> float:
    assert isinstance(adapter, InputAdapter)
    last = adapter.mlp[-1]
    assert isinstance(last, nn.Linear)
    return _relative(last) * _gate(adapter.gate)


def _relative(layer: nn.Linear) -> float:
    """Return the norm of a layer's weights over that of weights as ``nn.Linear`` initialises them."""
    norm = float(layer.weight.detach().float().norm())
    return norm / math.sqrt(layer.out_features / 3)


def _gate(gate: nn.Parameter | None) -> float:
    return 1.0 if gate is None else abs(float(gate.detach().float().tanh()))
