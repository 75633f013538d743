"""A single tower of a checkpoint: whether to store it, how to load it, its probe results and adapters."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from ..base.extras import require
from ..declare.spec import TowerSpec
from ..errors import CheckpointError, PluginError, TowerError
from ..run.fusion import Fusion
from ..storage.files import FUSION, read_json
from ..storage.find import hub_id, is_path
from ..storage.fingerprint import fingerprint, sampled_fingerprint
from ..storage.tensors import check_fit, mapped_tensors
from ..tower import Tower, TransformersTower, as_tower
from ..tower.load import from_source, revision_of
from ..tower.peft_tower import add_adapter, base_model, base_state, is_peft_model, make_config
from ..tower.probe import Proof
from ..tower.weights import quantisation_of
from .assign import fill, restore_dtypes, whole
from .limits import check_adapter, check_model
from .manifest import ADAPTER, ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOWERS, WEIGHTS, Checkpoint, adapter_folder

KINDS = {"path": (str,), "width": (int,), "beyond": (int,), "masked": (bool,), "positions": (int, NoneType)}


def is_to_be_stored(model: Fusion, name: str, embed_towers: bool) -> bool:
    """Whether a checkpoint stores the weights of a tower, instead of a reference to its source.

    A reference is a Hub id with its commit, or a plugin's URL, and only if loading it again gives tensors and
    a generation config identical to the tower's. Quantised towers are not compared: they can be neither
    trained nor converted.
    """
    spec, native = model.graph.towers[name], whole(model.tower(name))
    source, revision = spec.source, revision_of(base_model(native))
    if embed_towers or spec.train == "all" or source is None or is_path(source):
        return True
    if hub_id(source) and revision is None:
        return True
    if quantisation_of(base_model(native)):
        return False
    try:
        origin = from_source(name, source, revision=revision, cached=True)
    except (TowerError, PluginError):
        return True
    origin = whole(origin) if isinstance(origin, Tower) else origin
    if _generation(origin) != _generation(base_model(native)):
        return True
    found, state = base_state(origin), base_state(native)
    return found.keys() != state.keys() or not all(_same(found[key], state[key]) for key in state)


def _generation(model: Any) -> dict[str, Any] | None:
    """Return the settings by which a transformers model generates: begin and end tokens and so on."""
    config = getattr(model, "generation_config", None)
    return None if config is None else config.to_dict()


def ways_out(name: str) -> str:
    """Return advice for the error that a tower is not found."""
    return (
        f"say where it is with towers={{{name!r}: ...}}, or have it in the checkpoint: save with "
        "embed_towers=True where it can be loaded"
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)


def write_proof(tower: Tower) -> dict[str, Any] | None:
    """Return a tower's probe results for the manifest; None if it has none and is probed at each loading."""
    proof = tower.proof if isinstance(tower, TransformersTower) else None
    return None if proof is None else {**proof._asdict(), "versions": _versions()}


def read_proof(record: Mapping[str, Any]) -> Proof | None:
    """Return recorded probe results, or None if invalid or of other versions of torch or transformers."""
    said = record.get("proof")
    if not isinstance(said, dict) or said.get("versions") != _versions():
        return None
    if any(type(said.get(key)) not in kinds for key, kinds in KINDS.items()) or said["beyond"] < 0:
        return None
    return Proof(**{key: said[key] for key in KINDS})


def _versions() -> dict[str, str]:
    transformers = require("transformers", "transformers")
    return {"torch": str(torch.__version__), "transformers": transformers.__version__}


