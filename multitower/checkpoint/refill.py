"""The weights of a checkpoint put into a model that exists, which stays the same object."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..base.extras import require
from ..errors import CheckpointError
from ..run.fusion import Fusion
from ..storage.files import FUSION, check_fit
from ..storage.tensors import mapped_tensors
from ..tower.peft_tower import base_state
from .adapters import adapter_state
from .assign import check_stored
from .layout import ADAPTER_WEIGHTS, LINKS, TOWERS, WEIGHTS, adapter_folder, fusion_state, whole
from .manifest import open_checkpoint


def load_weights(model: Fusion, folder: str | os.PathLike[str]) -> None:
    """Put what a checkpoint stores into a model of the same graph, as a training run is resumed from it.

    >>> import tempfile
    >>> from multitower.testing import open_links, tiny_model
    >>> model, other = open_links(tiny_model()), tiny_model()
    >>> with tempfile.TemporaryDirectory() as place:
    ...     model.save_pretrained(place + "/fused")
    ...     load_weights(other, place + "/fused")
    >>> all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    True

    Towers that the checkpoint refers to, as frozen ones, are left as they are. All files are compared with
    the model before anything is changed.

    Raises:
        CheckpointError: The checkpoint is of another graph, damaged, or does not fit; all is listed.
    """
    checkpoint = open_checkpoint(Path(folder))
    declared = {key: [spec["name"] for spec in checkpoint.graph[key]] for key in ("towers", "links")}
    own = {"towers": list(model.graph.towers), "links": list(model.graph.links)}
    if declared != own or checkpoint.schedule != model.schedule.fingerprint:
        raise CheckpointError(f"{checkpoint.root / FUSION} is of another graph: {declared}, not {own}")
    checkpoint.check(checkpoint.records, links=True, verify=False)
    file, fused = checkpoint.root / LINKS, fusion_state(model)
    check_fit(fused, mapped_tensors(file), file)
    bases, adapters = [], []
    for name, record in checkpoint.records.items():
        native, place = whole(model.tower(name)), checkpoint.root / TOWERS / name
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
