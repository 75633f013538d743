"""Read and validate ``fusion.json``, and replace the sources of towers by those that the caller gives."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn

from ..declare.graph import FusionGraph
from ..declare.stored import stored_graph
from ..errors import CheckpointError
from ..storage.atomic import current
from ..storage.files import FILES, FUSION, Files, check_files, read_manifest
from ..storage.find import as_declared
from ..storage.tensors import Inventory, differences, inventory

LINKS, TOWERS, MODALITIES, WEIGHTS = "links.safetensors", "towers", "modalities", "model.safetensors"
ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
MAX_SHARD_SIZE = "5GB"
ADAPTER_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*")
"""The names of peft adapters, which are names of folders."""
Records = dict[str, dict[str, Any]]
RECORD = {
    "depth": (int,),
    "width": (int,),
    "embedded": (bool,),
    "revision": (str, NoneType),
    "fingerprint": (str,),
    "values": (str,),
}
"""The fields of a tower's record and their types; a tower that shares a model has "shared_with" instead."""
Given = str | os.PathLike[str] | nn.Module
"""The sources of a tower that a caller may give."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder and the validated content of its ``fusion.json``.

    Attributes:
        root: The folder.
        graph: The declaration, in the form of ``FusionGraph.to_dict``.
        records: The record of each tower; one that shares another's model comes after it.
        modalities: The record of each modality, by tower.
        tensors: The inventory of each file with tensors.
        schedule: The fingerprint of the schedule.
        files: Size and checksums of each file.
    """

    root: Path
    graph: dict[str, Any]
    records: Records
    modalities: Records
    tensors: dict[str, Inventory]
    schedule: str
    files: Files

    def check(self, towers: Iterable[str], *, links: bool, verify: bool) -> None:
        """Check headers, then bytes of the files of some towers and, if ``links``, of the links."""
        problems: list[str] = []
        towers = list(towers)
        for part in [LINKS] * links + parts_of(self.records, towers):
            try:
                found = inventory(self.root / part)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            wrong = differences(self.tensors[part], found, "but was saved as")
            problems += [f"{part}: {each}" for each in wrong]
        if problems:
            raise CheckpointError(f"{self.root} is not as it was saved:\n  " + "\n  ".join(problems))
        parts = ("links",) * links + tuple(f"{TOWERS}/{name}/" for name in towers)
        check_files(self.root, self.files, parts, verify=verify)

    def stored(self, beginning: str) -> int:
        """Return the total size in bytes of the safetensors files whose paths start with ``beginning``."""
        names = (name for name in self.files if name.startswith(beginning) and name.endswith(".safetensors"))
        return sum(self.files[name]["bytes"] for name in names)


def adapter_folder(name: str) -> str:
    """Return the folder of a peft adapter, relative to ``towers/<tower>/``."""
    return ADAPTER if name == "default" else f"{ADAPTER}/{name}"


