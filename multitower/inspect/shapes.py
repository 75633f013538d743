"""Models of which only shapes are known: they run, but neither their weights nor their states take memory."""

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
"""How many values a tensor may have to be computed all the same, where they are known."""

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What running under ``ShapesOnly`` raises where a model decides by values that are not known."""


class ShapesOnly(FakeTensorMode):  # type: ignore[no-untyped-call]  # torch leaves its __init_subclass__ so
    """Under this mode shapes, dtypes and devices are computed in place of values.

    >>> with ShapesOnly() as mode:
    ...     linear = mode.copy(nn.Linear(2, 3))
    ...     states, positions = linear(torch.ones(5, 2)), torch.arange(5)
    ...     large = torch.empty(1_000_000, 1_000_000)            # four terabytes, if it took any
    >>> states.shape, bool((positions > 3).any())
    (torch.Size([5, 3]), True)

    What is small and depends on no weight keeps its values: tokens, times, positions, masks. So what a
    model decides by these comes out as it would. Operators are chosen as for the device that tensors say
    they are on, and save for a backward what they would save there.
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
        """Compute the shape of what an operator gives, or the operator itself where its inputs are known."""
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
        """Let torch find the shapes; of what it may run for that, no values are needed."""
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
    """Copy a module with other tensors in place of its own; tied ones stay tied."""
    changed: dict[int, Any] = {}
    for tensor in _all_tensors(module):
        if id(tensor) not in changed:
            new = change(tensor.detach())
            is_parameter = isinstance(tensor, nn.Parameter)
            changed[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(module, changed)


def _all_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Return parameters, buffers, and what modules keep beside them."""
    for each in module.modules():
        yield from _tensors((each._parameters, each._buffers, list(vars(each).values())))


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (each for each in tree_iter(tree) if isinstance(each, Tensor))


def _grouped_mm(one: Tensor, other: Tensor, offs: Tensor, *unused: Any) -> Tensor:
    """Return what experts make of their tokens; torch knows that shape for some dtypes only."""
    shape = [*one.shape[:-1], other.shape[-1]]
    if one.dim() == other.dim() == 2:
        shape = [len(offs), *shape]
    elif one.dim() == 3:
        shape = shape[1:]
    return one.new_empty(shape)
