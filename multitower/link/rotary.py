"""Rotary positions, for queries and keys of taps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of rotary positions, each of shape (batch, 1, length, half the head width)."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Rotation:
    """Return the angles by which ``rotate`` turns pairs of channels, in proportion to positions.

    Args:
        positions: Numbers, shape (batch, length).
        width: That of a head, even.
        dtype: Of the table; angles are in float32.
    """
    half = width // 2
    speeds = 10_000.0 ** (-torch.arange(half, device=positions.device) / half)
    angles = positions[:, None, :, None] * speeds
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn pairs of channels by angles, so that products depend on distances.

    >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), rotation(torch.tensor([[0]]), width=2)).tolist()
    [[[[1.0, 0.0]]]]

    Source: Su et al., "RoFormer" (arXiv 2104.09864).

    Args:
        heads: Shape (batch, heads, length, even head width).
        rotation: Of their positions.
    """
    cos, sin = rotation.cos.to(heads.dtype), rotation.sin.to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
