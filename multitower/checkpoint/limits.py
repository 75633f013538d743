"""Limits for untrusted configs: refuse those that cost far more time or memory than their files hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.extras import require
from ..errors import CheckpointError
from ..storage.files import read_json
from ..tower.load import kernels_in
from .manifest import ADAPTER_CONFIG

COUNTS = re.compile(r"layer|expert|label|block|depth|^num_")
SIZES = re.compile(r"size|dim|vocab|position")
MODULES, RANK, BUFFERS = 1 << 14, 64, 1 << 24
"""Always allowed, whatever the size of the files: counts in a config, adapter rank, values in buffers."""
MAX_REPEATS, MAX_PATTERN = 4, 1000
SETTINGS_OF_RANK = ("r", "init_r", "rank_pattern")
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters")
PATTERN_KEYS = ("rank_pattern", "alpha_pattern")


def check_model(folder: Path, tensors: int, stored: int) -> None:
    """Check that a stored tower is safe to load with transformers.

    Loading must read only this folder, run no foreign code, and create no larger a model than the files can
    hold.
    """
    file = folder / "config.json"
    if (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} has no place there; adapters stand in adapter/")
    config = read_json(file)
    if kernels := kernels_in(config):
        raise CheckpointError(f"{file} asks for the kernels {kernels!r}, which may be code of others")
    for key, value in excessive(config, max(tensors, MODULES)).items():
        raise CheckpointError(f"{file} says {key}={value}, but there are only {tensors} tensors")
    _check_values(folder, stored)


def excessive(config: Mapping[str, Any], most: int) -> dict[str, int]:
    """Return the settings that ask for more than ``most`` modules.

    >>> excessive({"num_hidden_layers": 10**6, "vocab_size_per_layer_input": 262_144}, most=100)
    {'num_hidden_layers': 1000000}
    """
    counts = (each for each in _settings(config) if COUNTS.search(each[0]) and not SIZES.search(each[0]))
    return {key: value for key, value in counts if type(value) is int and value > most}


def check_adapter(file: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Check that a peft config has no larger rank than its tensors allow, and no pathological regex."""
    most = max([RANK, *(size for tensor in weights.values() for size in tensor.shape)])
    ranks = [
        value
        for key in SETTINGS_OF_RANK
        for _, value in _settings({key: config.get(key)})
        if type(value) is int
    ]
    if ranks and max(ranks) > most:
        raise CheckpointError(f"{file} asks for rank {max(ranks)}, but its tensors are no larger than {most}")
    patterns = [config[key] for key in PATTERNS if isinstance(config.get(key), str)]
    patterns += [name for key in PATTERN_KEYS if isinstance(config.get(key), dict) for name in config[key]]
    for pattern in patterns:
        if (
            len(pattern) > MAX_PATTERN
            or len(re.findall(r"[*+{]", pattern)) > MAX_REPEATS
            or re.search(r"\)[*+{]", pattern)
        ):
            raise CheckpointError(
                f"{file} holds the pattern {pattern[:80]!r}, with which matching may take for ever; give the "
                "modules by name"
            )


def _check_values(folder: Path, stored: int) -> None:
    """Build the model on the meta device, and compare its number of values with the size of its files."""
    transformers = require("transformers", "transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with require("transformers.initialization", "transformers").no_init_weights(), torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ImportError:
        raise
    except Exception as error:  # transformers may raise anything on a damaged config
        if "trust_remote_code" in str(error):
            return  # loading will refuse it too
        raise CheckpointError(
            f"{folder / 'config.json'} is of no model that transformers can build by itself: {error}"
        ) from error
    values = sum(each.numel() for each in model.parameters())
    buffers = sum(each.numel() for each in model.buffers())
    if values > 8 * stored or buffers > 8 * stored + BUFFERS:
        raise CheckpointError(
            f"{folder / 'config.json'} is of a model of {values} parameters and {buffers} other values, but "
            f"its files have {stored} bytes"
        )


def _settings(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values of a nested config with their innermost key."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _settings(value, key if key in SETTINGS_OF_RANK else str(name))
    elif isinstance(data, list):
        for value in data:
            yield from _settings(value, key)
    else:
        yield key, data
