from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from multitower.testing import check_modality
from multitower_image import ImageModality


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return load_digits().images.astype(np.float32) / 16


@pytest.fixture(scope="module")
def modality(digits) -> ImageModality:
    return ImageModality.fit(digits[:300], patches=64, side=2)


def mean_squared_error(image: np.ndarray, restored: np.ndarray) -> float:
    return float(np.square(image - restored).mean())


def test_it_is_a_modality(modality, digits):
    samples = [digits[1000], digits[1001].astype(np.float64), np.zeros((8, 8), np.float16)]
    check_modality(modality, samples, round_trip=mean_squared_error, bound=0.02)
    check_modality(modality, [(255 * digits[1000]).astype(np.uint8)], round_trip="tokens")


def test_more_patches_lose_less(digits):
    held_out, errors = list(digits[1000:1100]), []
    for patches in (4, 16, 64):
        modality = ImageModality.fit(digits[:300], patches=patches, side=2)
        restored = modality.decode_batch(modality.encode_batch(held_out))
        errors.append(mean_squared_error(np.stack(held_out), np.stack(restored)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 < 0.05 < np.var(held_out)


def test_patches_are_read_row_by_row():
    patches = torch.arange(6).div(5)[:, None, None].expand(6, 2, 2).contiguous()
    modality = ImageModality(patches, height=4, width=6)
    image = modality.decode(torch.arange(6))
    assert image[::2, ::2].tolist() == patches[:, 0, 0].view(2, 3).tolist()
    assert modality.encode(image).tolist() == [6, 0, 1, 2, 3, 4, 5, 7]
    assert torch.equal(modality.encode((image * 255).astype(np.uint8)), modality.encode(image))


def test_whatever_a_tower_emits_has_the_size_of_an_image(modality, digits):
    tokens = modality.encode(digits[0])
    assert np.array_equal(modality.decode(torch.cat([tokens, tokens])), modality.decode(tokens))
    half = modality.decode(tokens[: 1 + 8])
    assert np.array_equal(half[:4], modality.decode(tokens)[:4])
    assert not half[4:].any()
    assert modality.decode(torch.tensor([modality.begin, 9999])).shape == (8, 8)


def test_unfit_images_are_refused(modality):
    with pytest.raises(TypeError, match="the image is an array of int64: give a numpy array, of"):
        modality.encode(np.zeros((8, 8), int))
    with pytest.raises(TypeError, match="the image is list"):
        modality.encode([[0.0]])
    with pytest.raises(ValueError, match=r"shape \(8, 9\), not \(8, 8\): resize"):
        modality.encode(np.zeros((8, 9)))
    with pytest.raises(ValueError, match=r"shape \(8, 8, 3\): give \(height, width\)"):
        modality.encode(np.zeros((8, 8, 3)))
    for pixel in (1.5, -0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"values from .*{pixel:g}.*: give floats in 0..1"):
            modality.encode(np.full((8, 8), pixel))


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="hold 1 different patches, too few to find patches=2"):
        ImageModality.fit(np.zeros((3, 4, 4)), patches=2, side=2)
    for images in ([], [np.zeros((4, 4)), np.zeros((4, 6))], [np.zeros((4, 5))]):
        with pytest.raises(ValueError, match="give some of one size, a multiple of side=2"):
            ImageModality.fit(images, patches=1, side=2)
    with pytest.raises(ValueError, match=r"float64 of shape \(3,\): give float32"):
        ImageModality(torch.zeros(3, dtype=torch.float64), 4, 4)
    with pytest.raises(ValueError, match="side 2 do not fill an image of 4 x 5 pixels"):
        ImageModality(torch.zeros(1, 2, 2), 4, 5)
