"""What of a fused model an optimizer trains, and at which rate; gates by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..compile.schedule import Tap
from ..link.cross_attention import GatedCrossAttention


def named_gates(
    adapters: Mapping[str, nn.Module], taps: Mapping[Tap, GatedCrossAttention]
) -> dict[str, nn.Parameter]:
    """Return the parameter of each tanh gate, by readable name."""
    found: dict[str, Any] = {f"{name} adapter": module.gate for name, module in adapters.items()}
    for tap, module in taps.items():
        found[f"{tap.link} {tap.key} attention"] = module.attention_gate
        found[f"{tap.link} {tap.key} feed-forward"] = module.ffn_gate
    return {name: gate for name, gate in found.items() if gate is not None}


def parameter_groups(
    model: nn.Module,
    lr: float,
    rates: Mapping[str, float | Mapping[str, float] | None],
    gate_lr: float | None,
) -> list[dict[str, Any]]:
    """Return optimizer groups, one for each learning rate with and without decay; see ``FusedModel``."""
    unused = {(kind, name) for kind, given in rates.items() if isinstance(given, Mapping) for name in given}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, name, *_ = path.split(".")
        unused.discard((kind, name))
        given = rates[kind]
        rate = given.get(name) if isinstance(given, Mapping) else given
        if kind != "towers" and path.endswith("gate"):
            rate = 10 * lr if gate_lr is None else gate_lr
        decays = parameter.dim() > 1
        groups.setdefault((lr if rate is None else rate, decays), []).append(parameter)
    if unused:
        named = ", ".join(f"{kind}: {name!r}" for kind, name in sorted(unused))
        raise ValueError(f"there is a learning rate for what has no trained parameters ({named})")
    return [
        {"params": parameters, "lr": rate, **({} if decays else {"weight_decay": 0.0})}
        for (rate, decays), parameters in groups.items()
    ]
