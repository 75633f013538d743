"""Rotary positions of the shared time, for queries and keys of taps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .link import GatedCrossAttention


class Rotation(NamedTuple):
    """Cosines and sines of rotary positions, each of shape (batch, 1, length, half the head width)."""

    cos: Tensor
    sin: Tensor


class Rotations:
    """Tables of rotary positions, each made once: for a stream, a head width, a dtype and a device.

    >>> from multitower.link import GatedCrossAttention
    >>> tap = GatedCrossAttention(8, 8, heads=2, position="rotary")
    >>> made = Rotations({"text": torch.tensor([[0, 1, 2]])})
    >>> made.of("text", tap).cos.shape, made.of("text", tap) is made.of("text", tap)
    (torch.Size([1, 1, 3, 2]), True)

    Args:
        times: By stream when each of its tokens stands, int64, shape (batch, length).
    """

    def __init__(self, times: Mapping[str, Tensor]) -> None:
        self.times = times
        self.made: dict[tuple[object, ...], Rotation] = {}

    def of(self, stream: str, tap: GatedCrossAttention) -> Rotation | None:
        """Give the table of a stream as a tap needs it; None where it has no rotary positions."""
        if not tap.rotary:
            return None
        weight = tap.query.weight
        key = (stream, tap.head_width, weight.dtype, weight.device)
        if key not in self.made:
            self.made[key] = rotation(self.times[stream].to(weight.device), tap.head_width, weight.dtype)
        return self.made[key]


def rotation(times: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Rotation:
    """Give the angles by which ``rotate`` turns pairs of channels, in proportion to time.

    Args:
        times: int64, shape (batch, length).
        width: That of a head, even.
        dtype: Of the table; angles are in float32.
    """
    half = width // 2
    speeds = 10_000.0 ** (-torch.arange(half, device=times.device) / half)
    angles = times[:, None, :, None] * speeds
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn pairs of channels by angles, so that products depend on distances in time.

    >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), rotation(torch.tensor([[0]]), width=2)).tolist()
    [[[[1.0, 0.0]]]]

    Source: Su et al., "RoFormer" (arXiv 2104.09864).

    Args:
        heads: Shape (batch, heads, length, even head width).
        rotation: Of the times at which they stand.
    """
    cos, sin = rotation.cos.to(heads.dtype), rotation.sin.to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
