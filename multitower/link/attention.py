"""Attention of links: kernels, masks and rotary positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..batch.collate import values_at_hand

SDPA, FLEX = "sdpa", "flex_attention"
"""The kernels' names in transformers."""

WITHOUT_FLEX = ("cpu", "mps")
"""Device types without a backward pass of FlexAttention; on the CPU, some sizes do not compile either."""


class Visibility(NamedTuple):
    """Which source tokens each target token may attend to.

    Attributes:
        mask: Added to the scores, shape (batch, 1, target length, source length): 0 where visible, else minus
            infinity. Rows without visible tokens are all 0, so that their softmax is finite, and masked by
            ``sees`` instead. None if everything is visible. A BlockMask for FlexAttention.
        sees: bool, shape (batch, target length, 1): whether a target token sees any source token. None if all
            do.
    """

    mask: Tensor | BlockMask | None
    sees: Tensor | None

    def is_blind(self) -> bool:
        """Whether no query sees anything; False where values cannot be inspected without synchronising."""
        return self.sees is not None and values_at_hand(self.sees) and not bool(self.sees.any())


def visibility(
    query_times: Tensor,
    key_times: Tensor,
    key_mask: Tensor,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Visibility:
    """Return which keys each query sees: those of strictly earlier time.

    >>> seen = visibility(torch.tensor([[0, 2]]), torch.tensor([[1, -1]]), torch.tensor([[True, False]]))
    >>> seen.sees.flatten().tolist()
    [False, True]
    >>> seen.mask[0, 0, 1].tolist()
    [0.0, -inf]

    Args:
        query_times: int64, shape (batch, target length).
        key_times: int64, shape (batch, source length).
        key_mask: bool, shape (batch, source length): False at padding.
        window: How many ticks back a query sees; None for all.
        dtype: The dtype of the scores.
    """
    key_times, key_mask = key_times.to(query_times.device), key_mask.to(query_times.device)
    if values_at_hand(query_times) and _all_see_all(query_times, key_times, key_mask, window):
        return Visibility(None, None)
    mask = (query_times[:, :, None] > key_times[:, None, :]) & key_mask[:, None, :]
    if window is not None:
        mask = mask & ((query_times - window)[:, :, None] <= key_times[:, None, :])
    sees = mask.any(-1, keepdim=True)
    closed = torch.zeros_like(mask, dtype=dtype).masked_fill(sees & ~mask, float("-inf"))
    return Visibility(closed[:, None], sees)


def _all_see_all(query_times: Tensor, key_times: Tensor, key_mask: Tensor, window: int | None) -> bool:
    if not query_times.numel() or not key_times.numel() or not bool(key_mask.all()):
        return False
    later = bool((query_times.amin(1) > key_times.amax(1)).all())
    return later and (window is None or bool((query_times.amax(1) - key_times.amin(1) <= window).all()))


def block_visibility(
    query_times: Tensor, key_times: Tensor, key_mask: Tensor, window: int | None = None
) -> Visibility:
    """Return the same as ``visibility`` for FlexAttention, which skips fully masked blocks.

    >>> times = torch.arange(300)[None]
    >>> seen = block_visibility(times, times, torch.ones_like(times, dtype=torch.bool), window=50)
    >>> seen.mask.kv_num_blocks.tolist()                # of 3 blocks of 128 keys, by each block of queries
    [[[1, 2, 2]]]
    """
    device = query_times.device
    keys, real = key_times.to(device), key_mask.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        age = query_times[batch, query] - keys[batch, key]
        near = age > 0 if window is None else (age > 0) & (age <= window)
        return near & real[batch, key]

    sizes = (len(keys), None, query_times.shape[1], keys.shape[1])
    mask = create_block_mask(sees, *sizes, device=device)
    ordered = torch.where(real, keys, torch.iinfo(torch.int64).max).sort(-1).values
    before = torch.searchsorted(ordered, query_times)
    beyond = torch.zeros_like(before) if window is None else torch.searchsorted(ordered, query_times - window)
    return Visibility(mask, (before > beyond)[:, :, None])


def has_flex(device: torch.device) -> bool:
    """Whether links can use FlexAttention on a device."""
    return device.type not in WITHOUT_FLEX


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
    """Run attention with the kernel for this mask; all of shape (batch, heads, length, head width)."""
    if isinstance(mask, BlockMask):
        attended: Tensor = _flex()(query, keys, values, block_mask=mask)
        return attended
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def _flex() -> Callable[..., Any]:
    """Return FlexAttention, compiled unless this is traced already: uncompiled, it skips nothing."""
    return flex_attention if torch.compiler.is_compiling() else _compiled()  # type: ignore[return-value]  # it is one


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


class Rotation(NamedTuple):
    """Cosines and sines of rotary positions, each of shape (batch, 1, length, half the head width)."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Rotation:
    """Return the angles by which ``rotate`` rotates pairs of channels, proportional to the positions.

    Args:
        positions: Integers or floats, shape (batch, length).
        width: The head width, even.
        dtype: The dtype of the table; angles are computed in float32.
    """
    half = width // 2
    speeds = 10_000.0 ** (-torch.arange(half, device=positions.device) / half)
    angles = positions[:, None, :, None] * speeds
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate pairs of channels, so that dot products depend on relative positions.

    >>> rotate(torch.tensor([[[[1.0, 0.0]]]]), rotation(torch.tensor([[0]]), width=2)).tolist()
    [[[[1.0, 0.0]]]]

    Source: Su et al., "RoFormer" (arXiv 2104.09864).
    """
    cos, sin = rotation.cos.to(heads.dtype), rotation.sin.to(heads.dtype)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
