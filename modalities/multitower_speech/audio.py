"""Convert audio in any form to mono samples at one rate, with bounded memory."""

from __future__ import annotations

import io
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from multitower.base.extras import require

SAMPLE_RATE = 16_000
BLOCK = 1 << 18
LOUDEST = 2.0
LENGTH_UNKNOWN = 0x7FFF0000

Floats: TypeAlias = npt.NDArray[np.float32]
Samples: TypeAlias = npt.NDArray[Any] | torch.Tensor
Audio: TypeAlias = str | os.PathLike[str] | bytes | Samples | tuple[Samples, float]


def waveform(audio: Audio, rate: int = SAMPLE_RATE) -> Floats:
    """Return audio in any accepted form as mono samples, all at once.

    >>> waveform((np.zeros((8000, 2)), 8000)).shape
    (16000,)

    Args:
        audio: See ``blocks``.
        rate: Sample rate of the result, in Hz.

    Returns:
        float32, shape (length,), length at least 1.
    """
    return np.concatenate(list(blocks(audio, rate)))


def blocks(audio: Audio, rate: int = SAMPLE_RATE) -> Iterator[Floats]:
    """Yield audio in any accepted form as mono samples, a few seconds at a time.

    >>> [len(block) for block in blocks((np.zeros(600_000, dtype=np.int16), 32_000))]  # doctest: +ELLIPSIS
    [13..., ...]

    Args:
        audio: The path of a sound file; the bytes of one; samples at 16 kHz; or a tuple of samples and
            their rate in Hz. Samples are arrays or tensors of shape (length,) or (length, channels): floats
            in -1..1, or PCM of dtype int16 or int32, or uint8 around 128, which is divided by its range.
        rate: Sample rate of the result, in Hz.

    Yields:
        float32, shape (length,), at least one sample in total. Channels are averaged.

    Raises:
        TypeError: The audio is in none of these forms.
        ValueError: It is empty, not finite, of another shape or dtype, or soundfile cannot read it.
        FileNotFoundError: There is no such file.
        ImportError: The ``speech`` extra is not installed.
    """
    if isinstance(audio, str | os.PathLike):
        name = os.fspath(audio)
        if not os.path.isfile(name):
            raise FileNotFoundError(f"{name} is not a file: give the path of a sound file")
        return _read(name, name, rate)
    if isinstance(audio, bytes):
        return _read(io.BytesIO(audio), f"the sound file of {len(audio)} bytes", rate)
    samples, given = audio, float(SAMPLE_RATE)
    if isinstance(audio, tuple):
        if len(audio) != 2:
            raise ValueError(f"a tuple of audio is (samples, rate in Hz), but this has {len(audio)} items")
        samples, given = audio
    if not isinstance(samples, np.ndarray | torch.Tensor):
        raise TypeError(
            f"audio is a {type(samples).__name__}: give the path or the bytes of a sound file, an array or "
            "tensor of samples, or a tuple of samples and their rate in Hz"
        )
    _check_shape(samples, "audio", most_channels=2)
    parts = (samples[start : start + BLOCK] for start in range(0, len(samples), BLOCK))
    return resampled(parts, given, rate, "audio")


def _read(source: str | io.BytesIO, name: str, rate: int) -> Iterator[Floats]:
    soundfile = require("soundfile", "speech")

    def parts() -> Iterator[Floats]:
        with file:
            while len(part := file.read(BLOCK, dtype="float32", always_2d=True)):
                yield part

    try:
        file = soundfile.SoundFile(source)
        _warn_if_cut_off(file.extra_info, name)
        yield from resampled(parts(), file.samplerate, rate, name)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} cannot be read as sound: {error.error_string}") from error


def _warn_if_cut_off(log: str, name: str) -> None:
    """Warn if libsndfile's log says that an uncompressed file is shorter than its header declares.

    Truncated files of other formats are errors. Headers written before the length was known declare the
    maximum length; these are not warned about.
    """
    found = re.search(r"(?:data|SSND) *: (\d+) \(should be (\d+)\)", log)
    if found and int(found[2]) < int(found[1]) < LENGTH_UNKNOWN:
        warnings.warn(
            f"{name} is cut off: of {found[1]} bytes of samples only {found[2]} are there, and are read",
            stacklevel=2,
        )