def load_one(
    checkpoint: Checkpoint,
    spec: TowerSpec,
    given: str | nn.Module | None,
    changed: bool | Collection[str] = False,
    *,
    verify: bool = False,
) -> Tower:
    """Load a tower from the given source, else from the checkpoint, else from its original source.

    ``changed``: whether it may differ from the saved tower, for all or for the named towers.
    """
    name, record = spec.name, checkpoint.records[spec.name]
    place = checkpoint.root / TOWERS / name
    stored = place if record["embedded"] else None
    origin = spec.source if given is None else given
    if stored is not None and given is None and (stored / "config.json").exists():
        tensors = checkpoint.tensors[f"{TOWERS}/{name}/{WEIGHTS}"]
        check_model(stored, len(tensors), checkpoint.stored(f"{TOWERS}/{name}/model"))
        origin, mixed = str(stored), len({each.partition(" ")[0] for each in tensors.values()}) > 1
    referred = given is None and stored is None
    revision = record["revision"] if given is None and origin == spec.source else None
    file = None if stored is None else stored / WEIGHTS

    steps: list[Callable[[nn.Module], nn.Module]] = []
    if file is not None and origin == str(stored):
        steps += [functools.partial(restore_dtypes, file)] * mixed
    elif file is not None:
        steps.append(functools.partial(fill, file, given is None))
    if spec.train == "lora" or "adapters" in record:
        steps.append(functools.partial(load_adapters, place / ADAPTER, record))

    def prepare(model: nn.Module) -> nn.Module:
        return functools.reduce(lambda made, step: step(made), steps, model)

    try:
        proof = None if verify or given is not None or "adapters" in record else read_proof(record)
        tower = as_tower(name, origin, prepare if steps else None, revision=revision, proof=proof)
    except (TowerError, CheckpointError) as error:
        advice = f"; {ways_out(name)}" if referred and spec.source is not None else ""
        raise CheckpointError(f"{checkpoint.root}: {error}{advice}") from error
    except ImportError:
        raise
    except Exception as error:  # a valid config may still describe a model that cannot run
        raise CheckpointError(
            f"{checkpoint.root}: tower {name!r}: {type(error).__name__}: {error}"
        ) from error
    _check_size(name, record, tower)
    state = base_state(whole(tower))
    if any(tensor.is_meta for tensor in state.values()):
        raise CheckpointError(
            f"tower {name!r} is on the meta device, and the checkpoint has no values for it"
        )
    digest, expected = (
        (fingerprint, record["values"]) if verify else (sampled_fingerprint, record["fingerprint"])
    )
    if digest(state) != expected:
        own = file is not None and (origin == str(stored) or not isinstance(tower, TransformersTower))
        _refuse(name, origin, own=own, allowed=changed)
    return tower


def _check_size(name: str, record: dict[str, object], tower: Tower) -> None:
    sizes = {key: getattr(tower, key) for key in ("depth", "width")}
    wrong = [f"{key} {size}, not {record[key]}" for key, size in sizes.items() if size != record[key]]
    if wrong:
        raise CheckpointError(
            f"tower {name!r} has {' and '.join(wrong)}, with which the links were trained; load it as it "
            "was, and exchange the tower with swap"
        )


def _refuse(name: str, origin: object, *, own: bool, allowed: bool | Collection[str]) -> None:
    what = f"tower {name!r} from {origin if isinstance(origin, str) else type(origin).__name__}"
    if not own and (allowed is True or (not isinstance(allowed, bool) and name in allowed)):
        warnings.warn(
            f"{what} is not the one that this checkpoint was made with; the links were trained with another",
            stacklevel=6,
        )
        return
    raise CheckpointError(
        f"{what} is not the one that this checkpoint was made with: its weights or their dtype have changed. "
        f"Give the original with towers={{{name!r}: ...}}"
        + ("" if own else f", or take this one all the same with allow_changed_towers=[{name!r}]")
    )


def save_adapters(name: str, model: Any, folder: Path) -> dict[str, Any]:
    """Write the adapters of a PeftModel; return the names of all and of the active ones."""
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise CheckpointError(
            f"tower {name!r} has merged adapters, so that its model is not what it was; before saving, call "
            f"unimodal({name!r}).unmerge_adapter(), or merge_and_unload({name!r}) of the fused model"
        )
    if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
        raise CheckpointError(
            f"tower {name!r} has adapters that are switched off, and would be loaded with them on; "
            f"call unimodal({name!r}).base_model.enable_adapter_layers() before saving"
        )
    model.save_pretrained(folder, save_embedding_layers=False)
    for adapter in model.peft_config:
        place = folder.parent / adapter_folder(adapter)
        try:
            check_adapter(
                Path(ADAPTER_CONFIG),
                read_json(place / ADAPTER_CONFIG),
                mapped_tensors(place / ADAPTER_WEIGHTS),
            )
        except CheckpointError as error:
            raise CheckpointError(f"tower {name!r} could not be loaded again: {error}") from error
    return {"adapters": list(model.peft_config), "active_adapters": list(model.active_adapters)}


def load_adapters(folder: Path, record: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """Add the stored adapters to a model; return the PeftModel."""
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
            config.init_lora_weights = True  # other values may modify the base model
        in_single = any(tensor.dtype == torch.float32 for tensor in tensors.values())
        adapted = add_adapter(adapted, config, adapter, autocast=in_single)
        check_fit(adapter_state(adapted, adapter), tensors, file)
        peft.set_peft_model_state_dict(adapted, tensors, adapter)
        rebuilt = getattr(config, "save_only_topk_weights", False)  # VBLoRA: equal only up to rounding
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
