"""Load a checkpoint: a new fused model, the weights of an existing one, or a single tower."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..base.extras import require
from ..declare.graph import FusionGraph
from ..declare.stored import unlike_options
from ..errors import CheckpointError, GraphError, TowerError
from ..run.fusion import Fusion
from ..storage.files import FUSION
from ..storage.find import find_checkpoint
from ..storage.tensors import check_fit, mapped_tensors
from ..tower import Tower
from ..tower.peft_tower import base_state, is_peft_model
from ..tower.rollback import unchanged_on_error
from .assign import assign, check_stored, fusion_state, tower_of, whole
from .manifest import (
    ADAPTER_WEIGHTS,
    LINKS,
    TOWERS,
    WEIGHTS,
    Checkpoint,
    Given,
    adapter_folder,
    for_all_that_share,
    open_checkpoint,
    sources,
    with_sources,
)
from .placement import DeviceMap, as_devices, as_dtype, check_movable, move
from .towers import adapter_state, load_one

F = TypeVar("F", bound=Fusion)


def load_fusion(
    cls: type[F],
    checkpoint: Checkpoint,
    *,
    towers: Mapping[str, Given] | None = None,
    allow_changed_towers: bool | Collection[str] = False,
    dtype: torch.dtype | str | None = None,
    device_map: DeviceMap | None = None,
    verify: bool = False,
) -> F:
    """Load a checkpoint written by ``save_pretrained``.

    >>> import multitower as mt, tempfile
    >>> from multitower.testing import tiny_model, tiny_tower
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tiny_model().save_pretrained(folder + "/fused")
    ...     towers = {"speech": tiny_tower(depth=3, width=12), "text": tiny_tower(depth=2, width=8)}
    ...     model = mt.FusedModel.from_pretrained(folder + "/fused", towers=towers, dtype="bfloat16")
    >>> {parameter.dtype for parameter in model.parameters()}
    {torch.bfloat16}

    Headers, sizes and small files are checked before loading, samples of each tower's tensors while loading,
    and every value with ``verify=True``. If loading fails, given modules are unchanged. Weights are mapped
    from the files, not copied.

    Args:
        cls: The class of the model.
        checkpoint: The checkpoint.
        towers: Other sources for towers, by name: a path, a Hub id or a module. Required for towers that are
            not from transformers; if the checkpoint contains their weights, these replace the module's
            tensors, also on the meta device. If it contains peft adapters, give the base model; the adapters
            are added to it in place.
        allow_changed_towers: Whether towers may differ from those that were saved: True, or a list of names.
            Each difference is a warning instead of an error.
        dtype: The dtype to convert weights to, those of given modules too: torch.float16 or "float16"; by
            default every tensor keeps its dtype.
        device_map: A device, or a device per tower. Links and input adapters go to the device of the tower
            that they feed. By default, loaded towers are on the CPU, and given modules stay where they are.
        verify: Whether to compare every byte of the checkpoint, and every value of its towers.

    Raises:
        CheckpointError: A file is missing, damaged or of a newer format; tensors are missing, unexpected
            or of another shape or dtype; or a tower or its adapters are not those that the links were
            trained with. The message lists all problems.
        ValueError: A dtype or device is unknown.
        ImportError: A tower has peft adapters, and the extra "lora" is not installed.
    """
    names = list(checkpoint.records)
    wanted, devices = as_dtype(dtype), as_devices(device_map, names)
    _check_names(allow_changed_towers, names)
    given = for_all_that_share(checkpoint.records, towers or {})
    checkpoint.check(names, links=True, verify=verify)
    graph = with_sources(checkpoint.graph, given)
    with unchanged_on_error(each for each in given.values() if isinstance(each, nn.Module)):
        loaded = _load_towers(checkpoint, graph, given, allow_changed_towers, verify)
        model = _fuse(cls, checkpoint, graph, loaded)
        for name, each in loaded.items():
            check_movable(name, each, wanted, devices.get(name))
    for name, each in loaded.items():
        if "shared_with" not in checkpoint.records[name]:
            move(each.native, wanted, devices.get(name))

    def placed(key: str, tensor: Tensor) -> Tensor:
        device = model.tower(tower_of(graph, key)).device
        return tensor.to(device=device, dtype=wanted if tensor.is_floating_point() else None)

    assign(model, checkpoint.root / LINKS, placed)
    return model.eval()


def load_tower(
    folder: str | os.PathLike[str],
    name: str,
    *,
    tower: Given | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | int | torch.device | None = None,
    verify: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Load a single tower of a checkpoint as an ordinary model; nothing else is read.

    >>> import multitower as mt, tempfile
    >>> from multitower.testing import tiny_model, tiny_tower
    >>> model = tiny_model()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save_pretrained(folder + "/fused")
    ...     text = load_tower(folder + "/fused", "text", tower=tiny_tower(depth=2, width=8))
    >>> all(map(torch.equal, model.unimodal("text").state_dict().values(), text.state_dict().values()))
    True

    Args:
        folder: The checkpoint, or its Hub id.
        name: The tower.
        tower: Another source for it, as for ``from_pretrained``.
        dtype: The dtype to convert its weights to.
        device_map: The device to put it on.
        verify: Whether to compare every byte of its files, and every value.
        revision: See ``storage.find_checkpoint``.
        token: As ``revision``.
        cache_dir: As ``revision``.

    Returns:
        The transformers model, the ``PeftModel`` or the ``Tower``, in eval mode.

    Raises:
        CheckpointError: There is no such tower; or see ``load_fusion``.
    """
    root = find_checkpoint(folder, revision=revision, token=token, cache_dir=cache_dir)
    checkpoint = open_checkpoint(root)
    if name not in checkpoint.records:
        raise CheckpointError(
            f"{checkpoint.root} has no tower {name!r}; the towers are {', '.join(checkpoint.records)}"
        )
    first = checkpoint.records[name].get("shared_with", name)
    wanted, devices = as_dtype(dtype), as_devices(device_map, [first])
    checkpoint.check([first], links=False, verify=verify)
    given = {} if tower is None else sources({first: tower})
    spec = with_sources(checkpoint.graph, given).towers[first]
    with unchanged_on_error([tower] if isinstance(tower, nn.Module) else []):
        loaded = load_one(checkpoint, spec, given.get(first), verify=verify)
        check_movable(name, loaded, wanted, devices.get(first))
    move(loaded.native, wanted, devices.get(first))
    return loaded.native.eval()


