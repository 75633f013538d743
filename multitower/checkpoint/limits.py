"""What a stranger's files promise, held against what they bring, before time or memory is spent on them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..base.extras import require
from ..declare.spec import LinkSpec
from ..errors import CheckpointError, GraphError
from ..link.cross_attention import GatedCrossAttention
from ..storage.files import read_json
from ..tower import Tower
from ..tower.load import kernels_in
from .layout import ADAPTER_CONFIG, WEIGHTS

COUNTS = re.compile(r"layer|expert|label|block|depth|^num_")
MODULES, RANK, BUFFERS = 1024, 64, 1 << 24
"""What a config may ask for, however small its tensors: parts of a kind, rank, values that are not stored."""
MAX_REPEATS, MAX_PATTERN = 4, 1000
SETTINGS_OF_RANK = ("r", "init_r", "rank_pattern")
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters")
PATTERN_KEYS = ("rank_pattern", "alpha_pattern")


def check_model(folder: Path) -> None:
    """Check that transformers may load a stored tower.

    Nothing but safetensors in this folder may be read, no code may come from elsewhere, and the model may
    have no more values than the files can hold.

    Raises:
        CheckpointError: It may not; the message names the file.
    """
    if not any((folder / file).exists() for file in (WEIGHTS, f"{WEIGHTS}.index.json")):
        raise CheckpointError(f"{folder / WEIGHTS} is missing; was the checkpoint wholly copied?")
    if (folder / ADAPTER_CONFIG).exists():
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} has no place there; adapters stand in adapter/")
    files = _weight_files(folder)
    tensors = sum(len(_shapes(file)) for file in files)
    config = read_json(folder / "config.json")
    if kernels := kernels_in(config):
        raise CheckpointError(
            f"{folder / 'config.json'} asks for the kernels {kernels!r}, which may be code of others"
        )
    for key, value in _settings(config):
        if COUNTS.search(key) and _is_count(value) and value > max(tensors, MODULES):
            raise CheckpointError(
                f"{folder / 'config.json'} says {key}={value}, but there are only {tensors} tensors"
            )
    _check_values(folder, sum(file.stat().st_size for file in files))


def check_adapter(file: Path, config: Mapping[str, Any], weights: Path) -> None:
    """Check that a peft config asks for no larger adapters than are stored, and no endless pattern.

    Args:
        file: Where the config comes from, for errors.
        config: What ``adapter_config.json`` says.
        weights: The adapter's tensors.

    Raises:
        CheckpointError: It does.
    """
    most = max([RANK, *(size for shape in _shapes(weights).values() for size in shape)])
    ranks = [
        value
        for key in SETTINGS_OF_RANK
        for _, value in _settings({key: config.get(key)})
        if _is_count(value)
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


def check_links(links: Mapping[str, LinkSpec], towers: Mapping[str, Tower], stored: int) -> None:
    """Check that the links of a graph have no more values than their file has bytes.

    Raises:
        CheckpointError: They have, or a link does not fit the towers.
    """
    values = 0
    for link in links.values():
        source, target = towers[link.source], towers[link.target]
        try:
            taps = link.resolve(source.depth, target.depth)
            with torch.device("meta"):
                tap = GatedCrossAttention(
                    source.width,
                    target.width,
                    heads=link.heads,
                    gate=link.gate,
                    projection=link.projection,
                    feed_forward=link.feed_forward,
                )
        except (GraphError, ValueError) as error:
            raise CheckpointError(f"link {link.name!r}: {error}") from error
        values += len(taps) * sum(parameter.numel() for parameter in tap.parameters())
        if values > stored:
            raise CheckpointError(
                f"link {link.name!r} and those before it have {values} values or more, but what is stored of "
                f"them has {stored} bytes"
            )


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers will read; an index may name no others than those beside it."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    places = read_json(index).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) and _are_names(places) else set()
    beside = {file.name for file in folder.glob("*.safetensors")}
    if not names or not names <= beside:
        wrong = ", ".join(sorted(names - beside)) or "none"
        raise CheckpointError(f"{index} names files that are not beside it ({wrong}); was it wholly copied?")
    return [folder / name for name in sorted(names)]


def _are_names(places: Mapping[str, Any]) -> bool:
    return all(isinstance(place, str) for place in places.values())


def _check_values(folder: Path, stored: int) -> None:
    """Build a stored model without memory for its values, and count them."""
    transformers = require("transformers", "transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ImportError:
        raise
    except Exception as error:  # a damaged config can bring transformers to any of them
        if "trust_remote_code" in str(error):
            return  # then it will not be loaded either
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
    """Return all values of a config, however deep, by their innermost key."""
    if isinstance(data, dict):
        for name, value in data.items():
            yield from _settings(value, key if key in SETTINGS_OF_RANK else name)
    elif isinstance(data, list):
        for value in data:
            yield from _settings(value, key)
    else:
        yield key, data


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as stored:
            return {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118  # no mapping
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; was the checkpoint wholly copied?") from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or half-written: {error}") from error
