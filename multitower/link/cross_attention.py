"""The modules that a fusion adds to towers: cross-attention and input adapters."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from .attention import Rotation, Visibility, attend, rotate

TINY = 1e-12


class KeysValues(NamedTuple):
    """Keys and values of shape (batch, heads, source length, head width)."""

    keys: Tensor
    values: Tensor


class GatedCrossAttention(nn.Module):
    """One tap of a link: cross-attention from a target tower's state to a layer of a source tower.

    >>> tap = GatedCrossAttention(source_width=6, target_width=8, heads=2)
    >>> x, h = torch.randn(1, 3, 8), torch.randn(1, 2, 6)
    >>> real = torch.ones(1, 2, dtype=torch.bool)
    >>> from multitower.link.attention import visibility
    >>> seen = visibility(torch.tensor([[0, 2, 4]]), torch.tensor([[1, 3]]), real)
    >>> update = tap(x, tap.read(h), seen)
    >>> bool((update == 0).all())                   # the identity at the start
    True

    With x the target's state and h the source's: ``kv = project(norm(h))``; ``x = x + attention(q=norm(x),
    kv)``; with ``feed_forward=True`` then ``x = x + ffn(norm(x))``; with ``relative=True`` both updates are
    multiplied by the root mean square of x. The last linear layers of attention and ffn are zero at the
    start; with ``gate="tanh"`` they are not, but their outputs are multiplied by
    ``tanh(a)`` and ``tanh(b)``, a = b = 0 at the start. ``projection="none"`` leaves out the projection.

    Sources: Alayrac et al., "Flamingo" (arXiv 2204.14198), for the block and its gates; Zayats et al.,
    "Zipper" (arXiv 2405.18669), for the projection of the source; Zhang et al., "Fixup" (arXiv 1901.09321),
    for last layers that are zero at the start.
    """

    def __init__(
        self,
        source_width: int,
        target_width: int,
        *,
        heads: int | None = None,
        gate: str | None = None,
        projection: str = "none",
        position: str | None = None,
        pace: float = 1.0,
        feed_forward: bool = False,
        relative: bool = False,
    ) -> None:
        super().__init__()
        self.relative = relative
        self.heads = heads or default_heads(target_width, even=position is not None)
        self.head_width = target_width // self.heads
        self.position = position
        # The unit is a token of the finer tower, so that corresponding tokens have close positions.
        self.stretches = (max(1.0, 1 / pace), max(1.0, pace)) if position == "segment" else (1.0, 1.0)
        if target_width % self.heads:
            raise ValueError(
                f"{self.heads} heads do not divide the target width {target_width}; choose another heads=..."
            )
        if position is not None and self.head_width % 2:
            raise ValueError(
                f"rotary positions need an even head width, not {target_width} / {self.heads} heads; choose "
                "another heads=..., or position=None"
            )
        self.source_norm = nn.LayerNorm(source_width)
        self.project = _projection(projection, source_width, target_width)
        self.norm = nn.LayerNorm(target_width)
        self.query = nn.Linear(target_width, target_width, bias=False)
        projected = source_width if projection == "none" else target_width
        self.key = nn.Linear(projected, target_width, bias=False)
        self.value = nn.Linear(projected, target_width, bias=False)
        self.out = nn.Linear(target_width, target_width, bias=False)
        self.ffn_norm = nn.LayerNorm(target_width) if feed_forward else None
        self.ffn = _feed_forward(target_width) if feed_forward else None
        gated = gate == "tanh"
        self.attention_gate = nn.Parameter(torch.zeros(1)) if gated else None
        self.ffn_gate = nn.Parameter(torch.zeros(1)) if gated and feed_forward else None
        _set_to_zero(self.zero_at_start())

    def zero_at_start(self) -> list[nn.Parameter]:
        """Return the parameters whose zero initialisation makes the tap the identity."""
        if self.attention_gate is not None:
            return [gate for gate in (self.attention_gate, self.ffn_gate) if gate is not None]
        return [self.out.weight, *(() if self.ffn is None else self.ffn[-1].parameters())]

    def read(self, source: Tensor, rotation: Rotation | None = None) -> KeysValues:
        """Project the source's states to keys and values.

        Args:
            source: The source's states, shape (batch, source length, source width).
            rotation: The source's rotary table, if the tap has rotary positions; see ``Rotations``.
        """
        states = self.project(self.source_norm(source.to(self.key.weight)))
        return KeysValues(self._turned(self.key(states), rotation), self._split(self.value(states)))

    def forward(
        self, x: Tensor, source: KeysValues, seen: Visibility, rotation: Rotation | None = None
    ) -> Tensor:
        """Return the update to add to the target's states.

        Args:
            x: The target's states, shape (batch, target length, target width).
            source: Keys and values from ``read``.
            seen: Which source tokens each target token may attend to.
            rotation: The target's rotary table, if the tap has rotary positions.

        Returns:
            The update, with the shape, dtype and device of x; exactly zero for target tokens that see
            nothing.
        """
        states = x.to(self.query.weight)
        query = self._turned(self.query(self.norm(states)), rotation)
        keys, values = (each.to(query.dtype) for each in source)  # autocast may have begun or ended since
        attended = attend(query, keys, values, seen.mask)
        change = _gated(self.attention_gate, self.out(attended.transpose(1, 2).flatten(2)))
        update = self._sized(states, change)
        if self.ffn is not None and self.ffn_norm is not None:
            change = _gated(self.ffn_gate, self.ffn(self.ffn_norm(states + update)))
            update = update + self._sized(states, change)
        return (update if seen.sees is None else torch.where(seen.sees, update, 0.0)).to(x)

    def weights(
        self, x: Tensor, source: KeysValues, seen: Visibility, rotation: Rotation | None = None
    ) -> Tensor:
        """Return the attention weights, float, shape (batch, heads, target length, source length).

        Rows of target tokens that see nothing are zero.
        """
        query = self._turned(self.query(self.norm(x.to(self.query.weight))), rotation)
        scores = query @ source.keys.transpose(-1, -2) / query.shape[-1] ** 0.5
        assert not isinstance(seen.mask, BlockMask), "weights are those of sdpa"
        weights = (scores if seen.mask is None else scores + seen.mask).float().softmax(-1)
        return weights if seen.sees is None else torch.where(seen.sees[:, None], weights, 0.0)

    def _sized(self, states: Tensor, update: Tensor) -> Tensor:
        """Multiply the update by the root mean square of each token's state, if it is relative to that."""
        if not self.relative:
            return update
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        square = wide.square().mean(-1, keepdim=True)
        return update * (square + TINY).sqrt().to(update)  # TINY: the root has no gradient at 0

    def _turned(self, states: Tensor, rotation: Rotation | None) -> Tensor:
        if (self.position is not None) != (rotation is not None):
            raise ValueError("a tap takes a rotation if, and only if, it has rotary positions")
        heads = self._split(states)
        return heads if rotation is None else rotate(heads, rotation)

    def _split(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], self.heads, self.head_width).transpose(1, 2)


