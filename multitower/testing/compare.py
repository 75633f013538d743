"""Comparison of tensors: bit for bit, or up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype) -> float:
    """Return how much results may differ by rounding, relative to the largest value.

    >>> tolerance(torch.float32), tolerance(torch.bfloat16) > 0.02
    (0.0001, True)
    """
    return 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps ** 0.5 / 4


def assert_equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise an AssertionError with the largest difference unless two tensors are equal, bit for bit."""
    if not torch.equal(found, expected):
        raise AssertionError(f"{what} (by {_worst(found, expected)[0]:.2g})")


def assert_close(found: Tensor, expected: Tensor, what: str, within: float, *, least: float = 1.0) -> None:
    """Raise an AssertionError with the largest difference unless two tensors are equal up to rounding.

    >>> assert_close(torch.tensor(2.0), torch.tensor(2.00001), "two is another", 1e-4)
    >>> assert_close(torch.tensor(2.0), torch.tensor(2.1), "two is another", 1e-4)
    Traceback (most recent call last):
    AssertionError: two is another (by 0.1)

    Args:
        found: The tensor to check.
        expected: What it should be.
        what: The error message.
        within: The tolerance, relative to the largest expected value.
        least: Lower bound for that largest value.
    """
    worst, largest = _worst(found, expected)
    if not worst <= within * max(least, largest):
        raise AssertionError(f"{what} (by {worst:.2g})")


def _worst(found: Tensor, expected: Tensor) -> tuple[float, float]:
    if found.shape != expected.shape:
        raise AssertionError(f"shape {tuple(found.shape)} where {tuple(expected.shape)} is expected")
    if not expected.numel():
        return 0.0, 0.0
    difference = (found.double() - expected.double()).abs().max()
    return difference.item(), expected.double().abs().max().item()
