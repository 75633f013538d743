"""Tensors of a checkpoint put into modules: into what is there, or in place of what has no values yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..storage.files import check_fit
from ..storage.fingerprint import is_packed
from ..storage.tensors import mapped_tensors


def ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return which tensors are the same as an earlier one, and as which; only the first is stored.

    >>> one, other = torch.zeros(2), torch.zeros(2)
    >>> ties({"embedding": one, "norm": other, "head": one})
    {'head': 'embedding'}
    """
    first: dict[object, str] = {}
    found = {}
    for name, tensor in state.items():
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and first.setdefault(key, name) != name:
            found[name] = first[key]
    return found


def check_stored(state: Mapping[str, Tensor], file: Path) -> None:
    """Check that a file fits a model, where tied tensors may be stored under any of their names, or all.

    Raises:
        CheckpointError: It does not; all that does not fit is listed.
    """
    tensors, tied = mapped_tensors(file), ties(state)
    firsts = {tied.get(name, name) for name in tensors}
    needed = {
        name: tensor
        for name, tensor in state.items()
        if name in tensors or tied.get(name, name) not in firsts
    }
    check_fit(needed, tensors, file)


def as_stored(state: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file under all names that they have in a model."""
    names = _names(state)
    return {name: tensor for key, tensor in mapped_tensors(file).items() for name in names[key]}


def copy_into(state: Mapping[str, Tensor], file: Path) -> None:
    """Copy the tensors of a file, which fit, into those of a model."""
    with torch.no_grad():
        for key, tensor in mapped_tensors(file).items():
            state[key].copy_(tensor)


def assign(
    module: nn.Module, file: Path, change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
) -> None:
    """Put the tensors of a file, which fit, in place of those of a module, without a copy; ties stay."""
    names = _names(module.state_dict())
    for key, tensor in mapped_tensors(file).items():
        tensor = change(key, tensor)
        parameter: nn.Parameter | None = None
        for name in names[key]:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            if leaf in owner._parameters:
                old = owner._parameters[leaf]
                assert old is not None
                parameter = nn.Parameter(tensor, old.requires_grad) if parameter is None else parameter
                owner._parameters[leaf] = parameter
            else:
                owner._buffers[leaf] = tensor


def restore_dtypes(file: Path, module: nn.Module) -> nn.Module:
    """Convert tensors loaded in the one dtype of a config to those of the file; return the module."""
    stored = mapped_tensors(file)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in stored and stored[name].dtype != tensor.dtype and not is_packed(tensor):
            tensor.data = stored[name]
    return module


def convert_dtypes(file: Path, module: nn.Module) -> nn.Module:
    """Convert tensors that are still to be filled to the dtypes of the file; return the module."""
    stored = mapped_tensors(file)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in stored:
            tensor.data = tensor.data.to(stored[name].dtype)
    return module


def check_real(name: str, module: nn.Module) -> None:
    """Check that no tensor of a tower lacks values.

    Raises:
        CheckpointError: One does, which no checkpoint holds.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    empty = [key for key, tensor in tensors if tensor.is_meta]
    if empty:
        raise CheckpointError(
            f"tower {name!r} is on the meta device, and no values for {', '.join(empty)} are stored; make it "
            "on a real device"
        )


def _names(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of each tensor by each of its names."""
    tied = ties(state)
    alike: dict[str, list[str]] = {}
    for name in state:
        alike.setdefault(tied.get(name, name), []).append(name)
    return {name: alike[tied.get(name, name)] for name in state}
