"""Restore modules if an operation on them fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def unchanged_on_error(modules: Iterable[nn.Module], tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Undo all changes to modules, and to the values of some tensors, if an error is raised.

    >>> module = nn.Sequential(nn.Linear(2, 2))
    >>> try:
    ...     with unchanged_on_error([module]):
    ...         module[0] = nn.Identity()
    ...         raise ValueError
    ... except ValueError:
    ...     print(module[0])
    Linear(in_features=2, out_features=2, bias=True)

    This restores submodules, parameters, buffers, hooks, attributes, modes and ``requires_grad``. The values
    of ``tensors`` are copied to CPU memory meanwhile.
    """
    modules = list(modules)
    every = {id(each): each for module in modules for each in module.modules()}.values()
    attributes = [(each, _copied(vars(each))) for each in every]
    trained = [(each, each.requires_grad) for module in modules for each in module.parameters()]
    values = [(each, each.data, each.data.to("cpu", copy=True)) for each in tensors]
    try:
        yield
    except BaseException:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for tensor, data, value in values:
            data.copy_(value)
            tensor.data = data
        raise


def _copied(attributes: dict[str, object]) -> dict[str, object]:
    return {
        key: value.copy() if isinstance(value, dict | list) else value for key, value in attributes.items()
    }
