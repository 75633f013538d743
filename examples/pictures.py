"""Plots of the examples: losses, contributions, attention and error rates, each saved to a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Literal

import librosa
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

SAMPLE_RATE = 16_000
COLOURS = ("#0b6e99", "#d9730d", "#4d8b31", "#9b51a0", "#c0392b", "#8a6d3b")
TAP_NAME = re.compile(r"(?P<link>\S+) (?P<source>\d+)-(?P<target>\d+)")
PANELS = 3  # per row

History = Sequence[Mapping[str, float]]


def plot_losses(history: History, path: str | Path, *, title: str = "Training losses") -> Path:
    """Plot each loss over the steps: smoothed, with the raw values behind it.

    Args:
        history: entries such as `{"step": 10, "text": 2.1, "speech": 4.0}`; losses may be missing.
        path: the output file.
        title: the figure's title.

    Returns:
        The path.

    Raises:
        ValueError: the history is empty.
    """
    figure = _figure(7, 4)
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="cross-entropy (nats per token)")
    for (name, (steps, values)), colour in zip(_curves(history).items(), cycle(COLOURS), strict=False):
        smooth = _smooth(values)
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=colour, linewidth=2, label=f"{name} (ends at {smooth[-1]:.2f})")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _write(figure, path)


def plot_contributions(
    history: History, path: str | Path, *, title: str = "How much each link contributes"
) -> Path:
    """Plot the contribution of each tap over the steps: a panel per link, a colour per tap.

    Args:
        history: entries such as `{"step": 10, "speech->text 1-1": 0.03}`: the name of a link, and the source
            and target layers of a tap; layer 0 is the embedding.
        path: the output file.
        title: the figure's title.

    Returns:
        The path.

    Raises:
        ValueError: the history is empty, or a name is not that of a tap.
    """
    links: dict[str, dict[tuple[int, int], tuple[list[float], list[float]]]] = {}
    for name, curve in _curves(history).items():
        link, *layers = _tap(name)
        links.setdefault(link, {})[layers[0], layers[1]] = curve
    columns = min(len(links), PANELS)
    rows = -(-len(links) // columns)
    figure = _figure(1 + 4.6 * columns, 0.4 + 3.6 * rows)
    figure.suptitle(title)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in panels.flat[len(links) :]:
        axes.set_axis_off()
    for (link, taps), axes in zip(links.items(), panels.flat, strict=False):
        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.88, len(taps)))
        for ((source, target), (steps, values)), shade in zip(sorted(taps.items()), shades, strict=True):
            label = "embeddings" if source == target == 0 else f"layer {source} → {target}"
            axes.plot(steps, values, color=shade, linewidth=1.6, label=label)
        axes.set(title=link.replace("->", " → "), xlabel="step")
        axes.legend(frameon=False, fontsize="x-small", ncols=1 + len(taps) // 9, loc="best")
    for axes in panels[:, 0]:
        axes.set_ylabel("norm of the update / norm of the state")
    panels[0, 0].set_ylim(bottom=0)
    return _write(figure, path)


def plot_attention(
    weights: np.ndarray,
    path: str | Path,
    *,
    transcript_labels: Sequence[str],
    seconds_per_unit: float,
    waveform: np.ndarray,
    speech: Literal["source", "target"] = "source",
    title: str = "Cross-attention",
) -> Path:
    """Plot a cross-attention map below the spectrogram of the speech, on a common time axis.

    Args:
        weights: (target length, source length), without the speech tower's begin and end tokens.
        path: the output file.
        transcript_labels: a label for each text token, in order.
        seconds_per_unit: the duration of one speech token.
        waveform: the speech, 16 kHz mono.
        speech: which side of the link speech is on.
        title: the figure's title.

    Returns:
        The path.

    Raises:
        ValueError: the weights are not a matrix with a row or column per label.
    """
    grid = np.asarray(weights, dtype=np.float64)
    grid = grid.T if speech == "target" else grid
    if grid.ndim != 2 or len(grid) != len(transcript_labels):
        raise ValueError(
            f"weights of shape {np.shape(weights)} with speech as the {speech} need a label for each text "
            f"token, got {len(transcript_labels)} labels"
        )
    rows, units = grid.shape
    seconds = units * seconds_per_unit
    height = min(max(0.24 * rows, 2.0), 9.0)
    figure = _figure(8, height + 2.6)
    figure.suptitle(title, parse_math=False)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, height])
    _draw_spectrogram(above, waveform)
    scale = max(float(np.quantile(grid, 0.995)), 1e-9)
    image = below.imshow(
        grid,
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        vmin=0,
        vmax=scale,
        extent=(0, seconds, rows - 0.5, -0.5),
    )
    below.set_yticks(
        range(rows), transcript_labels, fontsize="small", fontfamily="monospace", parse_math=False
    )
    below.set(xlabel="time in the speech (s)", ylabel="text token", xlim=(0, seconds))
    figure.colorbar(image, ax=below, label="attention", shrink=0.8, extend="max")
    return _write(figure, path)


def plot_comparison(
    rows: Sequence[Mapping[str, str | float]], path: str | Path, *, title: str = "Held-out word error rates"
) -> Path:
    """Plot a bar for each system, grouped by measure.

    Args:
        rows: entries such as `{"system": "zipper", "ASR": 3.2, "TTS": 18.0}`, in per cent; measures may be
            missing.
        path: the output file.
        title: the figure's title.

    Returns:
        The path.

    Raises:
        ValueError: there is nothing to plot.
    """
    measures = list(dict.fromkeys(key for row in rows for key in row if key != "system"))
    if not measures:
        raise ValueError("nothing to compare: pass rows such as {'system': 'zipper', 'ASR': 3.2}")
    figure = _figure(7, 4)
    axes = figure.add_subplot(title=title, ylabel="word error rate (%)")
    colours = dict(zip((row["system"] for row in rows), cycle(COLOURS), strict=False))
    for group, measure in enumerate(measures):
        present = [row for row in rows if measure in row]
        width = 0.8 / len(rows)
        for place, row in enumerate(present):
            bar = axes.bar(
                group + (place - (len(present) - 1) / 2) * width,
                row[measure],
                0.92 * width,
                color=colours[row["system"]],
            )
            axes.bar_label(bar, fmt="%.1f", padding=2, fontsize="small")
    axes.set_xticks(range(len(measures)), measures)
    axes.margins(y=0.12)
    keys = [Line2D([], [], color=colour, linewidth=7, label=str(name)) for name, colour in colours.items()]
    figure.legend(handles=keys, frameon=False, fontsize="small", ncols=len(keys), loc="outside lower center")
    return _write(figure, path)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _write(figure: Figure, path: str | Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.grid(alpha=0.25)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _curves(history: History) -> dict[str, tuple[list[float], list[float]]]:
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name != "step":
                steps, values = curves.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    if not curves:
        raise ValueError("nothing to draw: the history has no entry such as {'step': 1, 'name': 0.5}")
    return curves


def _tap(name: str) -> tuple[str, int, int]:
    if not (match := TAP_NAME.fullmatch(name)):
        raise ValueError(f"cannot read the tap {name!r}: expected a name such as 'speech->text 1-1'")
    return match["link"], int(match["source"]), int(match["target"])


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Return the moving average over a centred window, truncated at the ends."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    start, stop = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def _draw_spectrogram(axes: Axes, waveform: np.ndarray) -> None:
    waveform = np.asarray(waveform, dtype=np.float32)
    power = librosa.feature.melspectrogram(y=waveform, sr=SAMPLE_RATE, n_fft=512, hop_length=160, n_mels=64)
    decibels = librosa.power_to_db(power, ref=np.max, top_db=60)
    axes.imshow(
        decibels,
        aspect="auto",
        origin="lower",
        cmap="Greys",
        extent=(0, len(waveform) / SAMPLE_RATE, 0, len(power)),
    )
    axes.set(ylabel="mel band", yticks=[0, 32, 64])
