"""Small grey images with a token for each patch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange
from PIL import Image as PillowImage
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from multitower import Modality
from multitower.plugins import check_tokens

Image = np.ndarray[Any, np.dtype[Any]]


class ImageModality(Modality):
    """Grey images of one size as tokens, a lossy codec.

    >>> images = np.random.default_rng(0).random((9, 8, 12), dtype=np.float32)
    >>> modality = ImageModality.fit(images, patches=16, side=4)
    >>> modality
    ImageModality(patches=16, side=4, height=8, width=12)
    >>> modality.encode(images[0]).shape                # 2 x 3 patches, begin and end
    torch.Size([8])
    >>> modality.decode(modality.encode(images[0])).shape
    (8, 12)

    An image is cut into square patches, row by row; each is represented by the nearest of the patches that
    k-means found.

    Args:
        patches: The patch of each token, float32 in 0..1, shape (patches, side, side).
        height: Height of the images in pixels, a multiple of side.
        width: Width of the images in pixels, a multiple of side.

    Attributes:
        vocab_size: Number of ids: the patches, begin and end.

    Raises:
        ValueError: The patches have another shape or dtype, or do not fill the image.
    """

    name = media = "image"
    accepts = (np.ndarray,)
    suffix = ".png"

    def __init__(self, patches: Tensor, height: int, width: int) -> None:
        size, dtype = tuple(patches.shape), patches.dtype
        if len(size) != 3 or 0 in size or size[1] != size[2] or dtype != torch.float32:
            raise ValueError(f"patches are {dtype} of shape {size}: give float32 (patches, side, side)")
        self.patches, self.side, self.height, self.width = patches, size[1], height, width
        if min(height, width) < 1 or height % self.side or width % self.side:
            raise ValueError(f"patches of side {self.side} do not fill an image of {height} x {width} pixels")
        self.begin = len(patches)
        self.end = self.begin + 1
        self.vocab_size = self.end + 1

    def __repr__(self) -> str:
        size = f"side={self.side}, height={self.height}, width={self.width}"
        return f"ImageModality(patches={len(self.patches)}, {size})"

    @classmethod
    def fit(cls, images: Iterable[Image], *, patches: int = 256, side: int = 4, seed: int = 0) -> Self:
        """Fit patches by k-means.

        Args:
            images: Images as for ``encode``, all of one size.
            patches: Number of patches.
            side: Side of a patch in pixels.
            seed: Random seed; the patches are reproducible on the same machine.

        Raises:
            ValueError: There are no images, they have several sizes, or fewer different patches.
        """
        grey = [as_grey(image) for image in images]
        sizes = {image.shape for image in grey}
        if len(sizes) != 1 or any(pixels % side for size in sizes for pixels in size):
            raise ValueError(f"images of sizes {sorted(sizes)}: give some of one size, a multiple of {side=}")
        seen = np.concatenate([cut(image, side) for image in grey])
        if (distinct := len(np.unique(seen, axis=0))) < patches:
            raise ValueError(f"the images hold {distinct} different patches, too few to find {patches=}")
        with threadpool_limits(1):
            centres = KMeans(patches, n_init=1, random_state=seed).fit(seen).cluster_centers_
        return cls(torch.from_numpy(centres.reshape(-1, side, side)).float(), *sizes.pop())

    def encode(self, raw: Image) -> Tensor:
        """Return the tokens of an image: int64, shape (height * width / side ** 2 + 2,).

        Args:
            raw: Floats in 0..1, or uint8, shape (height, width).

        Raises:
            TypeError: The image is not an array of floats or uint8.
            ValueError: It has another size, or values out of range.
        """
        grey = as_grey(raw)
        if grey.shape != (self.height, self.width):
            raise ValueError(f"the image has shape {grey.shape}, not {(self.height, self.width)}: resize it")
        seen = torch.from_numpy(cut(grey, self.side))
        ids = torch.cdist(seen, self.patches.flatten(1)).argmin(1)
        return torch.cat([ids.new_tensor([self.begin]), ids, ids.new_tensor([self.end])])

    def decode(self, tokens: Tensor) -> Image:
        """Return the image of any sequence of tokens: float32 in 0..1, shape (height, width).

        Begin, end and ids beyond the vocabulary are dropped. Missing patches are black; surplus ones are
        dropped.
        """
        rows, columns = self.height // self.side, self.width // self.side
        ids = [token for token in check_tokens(tokens) if token < self.begin][: rows * columns]
        filled = torch.zeros(rows * columns, self.side, self.side)
        filled[: len(ids)] = self.patches[ids]
        return np.asarray(rearrange(filled, "(r c) h w -> (r h) (c w)", r=rows))

    def read_file(self, path: str | os.PathLike[str]) -> Image:
        """Read an image file as grey, resized for ``encode``: uint8, shape (height, width)."""
        with PillowImage.open(path) as file:
            return np.asarray(file.convert("L").resize((self.width, self.height)))

    def write_file(self, raw: Image, path: str | os.PathLike[str]) -> None:
        """Write an image, floats in 0..1 of shape (height, width), to a file."""
        PillowImage.fromarray((raw * 255).round().astype(np.uint8)).save(path)

    def config(self) -> dict[str, Any]:
        """Return the size of the images."""
        return {"height": self.height, "width": self.width}

    def tensors(self) -> dict[str, Tensor]:
        """Return the patches."""
        return {"patches": self.patches}


def as_grey(image: Image) -> Image:
    """Return an image as float32 in 0..1, shape (height, width)."""
    if not isinstance(image, np.ndarray) or not (image.dtype == np.uint8 or image.dtype.kind == "f"):
        kind = f"an array of {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"the image is {kind}: give a numpy array, of floats in 0..1 or of uint8 in 0..255")
    if image.ndim != 2 or not image.size:
        raise ValueError(f"the image has shape {image.shape}: give (height, width), one grey image at a time")
    grey = (image / np.float32(255) if image.dtype == np.uint8 else image).astype(np.float32)
    if not (grey.min() >= 0 and grey.max() <= 1):
        raise ValueError(f"the image has values from {grey.min():g} to {grey.max():g}: give floats in 0..1")
    return grey


def cut(grey: Image, side: int) -> Image:
    """Cut an image into patches, row by row; shape (count, side * side)."""
    return np.asarray(rearrange(grey, "(r h) (c w) -> (r c) (h w)", h=side, w=side))
