"""What of a fused model learns: checked, and set on its towers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .graph import FusionGraph
from .sharing import check_trained_alike
from .tower import Tower
from .tower.lora import check_trained
from .tower.trainable import check_trainable, warn_of_lost_gradients

if TYPE_CHECKING:
    from .fused import FusedModel


def set_trained(graph: FusionGraph, towers: Mapping[str, Tower], kept: FusedModel | None = None) -> None:
    """Set ``requires_grad`` on the parameters of towers as the graph declares.

    >>> from multitower.testing import tiny_tower
    >>> graph, tower = FusionGraph(), tiny_tower()
    >>> graph.add_tower("text", tower)
    >>> set_trained(graph, {"text": tower})
    >>> any(parameter.requires_grad for parameter in tower.parameters())
    False

    Args:
        graph: The declaration.
        towers: A tower for each that the graph names.
        kept: A model whose towers stay as they are.

    Raises:
        GraphError: Two towers share weights, and are declared to learn in two ways.
        TowerError: A tower cannot learn as it is declared to.
    """
    owners: dict[int, str] = {}
    for name, tower in towers.items():
        for parameter in tower.parameters():
            check_trained_alike(graph.towers[owners.setdefault(id(parameter), name)], graph.towers[name])
    settled = set() if kept is None else set(kept.towers.values())
    for name, spec in graph.towers.items():
        tower = towers[name]
        if tower in settled:
            continue
        if spec.train == "all":
            check_trainable(name, tower)
        if spec.train == "lora":
            check_trained(name, tower.native)
        else:
            tower.requires_grad_(spec.train == "all")
    warned = set() if kept is None else {kept.towers[name] for name in _fed(kept.graph)}
    for name in _fed(graph):
        if towers[name] not in warned:
            warn_of_lost_gradients(name, towers[name])


def named_gates(model: FusedModel) -> dict[str, nn.Parameter]:
    """Give the parameter of each gate, by readable name."""
    found: dict[str, Any] = {f"{name} adapter": module.gate for name, module in model.adapters.items()}
    for tap in model.schedule.taps:
        module = model.tap(tap)
        found[f"{tap.link} {tap.key} attention"] = module.attention_gate
        found[f"{tap.link} {tap.key} feed-forward"] = module.ffn_gate
    return {name: gate for name, gate in found.items() if gate is not None}


def parameter_groups(model: nn.Module, lr: float, gate_lr: float | None) -> list[dict[str, Any]]:
    """Give what an optimizer should train, gates in a group of their own; see ``FusedModel``."""
    gates: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_gate = name.startswith(("links.", "adapters.")) and name.endswith("gate")
            (gates if is_gate else others).append(parameter)
    return [
        {"params": others, "lr": lr},
        {"params": gates, "lr": 10 * lr if gate_lr is None else gate_lr, "weight_decay": 0.0},
    ]


def _fed(graph: FusionGraph) -> list[str]:
    """Name the towers into which an input adapter or a link feeds."""
    targets = {link.target for link in graph.links.values()}
    return [name for name, spec in graph.towers.items() if spec.adapter is not None or name in targets]
