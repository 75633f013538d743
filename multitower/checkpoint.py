"""A fused model on disk.

    folder/  fusion.json         format version, graph, origin and fingerprint of each tower
             links.safetensors   links and input adapters
             towers/<name>/      only towers that were trained or have no other origin

Untouched pretrained towers are referred to, not copied, unless asked.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .fingerprint import fingerprint
from .fused import FusedModel
from .graph import FusionGraph
from .spec import GraphError
from .tower import Tower, TowerError, TransformersTower, as_tower

FORMAT_VERSION = 1
FUSION, LINKS, TOWERS, WEIGHTS = "fusion.json", "links.safetensors", "towers", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read."""


def save_pretrained(model: FusedModel, folder: str | os.PathLike[str], *, embed_towers: bool = False) -> None:
    """Write a fused model to a folder.

    >>> import multitower as mt, tempfile
    >>> from multitower.testing import tiny_model, tiny_tower
    >>> model = tiny_model()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder + "/fused")
    ...     towers = {"speech": tiny_tower(depth=3, width=12), "text": tiny_tower(depth=2, width=8)}
    ...     again = mt.FusedModel.from_pretrained(folder + "/fused", towers=towers)
    >>> all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    True

    All files are written to a new folder beside it, which then takes its place: a save that is broken
    off leaves an old checkpoint as it was.

    Args:
        model: The model.
        folder: A new folder, an empty one, or an older checkpoint, which is replaced; files in it that
            are not part of a checkpoint are kept.
        embed_towers: Whether to store frozen towers that were loaded from a path or Hub id, too.

    Raises:
        CheckpointError: The folder holds other things than a checkpoint.
    """
    target = Path(folder).absolute()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a folder to save to")
    if target.is_dir() and any(target.iterdir()) and not (target / FUSION).exists():
        raise CheckpointError(f"{target} is not empty and holds no {FUSION}; save to a folder of its own")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        _write(model, fresh, embed_towers)
        if target.exists():
            _keep_others(target, fresh)
            target.rename(scratch / "old")
        fresh.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def from_pretrained(folder: str | os.PathLike[str], *, towers: Mapping[str, str | nn.Module]) -> FusedModel:
    """Load what ``save_pretrained`` wrote.

    Args:
        folder: The checkpoint.
        towers: Where to take towers from instead: a path, a Hub id or a module. Needed for towers that
            are not from transformers; where the checkpoint holds their weights, these are loaded.

    Raises:
        CheckpointError: A file is missing, damaged or of a newer format; tensors are missing, unexpected
            or of another shape or dtype; or a tower is not the one that the links were trained with.
    """
    root = Path(folder)
    data = _read_json(root / FUSION)
    version = data.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{root / FUSION} has format version {version!r}; this release reads up to {FORMAT_VERSION}: "
            "upgrade multitower"
        )
    try:
        graph = FusionGraph.from_dict(_with_sources(data["graph"], towers))
        records = {name: dict(data["towers"][name]) for name in graph.towers}
    except (GraphError, KeyError, TypeError) as error:
        raise CheckpointError(f"{root / FUSION} is damaged: {error!r}") from error
    unknown = set(towers) - set(graph.towers)
    if unknown:
        raise CheckpointError(
            f"towers={sorted(unknown)}: the checkpoint has the towers {', '.join(graph.towers)}"
        )
    loaded = {
        name: _load_tower(root, name, records[name], towers.get(name), spec.source)
        for name, spec in graph.towers.items()
    }
    model = FusedModel(graph, loaded)
    _load_strictly(model, _read_tensors(root / LINKS), root / LINKS, prefixes=("links.", "adapters."))
    return model.eval()


def _with_sources(graph: Mapping[str, Any], towers: Mapping[str, str | nn.Module]) -> dict[str, Any]:
    """Declare that some towers come from elsewhere than the checkpoint says."""
    sources = {name: source if isinstance(source, str) else None for name, source in towers.items()}
    entries = [{**tower, "source": sources.get(tower["name"], tower["source"])} for tower in graph["towers"]]
    return {**graph, "towers": entries}


def _write(model: FusedModel, folder: Path, embed_towers: bool) -> None:
    records = {}
    for name, spec in model.graph.towers.items():
        tower = model.tower(name)
        embedded = embed_towers or spec.train != "none" or spec.source is None
        records[name] = {
            "class": type(tower.native).__name__,
            "embedded": embedded,
            "fingerprint": fingerprint(tower.native.state_dict()),
        }
        if embedded:
            _save_tower(tower, folder / TOWERS / name)
    state = model.state_dict()
    links = {
        key: value.contiguous() for key, value in state.items() if key.startswith(("links.", "adapters."))
    }
    save_file(links, folder / LINKS, metadata={"format": "pt"})
    document = {"format_version": FORMAT_VERSION, "graph": model.graph.to_dict(), "towers": records}
    (folder / FUSION).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _save_tower(tower: Tower, folder: Path) -> None:
    folder.mkdir(parents=True)
    if isinstance(tower, TransformersTower):
        tower.model.save_pretrained(folder)  # type: ignore[operator]  # a PreTrainedModel, known only when it runs
    else:
        state = {key: value.contiguous() for key, value in tower.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _load_tower(
    root: Path, name: str, record: Mapping[str, Any], given: str | nn.Module | None, source: str | None
) -> Tower:
    stored = root / TOWERS / name if record.get("embedded") else None
    if stored is not None and (stored / "config.json").exists():
        source = str(stored)
    origin = source if given is None else given
    try:
        tower = as_tower(name, origin)
    except TowerError as error:
        raise CheckpointError(f"{root}: {error}") from error
    if stored is not None and not isinstance(tower, TransformersTower):
        _load_strictly(tower, _read_tensors(stored / WEIGHTS), stored / WEIGHTS)
    found, expected = fingerprint(tower.native.state_dict()), record.get("fingerprint")
    if found != expected:
        raise CheckpointError(
            f"tower {name!r} from {origin if isinstance(origin, str) else type(origin).__name__} is not the "
            f"one that this checkpoint was made with (fingerprint {found}, expected {expected}); its weights "
            f"or their dtype have changed. Give the original with towers={{{name!r}: ...}}"
        )
    return tower


def _load_strictly(
    module: nn.Module, tensors: Mapping[str, Tensor], file: Path, prefixes: tuple[str, ...] = ("",)
) -> None:
    """Copy tensors into a module; where anything does not fit, list all of it and change nothing."""
    state = {key: value for key, value in module.state_dict().items() if key.startswith(prefixes)}
    problems = [f"missing: {key}" for key in state if key not in tensors]
    problems += [f"unexpected: {key}" for key in tensors if key not in state]
    problems += [
        f"{key} is {tuple(tensor.shape)} {tensor.dtype}, but the model has "
        f"{tuple(state[key].shape)} {state[key].dtype}"
        for key, tensor in tensors.items()
        if key in state and (tensor.shape, tensor.dtype) != (state[key].shape, state[key].dtype)
    ]
    if problems:
        raise CheckpointError(f"{file} does not fit the model:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for key, tensor in tensors.items():
            state[key].copy_(tensor)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} is missing; is {file.parent} a fused checkpoint, wholly copied?"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is damaged: expected a JSON object")
    return data


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; was the checkpoint wholly copied?") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or half-written: {error}") from error


def _keep_others(old: Path, new: Path) -> None:
    """Copy what a user keeps beside a checkpoint, such as a README or modalities."""
    for entry in old.iterdir():
        if entry.name not in (FUSION, LINKS, TOWERS):
            if entry.is_dir():
                shutil.copytree(entry, new / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, new / entry.name, follow_symlinks=False)