def load_weights(model: Fusion, folder: str | os.PathLike[str]) -> None:
    """Copy the weights in a checkpoint into a model of the same graph, to resume training.

    Towers that the checkpoint only refers to, such as frozen ones, are unchanged. All files are compared with
    the model before anything is changed.
    """
    checkpoint = open_checkpoint(Path(folder))
    declared = {key: [spec["name"] for spec in checkpoint.graph[key]] for key in ("towers", "links")}
    own = {"towers": list(model.graph.towers), "links": list(model.graph.links)}
    if declared != own or checkpoint.schedule != model.schedule.fingerprint:
        raise CheckpointError(f"{checkpoint.root / FUSION} is of another graph: {declared}, not {own}")
    problems = unlike_options(FusionGraph.from_dict(checkpoint.graph), model.graph)
    if problems:
        raise CheckpointError(f"{checkpoint.root} does not fit:\n  " + "\n  ".join(problems))
    checkpoint.check(checkpoint.records, links=True, verify=False)
    file, fused = checkpoint.root / LINKS, fusion_state(model)
    check_fit(fused, mapped_tensors(file), file)
    bases, adapters = [], []
    for name, record in checkpoint.records.items():
        place = checkpoint.root / TOWERS / name
        native: Any = whole(model.tower(name))
        there = list(native.peft_config) if is_peft_model(native) else []
        if "shared_with" not in record and record.get("adapters", []) != there:
            raise CheckpointError(
                f"{checkpoint.root / FUSION}: tower {name!r} was saved with the peft adapters "
                f"{record.get('adapters', [])}, and this model's has {there}"
            )
        if record.get("embedded"):
            state = base_state(native)
            check_stored(state, place / WEIGHTS)
            bases.append((state, place / WEIGHTS))
        for adapter in record.get("adapters", {}):
            tensors = mapped_tensors(place / adapter_folder(adapter) / ADAPTER_WEIGHTS)
            check_fit(adapter_state(native, adapter), tensors, place / adapter_folder(adapter))
            adapters.append((native, tensors, adapter))
    with torch.no_grad():
        for state, stored in [(fused, file), *bases]:
            for key, tensor in mapped_tensors(stored).items():
                state[key].copy_(tensor)
    for native, tensors, adapter in adapters:
        require("peft", "lora").set_peft_model_state_dict(native, tensors, adapter)


def _check_names(allowed: bool | Collection[str], names: list[str]) -> None:
    unknown = set() if isinstance(allowed, bool) else set(allowed) - set(names)
    if isinstance(allowed, str) or unknown:
        raise ValueError(
            f"allow_changed_towers={allowed!r}: give True, or a list of towers; there are {', '.join(names)}"
        )


def _load_towers(
    checkpoint: Checkpoint,
    graph: FusionGraph,
    given: Mapping[str, str | nn.Module],
    changed: bool | Collection[str],
    verify: bool,
) -> dict[str, Tower]:
    loaded: dict[str, Tower] = {}
    errors: list[CheckpointError] = []
    if not isinstance(changed, bool):
        changed = {checkpoint.records[name].get("shared_with", name) for name in changed}
    for name, spec in graph.towers.items():
        first = checkpoint.records[name].get("shared_with")
        if first is not None:
            continue
        try:
            loaded[name] = load_one(checkpoint, spec, given.get(name), changed, verify=verify)
        except CheckpointError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise CheckpointError("\n".join(map(str, errors))) from ExceptionGroup("towers", errors)
    return {name: loaded[checkpoint.records[name].get("shared_with", name)] for name in graph.towers}


def _fuse(cls: type[F], checkpoint: Checkpoint, graph: FusionGraph, loaded: Mapping[str, Tower]) -> F:
    """Return the model with uninitialised links, after checking that the stored ones fit."""
    depths = {name: tower.depth for name, tower in loaded.items()}
    try:
        links = graph.links.values()
        taps = sum(len(link.resolve(depths[link.source], depths[link.target])) for link in links)
        if taps > len(checkpoint.tensors[LINKS]):
            raise GraphError(f"{taps} taps, but {LINKS} has only {len(checkpoint.tensors[LINKS])} tensors")
        model = cls(graph, loaded, empty=True)
    except (GraphError, TowerError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.root / FUSION} does not fit its towers: {error}") from error
    file, state = checkpoint.root / LINKS, fusion_state(model)
    tensors = mapped_tensors(file)
    state = {key: each.to(tensors.get(key, each).dtype) for key, each in state.items()}  # not the towers'
    check_fit(state, tensors, file)
    if checkpoint.schedule != model.schedule.fingerprint:
        raise CheckpointError(
            f"{checkpoint.root / FUSION} is damaged: the links were trained between other layers than it says"
        )
    return model
