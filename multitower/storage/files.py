"""The files of a checkpoint, read with errors that say which file and what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CheckpointError

FUSION = "fusion.json"
"""What a checkpoint says of itself."""
LARGEST_JSON = 1 << 24
"""How many bytes a JSON file of a checkpoint may have."""


def check_fit(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Check that a file holds the tensors of a model, of the same shapes and dtypes.

    Raises:
        CheckpointError: It does not; all that does not fit is listed.
    """
    expected, found = (
        {key: f"{tuple(tensor.shape)} {tensor.dtype}" for key, tensor in each.items()}
        for each in (state, tensors)
    )
    if problems := differences(expected, found, "but the model has"):
        raise CheckpointError(f"{file} does not fit the model:\n  " + "\n  ".join(problems))


def differences(expected: Mapping[str, str], found: Mapping[str, str], but: str) -> list[str]:
    """List what is missing, what should not be there, and what is other than expected.

    >>> differences({"a": "[2]", "b": "[3]"}, {"b": "[4]", "c": "[5]"}, "not")
    ['missing: a', 'unexpected: c', 'b is [4], not [3]']
    """
    problems = [f"missing: {key}" for key in expected if key not in found]
    problems += [f"unexpected: {key}" for key in found if key not in expected]
    changed = (key for key in found if key in expected and expected[key] != found[key])
    return problems + [f"{key} is {found[key]}, {but} {expected[key]}" for key in changed]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object that is no larger than ``LARGEST_JSON`` and means one thing only.

    Raises:
        CheckpointError: The file is missing, or is none: it names a key twice, say, or holds NaN.
    """
    try:
        if file.is_file() and file.stat().st_size > LARGEST_JSON:
            raise CheckpointError(f"{file} is damaged: it has more than {LARGEST_JSON} bytes")
        data = json.loads(
            file.read_text(encoding="utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_such_number
        )
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} is missing; is {file.parent} a fused checkpoint, wholly copied?"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is damaged: expected a JSON object")
    return data


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; was the checkpoint wholly copied?") from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged or half-written: {error}") from error


def check_inside(folder: Path) -> None:
    """Check that a checkpoint is plain files and folders, so that reading it reads nothing else.

    The cache of the Hub keeps the files of a ``snapshots/<revision>`` as links to ``blobs``, which are let
    pass. What stands beside a checkpoint in its folder is never read, and may be anything.

    Raises:
        CheckpointError: There is a link that leads elsewhere, or a device or pipe.
    """
    root = folder.resolve()
    blobs = [place.parent / "blobs" for place in root.parents if place.name == "snapshots"]
    for place, folders, files in os.walk(root):
        if Path(place) == root:
            folders[:], files = _own(folders), _own(files)
        for entry in (Path(place, name) for name in (*folders, *files)):
            try:
                real = entry.resolve(strict=True)
            except (OSError, RuntimeError) as error:
                raise CheckpointError(f"{entry} is a link that leads nowhere: {error}") from error
            if entry.is_symlink() and not (real.parent in blobs and real.is_file()):
                raise CheckpointError(
                    f"{entry} is a link to {real}, and none is followed; put a copy in its place"
                )
            if not (real.is_file() or real.is_dir()):
                raise CheckpointError(f"{entry} is neither a file nor a folder")


def _own(names: list[str]) -> list[str]:
    return [
        name for name in names if name in ("towers", "modalities") or name.endswith((".json", ".safetensors"))
    ]


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return data


def _no_such_number(name: str) -> float:
    raise ValueError(f"{name} is no number")
