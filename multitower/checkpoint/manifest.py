"""What ``fusion.json`` says of a checkpoint, and what the caller says instead."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..declare.graph import FusionGraph
from ..errors import CheckpointError
from ..storage.files import FUSION
from ..storage.find import as_declared
from ..storage.integrity import FILES, check_files, read_sealed
from ..storage.tensors import Inventory, inventory
from .layout import ADAPTER_WEIGHTS, LINKS, TOWERS, WEIGHTS, adapter_folder, is_links
from .migrate import migrated

Records = dict[str, dict[str, Any]]
Given = str | os.PathLike[str] | nn.Module
"""What a caller may name as a tower."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder and what its ``fusion.json`` says, checked for its form.

    Attributes:
        root: The folder.
        graph: The declaration, as ``FusionGraph.to_dict`` gives it.
        records: What is said of each tower; one that shares the model of another comes after it.
        tensors: What is in each file with tensors; None where an older version of the format does not say.
        schedule: The fingerprint of the schedule, or None.
        document: All that it says.
    """

    root: Path
    graph: dict[str, Any]
    records: Records
    tensors: dict[str, Inventory] | None
    schedule: str | None
    document: dict[str, Any]

    def parts(self, towers: Iterable[str]) -> list[str]:
        """Name the files with tensors of some towers."""
        return [part for name in towers for part in parts_of(name, self.records[name])]

    def links(self) -> list[str]:
        """Name the files of the links, those that are there and those that should be."""
        present = (path.name for path in self.root.iterdir())
        return sorted({name for name in (*present, *self.document.get(FILES, ())) if is_links(name)})

    def check_files(self, parts: Iterable[str]) -> None:
        """Check that files and folders are as they were saved; see ``integrity.check_files``."""
        check_files(self.root, self.document, parts)

    def check_tensors(self, parts: list[str]) -> None:
        """Check that files hold the tensors that they should, from their headers alone.

        Raises:
            CheckpointError: They do not; all that is wrong, in whichever of the files, is listed.
        """
        problems: list[str] = []
        for part in parts:
            try:
                found = inventory(self.root / part)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if self.tensors is not None:
                problems += [f"{part}: {each}" for each in _differences(self.tensors[part], found)]
        if problems:
            raise CheckpointError(f"{self.root} is not as it was saved:\n  " + "\n  ".join(problems))


def parts_of(name: str, record: Mapping[str, Any]) -> list[str]:
    """Name the files with tensors that a checkpoint holds for a tower.

    >>> parts_of("text", {"embedded": True, "adapters": {"default": "..."}})
    ['towers/text/model.safetensors', 'towers/text/adapter/adapter_model.safetensors']
    """
    parts = [f"{TOWERS}/{name}/{WEIGHTS}"] if record.get("embedded") else []
    adapters = [adapter_folder(adapter) for adapter in record.get("adapters", {})]
    return parts + [f"{TOWERS}/{name}/{folder}/{ADAPTER_WEIGHTS}" for folder in adapters]


def read_checkpoint(root: Path) -> Checkpoint:
    """Read ``fusion.json``.

    Raises:
        CheckpointError: It is missing, damaged, or of a newer version of the format.
    """
    document = migrated(read_sealed(root), root / FUSION)
    try:
        graph = FusionGraph.from_dict(document["graph"]).to_dict()
        records = _records(graph, document["towers"])
        tensors, schedule = document["tensors"], document["schedule"]
        checkpoint = Checkpoint(root, graph, records, tensors, schedule and schedule["fingerprint"], document)
        if tensors is not None and not _are_inventories(tensors, [LINKS, *checkpoint.parts(records)]):
            raise ValueError("it does not say which tensors there are")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{root / FUSION} is damaged: {error!r}") from error
    return checkpoint


def for_all_that_share(
    records: Mapping[str, Mapping[str, Any]], towers: Mapping[str, Given]
) -> dict[str, str | nn.Module]:
    """Return what the caller names for one tower to all that share its model."""
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
    """Return what a caller names as towers, paths as graphs name them.

    >>> sources({"text": Path("/models/text")})
    {'text': '/models/text'}

    Raises:
        TypeError: It is something else.
    """
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
    """Declare that some towers come from elsewhere than the checkpoint says."""
    named = {name: source if isinstance(source, str) else None for name, source in towers.items()}
    entries = [{**tower, "source": named.get(tower["name"], tower["source"])} for tower in graph["towers"]]
    return FusionGraph.from_dict({**graph, "towers": entries})


def _records(graph: Mapping[str, Any], towers: Mapping[str, Any]) -> Records:
    records: Records = {}
    for spec in graph["towers"]:
        name = spec["name"]
        records[name] = record = dict(towers[name])
        first = record.get("shared_with")
        if first is not None:
            if first == name or "shared_with" in records[first]:
                raise KeyError(f"tower {name!r} cannot share the model of {first!r}")
            continue
        if not isinstance(record.get("fingerprint"), str):
            raise KeyError(f"tower {name!r} has no fingerprint")
        if not isinstance(record.get("adapters", {}), dict):
            raise ValueError(f"tower {name!r}: it does not say which peft adapters there are")
        for adapter in record.get("adapters", {}):
            if not re.fullmatch(r"\w[\w .-]*", adapter):
                raise KeyError(f"tower {name!r} cannot have adapters {adapter!r}")
    return records


def _are_inventories(tensors: Any, parts: list[str]) -> bool:
    return set(tensors) == set(parts) and all(
        isinstance(each, dict) and all(isinstance(tensor, str) for tensor in each.values())
        for each in tensors.values()
    )


def _differences(expected: Inventory, found: Inventory) -> list[str]:
    problems = [f"missing: {key}" for key in expected if key not in found]
    problems += [f"unexpected: {key}" for key in found if key not in expected]
    return problems + [
        f"{key} is {tensor}, but was {expected[key]} when it was saved"
        for key, tensor in found.items()
        if key in expected and expected[key] != tensor
    ]
