"""Collect the tensors of a fused model for a checkpoint, and assign stored tensors to modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from ..declare.graph import FusionGraph
from ..errors import CheckpointError
from ..run.fusion import Fusion
from ..storage.fingerprint import is_packed
from ..storage.tensors import check_fit, mapped_tensors
from ..tower import Tower, TransformersTower
from ..tower.peft_tower import is_peft_model


def fusion_state(model: Fusion) -> dict[str, Tensor]:
    """Return the state dict of links and input adapters, without the towers."""
    return {key: value for key, value in model.state_dict().items() if not key.startswith("towers.")}


def check_names(model: Fusion) -> None:
    """Raise if ``torch.compile(module)`` has renamed tensors, so that a checkpoint could not be loaded."""
    for name in model.state_dict():
        if "._orig_mod." in name:
            module = name.partition("._orig_mod.")[0]
            raise CheckpointError(
                f"{module} was replaced by torch.compile(module), which renames its tensors; compile it in "
                "place, module.compile(), or the fused model as a whole"
            )


def whole(tower: Tower) -> nn.Module:
    """Return a tower's module: a PeftModel, a transformers model, or a ``Tower`` in plain PyTorch."""
    native = tower.native
    return native if is_peft_model(native) or isinstance(tower, TransformersTower) else tower


def tower_of(graph: FusionGraph, key: str) -> str:
    """Return the name of the tower that a tensor of a link or an input adapter feeds.

    >>> graph = FusionGraph()
    >>> for name in ("speech", "text"):
    ...     graph.add_tower(name, "path/to/decoder")
    >>> graph.add_link("speech", "text", interleave=1)
    >>> tower_of(graph, "links.speech->text.1-1.norm.weight"), tower_of(graph, "adapters.speech.gate")
    ('text', 'speech')
    """
    kind, name, _ = key.split(".", 2)
    return graph.links[name].target if kind == "links" else name


def ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each tied tensor to the first name of the same tensor, under which alone it is stored.

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
    """Assign stored tensors to a ``Tower``, keeping its devices; return the model.

    Tied tensors may be stored under any or all of their names. With ``convert``, the model's dtypes may
    differ. Any other module is returned unchanged.
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
    """Check that a file fits a model; tied tensors may be stored under any or all of their names.

    With ``convert``, the model's dtypes may differ.
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
    """Assign the tensors of a file, already checked, to a module without copying; ties are kept."""
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
    """Restore the file's dtypes after loading in the config's single dtype; return the module."""
    stored = mapped_tensors(file)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name in stored and stored[name].dtype != tensor.dtype and not is_packed(tensor):
            tensor.data = stored[name]
    return module


def _names(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Map each name to all names of the same tensor."""
    tied = ties(state)
    alike: dict[str, list[str]] = {}
    for name in state:
        alike.setdefault(tied.get(name, name), []).append(name)
    return {name: alike[tied.get(name, name)] for name in state}
