"""The files of a checkpoint, read with errors that say which file and what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FUSION = "fusion.json"
"""What a checkpoint says of itself."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read."""


def load_strictly(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Copy tensors into those of a model; where anything does not fit, list all of it and change nothing.

    Raises:
        CheckpointError: Something does not fit.
    """
    check_fit(state, tensors, file)
    with torch.no_grad():
        for key, tensor in tensors.items():
            state[key].copy_(tensor)


def check_fit(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Check that a file holds the tensors of a model, of the same shapes and dtypes.

    Raises:
        CheckpointError: It does not; all that does not fit is listed.
    """
    problems = [f"missing: {key}" for key in state if key not in tensors]
    problems += [f"unexpected: {key}" for key in tensors if key not in state]
    problems += [
        f"{key} is {tuple(tensor.shape)} {tensor.dtype}, but the model has "
        f"{tuple(state[key].shape)} {state[key].dtype}"
        for key, tensor in tensors.items()
        if key in state and (tensor.shape, tensor.dtype) != (state[key].shape, state[key].dtype)
    ]
    if problems:
        raise CheckpointError(f"{file} does not fit the model:\n  " + "\n  ".join(problems))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, or is none.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} is missing; is {file.parent} a fused checkpoint, wholly copied?"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or half-written: {error}") from error
