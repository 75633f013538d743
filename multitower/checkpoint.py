"""A fused model on disk.

    folder/  fusion.json             format version, graph, fingerprint of each tower and its peft adapters,
                                     modalities
             links.safetensors       links and input adapters
             towers/<name>/          the model of a tower that was trained whole or has no other origin
             towers/<name>/adapter/  the peft adapters of a tower, as peft saves and loads them
             modalities/<name>/      the modality of a tower, where one was given

Untouched pretrained models, peft adapters on them or not, are referred to, not copied, unless asked. What is
stored of a model with adapters is the model without them, as if peft had never touched it. Of towers that
share one model the first is written so, and the others name it (``shared_with``).
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .codecs import MODALITIES, Records, check_modalities, keep_modalities, write_modalities
from .extras import require
from .files import FUSION, CheckpointError, check_fit, load_strictly, read_json, read_tensors
from .fingerprint import fingerprint
from .fused import FusedModel
from .graph import FusionGraph
from .modality import Modality
from .sharing import shared_with
from .spec import GraphError, TowerSpec
from .tower import Tower, TowerError, TransformersTower, as_tower
from .tower.lora import add_adapter, base_model, base_state, is_peft_model, make_config
from .tower.offload import is_offloaded
from .tower.quantised import can_be_stored, quantisation_of

FORMAT_VERSION = 1
LINKS, TOWERS, WEIGHTS = "links.safetensors", "towers", "model.safetensors"
ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"


def save_pretrained(
    model: FusedModel,
    folder: str | os.PathLike[str],
    *,
    embed_towers: bool = False,
    modalities: Mapping[str, Modality] | None = None,
) -> None:
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
            are not part of a checkpoint are kept, and so are modalities, where none is given instead.
        embed_towers: Whether to store frozen models that were loaded from a path or Hub id, too.
        modalities: What makes the tokens of some or all towers, by tower, for ``Pipeline.from_pretrained``.

    Raises:
        CheckpointError: The folder holds other things than a checkpoint, or adapters are merged.
        ValueError: A modality is given for no tower, or has more ids than its tower.
        TypeError: What is given as modality is none.
    """
    modalities = modalities or {}
    check_modalities(model, modalities)
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
        records = write_modalities(modalities, fresh)
        if target.exists():
            _keep_others(target, fresh)
            records = keep_modalities(target, fresh, model.graph.towers) | records
        _write(model, fresh, embed_towers, records)
        if target.exists():
            target.rename(scratch / "old")
        fresh.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
    root = Path(folder)
    data = read_json(root / FUSION)
    version = data.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(
            f"{root / FUSION} has format version {version!r}; this release reads up to {FORMAT_VERSION}: "
            "upgrade multitower"
        )
    try:
        records = _read_records(data)
        towers = _for_all_that_share(records, towers)
        graph = FusionGraph.from_dict(_with_sources(data["graph"], towers))
    except (GraphError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{root / FUSION} is damaged: {error!r}") from error
    loaded: dict[str, Tower] = {}
    for name, spec in graph.towers.items():
        first = records[name].get("shared_with")
        loaded[name] = loaded[first] if first else _load_tower(root, records[name], towers.get(name), spec)
    model = FusedModel(graph, loaded)
    load_strictly(_fusion_state(model), read_tensors(root / LINKS), root / LINKS)
    return model.eval()


def _read_records(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Give what is said of each tower; one that shares the model of another comes after it."""
    records: dict[str, dict[str, Any]] = {}
    for spec in data["graph"]["towers"]:
        name = spec["name"]
        records[name] = dict(data["towers"][name])
        first = records[name].get("shared_with")
        if first is not None and (first == name or "shared_with" in records[first]):
            raise KeyError(f"tower {name!r} cannot share the model of {first!r}")
    return records


def _for_all_that_share(
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


def _with_sources(graph: Mapping[str, Any], towers: Mapping[str, str | nn.Module]) -> dict[str, Any]:
    """Declare that some towers come from elsewhere than the checkpoint says."""
    sources = {name: source if isinstance(source, str) else None for name, source in towers.items()}
    entries = [{**tower, "source": sources.get(tower["name"], tower["source"])} for tower in graph["towers"]]
    return {**graph, "towers": entries}


def _write(model: FusedModel, folder: Path, embed_towers: bool, modalities: Records) -> None:
    records: dict[str, dict[str, Any]] = {}
    shared = shared_with({name: model.tower(name) for name in model.graph.towers})
    for name, spec in model.graph.towers.items():
        if name in shared:
            records[name] = {"shared_with": shared[name]}
            continue
        whole, place = _whole(model.tower(name)), folder / TOWERS / name
        state = base_state(whole)
        embedded = embed_towers or spec.train == "all" or spec.source is None
        if embedded and not can_be_stored(base_model(whole)):
            _leave_out(name, base_model(whole), embed_towers)
            embedded = False
        records[name] = {
            "class": type(base_model(whole)).__name__,
            "embedded": embedded,
            "fingerprint": fingerprint(state),
        }
        if embedded:
            _save_model(base_model(whole), state, place)
        if is_peft_model(whole):
            records[name] |= _save_adapters(name, whole, place / ADAPTER)
    links = {key: value.contiguous() for key, value in _fusion_state(model).items()}
    save_file(links, folder / LINKS, metadata={"format": "pt"})
    document = {
        "format_version": FORMAT_VERSION,
        "graph": model.graph.to_dict(),
        "towers": records,
        "modalities": modalities,
    }
    (folder / FUSION).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _leave_out(name: str, model: nn.Module, embed_towers: bool) -> None:
    why = (
        f"tower {name!r} is quantised ({quantisation_of(model)}) in a way that cannot be written to a "
        "checkpoint and read back"
    )
    if embed_towers:
        raise CheckpointError(f"{why}; save without embed_towers, and keep the tower yourself")
    warnings.warn(
        f"{why}; it is left out, so load with from_pretrained(folder, towers={{{name!r}: module}})",
        stacklevel=5,
    )


def _fusion_state(model: FusedModel) -> dict[str, Tensor]:
    """Give what belongs to no tower: links and input adapters."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("towers.")}


def _whole(tower: Tower) -> nn.Module:
    """Give what a tower is made of: a PeftModel, a transformers model, or a ``Tower`` in plain PyTorch."""
    native = tower.native
    return native if is_peft_model(native) or isinstance(tower, TransformersTower) else tower


def _save_model(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    if isinstance(model, Tower):
        folder.mkdir(parents=True)
        state = {key: value.contiguous() for key, value in state.items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    else:
        own = not is_offloaded(model) and state.keys() == model.state_dict().keys()
        model.save_pretrained(folder, state_dict=None if own else state)


def _save_adapters(name: str, model: Any, folder: Path) -> dict[str, Any]:
    """Write the adapters of a PeftModel; say which there are and which are active."""
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise CheckpointError(
            f"tower {name!r} has merged adapters, so that its model is not what it was; before saving, call "
            f"unimodal({name!r}).unmerge_adapter(), or merge_and_unload({name!r}) of the fused model"
        )
    model.save_pretrained(folder, save_embedding_layers=False)
    adapters = {adapter: fingerprint(_adapter_state(model, adapter)) for adapter in model.peft_config}
    return {"adapters": adapters, "active_adapters": list(model.active_adapters)}


def _adapter_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    peft = require("peft", "lora")
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    )
    return state


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
        prepare = functools.partial(_load_adapters, place / ADAPTER, record)
    try:
        tower = as_tower(name, origin, prepare)
    except TowerError as error:
        raise CheckpointError(f"{root}: {error}") from error
    state = base_state(_whole(tower))
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


def _load_adapters(folder: Path, record: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """Put the stored adapters on a model; give the PeftModel."""
    peft = require("peft", "lora")
    adapters, active = record.get("adapters"), record.get("active_adapters")
    if not (isinstance(adapters, dict) and isinstance(active, list) and active):
        raise CheckpointError(f"{FUSION} is damaged: it does not say which peft adapters there are")
    if is_peft_model(model):
        raise CheckpointError("it has peft adapters, but the checkpoint brings its own; give it without")
    adapted: Any = model
    for adapter, expected in adapters.items():
        place = folder if adapter == "default" else folder / adapter
        file, tensors = place / ADAPTER_WEIGHTS, read_tensors(place / ADAPTER_WEIGHTS)
        config = make_config(read_json(place / ADAPTER_CONFIG))
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # others may change the model; the values come from the file
        in_single = any(tensor.dtype == torch.float32 for tensor in tensors.values())
        adapted = add_adapter(adapted, config, adapter, autocast=in_single)
        check_fit(_adapter_state(adapted, adapter), tensors, file)
        peft.set_peft_model_state_dict(adapted, tensors, adapter)
        if fingerprint(_adapter_state(adapted, adapter)) != expected:
            raise CheckpointError(f"{file} holds other values than those that this checkpoint was made with")
    try:
        adapted.set_adapter(active[0])
        adapted.base_model.set_adapter(active)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{FUSION} is damaged: no adapters {active} to activate") from error
    assert isinstance(adapted, nn.Module)
    return adapted


def _keep_others(old: Path, new: Path) -> None:
    """Copy what a user keeps beside a checkpoint, such as a README."""
    for entry in old.iterdir():
        if entry.name not in (FUSION, LINKS, TOWERS, MODALITIES):
            if entry.is_dir():
                shutil.copytree(entry, new / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, new / entry.name, follow_symlinks=False)
