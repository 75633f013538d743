"""Towers with peft adapters: LoRA, IA3, LoHa, VeRA, ...; the base model does not change."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.extras import require
from ..declare.peft_config import check_config
from ..errors import TowerError
from ..storage.fingerprint import sampled_fingerprint
from .base import Tower
from .shell import Inject
from .weights import is_offloaded, whole_state

DEFAULT = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
"""The config for ``train="lora"``; other options are peft's defaults."""


def is_peft_model(model: object) -> bool:
    """Whether this is a ``peft.PeftModel``, without importing peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def make_config(data: Mapping[str, Any]) -> Any:
    """Rebuild a trainable ``peft.PeftConfig`` from ``plain_config`` or an adapter_config.json."""
    peft = require("peft", "lora")
    try:
        config = peft.PeftConfig.from_peft_type(
            **{**data, "inference_mode": False, "base_model_name_or_path": None}
        )
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"this is no config of peft {peft.__version__}: {error!r}") from error
    check_config(config)
    return config


def with_adapters(model: nn.Module, declared: Mapping[str, Any] | None) -> nn.Module:
    """Return the PeftModel around a model, changed in place: with new adapters, or its existing ones.

    ``declared`` is a config from ``plain_config``, or None for ``DEFAULT`` or existing adapters.
    """
    if is_peft_model(model):
        if declared is not None:
            raise ValueError("it has peft adapters already, which train='lora' trains; give it no config")
        return model
    config = make_config(DEFAULT if declared is None else declared)
    if any(parameter.is_meta for parameter in model.parameters()) and not is_offloaded(model):
        with torch.device("meta"):
            return add_adapter(model, config)
    before = sampled_fingerprint(model.state_dict())
    adapted = add_adapter(model, config)
    if sampled_fingerprint(base_state(adapted)) != before:
        raise ValueError(
            "this peft config changes the model's own tensors (init_lora_weights, for one, may do that), so "
            "that its origin could not be referred to; call peft.get_peft_model yourself and give the result"
        )
    return adapted


def add_adapter(model: nn.Module, config: Any, name: str = "default", *, autocast: bool = True) -> nn.Module:
    """Add an adapter to a model or PeftModel, in place; return the PeftModel.

    peft changes the config. If ``autocast``, the adapter is in float32 even if the model is in half
    precision.
    """
    peft = require("peft", "lora")
    try:
        with _expected_warnings():
            if is_peft_model(model):
                model.add_adapter(name, config, autocast_adapter_dtype=autocast)  # type: ignore[operator]  # a PeftModel
                return model
            adapted: nn.Module = peft.get_peft_model(model, config, name, autocast_adapter_dtype=autocast)
    except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError, RuntimeError) as error:
        advice = (
            " (a Tower needs target_modules by name and no task_type)" if isinstance(model, Tower) else ""
        )
        raise ValueError(
            f"peft cannot put {config.peft_type.value} adapters on {type(model).__name__}: {error}{advice}"
        ) from error
    return adapted


def base_model(model: Any) -> nn.Module:
    """Return the model inside of a PeftModel; return any other model itself."""
    if not is_peft_model(model):
        assert isinstance(model, nn.Module)
        return model
    for config in model.peft_config.values():
        check_config(config)
    inner = model.get_base_model()
    inside = {id(parameter) for parameter in inner.parameters()}
    outside = [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
    if outside:
        raise ValueError(f"its {type(model.base_model).__name__} has parameters of its own, as {outside[0]}")
    assert isinstance(inner, nn.Module)
    return inner


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's tensors without its adapters, under their names in the base model."""
    inner = base_model(model)
    state = whole_state(inner)
    return {name: state[key] for key in state if (name := _base_name(inner, key)) is not None}


def adapter_names(model: nn.Module) -> set[str]:
    """Return the names of adapter tensors in the state dict of the model inside; see ``base_state``."""
    inner = base_model(model)
    return {key for key in inner.state_dict() if _base_name(inner, key) is None}


def merged_into(model: nn.Module) -> list[Tensor]:
    """Return the tensors that may change when adapters are merged."""
    found = {
        id(tensor): tensor
        for module in model.modules()
        if _kept(module) is not None
        for tensor in (*module.parameters(), *module.buffers())
    }
    return list(found.values())


