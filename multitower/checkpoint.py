"""A fused model on disk.

    folder/  fusion.json         format version, graph, origin and fingerprint of each tower
             links.safetensors   links and input adapters
             towers/<name>/      only towers that were trained or have no other origin

Untouched pretrained towers are referred to, not copied, unless asked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .fused import FusedModel
from .graph import FusionGraph, GraphError
from .tower import Tower, TowerError, TransformersTower, as_tower
from .tower.offload import is_offloaded, whole_state
from .tower.quantised import can_be_stored, plain_parts, quantisation_of

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


def fingerprint(tower: Tower) -> str:
    """Give a short digest of a tower's tensors: names, shapes, dtypes and a sample of the values.

    >>> from multitower.testing import tiny_tower
    >>> fingerprint(tiny_tower(seed=1)) == fingerprint(tiny_tower(seed=1)) != fingerprint(tiny_tower(seed=2))
    True
    """
    digest = hashlib.sha256()
    state = sorted(whole_state(tower.native).items())
    for name, tensor in (part for entry in state for part in plain_parts(*entry)):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 64)].cpu()
        digest.update(bytes(sample.contiguous().view(torch.uint8).tolist()))
    return digest.hexdigest()[:32]


def _write(model: FusedModel, folder: Path, embed_towers: bool) -> None:
    records = {}
    for name, spec in model.graph.towers.items():
        tower = model.tower(name)
        embedded = embed_towers or spec.train != "none" or spec.source is None
        if embedded and not can_be_stored(tower.native):
            _leave_out(name, tower, embed_towers)
            embedded = False
        records[name] = {
            "class": type(tower.native).__name__,
            "embedded": embedded,
            "fingerprint": fingerprint(tower),
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


def _leave_out(name: str, tower: Tower, embed_towers: bool) -> None:
    why = (
        f"tower {name!r} is quantised ({quantisation_of(tower.native)}) in a way that cannot be written to a "
        "checkpoint and read back"
    )
    if embed_towers:
        raise CheckpointError(f"{why}; save without embed_towers, and keep the tower yourself")
    warnings.warn(
        f"{why}; it is left out, so load with from_pretrained(folder, towers={{{name!r}: module}})",
        stacklevel=5,
    )


def _save_tower(tower: Tower, folder: Path) -> None:
    folder.mkdir(parents=True)
    if isinstance(tower, TransformersTower):
        state = whole_state(tower.model) if is_offloaded(tower.model) else None
        tower.model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]  # a PreTrainedModel, known only when it runs
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
    found, expected = fingerprint(tower), record.get("fingerprint")
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
