"""What a batch costs a model, part by part, and a table of it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one part of a model costs, or all of it.

    >>> (Cost(parameters=3, forward_flops=10) + Cost(parameters=2, backward_flops=20)).step_flops
    30

    Attributes:
        parameters: How many parameters there are. One that several parts share is counted in the first.
        trained: How many of them are trained.
        parameter_bytes: Their bytes.
        forward_flops: Floating-point operations of the forward: two for each multiplication in a matrix
            product, attention or convolution. All else is not counted.
        backward_flops: Those of the backward.
        saved_bytes: What autograd keeps from forward to backward: each storage once, where it is kept first;
            parameters, buffers and the batch are not counted.
        cache_bytes: What decoding keeps of the batch's tokens. Of a tower: what transformers' own cache
            holds of them when this tower is decoded; 0 for a ``Tower`` that decodes without such a cache. Of
            a link: the keys and values of its source when its target is decoded.
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
        """Floating-point operations of a forward and a backward."""
        return self.forward_flops + self.backward_flops

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Cost)))


@dataclass(frozen=True, repr=False)
class Estimate:
    """What a batch costs a fused model, part by part; see ``FusedModel.estimate``.

    Attributes:
        towers: The cost of each tower by name, its head included.
        adapters: That of each input adapter, by the name of its tower.
        links: That of each link.
        loss: That of the losses, made of the logits.
    """

    towers: Mapping[str, Cost]
    adapters: Mapping[str, Cost]
    links: Mapping[str, Cost]
    loss: Cost

    @property
    def total(self) -> Cost:
        """The cost of all parts."""
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
    """Write a number with a prefix of its unit."""
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
