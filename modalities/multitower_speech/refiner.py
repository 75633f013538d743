"""A small convolutional network that maps the vectors of units to log-mel frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from .frontend import N_MELS

CENTRE, SPREAD = -5.0, 3.0
CROP, BATCH, PEAK_RATE = 64, 16, 2e-3


def _conv(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Conv1d:
    return nn.Conv1d(
        inputs, outputs, kernel, padding="same", dilation=dilation, device="cpu", dtype=torch.float32
    )


class Refiner(nn.Module):
    """Maps the vectors of units to log-mel frames.

    >>> Refiner(160, 160, residual=True)(torch.zeros(25, 160)).shape       # one second, two frames a unit
    torch.Size([50, 80])

    The receptive field is nine units on either side.

    Args:
        inputs: Width of a unit's vector.
        outputs: 80 * frames per unit.
        residual: Whether the vectors are log-mel frames, to which the network's output is added.
        width: Hidden channels.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, inputs: int, outputs: int, *, residual: bool, width: int = 128) -> None:
        super().__init__()
        self.residual = residual
        self.first, self.last = _conv(inputs, width, 3), _conv(width, outputs, 3)
        for part in self.last.parameters():
            nn.init.zeros_(part)  # before training, the output is zero
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GELU(), _conv(width, width, 3, dilation), nn.GELU(), _conv(width, width, 1))
            for dilation in (1, 2, 4)
        )
        self.register_buffer("centre", torch.tensor(CENTRE, dtype=torch.float32, device="cpu"))
        self.register_buffer("spread", torch.tensor(SPREAD, dtype=torch.float32, device="cpu"))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return log-mel frames, shape (..., n * frames per unit, 80), of vectors (..., n, inputs)."""
        hidden = self.first(((vectors - self.centre) / self.spread).mT)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        frames: Tensor = SPREAD * self.last(hidden).mT + (vectors if self.residual else CENTRE)
        return frames.reshape(*frames.shape[:-2], -1, N_MELS)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], *, residual: bool) -> Self:
        """Rebuild a frozen refiner in eval mode from its weights.

        Raises:
            KeyError, RuntimeError: The tensors are not the weights of a refiner.
        """
        width, inputs, _ = tensors["first.weight"].shape
        refiner = cls(inputs, len(tensors["last.weight"]), residual=residual, width=width)
        refiner.load_state_dict(dict(tensors))
        return refiner.eval().requires_grad_(False)


def weights(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, which is removed."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def fit_refiner(vectors: Tensor, frames: Tensor, *, steps: int, seed: int, residual: bool = False) -> Refiner:
    """Train a refiner on the mean absolute error, for about a minute.

    >>> frames = torch.randn(100, 80)
    >>> fit_refiner(frames, frames, steps=2, seed=0, residual=True).training
    False

    Args:
        vectors: The vectors of units, float32, shape (n, inputs).
        frames: The original log-mel frames, float32, shape (n * frames per unit, 80).
        steps: Number of batches, each of 16 crops of 64 units.
        seed: Seed of weights and crops. The global random state is unchanged.
        residual: Whether the vectors are log-mel frames.
    """
    targets = frames.reshape(len(vectors), -1)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Refiner(vectors.shape[1], targets.shape[1], residual=residual)
        if not residual:
            model.centre.fill_(vectors.mean())
            model.spread.fill_(vectors.std().clamp(min=1e-6))
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps + 1)
        window = torch.arange(min(CROP, len(vectors)))
        for _ in range(steps):
            at = torch.randint(len(vectors) - len(window) + 1, (BATCH, 1)) + window
            loss = (model(vectors[at]) - targets[at].reshape(BATCH, -1, N_MELS)).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)
