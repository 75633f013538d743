"""Graphs in checkpoints: read them, and compare them with that of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .graph import OPTIONS, FusionGraph

TOWER_OPTIONS = ("adapter", "memory")
"""Options of a tower that determine what it computes, besides its source."""


def stored_graph(data: Mapping[str, Any]) -> FusionGraph:
    """Rebuild the graph of a checkpoint; where links do not say whether they are relative, they are not."""
    links = [{"relative": False, **link} for link in data["links"]]
    return FusionGraph.from_dict({**data, "links": links})


def unlike_options(saved: FusionGraph, mine: FusionGraph) -> list[str]:
    """List the options by which two graphs with the same towers and links compute something else.

    >>> def graph(**options):
    ...     graph = FusionGraph()
    ...     for name in ("speech", "text"):
    ...         graph.add_tower(name, "path/to/decoder")
    ...     graph.add_link("speech", "text", interleave=1, **options)
    ...     return graph
    >>> unlike_options(graph(window=4), graph())
    ["link 'speech->text' was saved with window=4, and the model's has window=None"]
    """
    pairs = [
        ("tower", TOWER_OPTIONS, saved.towers, mine.towers),
        ("link", OPTIONS, saved.links, mine.links),
    ]
    return [
        f"{kind} {name!r} was saved with {option}={old!r}, and the model's has {option}={new!r}"
        for kind, options, before, after in pairs
        for name in before
        if name in after
        for option in options
        if (old := getattr(before[name], option)) != (new := getattr(after[name], option))
    ]
