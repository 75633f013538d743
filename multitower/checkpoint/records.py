"""What ``fusion.json`` says of the towers, and what the caller says instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..files import CheckpointError


def read_records(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give what is said of each tower; one that shares the model of another comes after it."""
    records: dict[str, dict[str, Any]] = {}
    for spec in data["graph"]["towers"]:
        name = spec["name"]
        records[name] = dict(data["towers"][name])
        first = records[name].get("shared_with")
        if first is not None and (first == name or "shared_with" in records[first]):
            raise KeyError(f"tower {name!r} cannot share the model of {first!r}")
    return records


def for_all_that_share(
    records: Mapping[str, Mapping[str, Any]], towers: Mapping[str, str | nn.Module]
) -> dict[str, str | nn.Module]:
    """Give what the caller names for one tower to all that share its model."""
    unknown = set(towers) - set(records)
    if unknown:
        raise CheckpointError(f"towers={sorted(unknown)}: the checkpoint has the towers {', '.join(records)}")
    chosen: dict[str, tuple[str, str | nn.Module]] = {}
    for name, source in towers.items():
        other, same = chosen.setdefault(records[name].get("shared_with", name), (name, source))
        if same is not source and same != source:
            raise CheckpointError(
                f"towers {other!r} and {name!r} share one model in this checkpoint; give the same for "
                "both, or for one of them only"
            )
    firsts = {name: record.get("shared_with", name) for name, record in records.items()}
    return {name: chosen[first][1] for name, first in firsts.items() if first in chosen}


def with_sources(graph: Mapping[str, Any], towers: Mapping[str, str | nn.Module]) -> dict[str, Any]:
    """Declare that some towers come from elsewhere than the checkpoint says."""
    sources = {name: source if isinstance(source, str) else None for name, source in towers.items()}
    entries = [{**tower, "source": sources.get(tower["name"], tower["source"])} for tower in graph["towers"]]
    return {**graph, "towers": entries}
