"""Tensors of a checkpoint put into modules: into what is there, or in place of what has no values yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import CheckpointError
from ..storage.files import check_fit
from ..storage.fingerprint import is_packed
from ..storage.tensors import mapped_tensors
from ..tower import Tower


def ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return which tensors are the same as an earlier one, and as which; only the first is stored.

    >>> import torch
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


def fill(file: Path, convert: bool, model: nn.Module) -> nn.Module:
    """Put stored tensors in place of those of a ``Tower``, on the same device; return the model.

    Tied tensors may be stored under any of their names, or all. What is no ``Tower`` stays as it is.

    Args:
        file: What is stored.
        convert: Whether the model may have other dtypes.
        model: The model.

    Raises:
        CheckpointError: The file does not fit, of which all is listed; or what is not stored has no values.
    """
    if not isinstance(model, Tower):
        return model
    state = model.state_dict()
    devices = {key: each.device for key, each in state.items()}
    check_stored(state, file, convert=convert)
    assign(model, file, lambda key, each: each if devices[key].type == "meta" else each.to(devices[key]))
    everything = [*model.named_parameters(), *model.named_buffers()]
    if empty := [key for key, tensor in everything if tensor.is_meta]:
        raise CheckpointError(
            f"it is on the meta device, and {', '.join(empty)} are not stored; make it on a real device"
        )
    return model


def check_stored(state: Mapping[str, Tensor], file: Path, *, convert: bool = False) -> None:
    """Check that a file fits a model, where tied tensors may be stored under any of their names, or all.

    Args:
        state: The tensors of the model.
        file: What is stored.
        convert: Whether the model may have other dtypes.

    Raises:
        CheckpointError: It does not; all that does not fit is listed.
    """
    tensors, tied = mapped_tensors(file), ties(state)
    firsts = {tied.get(name, name) for name in tensors}
    needed = {
        name: tensor.to(tensors[name].dtype) if convert and name in tensors else tensor
        for name, tensor in state.items()
        if name in tensors or tied.get(name, name) not in firsts
    }
    check_fit(needed, tensors, file)


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


def _names(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the names of each tensor by each of its names."""
    tied = ties(state)
    alike: dict[str, list[str]] = {}
    for name in state:
        alike.setdefault(tied.get(name, name), []).append(name)
    return {name: alike[tied.get(name, name)] for name in state}