class InputAdapter(nn.Module):
    """Adapts the embedded tokens of a tower before its first layer, in fused runs only.

    >>> adapter = InputAdapter(8)
    >>> h = torch.randn(1, 3, 8)
    >>> torch.equal(adapter(h), h)                  # "residual": h + mlp(h), the last layer zero at the start
    True

    "gated" is ``h + tanh(g) * mlp(h)`` with g = 0 at the start; "paper" is ``relu(mlp(h))`` as printed in
    Zipper (arXiv 2405.18669), which is not the identity at the start.
    """

    def __init__(self, width: int, form: str = "residual") -> None:
        super().__init__()
        self.form = form
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gate = nn.Parameter(torch.zeros(1)) if form == "gated" else None
        _set_to_zero(self.zero_at_start())

    def zero_at_start(self) -> list[nn.Parameter]:
        """Return the parameters whose zero initialisation makes the adapter the identity, if any."""
        if self.gate is not None:
            return [self.gate]
        return list(self.mlp[-1].parameters()) if self.form == "residual" else []

    def forward(self, embedded: Tensor) -> Tensor:
        """Adapt embedded tokens of shape (batch, length, width)."""
        weight = next(self.mlp.parameters())
        adapted: Tensor = self.mlp(embedded.to(weight.dtype)).to(embedded.dtype)
        return F.relu(adapted) if self.form == "paper" else embedded + _gated(self.gate, adapted)


def add(x: Tensor, updates: Iterable[Tensor]) -> Tensor:
    """Add the updates of several taps to a state.

    >>> add(torch.ones(1), [torch.ones(1), torch.ones(1)])
    tensor([3.])

    They are summed first, so that less is lost to rounding in a large x.
    """
    return x + functools.reduce(torch.add, updates)


def default_heads(width: int, *, even: bool = False) -> int:
    """Return a number of heads that divides the width: about 64 channels each, 32 in small towers.

    >>> default_heads(300), default_heads(300, even=True)
    (4, 3)

    ``even``: whether each must have an even number of channels, if the width has.
    """
    wanted = max(1, width // 64, min(4, width // 32))
    divisors = [heads for heads in range(wanted, 0, -1) if width % heads == 0]
    return next((heads for heads in divisors if even and width // heads % 2 == 0), divisors[0])


def is_open(module: nn.Module) -> bool:
    """Whether a tap or an input adapter no longer is the identity."""
    assert isinstance(module, GatedCrossAttention | InputAdapter)
    parameters = module.zero_at_start()
    return not parameters or any(bool(parameter.any()) for parameter in parameters)


def _set_to_zero(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        nn.init.zeros_(parameter)


def _gated(gate: nn.Parameter | None, update: Tensor) -> Tensor:
    """Multiply an update by tanh of its gate, if there is one.

    The gate is expanded to all channels so that its gradient is summed over tokens first. If it were summed
    over everything at once, inductor would specialise on short and long batches.
    """
    return update if gate is None else torch.tanh(gate).expand(update.shape[-1]).to(update.dtype) * update


def _feed_forward(width: int) -> nn.Sequential:
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
