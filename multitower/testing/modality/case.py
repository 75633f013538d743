"""Shared code of the checks of modalities: samples, their tokens, and equality of raw data."""

from __future__ import annotations

import copy
import dataclasses
import random
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...plugins.modality import Modality
from ..report import call

RoundTrip = Literal["data", "tokens"] | Callable[[Any, Any], float]
"""What survives decode(encode(raw)): the data, only their tokens, or all but a measured loss."""


class ModalityCase(NamedTuple):
    """A modality to check, samples of raw data, and what its author declares."""

    modality: Modality
    samples: Sequence[Any]
    round_trip: RoundTrip
    bound: float | None
    edges_inside: bool

    def raw(self, place: int) -> Any:
        """Return a copy of a sample, since a modality may change it."""
        return copy.deepcopy(self.samples[place])

    def encode(self, place: int) -> Tensor:
        """Return the tokens of a sample."""
        tokens: Tensor = call(f"encode of sample {place}", self.modality.encode, self.raw(place))
        return tokens

    def rows(self) -> list[Tensor]:
        """Return the tokens of each sample."""
        return [self.encode(place) for place in range(len(self.samples))]

    def decode(self, tokens: Tensor, what: str) -> Any:
        """Decode tokens; errors name them by ``what``."""
        return call(f"decode of {what}", self.modality.decode, tokens.clone())


def same(first: Any, second: Any) -> bool:
    """Whether two pieces of raw data are equal: arrays bit for bit, objects part by part.

    >>> same(("a", np.array([1.0, np.nan])), ("a", np.array([1.0, np.nan])))
    True
    >>> same(np.zeros(2, np.float32), np.zeros(2))
    False
    """
    if first is second or isinstance(first, type):
        return first is second
    if isinstance(first, Tensor | np.ndarray):
        if type(first) is not type(second) or (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        alike: Any = (first == second) | ((first != first) & (second != second))
        return bool(alike.all())
    if isinstance(first, Mapping):
        alike = isinstance(second, Mapping) and first.keys() == second.keys()
        return alike and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        alike = isinstance(second, list | tuple) and len(first) == len(second)
        return alike and all(map(same, first, second))
    if dataclasses.is_dataclass(first):
        fields = [field.name for field in dataclasses.fields(first)]
        alike = type(first) is type(second)
        return alike and all(same(getattr(first, name), getattr(second, name)) for name in fields)
    compares = type(first).__eq__ is not object.__eq__  # type: ignore[comparison-overlap]  # it may be inherited
    if not compares and hasattr(first, "__dict__"):
        return type(first) is type(second) and same(vars(first), vars(second))
    return bool(first == second)


def strange_rows(modality: Modality) -> list[Tensor]:
    """Return rows of valid tokens that a tower may generate but no encoder would."""
    size, begin, end = modality.vocab_size, modality.begin, modality.end
    generator = torch.Generator().manual_seed(0)
    edges: list[list[int]] = [[], [begin], [end], [begin, end], [end, begin], [begin, 0, end, size - 1, end]]
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in edges]
    rows += [torch.full((5,), token) for token in (modality.pad, 0, size - 1)]
    rows += [torch.randint(size, (length,), generator=generator) for length in (1, 2, 3, 9, 20, 20, 20, 64)]
    return rows


def short(value: Any) -> str:
    """Format a value in one line."""
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return reprlib.repr(value)


def random_states() -> dict[str, Any]:
    """Return the state of each global random generator."""
    return {"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Restore the global random generators afterwards."""
    before = random_states()
    try:
        yield
    finally:
        random.setstate(before["random"])
        np.random.set_state(before["numpy"])
        torch.set_rng_state(before["torch"])
