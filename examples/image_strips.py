"""A modality for grey images of one height, such as lines of handwriting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import numpy as np
import torch
from einops import rearrange
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

import multitower as mt
from multitower.plugins import check_tokens


class ImageModality(mt.Modality):
    """Images as tokens from left to right, one for each strip of a few pixel columns.

    >>> image = np.random.default_rng(0).random((8, 24), dtype=np.float32)
    >>> images = ImageModality.fit([image], strips=6, width=2)
    >>> tokens = images.encode(image)
    >>> tokens.shape, tokens.dtype                       # 12 strips, begin and end
    (torch.Size([14]), torch.int64)
    >>> images.decode(tokens).shape
    (8, 24)

    Args:
        centres: The strip of each token, float32, shape (strips, height, width).

    Attributes:
        height: Height of the images in pixels.
        width: Width of a strip in pixels.

    Raises:
        ValueError: The centres have another shape or dtype.
    """

    name = "image_strips"
    accepts = (np.ndarray,)

    def __init__(self, centres: torch.Tensor) -> None:
        shape, dtype = tuple(centres.shape), centres.dtype
        if len(shape) != 3 or 0 in shape or dtype != torch.float32:
            raise ValueError(
                f"centres have shape {shape} and dtype {dtype}: give float32 of shape (strips, height, "
                "width), as ImageModality.fit does"
            )
        self.centres = centres
        self.begin, self.height, self.width = shape
        self.end = self.begin + 1
        self.vocab_size = self.end + 1

    def __repr__(self) -> str:
        return f"ImageModality(strips={self.begin}, height={self.height}, width={self.width})"

    @classmethod
    def fit(cls, images: Iterable[np.ndarray], *, strips: int = 256, width: int = 2, seed: int = 0) -> Self:
        """Fit strips by k-means.

        Args:
            images: Floats in 0..1, each of shape (height, any width).
            strips: Number of strips.
            width: Width of a strip in pixels.
            seed: Random seed; the strips are reproducible on the same machine.

        Raises:
            ValueError: The images have fewer different strips.
        """
        pixels = np.concatenate([_cut(image, width) for image in images])
        vectors = pixels.reshape(len(pixels), -1)
        if (distinct := len(np.unique(vectors, axis=0))) < strips:
            raise ValueError(
                f"the images hold {distinct} different strips, too few to fit strips={strips}: "
                "give more images or ask for fewer"
            )
        with threadpool_limits(1):
            found = KMeans(strips, n_init=1, random_state=seed).fit(vectors)
        return cls(torch.from_numpy(found.cluster_centers_.reshape(-1, *pixels.shape[1:])).float())

    def encode(self, raw: np.ndarray) -> torch.Tensor:
        """Return the tokens of one image.

        Args:
            raw: Floats in 0..1, shape (height, any width).

        Returns:
            int64, shape (ceil(raw width / width) + 2,), including begin and end.

        Raises:
            TypeError: The image is not an array of floats.
            ValueError: It has another height, or not two dimensions.
        """
        if not isinstance(raw, np.ndarray) or raw.dtype.kind != "f":
            kind = f"an array of {raw.dtype}" if isinstance(raw, np.ndarray) else type(raw).__name__
            raise TypeError(f"the image is {kind}: give a numpy array of floats in 0..1")
        if raw.ndim != 2 or len(raw) != self.height:
            raise ValueError(f"the image has shape {raw.shape}: give shape ({self.height}, any width)")
        pixels = torch.from_numpy(_cut(raw, self.width))
        ids = torch.cdist(pixels.flatten(1), self.centres.flatten(1)).argmin(1)
        return torch.cat([ids.new_tensor([self.begin]), ids, ids.new_tensor([self.end])])

    def decode(self, tokens: torch.Tensor) -> np.ndarray:
        """Return the image of any sequence of tokens: float32, shape (height, width * strips).

        Begin, end and ids beyond the vocabulary are dropped.
        """
        ids = [token for token in check_tokens(tokens) if token < self.begin]
        return rearrange(self.centres[ids], "n h w -> h (n w)").numpy()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the strips."""
        return {"centres": self.centres}


def _cut(image: np.ndarray, width: int) -> np.ndarray:
    """Cut an image into strips, shape (count, height, width); the last is padded with zeros."""
    padded = np.pad(np.asarray(image, dtype=np.float32), ((0, 0), (0, -np.shape(image)[1] % width)))
    return rearrange(padded, "h (n w) -> n h w", w=width)
