"""Residual k-means units."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch

import multitower as mt
from multitower.base.extras import require

from .audio import Floats

FIT_LIMIT = 100_000
FEW = 5
"""Minimum number of vectors per unit, below which units overfit the audio."""


def fit_codebooks(vectors: Floats, *, units: int, codebooks: int, seed: int) -> torch.Tensor:
    """Cluster vectors, then the residuals of each codebook.

    >>> vectors = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    >>> fit_codebooks(vectors, units=8, codebooks=2, seed=0).shape
    torch.Size([2, 8, 3])

    Args:
        vectors: float32, shape (n, width); at most 100,000 random ones are used.
        units: Number of centres per codebook.
        codebooks: Number of codebooks.
        seed: Random seed of selection and clustering.

    Returns:
        The centres, float32, shape (codebooks, units, width).

    Raises:
        ValueError: There are fewer vectors than units, or `units` or `codebooks` is below 1.
    """
    for name, value in (("units", units), ("codebooks", codebooks)):
        if value < 1:
            raise ValueError(f"{name}={value}: give at least 1")
    if len(vectors) < units:
        raise ValueError(
            f"{len(vectors)} vectors are too few to fit units={units}: give more audio or ask for fewer units"
        )
    if len(vectors) < FEW * units:
        warnings.warn(
            f"{len(vectors)} vectors are few to fit units={units}, which will suit no other audio: give more "
            "audio or ask for fewer units",
            stacklevel=3,
        )
    kmeans = require("sklearn.cluster", "speech").KMeans
    limits = require("threadpoolctl", "speech").threadpool_limits
    if len(vectors) > FIT_LIMIT:
        vectors = np.random.default_rng(seed).choice(vectors, FIT_LIMIT, replace=False)
    rest = torch.from_numpy(vectors)
    books: list[torch.Tensor] = []
    for _ in range(codebooks):
        # With several threads, the order of summation, hence the result, varies between runs.
        with limits(1, user_api="openmp"):
            fitted = kmeans(units, max_iter=20, n_init=1, random_state=seed).fit(rest.numpy())
        books.append(torch.from_numpy(fitted.cluster_centers_.astype(np.float32)))
        rest = rest - books[-1][_nearest(rest, books[-1])]
    return torch.stack(books)


def codebooks_of(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the codebooks of a saved modality.

    Raises:
        CheckpointError: They are missing.
    """
    if "codebooks" not in tensors:
        raise mt.errors.CheckpointError(
            "modality.safetensors is missing or contains no codebooks: save again"
        )
    return tensors["codebooks"]


def _nearest(vectors: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    return torch.addmm((book**2).sum(1), vectors, book.T, alpha=-2).argmin(1)


def quantize(vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Return the units of vectors: in each codebook, the nearest to the residual of the previous ones.

    >>> codebooks = torch.tensor([[[0.0], [10.0]], [[-1.0], [1.0]]])
    >>> quantize(torch.tensor([[9.0], [1.0]]), codebooks)
    tensor([[1, 0],
            [0, 1]])

    Args:
        vectors: float32, shape (n, width).
        codebooks: float32, shape (codebooks, units, width).

    Returns:
        int64, shape (n, codebooks).
    """
    columns, rest = [], vectors
    for book in codebooks:
        columns.append(_nearest(rest, book))
        rest = rest - book[columns[-1]]
    return torch.stack(columns, dim=1)


def dequantize(codes: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Return the vectors of units.

    >>> codebooks = torch.tensor([[[0.0], [10.0]], [[-1.0], [1.0]]])
    >>> dequantize(torch.tensor([[1, 0], [0, -1]]), codebooks).flatten()
    tensor([9., 0.])

    Args:
        codes: int64, shape (n, codebooks); -1 adds nothing.
        codebooks: float32, shape (codebooks, units, width).

    Returns:
        float32, shape (n, width).
    """
    vectors = codebooks.new_zeros(len(codes), codebooks.shape[2])
    for book, column in zip(codebooks, codes.T, strict=True):
        vectors += book[column.clamp(min=0)] * (column >= 0).unsqueeze(1)
    return vectors