def parts_of(records: Mapping[str, Mapping[str, Any]], towers: Iterable[str]) -> list[str]:
    """Return the names of the files with tensors that a checkpoint contains for some towers.

    >>> parts_of({"text": {"embedded": True, "adapters": ["default"]}}, ["text"])
    ['towers/text/model.safetensors', 'towers/text/adapter/adapter_model.safetensors']
    """
    parts = []
    for name in towers:
        parts += [f"{TOWERS}/{name}/{WEIGHTS}"] if records[name].get("embedded") else []
        adapters = map(adapter_folder, records[name].get("adapters", ()))
        parts += [f"{TOWERS}/{name}/{adapter}/{ADAPTER_WEIGHTS}" for adapter in adapters]
    return parts


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and validate ``fusion.json``."""
    root = current(folder)
    document = read_manifest(root)
    try:
        graph = stored_graph(document["graph"]).to_dict()
        records = _records(graph, document["towers"])
        tensors, schedule = document["tensors"], document["schedule"]["fingerprint"]
        modalities = _modalities(records, document["modalities"])
        if not _are_inventories(tensors, [LINKS, *parts_of(records, records)]):
            raise ValueError("it does not say which tensors there are")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{root / FUSION} is damaged: {error!r}") from error
    return Checkpoint(root, graph, records, modalities, tensors, schedule, document[FILES])


def for_all_that_share(
    records: Mapping[str, Mapping[str, Any]], towers: Mapping[str, Given]
) -> dict[str, str | nn.Module]:
    """Apply the source given for one tower to all towers that share its model."""
    unknown = set(towers) - set(records)
    if unknown:
        raise CheckpointError(f"towers={sorted(unknown)}: the checkpoint has the towers {', '.join(records)}")
    chosen: dict[str, tuple[str, str | nn.Module]] = {}
    for name, source in sources(towers).items():
        other, same = chosen.setdefault(records[name].get("shared_with", name), (name, source))
        if same is not source and same != source:
            raise CheckpointError(
                f"towers {other!r} and {name!r} share one model in this checkpoint; give the same for "
                "both, or for one of them only"
            )
    firsts = {name: record.get("shared_with", name) for name, record in records.items()}
    return {name: chosen[first][1] for name, first in firsts.items() if first in chosen}


def sources(towers: Mapping[str, Given]) -> dict[str, str | nn.Module]:
    """Check the types of given sources, and normalise paths by ``as_declared``."""
    for name, source in towers.items():
        if not isinstance(source, str | os.PathLike | nn.Module):
            raise TypeError(
                f"towers={{{name!r}: ...}}: give a path, a Hub id or a module, not a {type(source).__name__}"
            )
    return {
        name: source if isinstance(source, nn.Module) else as_declared(source)
        for name, source in towers.items()
    }


def with_sources(graph: Mapping[str, Any], towers: Mapping[str, str | nn.Module]) -> FusionGraph:
    """Return the graph with other sources for some towers."""
    named = {name: source if isinstance(source, str) else None for name, source in towers.items()}
    entries = [{**tower, "source": named.get(tower["name"], tower["source"])} for tower in graph["towers"]]
    return FusionGraph.from_dict({**graph, "towers": entries})


def _records(graph: Mapping[str, Any], towers: Mapping[str, Any]) -> Records:
    records: Records = {}
    for spec in graph["towers"]:
        name = spec["name"]
        records[name] = record = dict(towers[name])
        if "shared_with" in record:
            first = record["shared_with"]
            if first == name or "shared_with" in records[first]:
                raise KeyError(f"tower {name!r} cannot share the model of {first!r}")
            continue
        wrong = [key for key, kinds in RECORD.items() if type(record.get(key)) not in kinds]
        if wrong:
            raise ValueError(f"tower {name!r}: it does not say {', '.join(wrong)}")
        adapters, active = record.get("adapters", ()), record.get("active_adapters", ())
        if "adapters" in record and not (isinstance(adapters, list) and isinstance(active, list) and active):
            raise ValueError(f"tower {name!r}: it does not say which peft adapters there are")
        for adapter in (*adapters, *active):
            if not ADAPTER_NAME.fullmatch(adapter) or adapter not in adapters:
                raise ValueError(f"tower {name!r} cannot have adapters {adapter!r}")
    return records


def _modalities(records: Records, modalities: Any) -> Records:
    for name, record in modalities.items():
        if name not in records or type(record["modality"]) is not str:
            raise ValueError(f"modality of tower {name!r}: {record!r}")
        if not all(isinstance(record[key], str | None) for key in ("package", "version")):
            raise ValueError(f"modality of tower {name!r}: {record!r}")
    return dict(modalities)


def _are_inventories(tensors: Any, parts: list[str]) -> bool:
    return set(tensors) == set(parts) and all(
        isinstance(each, dict) and all(isinstance(tensor, str) for tensor in each.values())
        for each in tensors.values()
    )
