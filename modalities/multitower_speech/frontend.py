"""Log-mel frames of 20 ms from samples at 16 kHz, and back by Griffin-Lim."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

from multitower.base.extras import require

from .audio import SAMPLE_RATE, Audio, Floats, blocks, pieces

FRAME_RATE = 50
HOP = SAMPLE_RATE // FRAME_RATE
N_FFT = 1024
N_MELS = 80
FLOOR = 1e-4
MARGIN = (N_FFT - HOP) // 2
SLOT = 64


@lru_cache(maxsize=1)
def _filters() -> tuple[Floats, Floats]:
    bank = require("librosa", "speech").filters.mel(
        sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, fmin=60, fmax=7600, dtype=np.float32
    )
    return bank, np.linalg.pinv(bank)


def _mel(samples: Floats) -> Floats:
    spectrum = require("librosa", "speech").stft(samples, n_fft=N_FFT, hop_length=HOP, center=False)
    mel: Floats = _filters()[0] @ np.abs(spectrum)
    return np.log(np.maximum(mel, FLOOR)).T.astype(np.float32)


def mel_slots(parts: Iterable[Floats], size: int, step: int = 1) -> Iterator[tuple[Floats, slice]]:
    """Yield log-mel frames as soon as they are final, in slots of `size` frames.

    >>> parts = np.split(np.zeros(6400, dtype=np.float32), [100, 4000])
    >>> [new for _, new in mel_slots(parts, size=8)]        # of twenty frames
    [slice(0, 8, None), slice(0, 3, None), slice(3, 8, None), slice(0, 2, None), slice(2, 4, None)]

    Every slot is computed from an array of the same shape, so the frames do not depend on how the samples are
    split, not even by rounding.

    Args:
        parts: Samples at 16 kHz, float32, each of shape (length,).
        size: Frames in a slot.
        step: Until the end, new frames come in multiples of this; it divides `size`.

    Yields:
        A slot, float32, shape (size, 80), and a slice of its new frames; ignore those after it. The samples
        of the last frame are padded with zeros.
    """
    held, done, ended = np.zeros(MARGIN, dtype=np.float32), 0, False
    whole = size * HOP + 2 * MARGIN
    source = iter(parts)
    while not ended:
        part = next(source, None)
        if part is None:
            ended, part = True, np.zeros((MARGIN - len(held)) % HOP + MARGIN, dtype=np.float32)
        held = np.concatenate([held, part])
        while len(held) >= whole:
            yield _mel(held[:whole]), slice(done, size)
            held, done = held[size * HOP :], 0
        ready = max(0, len(held) - 2 * MARGIN) // HOP
        if not ended:
            ready -= ready % step
        if ready > done:
            yield _mel(np.pad(held, (0, whole - len(held)))), slice(done, ready)
            done = ready


def log_mel(parts: Iterable[Floats]) -> Floats:
    """Return the log-mel frames of samples at 16 kHz.

    >>> log_mel([np.zeros(16_000, dtype=np.float32)]).shape
    (50, 80)

    Args:
        parts: Samples, float32, each of shape (length,), at least one in total.

    Returns:
        Natural logarithms of mel magnitudes, float32, shape (ceil(length / 320), 80).
    """
    return np.concatenate([slot[new] for slot, new in mel_slots(parts, SLOT)])


def log_mels(waveforms: Iterable[Audio]) -> list[Floats]:
    """Return the log-mel frames of each of several pieces of audio.

    >>> [frames.shape for frames in log_mels([np.zeros(16_000), (np.zeros(22_050), 22_050)])]
    [(50, 80), (50, 80)]

    Raises:
        ValueError: One of them is invalid (the message has its index), there are none, or a single piece of
            audio is given.
    """
    mels = []
    for audio, named in pieces(waveforms):
        with named:
            mels.append(log_mel(blocks(audio)))
    return mels


def stacked(frames: Floats, stack: int) -> Floats:
    """Concatenate neighbouring frames; the last is repeated as padding.

    >>> stacked(np.zeros((5, 80), dtype=np.float32), 2).shape
    (3, 160)

    Args:
        frames: float32, shape (n, 80).
        stack: Number of frames per vector.

    Returns:
        float32, shape (ceil(n / stack), stack * 80).
    """
    padded = np.pad(frames, ((0, -len(frames) % stack), (0, 0)), mode="edge")
    return padded.reshape(-1, stack * N_MELS)


def griffin_lim(frames: Floats, *, iterations: int = 32, seed: int = 0) -> Floats:
    """Return samples whose log-mel frames approximate those given.

    >>> griffin_lim(np.full((50, 80), np.log(FLOOR), dtype=np.float32)).shape
    (16000,)

    Args:
        frames: Natural logarithms of mel magnitudes, float32, shape (n, 80).
        iterations: Iterations of phase estimation.
        seed: Seed of the initial phases.

    Returns:
        Samples at 16 kHz, float32, shape (320 * n,), clipped to -1..1.
    """
    if len(frames) == 0:
        return np.zeros(0, dtype=np.float32)
    magnitude = np.maximum(_filters()[1] @ np.exp(frames.T), 0)
    samples: Floats = require("librosa", "speech").griffinlim(
        magnitude, n_iter=iterations, hop_length=HOP, n_fft=N_FFT, center=False, random_state=seed
    )
    return samples[MARGIN:-MARGIN].clip(-1, 1).astype(np.float32)
