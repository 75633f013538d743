"""Tensors in a safetensors file, or in several shards with an index in the Hub's format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from .files import read_json

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}

Inventory = dict[str, str]
"""By tensor, its dtype as safetensors spells it, and its shape: ``F32 [2, 3]``."""


def write_tensors(tensors: Mapping[str, Tensor], file: Path, max_shard_size: int | str) -> None:
    """Write tensors to a file; above a size, to ``<stem>-00001-of-0000N.safetensors`` and an index.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "links.safetensors")
    ...     write_tensors({"a": torch.zeros(2), "b": torch.ones(3)}, file, max_shard_size=10)
    ...     print(sorted(path.name for path in file.parent.iterdir())[-1])
    ...     print(inventory(file))
    links.safetensors.index.json
    {'a': 'F32 [2]', 'b': 'F32 [3]'}
    """
    shards = _split(tensors, size_in_bytes(max_shard_size))
    names = [file.name]
    if len(shards) > 1:
        numbers = range(1, len(shards) + 1)
        names = [f"{file.stem}-{number:05}-of-{len(shards):05}.safetensors" for number in numbers]
    for name, shard in zip(names, shards, strict=True):
        whole = {key: tensor.contiguous() for key, tensor in shard.items()}
        save_file(whole, file.with_name(name), metadata={"format": "pt"})
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        index_of(file).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def inventory(file: Path) -> Inventory:
    """Return dtype and shape of every tensor, reading only headers and the index."""
    found: Inventory = {}
    for shard, expected in _shards(file).items():
        with _opened(shard) as stored:
            keys = set(stored.keys())
            if expected is not None and keys != expected:
                wrong = ", ".join(sorted(keys ^ expected))
                raise CheckpointError(f"{shard} and {index_of(file).name} differ in what it holds: {wrong}")
            for key in keys:
                part = stored.get_slice(key)
                found[key] = f"{part.get_dtype()} {part.get_shape()}"
    return dict(sorted(found.items()))


def mapped_tensors(file: Path) -> dict[str, Tensor]:
    """Return all tensors, memory-mapped from the files."""
    tensors: dict[str, Tensor] = {}
    for shard in _shards(file):
        with _opened(shard) as stored:
            tensors |= {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118  # no mapping
    return tensors


def size_in_bytes(size: int | str) -> int:
    """Parse a size, in bytes or as in "5GB"."""
    found = re.fullmatch(r"(\d+)\s*([KMGT]B)", size.upper()) if isinstance(size, str) else None
    number = int(found[1]) * UNITS[found[2]] if found else size
    if not isinstance(number, int) or isinstance(number, bool) or number <= 0:
        raise ValueError(f"max_shard_size={size!r}: give a number of bytes, or one with KB, MB, GB or TB")
    return number


def index_of(file: Path) -> Path:
    """Return the path of the index of a sharded file."""
    return file.with_name(f"{file.name}.index.json")


def _split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    return shards


def _shards(file: Path) -> dict[Path, set[str] | None]:
    """Return the shards, each with the tensor names that the index lists for it; None without an index."""
    index = index_of(file)
    if not index.exists():
        return {file: None}
    if file.exists():
        raise CheckpointError(
            f"{file} and {index.name} are both there; remove what is not of this checkpoint"
        )
    places = read_json(index).get("weight_map")
    name = re.compile(re.escape(file.stem) + r"-\d{5}-of-\d{5}\.safetensors")
    if not isinstance(places, dict) or not all(
        isinstance(place, str) and name.fullmatch(place) for place in places.values()
    ):
        raise CheckpointError(f"{index} is damaged: it does not say in which file each tensor is")
    shards: dict[Path, set[str] | None] = {}
    for place in sorted(set(places.values())):
        shards[file.with_name(place)] = {key for key, each in places.items() if each == place}
    stray = {path for path in file.parent.iterdir() if name.fullmatch(path.name)} - set(shards)
    if stray:
        raise CheckpointError(f"{index} does not mention {', '.join(sorted(path.name for path in stray))}")
    return shards


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        stored = safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; was the checkpoint wholly copied?") from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or half-written: {error}") from error
    yield stored


def check_fit(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Check that a file has the same tensor names, shapes and dtypes as a model."""
    expected, found = (
        {key: f"{tuple(tensor.shape)} {tensor.dtype}" for key, tensor in each.items()}
        for each in (state, tensors)
    )
    if problems := differences(expected, found, "but the model has"):
        raise CheckpointError(f"{file} does not fit the model:\n  " + "\n  ".join(problems))


def differences(expected: Mapping[str, str], found: Mapping[str, str], but: str) -> list[str]:
    """List missing, unexpected and differing entries.

    >>> differences({"a": "[2]", "b": "[3]"}, {"b": "[4]", "c": "[5]"}, "not")
    ['missing: a', 'unexpected: c', 'b is [4], not [3]']
    """
    problems = [f"missing: {key}" for key in expected if key not in found]
    problems += [f"unexpected: {key}" for key in found if key not in expected]
    changed = (key for key in found if key in expected and expected[key] != found[key])
    return problems + [f"{key} is {found[key]}, {but} {expected[key]}" for key in changed]
