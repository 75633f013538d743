"""A simulated device: its tensors report it as their device, but hold their values on the CPU.

It finds errors of accelerators without having one: operations that mix devices raise an error, and each time
the host waits for a value from the device is recorded. Importing this module registers the device with torch
permanently, so import it only in a process of its own.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("other")
DEVICE = torch.device("other", 0)

ATEN = torch.ops.aten
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
WAITING = {
    ATEN._local_scalar_dense.default,
    ATEN._unique2.default,
    ATEN.equal.default,
    ATEN.masked_select.default,
    ATEN.nonzero.default,
    ATEN.repeat_interleave.Tensor,
}
"""Operations that return a Python value, or a shape that depends on the values of tensors."""


class Wait(NamedTuple):
    """An operation for which the host waits, and its stack as "file:line", the innermost last."""

    operation: str
    lines: tuple[str, ...]


class OtherDevice(TorchDispatchMode):
    """Creates tensors on the device, and records waits.

    >>> with OtherDevice() as other:
    ...     two = torch.ones(2, device=DEVICE).sum().item()
    >>> [wait.operation for wait in other.waits]
    ['aten._local_scalar_dense.default']
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _waits(func, args, kwargs or {}):
            lines = tuple(f"{each.filename}:{each.lineno}" for each in traceback.extract_stack()[:-1])
            self.waits.append(Wait(str(func), lines))
        return run(func, args, kwargs or {})


class Remote(Tensor):
    """A tensor on the device."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> Remote:
        remote = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=DEVICE,
        )
        remote.raw = raw
        return remote

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()  # tells which tensors share memory

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    remote = [tensor for tensor in tensors if isinstance(tensor, Remote)]
    if func not in COPIES and 0 < len(remote) < len(tensors):  # real devices take CPU scalars
        places = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"{func} mixes devices: {places}")
    there, given_args = _gives_remote(func, args, kwargs), args
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(Remote, lambda tensor: tensor.raw, (args, kwargs))
    result = func(*args, **kwargs)
    if not there:
        return result
    if torch.Tag.inplace_view in func.tags:  # such as squeeze_, which changes the tensor's shape
        with no_dispatch():
            func(*given_args, **kwargs)
    given = {id(tensor.raw): tensor for tensor in remote}  # in-place operations return their input
    return tree_map_only(Tensor, lambda raw: given.get(id(raw)) if id(raw) in given else Remote(raw), result)


def _waits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    leaves = tree_leaves((args, kwargs))
    if not any(isinstance(leaf, Remote) for leaf in leaves):
        return False
    by_mask = func is ATEN.index.Tensor and any(
        each.dtype in (torch.bool, torch.uint8) for each in args[1] if each is not None
    )
    return func in WAITING or by_mask or (func in COPIES and not _gives_remote(func, args, kwargs))


def _gives_remote(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == DEVICE.type
    among = args[0] if func in COPIES else (args, kwargs)
    return any(isinstance(leaf, Remote) for leaf in tree_leaves(among))


def _empty(size: Sequence[int], *, dtype: Any = None, **_: Any) -> Tensor:
    return Remote(torch.empty(size, dtype=dtype))


def _empty_strided(size: Sequence[int], stride: Sequence[int], *, dtype: Any = None, **_: Any) -> Tensor:
    return Remote(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, into: Tensor, non_blocking: bool = False) -> Tensor:
    raw, place = (each.raw if isinstance(each, Remote) else each for each in (source, into))
    place.copy_(raw)
    return into


# Dispatch modes do not see the creation of tensors by torch.tensor(..., device=...).
LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
