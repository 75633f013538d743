"""The modules that a fusion adds between towers: gated cross-attention and input adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from .attention import Visibility, attend
from .rotary import Rotation, rotate


class KeysValues(NamedTuple):
    """What a tap reads of a source: keys and values of shape (batch, heads, source length, head width)."""

    keys: Tensor
    values: Tensor


class GatedCrossAttention(nn.Module):
    """One tap of a link: what a target tower takes from one layer of a source tower.

    >>> tap = GatedCrossAttention(source_width=6, target_width=8, heads=2)
    >>> x, h = torch.randn(1, 3, 8), torch.randn(1, 2, 6)
    >>> real = torch.ones(1, 2, dtype=torch.bool)
    >>> from multitower.attention import visibility
    >>> seen = visibility(torch.tensor([[0, 2, 4]]), torch.tensor([[1, 3]]), real)
    >>> update = tap(x, tap.read(h), seen)
    >>> bool((update == 0).all())                   # the gates are closed at the start
    True

    With x the target's state and h the source's: ``kv = project(norm(h))``;
    ``x = x + tanh(a) * attention(q=norm(x), kv)``; ``x = x + tanh(b) * ffn(norm(x))``; a = b = 0 at the
    start; ``feed_forward=False`` leaves the second update out, ``projection="none"`` the projection.
    Sources: Alayrac et al., "Flamingo" (arXiv 2204.14198), for the gated block; Zayats et al., "Zipper"
    (arXiv 2405.18669), for the projection of the source.
    """

    def __init__(
        self,
        source_width: int,
        target_width: int,
        *,
        heads: int | None = None,
        projection: str = "mlp",
        position: str | None = None,
        feed_forward: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads or default_heads(target_width)
        self.head_width = target_width // self.heads
        self.rotary = position == "rotary"
        if target_width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the target width {target_width}")
        if self.rotary and self.head_width % 2:
            raise ValueError(
                f"rotary positions need an even head width, not {target_width} / {self.heads} heads"
            )
        self.source_norm = nn.LayerNorm(source_width)
        self.project = _projection(projection, source_width, target_width)
        self.norm = nn.LayerNorm(target_width)
        self.query = nn.Linear(target_width, target_width, bias=False)
        projected = source_width if projection == "none" else target_width
        self.key = nn.Linear(projected, target_width, bias=False)
        self.value = nn.Linear(projected, target_width, bias=False)
        self.out = nn.Linear(target_width, target_width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.ffn_norm = nn.LayerNorm(target_width) if feed_forward else None
        self.ffn = _feed_forward(target_width) if feed_forward else None
        self.ffn_gate = nn.Parameter(torch.zeros(1)) if feed_forward else None

    def read(self, source: Tensor, rotation: Rotation | None = None) -> KeysValues:
        """Project the source's states to keys and values.

        Args:
            source: The source's states, shape (batch, source length, source width).
            rotation: Of the source's times, where the tap has rotary positions; see ``Rotations``.
        """
        states = self.project(self.source_norm(source.to(self.key.weight)))
        return KeysValues(self._turned(self.key(states), rotation), self._split(self.value(states)))

    def forward(
        self, x: Tensor, source: KeysValues, seen: Visibility, rotation: Rotation | None = None
    ) -> Tensor:
        """Give the update to add to the target's states.

        Args:
            x: The target's states, shape (batch, target length, target width).
            source: What ``read`` gave.
            seen: Which source tokens each target token may read.
            rotation: Of the target's times, where the tap has rotary positions.

        Returns:
            Shape, dtype and device of x; exactly zero where a target token sees nothing.
        """
        states = x.to(self.query.weight)
        query = self._turned(self.query(self.norm(states)), rotation)
        attended = attend(query, *source, seen.mask)
        update = _opening(self.attention_gate, states) * self.out(attended.transpose(1, 2).flatten(2))
        if self.ffn is not None and self.ffn_norm is not None and self.ffn_gate is not None:
            update = update + _opening(self.ffn_gate, states) * self.ffn(self.ffn_norm(states + update))
        return (update if seen.sees is None else torch.where(seen.sees, update, 0.0)).to(x)

    def weights(
        self, x: Tensor, source: KeysValues, seen: Visibility, rotation: Rotation | None = None
    ) -> Tensor:
        """Give the attention weights, float, shape (batch, heads, target length, source length).

        Rows of target tokens that see nothing are zero.
        """
        query = self._turned(self.query(self.norm(x.to(self.query.weight))), rotation)
        scores = query @ source.keys.transpose(-1, -2) / query.shape[-1] ** 0.5
        assert not isinstance(seen.mask, BlockMask), "weights are those of sdpa"
        weights = (scores if seen.mask is None else scores + seen.mask).float().softmax(-1)
        return weights if seen.sees is None else torch.where(seen.sees[:, None], weights, 0.0)

    def _turned(self, states: Tensor, rotation: Rotation | None) -> Tensor:
        if self.rotary != (rotation is not None):
            raise ValueError("a tap takes a rotation if, and only if, it has rotary positions")
        heads = self._split(states)
        return heads if rotation is None else rotate(heads, rotation)

    def _split(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.heads, self.head_width).transpose(1, 2)


class InputAdapter(nn.Module):
    """Stands between a tower's embedding and its first layer in a fused run.

    >>> adapter = InputAdapter(8)
    >>> h = torch.randn(1, 3, 8)
    >>> torch.equal(adapter(h), h)                  # "gated": h + tanh(g) * mlp(h), g = 0 at the start
    True

    "paper" is ``relu(mlp(h))``, as Zipper (arXiv 2405.18669) prints it: not the identity at the start.
    """

    def __init__(self, width: int, form: str = "gated") -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gate = nn.Parameter(torch.zeros(1)) if form == "gated" else None

    def forward(self, embedded: Tensor) -> Tensor:
        """Adapt embedded tokens, shape (batch, length, width)."""
        weight = next(self.mlp.parameters())
        adapted: Tensor = self.mlp(embedded.to(weight.dtype)).to(embedded.dtype)
        if self.gate is None:
            return F.relu(adapted)
        return embedded + _opening(self.gate, adapted).to(embedded.dtype) * adapted


def add(x: Tensor, updates: Iterable[Tensor]) -> Tensor:
    """Add to a state what several taps made of it: first together, so that no update is lost in a large x.

    >>> add(torch.ones(1), [torch.ones(1), torch.ones(1)])
    tensor([3.])
    """
    return x + functools.reduce(torch.add, updates)


def default_heads(width: int) -> int:
    """Give a number of heads that divides the width: about 64 channels each, 32 in small towers.

    >>> [default_heads(width) for width in (48, 128, 576, 2048)]
    [1, 4, 9, 32]
    """
    wanted = max(1, width // 64, min(4, width // 32))
    return next(heads for heads in range(wanted, 0, -1) if width % heads == 0)


def _opening(gate: Tensor, states: Tensor) -> Tensor:
    """Give how far a gate is open, once for each channel of states.

    Its gradient is then summed over tokens first. Summed over all numbers at once, it makes inductor tell
    short batches from long ones, and compile for each.
    """
    return torch.tanh(gate).expand(states.shape[-1])


def _feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def _projection(kind: str, source_width: int, target_width: int) -> nn.Module:
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(source_width, target_width),
            nn.GELU(),
            nn.Linear(target_width, target_width),
            nn.GELU(),
            nn.Linear(target_width, target_width),
        )
    if kind == "none":
        return nn.Identity()
    linear = nn.Linear(source_width, target_width)
    return nn.Sequential(linear, nn.ReLU()) if kind == "relu" else linear