def resampled(parts: Iterable[Samples], given: float, rate: int, name: str) -> Iterator[Floats]:
    """Convert parts of samples to mono at another rate; the result does not depend on how they are split.

    >>> tone = np.sin(np.arange(3000) / 10)
    >>> whole = np.concatenate(list(resampled([tone], 44_100, 16_000, "tone")))
    >>> cut = np.concatenate(list(resampled([tone[:1], tone[1:]], 44_100, 16_000, "tone")))
    >>> len(whole), np.array_equal(whole, cut)
    (1088, True)

    Args:
        parts: Samples in the forms of ``blocks``; empty parts are allowed.
        given: Their rate in Hz.
        rate: Sample rate of the result, in Hz.
        name: Their name in error messages.

    Raises:
        TypeError: A part is neither an array nor a tensor.
        ValueError: There are no samples, or they are not finite, or of another shape or dtype.
    """
    if isinstance(given, bool) or not isinstance(given, Real) or not 0 < given < math.inf:
        raise ValueError(f"{name} has a sample rate of {given!r}: give a number of Hz above 0")
    stream = None
    if given != rate:
        stream = require("soxr", "speech").ResampleStream(float(given), rate, 1, dtype="float32")
    heard, written, warned = 0, 0, False
    for part in parts:
        samples = _mono(part, name)
        if len(samples) and not warned and (peak := float(np.abs(samples).max())) > LOUDEST:
            warned = True
            warnings.warn(
                f"{name} reaches {peak:.3g}, where full scale is 1: divide it by its range", stacklevel=2
            )
        heard += len(samples)
        block = samples if stream is None else stream.resample_chunk(samples)
        written += len(block)
        if len(block):
            yield block
    if not heard:
        raise ValueError(f"{name} is empty: give at least one sample")
    if stream is not None:
        block = stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
        yield block if written + len(block) else np.zeros(1, dtype=np.float32)


def pieces(waveforms: Iterable[Audio]) -> Iterator[tuple[Audio, AbstractContextManager[None]]]:
    """Yield pieces of audio, each with a context that adds its index to errors.

    >>> for audio, named in pieces([np.zeros(3), np.zeros(0)]):
    ...     with named:
    ...         waveform(audio)
    Traceback (most recent call last):
    ValueError: waveform 1: audio is empty: give at least one sample

    Raises:
        ValueError: There are none, or it is a single piece of audio instead of several.
    """
    if isinstance(waveforms, str | bytes | os.PathLike | np.ndarray | torch.Tensor):
        raise ValueError(f"waveforms is a single {type(waveforms).__name__}: give a list of waveforms")
    index = -1
    for index, audio in enumerate(waveforms):
        yield audio, _named(f"waveform {index}")
    if index < 0:
        raise ValueError("there are no waveforms: give at least one")


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _mono(samples: Samples, name: str) -> Floats:
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu()
        samples = (samples.float() if samples.is_floating_point() else samples).numpy()
    if not isinstance(samples, np.ndarray):
        raise TypeError(f"{name} has a part that is a {type(samples).__name__}: give arrays or tensors")
    _check_shape(samples, name, most_channels=64)  # a part may be short
    if np.issubdtype(samples.dtype, np.floating):
        floats: Floats = samples.astype(np.float32, copy=False)
    elif samples.dtype in (np.int16, np.int32):
        floats = samples.astype(np.float32) / np.float32(-float(np.iinfo(samples.dtype).min))
    elif samples.dtype == np.uint8:
        floats = samples.astype(np.float32) / np.float32(128) - np.float32(1)
    else:
        raise ValueError(
            f"{name} has dtype {samples.dtype}: give floats in -1..1, or PCM of dtype int16, int32 or uint8"
        )
    if not np.isfinite(floats).all():
        raise ValueError(f"{name} holds NaN or infinite samples: repair or drop it")
    return np.ascontiguousarray(floats if floats.ndim == 1 else floats.mean(axis=1))


def _check_shape(samples: Samples, name: str, most_channels: int) -> None:
    shape = tuple(samples.shape)
    if len(shape) not in (1, 2) or shape[1:] == (0,):
        raise ValueError(f"{name} has shape {shape}: give samples of shape (length,) or (length, channels)")
    if len(shape) == 2 and shape[1] > max(most_channels, shape[0]):
        raise ValueError(f"{name} has shape {shape}: channels come last, so give its transpose")
