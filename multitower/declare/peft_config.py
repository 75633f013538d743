"""peft configs as plain data."""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping
from typing import Any

NOT_IN_A_TOWER = {
    "is_prompt_learning": "puts virtual tokens before the prompt, for which a tower has no place",
    "is_adaption_prompt": "puts virtual tokens before the prompt, for which a tower has no place",
    "alora_invocation_tokens": "looks at the tokens before the model runs, which a tower does not",
    "adapters": "loads adapters from places of its own",
    "megatron_config": "runs code of another package",
    "layer_replication": "gives the model other layers, which a tower cannot tell from its own",
}


def is_peft_config(value: object) -> bool:
    """Whether this is a ``peft.PeftConfig``, without importing peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(value, peft.PeftConfig)


def plain_config(config: Any) -> dict[str, Any]:
    """Convert a ``peft.PeftConfig`` to data that JSON preserves."""
    check_config(config)
    plain: dict[str, Any] = _plain(config.to_dict())
    return plain


def check_config(config: Any) -> None:
    """Check that a tower supports the adapters of a config."""
    for field, why in NOT_IN_A_TOWER.items():
        if getattr(config, field, None):
            raise ValueError(f"{type(config).__name__} ({field}) {why}; use LoRA, IA3, ... without it")


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(each) for each in value)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"the peft config contains a {type(value).__name__}, which JSON cannot represent")
