"""The cost of a batch, per part of a model, and its table."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Cost:
    """The cost of one part of a model, or of all of it.

    >>> (Cost(parameters=3, forward_flops=10) + Cost(parameters=2, backward_flops=20)).step_flops
    30

    Attributes:
        parameters: Number of parameters; one shared by several parts is counted in the first.
        trained: Number of trained parameters.
        parameter_bytes: Size of the parameters.
        forward_flops: FLOPs of the forward: two per multiplication in matrix products, attention and
            convolutions; nothing else is counted.
        backward_flops: FLOPs of the backward.
        saved_bytes: Size of what autograd saves for the backward: each storage once, in the part that saves
            it first, without parameters, buffers and the batch.
        cache_bytes: Size of the decoding cache for the batch's tokens. For a tower: its transformers cache
            when it is decoded; 0 for a ``Tower`` without one. For a link: the keys and values of its source
            when its target is decoded.
    """

    parameters: int = 0
    trained: int = 0
    parameter_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    saved_bytes: int = 0
    cache_bytes: int = 0

    @property
    def step_flops(self) -> int:
        """FLOPs of a forward and a backward."""
        return self.forward_flops + self.backward_flops

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Cost)))


@dataclass(frozen=True, repr=False)
class Estimate:
    """The cost of a batch, per part of a fused model; see ``FusedModel.estimate``.

    Attributes:
        towers: The cost of each tower by name, including its head.
        adapters: The cost of each input adapter, by the name of its tower.
        links: The cost of each link, by name.
        loss: The cost of computing the losses from the logits.
    """

    towers: Mapping[str, Cost]
    adapters: Mapping[str, Cost]
    links: Mapping[str, Cost]
    loss: Cost

    @property
    def total(self) -> Cost:
        """The total cost of all parts."""
        parts = (*self.towers.values(), *self.adapters.values(), *self.links.values(), self.loss)
        return functools.reduce(operator.add, parts)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain data."""
        return asdict(self) | {"total": asdict(self.total)}

    def __str__(self) -> str:
        kinds = (("tower", self.towers), ("adapter", self.adapters), ("link", self.links))
        rows = [(f"{kind} {name}", cost) for kind, costs in kinds for name, cost in costs.items()]
        rows += [("loss", self.loss), ("total", self.total)]
        head = ("", "parameters", "trained", "forward", "step", "saved", "cache")
        return "\n".join(_aligned([head, *(_row(name, cost) for name, cost in rows)]))


def _row(name: str, cost: Cost) -> tuple[str, ...]:
    return (
        name,
        f"{cost.parameters:,}",
        f"{cost.trained:,}",
        *(_scaled(flops, 1000, " kMGTPE", "FLOP") for flops in (cost.forward_flops, cost.step_flops)),
        *(_scaled(size, 1024, " KMGTPE", "iB") for size in (cost.saved_bytes, cost.cache_bytes)),
    )


def _scaled(value: float, step: int, prefixes: str, unit: str) -> str:
    """Format a number with a unit prefix."""
    place = 0
    while value >= step and place < len(prefixes) - 1:
        value, place = value / step, place + 1
    if place == 0:
        return f"{value:.0f} {'B' if unit == 'iB' else unit}"
    return f"{value:.2f} {prefixes[place]}{unit}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [each.rjust(width) for each, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()
