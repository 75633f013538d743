"""Modules of a caller that stay as they were when what is done with them fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def unchanged_on_error(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Undo what is done to modules where an error comes of it; values of tensors are not undone.

    >>> module = nn.Sequential(nn.Linear(2, 2))
    >>> try:
    ...     with unchanged_on_error([module]):
    ...         module[0] = nn.Identity()
    ...         raise ValueError
    ... except ValueError:
    ...     print(module[0])
    Linear(in_features=2, out_features=2, bias=True)

    Submodules, parameters, buffers, hooks, attributes, modes and ``requires_grad`` are those of before.
    """
    modules = list(modules)
    every = {id(each): each for module in modules for each in module.modules()}.values()
    attributes = [(each, _copied(vars(each))) for each in every]
    trained = [(each, each.requires_grad) for module in modules for each in module.parameters()]
    try:
        yield
    except BaseException:
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def _copied(attributes: dict[str, object]) -> dict[str, object]:
    return {key: value.copy() if isinstance(value, dict) else value for key, value in attributes.items()}
