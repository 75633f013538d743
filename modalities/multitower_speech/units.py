"""Vectors to residual k-means units and back, flattened in time."""

from __future__ import annotations

import numpy as np
import torch

from ._need import need
from .frontend import Floats

FIT_LIMIT = 100_000


def fit_codebooks(vectors: Floats, *, units: int, codebooks: int, seed: int) -> torch.Tensor:
    """Cluster vectors, then what each codebook leaves over.

    >>> vectors = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    >>> fit_codebooks(vectors, units=8, codebooks=2, seed=0).shape
    torch.Size([2, 8, 3])

    Args:
        vectors: float32, shape (n, width). Of more than 100,000, as many are drawn by the seed.
        units: Number of centres in a codebook.
        codebooks: Number of codebooks.
        seed: Of the draw and of the clustering.

    Returns:
        The centres, float32, shape (codebooks, units, width).
    """
    kmeans, limits = need("sklearn.cluster").KMeans, need("threadpoolctl").threadpool_limits
    if len(vectors) > FIT_LIMIT:
        vectors = np.random.default_rng(seed).choice(vectors, FIT_LIMIT, replace=False)
    rest = torch.from_numpy(vectors)
    books: list[torch.Tensor] = []
    for _ in range(codebooks):
        # Threads would add up the centres in any order, and so give other units on each run.
        with limits(1, user_api="openmp"):
            fitted = kmeans(units, max_iter=20, n_init=1, random_state=seed).fit(rest.numpy())
        books.append(torch.from_numpy(fitted.cluster_centers_.astype(np.float32)))
        rest = rest - books[-1][_nearest(rest, books[-1])]
    return torch.stack(books)


def _nearest(vectors: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    return torch.addmm((book**2).sum(1), vectors, book.T, alpha=-2).argmin(1)


def quantize(vectors: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Give the units of vectors, one group of a unit from each codebook after another.

    >>> codebooks = torch.tensor([[[0.0], [10.0]], [[-1.0], [1.0]]])
    >>> quantize(torch.tensor([[9.0], [1.0]]), codebooks)
    tensor([1, 2, 0, 3])

    Args:
        vectors: float32, shape (n, width).
        codebooks: float32, shape (codebooks, units, width).

    Returns:
        int64, shape (n * codebooks,). Unit u of codebook c is c * units + u.
    """
    columns, rest = [], vectors
    for level, book in enumerate(codebooks):
        index = _nearest(rest, book)
        rest = rest - book[index]
        columns.append(index + level * len(book))
    return torch.stack(columns, dim=1).flatten()


def dequantize(tokens: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Give the vectors of units, also of sequences that no encoder would give.

    >>> codebooks = torch.tensor([[[0.0], [10.0]], [[-1.0], [1.0]]])
    >>> dequantize(torch.tensor([1, 2, 0, 3]), codebooks).flatten()
    tensor([9., 1.])
    >>> dequantize(torch.tensor([3, 1, 0, 2, 2, 99]), codebooks).flatten()
    tensor([10., -1.])

    A unit of the first codebook begins a vector; the units of the others refine it, in order.
    Where they are missing, the vector stays coarse; where they are out of order, they are dropped.
    So are ids past the last unit.

    Args:
        tokens: Integers, shape (length,).
        codebooks: float32, shape (codebooks, units, width).

    Returns:
        float32, shape (n, width), n the number of units of the first codebook.

    Raises:
        ValueError: The tokens are of another shape or dtype, or negative.
    """
    count, units, width = codebooks.shape
    vectors: list[torch.Tensor] = []
    due = count
    for i in _ids(tokens):
        level, unit = divmod(i, units)
        if level == 0:
            vectors.append(codebooks[0, unit])
            due = 1
        elif level == due < count:
            vectors[-1] = vectors[-1] + codebooks[level, unit]
            due += 1
    return torch.stack(vectors) if vectors else codebooks.new_zeros(0, width)


def _ids(tokens: torch.Tensor) -> list[int]:
    tensor = torch.as_tensor(tokens)
    if tensor.ndim != 1 or (len(tensor) and tensor.is_floating_point()):
        raise ValueError(
            f"tokens have shape {tuple(tensor.shape)} and dtype {tensor.dtype}: "
            "give integers of shape (length,), one example at a time"
        )
    if len(tensor) and int(tensor.min()) < 0:
        raise ValueError(f"tokens hold {int(tensor.min())}: drop labels that are ignored before decoding")
    return [int(i) for i in tensor.tolist()]
