"""Handwritten digits from scikit-learn: write phrases as rows of them, and read these with a classifier.

```python
model, judge, unseen = handwriting(seed=0)               # three disjoint sets of images
row = write("four seven", unseen, np.random.default_rng(0))     # shape (8, 16)
ImageJudge(judge).read(row)                              # "four seven"
```
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from phrases import DIGITS

SIDE = 8
SHARES = (0.6, 0.25)


class Handwriting(NamedTuple):
    """Images of digits: pixels in 0..1, shape (count, 8, 8), and their labels."""

    pixels: np.ndarray
    digits: np.ndarray


def handwriting(seed: int) -> tuple[Handwriting, Handwriting, Handwriting]:
    """Split scikit-learn's 1,797 digits into disjoint sets: for the model, for the judge, held out."""
    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(pixels))
    cuts = np.cumsum([round(share * len(pixels)) for share in SHARES])
    images = (pixels / 16).astype(np.float32).reshape(-1, SIDE, SIDE)
    model, judge, unseen = (Handwriting(images[part], digits[part]) for part in np.split(order, cuts))
    return model, judge, unseen


def write(phrase: str, hand: Handwriting, rng: np.random.Generator) -> np.ndarray:
    """Write a phrase as a row of randomly drawn digits: shape (8, 8 * digits)."""
    places = [rng.choice(np.flatnonzero(hand.digits == DIGITS.index(word))) for word in phrase.split()]
    return np.concatenate([hand.pixels[place] for place in places], axis=1)


class ImageJudge:
    """A support vector machine on pixels, trained on other images than the towers."""

    def __init__(self, hand: Handwriting) -> None:
        self.classifier = SVC(gamma=0.25, C=10).fit(hand.pixels.reshape(len(hand.pixels), -1), hand.digits)

    def read(self, image: np.ndarray) -> str:
        """Classify each cell of 8 columns as a digit; an incomplete last cell is padded.

        Args:
            image: Floats in 0..1, shape (8, width).
        """
        if not image.shape[1]:
            return ""
        padded = np.pad(image, ((0, 0), (0, -image.shape[1] % SIDE)))
        cells = padded.reshape(SIDE, -1, SIDE).transpose(1, 0, 2)
        return " ".join(DIGITS[digit] for digit in self.classifier.predict(cells.reshape(len(cells), -1)))
