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
    """Return the parameter of each tanh gate, by readable name."""
    found: dict[str, Any] = {f"{name} adapter": module.gate for name, module in model.adapters.items()}
    for tap in model.schedule.taps:
        module = model.tap(tap)
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


def _fed(graph: FusionGraph) -> list[str]:
    """Name the towers into which an input adapter or a link feeds."""
    targets = {link.target for link in graph.links.values()}
    return [name for name, spec in graph.towers.items() if spec.adapter is not None or name in targets]
