"""Synthesise sound piece by piece, joined without clicks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from .audio import Floats

PIECE = 0.5
"""Duration of a piece, in seconds."""

AROUND = 0.16
"""Context on either side of a piece for synthesis, in seconds; its sound is discarded."""

SEAM = 0.02
"""Duration of the cross-fade between pieces, in seconds."""

SHIFT = 0.008
"""Maximum shift of a piece to align its phase with the previous one, in seconds."""


def sound_in_pieces(
    parts: Iterable[torch.Tensor], sound: Callable[[torch.Tensor], Floats], *, rate: float, sample_rate: int
) -> Iterator[Floats]:
    """Yield the samples of units that arrive in parts.

    >>> def beep(codes):
    ...     return np.ones(len(codes) * 320, dtype=np.float32)
    >>> parts = [torch.zeros(40, 1, dtype=torch.int64)] * 2
    >>> [len(piece) for piece in sound_in_pieces(parts, beep, rate=50, sample_rate=16_000)]
    [7680, 8000, 9920]

    Each piece is synthesised with some context. If the vocoder estimates phases, those of two pieces differ,
    so the second is shifted by a few milliseconds for the best correlation with the first, and cross-faded
    (synchronised overlap-add: Roucos and Wilgus, "High quality time-scale modification for speech", 1985).

    Args:
        parts: Units, int64, each of shape (frames, codebooks).
        sound: Maps units to samples, float32, shape (length,).
        rate: Frames per second.
        sample_rate: Samples per second.

    Yields:
        Samples, float32, shape (length,).
    """
    hop, around = sample_rate / rate, max(1, round(AROUND * rate))
    size = max(1, round(PIECE * rate))
    seam, shift = round(SEAM * sample_rate), round(SHIFT * sample_rate)
    held, done, tail = None, 0, np.zeros(0, dtype=np.float32)
    late = 0  # surplus of samples so far
    for codes, last in _with_last(parts):
        held = codes if held is None else torch.cat([held, codes])
        while len(held) - done >= size + around or (last and done < len(held)):
            end = len(held) if last and len(held) - done < size + around else done + size
            first = max(0, done - around)
            samples = sound(held[first : min(len(held), end + around)])
            start = round((done - first) * hop)
            stop = len(samples) if end == len(held) else round((end - first) * hop)
            if len(tail):
                first_place = start - seam + late - shift
                place = best_shift(tail, samples[first_place : first_place + seam + 2 * shift])
                start, late = first_place + place, shift - place
                fade = np.linspace(0, 1, seam, dtype=np.float32)
                samples[start : start + seam] = tail * (1 - fade) + samples[start : start + seam] * fade
            keep = 0 if end == len(held) and last else seam
            yield samples[start : stop - keep]
            tail, done = samples[stop - keep : stop] if keep else tail[:0], end
            if last and end == len(held):
                return


def best_shift(before: Floats, after: Floats) -> int:
    """Return the place in ``after`` that correlates best with ``before``.

    >>> wave = np.sin(np.arange(100) / 3).astype(np.float32)
    >>> best_shift(wave[20:40], wave[10:60])
    10

    Args:
        before: Samples, shape (length,).
        after: More samples; every place is tried, and the middle is preferred among equals.
    """
    windows = np.lib.stride_tricks.sliding_window_view(after, len(before))
    likeness = windows @ before / (np.sqrt((windows**2).sum(1)) + 1e-6)
    middle = (len(windows) - 1) / 2
    far = np.abs(np.arange(len(windows)) - middle) / max(1, middle)
    return int((likeness - 1e-3 * likeness.max() * far).argmax())


def _with_last(parts: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield each part, and whether it is the last."""
    before = None
    for part in parts:
        if before is not None:
            yield before, False
        before = part
    if before is not None:
        yield before, True