def check_mergeable(model: nn.Module) -> None:
    """Check that merging the adapters does not change a layer without adapters, through tied weights."""
    owners: dict[int, list[str]] = {}
    for name, tensor in base_state(model).items():
        owners.setdefault(tensor.data_ptr(), []).append(name)
    adapted: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if _kept(module) == "base_layer":
            weight = getattr(module.get_base_layer(), "weight", None)  # type: ignore[operator]  # a BaseTunerLayer
            if weight is not None:
                adapted.setdefault(weight.data_ptr(), []).append(module)
    for place, modules in adapted.items():
        tied = owners.get(place, [])
        rows = {id(getattr(module, "trainable_tokens_delta", module)) for module in modules}
        if len(tied) > 1 and not (len(modules) == len(tied) and len(rows) == 1):  # peft ties what they learn
            raise ValueError(
                f"{' and '.join(tied)} are tied, so that what is merged into one would change the other; "
                "keep the adapters apart, or untie them"
            )


def check_whole(model: nn.Module) -> None:
    """Check that a model with peft layers still has its PeftModel."""
    if not is_peft_model(model) and any(_kept(module) for module in model.modules()):
        raise ValueError(
            "it has peft layers, but no PeftModel around it (was it compiled before, or did transformers add "
            "them?); give the PeftModel, which peft.AutoPeftModelForCausalLM loads, or the model without them"
        )


def check_trained(name: str, model: nn.Module) -> None:
    """Check that a tower with ``train="lora"`` has trainable parameters."""
    if not is_peft_model(model):
        raise TowerError(f"tower {name!r} has no adapters for train='lora'; FusionGraph.compile adds them")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TowerError(
            f"tower {name!r} has train='lora', but its adapters are frozen; load them with "
            "is_trainable=True, or declare train='none'"
        )


class PeftTower(Tower):
    """A ``Tower`` with peft adapters, and the PeftModel around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tower = base_model(model)
        assert isinstance(tower, Tower)
        self.tower = tower
        self.depth, self.width, self.vocab_size = tower.depth, tower.width, tower.vocab_size
        self.begin, self.end = tower.begin, tower.end
        self.max_length, self.hard_limit, self.caches = tower.max_length, tower.hard_limit, tower.caches
        self._native = (model,)  # not registered: its parameters are the tower's

    @property
    def native(self) -> nn.Module:
        """The PeftModel."""
        return self._native[0]

    @property
    def pads_left(self) -> bool:
        """See ``Tower``."""
        return self.tower.pads_left

    @property
    def packs(self) -> bool:  # type: ignore[override]  # that of the tower inside
        """See ``Tower``."""
        return self.tower.packs

    def embed(self, tokens: Tensor, *cache: Any, **positions: Tensor) -> tuple[Tensor, Any]:
        """See ``Tower.embed``; a cache needs ``caches``, and positions need ``packs``."""
        tower: Any = self.tower
        embedded: tuple[Tensor, Any] = tower.embed(tokens, *cache, **positions)
        return embedded

    @property
    def resumes(self) -> bool:
        """See ``Tower``."""
        return self.tower.resumes

    def resume(self, tokens: Tensor, cache: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """See ``Tower.resume``."""
        return self.tower.resume(tokens, cache, mask)

    def layer(self, index: int, hidden: Tensor, context: Any) -> Tensor:
        """See ``Tower.layer``."""
        return self.tower.layer(index, hidden, context)

    def head(self, hidden: Tensor, context: Any) -> Tensor:
        """See ``Tower.head``."""
        return self.tower.head(hidden, context)

    def head_at(self, hidden: Tensor, context: Any, places: Tensor) -> Tensor:
        """See ``Tower.head_at``."""
        return self.tower.head_at(hidden, context, places)

    def decoder(self, inject: Inject) -> Any:
        """See ``Tower.decoder``."""
        return self.tower.decoder(inject)


def _kept(module: nn.Module | Tensor) -> str | None:
    """Return the attribute in which a module of peft keeps the module that it replaces; None for others."""
    if sys.modules.get("peft") is None:
        return None
    if isinstance(module, require("peft.tuners.tuners_utils", "lora").BaseTunerLayer):
        return "base_layer"
    if isinstance(module, require("peft.utils.other", "lora").AuxiliaryTrainingWrapper):
        return "token_adapter" if module._modules.get("original_module") is None else "original_module"
    return None


def _base_name(model: nn.Module, key: str) -> str | None:
    """Return a tensor's name in the base model; None for a tensor of an adapter."""
    parts: list[str] = []
    node: Any = model
    for part in key.split("."):
        kept = _kept(node)
        if kept is None:
            parts.append(part)
        elif part != kept:
            return None
        node = getattr(node, part)
    return ".".join(parts)


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Ignore warnings about settings that peft corrects itself, and about peft's use of transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # peft corrects it
        # peft 0.21 uses a deprecated attribute of transformers 5.23.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield
