"""Measure the reconstruction quality of the image modality on Fashion-MNIST, from Debian's package.

apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
python examples/plugins/multitower_image/measure_image.py fashion --picture reconstructions.png
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from multitower_image import ImageModality

FITTED, MEASURED, SHOWN = 4000, 1000, 12
SETTINGS = ((7, 256), (4, 16), (4, 64), (4, 256), (4, 1024), (2, 64), (2, 256))


def images_in(folder: Path, part: str) -> np.ndarray:
    """Read the images of a split, "train" or "t10k": uint8, shape (count, 28, 28)."""
    (file,) = folder.rglob(f"{part}-images-idx3-ubyte.gz")
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)


def draw(rows: dict[str, list[np.ndarray]], file: Path) -> None:
    """Draw one row of images per name."""
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(0.7 * count + 1.6, 0.75 * len(rows)))
    for line, axes in zip(rows.items(), figure.subplots(len(rows), count), strict=True):
        name, images = line
        for axis, image in zip(axes, images, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    with mpl.rc_context({"savefig.bbox": "tight"}):
        figure.savefig(file, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the Debian package was unpacked")
    parser.add_argument("--picture", type=Path, default=Path("reconstructions.png"))
    options = parser.parse_args()
    train = images_in(options.folder, "train")[:FITTED]
    held_out = images_in(options.folder, "t10k")[:MEASURED] / np.float32(255)
    rows = {"original": list(held_out[:SHOWN])}
    print("| patches | side | tokens per image | mean squared error | PSNR in dB |")
    print("|--------:|-----:|-----------------:|-------------------:|-----------:|")
    for side, patches in SETTINGS:
        modality = ImageModality.fit(train, patches=patches, side=side)
        restored = np.stack(modality.decode_batch(modality.encode_batch(list(held_out))))
        error = float(np.square(restored - held_out).mean())
        tokens = len(modality.encode(held_out[0]))
        print(f"| {patches} | {side} | {tokens} | {error:.4f} | {-10 * np.log10(error):.1f} |", flush=True)
        rows[f"{patches} of {side} x {side}"] = list(restored[:SHOWN])
    draw(rows, options.picture)


if __name__ == "__main__":
    main()
