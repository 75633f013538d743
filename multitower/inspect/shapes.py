"""Run models on shapes alone: neither weights nor states take memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_iter

MOST_VALUES = 1 << 22
"""Maximum size of tensors that are computed with their values, if their inputs have values."""

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""Raised under ``ShapesOnly`` if control flow depends on unknown values."""


class ShapesOnly(FakeTensorMode):  # type: ignore[no-untyped-call]  # torch's __init_subclass__ is untyped
    """A mode that computes shapes, dtypes and devices instead of values.

    >>> with ShapesOnly() as mode:
    ...     linear = mode.copy(nn.Linear(2, 3))
    ...     states, positions = linear(torch.ones(5, 2)), torch.arange(5)
    ...     large = torch.empty(1_000_000, 1_000_000)            # four terabytes, if it took any
    >>> states.shape, bool((positions > 3).any())
    (torch.Size([5, 3]), True)

    Small tensors that do not depend on weights (tokens, times, positions, masks) keep their values, so
    control flow that depends on them is the real one. Operators are dispatched for the device that the fake
    tensors claim, and save for the backward what they would save there.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._inside = False
        self._overwritten: dict[int, torch.UntypedStorage] = {}

    def copy(self, module: nn.Module, device: torch.device | str = "cpu") -> Any:
        """Copy a module without its values."""

        def empty(tensor: Tensor) -> Tensor:
            fake = self.from_tensor(tensor)
            if not tensor.is_meta:
                return fake
            with self:
                return torch.empty_like(fake, device=device)

        return _copied(module, empty)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute output shapes; or values, if all inputs have values and the outputs are small."""
        kwargs = kwargs or {}
        if self._inside:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if all(map(self._has_values, _tensors((args, kwargs)))):
            try:
                output = self._shapes(func, types, args, kwargs)
            except NEEDS_VALUES:
                return func(*args, **kwargs)
            small = all(each.numel() <= MOST_VALUES for each in _tensors(output))
            return func(*args, **kwargs) if small else output
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped_mm(*args, **kwargs)
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            for each in _tensors((args[:1], kwargs.get("out"))):
                self._overwritten[each.untyped_storage()._cdata] = each.untyped_storage()
        return self._shapes(func, types, args, kwargs)

    def _shapes(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Compute output shapes by ``FakeTensorMode``; operators that it calls in turn need no values."""
        outside, self._inside = self._inside, True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside = outside

    def _has_values(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            return False
        return tensor.untyped_storage()._cdata not in self._overwritten


def on_meta(module: nn.Module) -> Any:
    """Copy a module onto the meta device."""
    return _copied(module, lambda tensor: tensor.to("meta"))


def _copied(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """Copy a module with each tensor replaced by ``change``; tied ones stay tied."""
    changed: dict[int, Any] = {}
    for tensor in _all_tensors(module):
        if id(tensor) not in changed:
            new = change(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            changed[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(module, changed)


def _all_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and tensors in other attributes of modules."""
    for each in module.modules():
        yield from _tensors((each._parameters, each._buffers, list(vars(each).values())))


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (each for each in tree_iter(tree) if isinstance(each, Tensor))


def _grouped_mm(one: Tensor, other: Tensor, offs: Tensor, *unused: Any) -> Tensor:
    """Return the output of a grouped matrix product; torch's fake implementation covers only some dtypes."""
    shape = [*one.shape[:-1], other.shape[-1]]
    if one.dim() == other.dim() == 2:
        shape = [len(offs), *shape]
    elif one.dim() == 3:
        shape = shape[1:]
    return one.new_empty(shape)
