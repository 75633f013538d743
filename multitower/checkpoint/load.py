"""From a folder to a fused model."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..files import FUSION, CheckpointError, load_strictly, read_tensors
from ..fingerprint import fingerprint
from ..fused import FusedModel
from ..graph import FusionGraph
from ..seal import check_files, read_sealed, steadily
from ..spec import GraphError, TowerSpec
from ..tower import Tower, TowerError, TransformersTower, as_tower
from ..tower.lora import base_state
from .adapters import load_adapters
from .layout import ADAPTER, ADAPTER_CONFIG, LINKS, TOWERS, WEIGHTS
from .parts import fusion_state, whole
from .records import for_all_that_share, read_records, with_sources


def from_pretrained(folder: str | os.PathLike[str], *, towers: Mapping[str, str | nn.Module]) -> FusedModel:
    """Load what ``save_pretrained`` wrote.

    Args:
        folder: The checkpoint.
        towers: Where to take towers from instead: a path, a Hub id or a module. Needed for towers that
            are not from transformers; where the checkpoint holds their weights, these are loaded. Where it
            holds peft adapters, give the model without them; they are put on it in place.

    Raises:
        CheckpointError: A file is missing, damaged or of a newer format; tensors are missing, unexpected
            or of another shape or dtype; or a tower or its adapters are not those that the links were
            trained with.
        ImportError: A tower has peft adapters, and the extra "lora" is not installed.
    """
    again = all(isinstance(tower, str) for tower in towers.values())
    return steadily(Path(folder), functools.partial(_load, towers=towers), again=again)


def _load(root: Path, towers: Mapping[str, str | nn.Module]) -> FusedModel:
    data = read_sealed(root)
    try:
        records = read_records(data)
        towers = for_all_that_share(records, towers)
        graph = FusionGraph.from_dict(with_sources(data["graph"], towers))
    except (GraphError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{root / FUSION} is damaged: {error!r}") from error
    loaded: dict[str, Tower] = {}
    for name, spec in graph.towers.items():
        first = records[name].get("shared_with")
        check_files(root, data, f"{TOWERS}/{name}")
        loaded[name] = loaded[first] if first else _load_tower(root, records[name], towers.get(name), spec)
    model = FusedModel(graph, loaded)
    check_files(root, data, LINKS)
    load_strictly(fusion_state(model), read_tensors(root / LINKS), root / LINKS)
    return model.eval()


def _load_tower(
    root: Path, record: Mapping[str, Any], given: str | nn.Module | None, spec: TowerSpec
) -> Tower:
    name, source, place = spec.name, spec.source, root / TOWERS / spec.name
    stored = place if record.get("embedded") else None
    if stored is not None and (stored / "config.json").exists():
        _check_stored(stored)
        source = str(stored)
    origin = source if given is None else given
    prepare = None
    if spec.train == "lora" or "adapters" in record:
        prepare = functools.partial(load_adapters, place / ADAPTER, record)
    try:
        tower = as_tower(name, origin, prepare)
    except TowerError as error:
        raise CheckpointError(f"{root}: {error}") from error
    state = base_state(whole(tower))
    if stored is not None and not isinstance(tower, TransformersTower):
        load_strictly(state, read_tensors(stored / WEIGHTS), stored / WEIGHTS)
    found, expected = fingerprint(state), record.get("fingerprint")
    if found != expected:
        raise CheckpointError(
            f"tower {name!r} from {origin if isinstance(origin, str) else type(origin).__name__} is not the "
            f"one that this checkpoint was made with (fingerprint {found}, expected {expected}); its weights "
            f"or their dtype have changed. Give the original with towers={{{name!r}: ...}}"
        )
    return tower


def _check_stored(folder: Path) -> None:
    """Check that transformers will read nothing but safetensors, and no adapters of its own accord."""
    if not any((folder / file).exists() for file in (WEIGHTS, f"{WEIGHTS}.index.json")):
        raise CheckpointError(f"{folder / WEIGHTS} is missing; was the checkpoint wholly copied?")
    if (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} has no place there; adapters stand in {ADAPTER}/")
