"""Waveforms to log-mel frames of 20 ms, and back by Griffin-Lim."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ._need import need

SAMPLE_RATE = 16_000
FRAME_RATE = 50
HOP = SAMPLE_RATE // FRAME_RATE
N_FFT = 1024
N_MELS = 80
FLOOR = 1e-4
MARGIN = (N_FFT - HOP) // 2

Floats: TypeAlias = npt.NDArray[np.float32]
Audio: TypeAlias = str | os.PathLike[str] | npt.NDArray[Any] | torch.Tensor | tuple[Any, int]


def waveform(audio: Audio) -> Floats:
    """Give any accepted form of audio as mono samples at 16 kHz.

    >>> waveform((np.zeros((8000, 2)), 8000)).shape
    (16000,)

    Args:
        audio: The path of a sound file; float samples at 16 kHz, shape (length,); or a tuple of
            float samples, shape (length,) or (length, channels), and their rate in Hz.

    Returns:
        Samples, float32, shape (length,). Channels are averaged.

    Raises:
        ValueError: The audio is empty, not finite, not floating-point, of another shape, or in a file
            that soundfile cannot read.
        FileNotFoundError: There is no such file.
        ImportError: The ``speech`` extra is not installed.
    """
    name, rate = "audio", float(SAMPLE_RATE)
    dims: tuple[int, ...] = (1, 2)
    samples: Any = audio
    if isinstance(audio, str | os.PathLike):
        name = os.fspath(audio)
        samples, rate = _read(name)
    elif isinstance(audio, tuple):
        if len(audio) != 2:
            raise ValueError(f"a tuple of audio is (samples, rate in Hz), but this has {len(audio)} items")
        samples, rate = audio
    else:
        dims = (1,)
    return _resample(_mono(samples, name, dims), rate, name)


def _read(name: str) -> tuple[Floats, int]:
    soundfile = need("soundfile")
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name} is not a file: give the path of a sound file")
    try:
        samples, rate = soundfile.read(name, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} cannot be read as sound: {error.error_string}") from error
    return samples, rate


def _mono(samples: Any, name: str, dims: tuple[int, ...]) -> Floats:
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu().float() if samples.is_floating_point() else samples.cpu()
    array = np.asarray(samples)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"{name} has dtype {array.dtype}: give floats in -1..1; for 16-bit integers, samples / 32768"
        )
    if array.ndim not in dims:
        raise ValueError(
            f"{name} has shape {array.shape}: give shape (length,) at 16 kHz, "
            "or a tuple of samples, shape (length,) or (length, channels), and their rate in Hz"
        )
    if array.size == 0:
        raise ValueError(f"{name} is empty (shape {array.shape}): give at least one sample")
    if array.ndim == 2 and array.shape[1] > array.shape[0]:
        raise ValueError(f"{name} has shape {array.shape}: channels come last, so give its transpose")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite samples: repair or drop it")
    return np.ascontiguousarray(array.mean(axis=1) if array.ndim == 2 else array, dtype=np.float32)


def _resample(samples: Floats, rate: float, name: str) -> Floats:
    if not rate > 0:
        raise ValueError(f"{name} has a sample rate of {rate}: give it in Hz, above 0")
    if rate == SAMPLE_RATE:
        return samples
    resampled: Floats = need("librosa").resample(samples, orig_sr=rate, target_sr=SAMPLE_RATE)
    return resampled.astype(np.float32, copy=False)


@lru_cache(maxsize=1)
def _filters() -> tuple[Floats, Floats]:
    bank = need("librosa.filters").mel(
        sr=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, fmin=60, fmax=7600, dtype=np.float32
    )
    return bank, np.linalg.pinv(bank)


def log_mel(samples: Floats) -> Floats:
    """Give the log-mel frames of samples at 16 kHz.

    >>> log_mel(np.zeros(16_000, dtype=np.float32)).shape
    (50, 80)

    Args:
        samples: float32, shape (length,), length at least 1. The last frame is padded with zeros.

    Returns:
        Natural logarithms of mel magnitudes, float32, shape (ceil(length / 320), 80).
    """
    padded = np.pad(samples, (MARGIN, MARGIN + -len(samples) % HOP))
    spectrum = need("librosa").stft(padded, n_fft=N_FFT, hop_length=HOP, center=False)
    mel: Floats = _filters()[0] @ np.abs(spectrum)
    return np.log(np.maximum(mel, FLOOR)).T.astype(np.float32)


def log_mels(waveforms: Iterable[Audio]) -> list[Floats]:
    """Give the log-mel frames of each of several pieces of audio.

    >>> [frames.shape for frames in log_mels([np.zeros(16_000), (np.zeros(22_050), 22_050)])]
    [(50, 80), (50, 80)]

    Raises:
        ValueError: One of them is unfit (the message gives its index), there are none, or it is a
            single piece of audio instead of several.
    """
    if isinstance(waveforms, str | os.PathLike | np.ndarray | torch.Tensor):
        raise ValueError(f"waveforms is a single {type(waveforms).__name__}: give a list of waveforms")
    mels = []
    for index, audio in enumerate(waveforms):
        try:
            mels.append(log_mel(waveform(audio)))
        except ValueError as error:
            raise ValueError(f"waveform {index}: {error}") from error
    if not mels:
        raise ValueError("there are no waveforms: give at least one")
    return mels


def stacked(frames: Floats, stack: int) -> Floats:
    """Join neighbouring frames; the last is repeated to fill.

    >>> stacked(np.zeros((5, 80), dtype=np.float32), 2).shape
    (3, 160)

    Args:
        frames: float32, shape (n, 80).
        stack: How many frames make one vector.

    Returns:
        float32, shape (ceil(n / stack), stack * 80).
    """
    padded = np.pad(frames, ((0, -len(frames) % stack), (0, 0)), mode="edge")
    return padded.reshape(-1, stack * N_MELS)


def griffin_lim(frames: Floats, *, iterations: int = 32, seed: int = 0) -> Floats:
    """Give samples whose log-mel frames are near those given.

    >>> griffin_lim(np.full((50, 80), np.log(FLOOR), dtype=np.float32)).shape
    (16000,)

    Args:
        frames: Natural logarithms of mel magnitudes, float32, shape (n, 80).
        iterations: Rounds of phase estimation.
        seed: Of the phases at the start.

    Returns:
        Samples at 16 kHz, float32, shape (320 * n,), clipped to -1..1.
    """
    if len(frames) == 0:
        return np.zeros(0, dtype=np.float32)
    magnitude = np.maximum(_filters()[1] @ np.exp(frames.T), 0)
    samples: Floats = need("librosa").griffinlim(
        magnitude, n_iter=iterations, hop_length=HOP, n_fft=N_FFT, center=False, random_state=seed
    )
    return samples[MARGIN:-MARGIN].clip(-1, 1).astype(np.float32)
