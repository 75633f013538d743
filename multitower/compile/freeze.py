"""What of a fused model learns: checked, and set on its towers."""

from __future__ import annotations

from collections.abc import Mapping

from ..declare.graph import FusionGraph
from ..tower import Tower
from ..tower.peft_tower import check_trained
from ..tower.weights import check_trainable, warn_of_lost_gradients
from .towers import check_trained_alike


def set_trained(
    graph: FusionGraph,
    towers: Mapping[str, Tower],
    before: FusionGraph | None = None,
    kept: Mapping[str, Tower] | None = None,
) -> None:
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
        before: The graph of a model that is continued.
        kept: The towers of that model, which stay as they are.

    Raises:
        GraphError: Two towers share weights, and are declared to learn in two ways.
        TowerError: A tower cannot learn as it is declared to.
    """
    owners: dict[int, str] = {}
    for name, tower in towers.items():
        for parameter in tower.parameters():
            check_trained_alike(graph.towers[owners.setdefault(id(parameter), name)], graph.towers[name])
    kept = kept or {}
    settled = set(kept.values())
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
    warned = set() if before is None else {kept[name] for name in _fed(before)}
    for name in _fed(graph):
        if towers[name] not in warned:
            warn_of_lost_gradients(name, towers[name])


def _fed(graph: FusionGraph) -> list[str]:
    """Name the towers into which an input adapter or a link feeds."""
    targets = {link.target for link in graph.links.values()}
    return [name for name, spec in graph.towers.items() if spec.adapter is not None or name in targets]
