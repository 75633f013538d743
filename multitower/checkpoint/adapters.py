"""The peft adapters of a tower on disk, in peft's own format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.extras import require
from ..errors import CheckpointError
from ..storage.files import FUSION, read_json
from ..storage.fingerprint import fingerprint
from ..storage.tensors import check_fit, mapped_tensors
from ..tower.peft_tower import add_adapter, is_peft_model, make_config
from .limits import check_adapter
from .manifest import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_folder


def save_adapters(name: str, model: Any, folder: Path) -> dict[str, Any]:
    """Write the adapters of a PeftModel; return which there are and which are active."""
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise CheckpointError(
            f"tower {name!r} has merged adapters, so that its model is not what it was; before saving, call "
            f"unimodal({name!r}).unmerge_adapter(), or merge_and_unload({name!r}) of the fused model"
        )
    model.save_pretrained(folder, save_embedding_layers=False)
    return {"adapters": list(model.peft_config), "active_adapters": list(model.active_adapters)}


def load_adapters(folder: Path, record: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """Put the stored adapters on a model; return the PeftModel."""
    peft = require("peft", "lora")
    if "adapters" not in record:
        raise CheckpointError(f"{FUSION} is damaged: it does not say which peft adapters there are")
    if is_peft_model(model):
        raise CheckpointError("it has peft adapters, but the checkpoint brings its own; give it without")
    adapted: Any = model
    active = record["active_adapters"]
    for adapter in record["adapters"]:
        place = folder.parent / adapter_folder(adapter)
        file, tensors = place / ADAPTER_WEIGHTS, mapped_tensors(place / ADAPTER_WEIGHTS)
        settings = read_json(place / ADAPTER_CONFIG)
        check_adapter(place / ADAPTER_CONFIG, settings, tensors)
        config = make_config(settings)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # others may change the model; the values come from the file
        in_single = any(tensor.dtype == torch.float32 for tensor in tensors.values())
        adapted = add_adapter(adapted, config, adapter, autocast=in_single)
        check_fit(adapter_state(adapted, adapter), tensors, file)
        peft.set_peft_model_state_dict(adapted, tensors, adapter)
        rebuilt = getattr(config, "save_only_topk_weights", False)  # of VBLoRA: equal up to rounding
        if not rebuilt and fingerprint(adapter_state(adapted, adapter)) != fingerprint(tensors):
            raise CheckpointError(f"{file} holds values that peft does not take as they are")
    try:
        adapted.set_adapter(active[0])
        adapted.base_model.set_adapter(active)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{FUSION} is damaged: no adapters {active} to activate") from error
    assert isinstance(adapted, nn.Module)
    return adapted


def adapter_state(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of one adapter, as peft stores them."""
    peft = require("peft", "lora")
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, adapter_name=adapter, save_embedding_layers=False
    )
    return state
