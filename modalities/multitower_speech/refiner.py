"""A small convolutional network that smooths what quantising did to log-mel frames."""

from __future__ import annotations

import torch
from torch import nn

from .frontend import N_MELS

CENTRE, SPREAD = -5.0, 3.0
CROP, BATCH, PEAK_RATE = 64, 16, 2e-3


class Refiner(nn.Module):
    """Log-mel frames restored from units, to frames nearer to the original ones.

    >>> Refiner()(torch.zeros(50, 80)).shape
    torch.Size([50, 80])

    Each frame sees six on either side: 260 ms in all.
    """

    def __init__(self, width: int = 128, kernel: int = 5) -> None:
        super().__init__()
        sizes = (N_MELS, width), (width, width), (width, N_MELS)
        first, middle, last = (
            nn.Conv1d(*size, kernel, padding="same", device="cpu", dtype=torch.float32) for size in sizes
        )
        self.layers = nn.Sequential(first, nn.GELU(), middle, nn.GELU(), last)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Refine log-mel frames, float32, shape (..., n, 80)."""
        x = ((frames - CENTRE) / SPREAD).mT
        y: torch.Tensor = self.layers(x)
        return frames + SPREAD * y.mT


def fit_refiner(restored: torch.Tensor, original: torch.Tensor, *, steps: int, seed: int) -> Refiner:
    """Train a refiner for a few seconds on the mean absolute error.

    >>> frames = torch.randn(100, 80)
    >>> fit_refiner(frames, frames, steps=2, seed=0).training
    False

    Args:
        restored: Log-mel frames restored from units, float32, shape (n, 80).
        original: The same frames before quantising, float32, shape (n, 80).
        steps: Number of batches, each of 16 crops of 64 frames.
        seed: Of the weights and of the crops. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Refiner()
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps + 1)
        window = torch.arange(min(CROP, len(restored)))
        for _ in range(steps):
            starts = torch.randint(len(restored) - len(window) + 1, (BATCH, 1))
            at = starts + window
            loss = (model(restored[at]) - original[at]).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)
