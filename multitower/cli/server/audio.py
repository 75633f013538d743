"""Audio in requests and responses: validation, and output in the requested format."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...base.extras import require
from ...plugins.modality import Modality

BLOCK = 1 << 16
CHANNELS, LOUDEST, RATES = 8, 2.0, range(1_000, 384_001)
PCM_RATE = 24_000
TYPES = {
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
    "pcm": f"audio/pcm;rate={PCM_RATE}",
}
"""Output formats and their media types; "pcm" is 16-bit mono at 24 kHz."""


def check_sound(data: bytes, seconds: float) -> None:
    """Check that bytes are a valid sound file of at most this duration, reading it in blocks."""
    soundfile = require("soundfile", "speech")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.channels > CHANNELS or file.samplerate not in RATES:
                raise ValueError(
                    f"the sound has {file.channels} channels at {file.samplerate} Hz; at most {CHANNELS} are "
                    f"read, at {RATES[0]} to {RATES[-1]} Hz"
                )
            heard = 0
            while len(block := file.read(BLOCK, dtype="float32")):
                heard += len(block)
                if heard > seconds * file.samplerate:
                    raise ValueError(f"the sound is longer than the {seconds:g} s that are allowed")
                if not np.isfinite(block).all():
                    raise ValueError("the sound holds NaN or infinite samples")
                if (peak := float(np.abs(block).max())) > LOUDEST:
                    raise ValueError(
                        f"the sound reaches {peak:.3g}, where full scale is 1; divide it by its range"
                    )
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"the {len(data)} bytes cannot be read as a sound file: {error.error_string}"
        ) from error
    if not heard:
        raise ValueError("the sound is empty")


def raw_of(modality: Modality, data: bytes, seconds: float) -> Any:
    """Return a sound file in a form that a modality accepts: its bytes, or the result of ``read_file``."""
    check_sound(data, seconds)
    if bytes in modality.accepts:
        return data
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"sound{modality.suffix}")
        path.write_bytes(data)
        return modality.read_file(path)


def bytes_of(modality: Modality, raw: Any, form: str) -> bytes:
    """Convert a modality's raw data to a file, by its ``write_file``, or to raw PCM."""
    if form == "pcm":
        return b"".join(pcm_in_pieces(modality, [raw]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"sound.{form}")
        modality.write_file(raw, path)
        return path.read_bytes()


def pcm_in_pieces(modality: Modality, raws: Iterable[Any]) -> Iterator[bytes]:
    """Convert pieces of a modality's raw data to 16-bit mono PCM at 24 kHz."""
    resampler: Any = None
    for raw in raws:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "sound.wav")
            modality.write_file(raw, path)
            samples, rate = require("soundfile", "speech").read(path, dtype="float32")
        if resampler is None:
            resampler = require("soxr", "speech").ResampleStream(rate, PCM_RATE, 1, dtype="float32")
        yield _pcm(resampler.resample_chunk(samples))
    if resampler is not None:
        yield _pcm(resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))


def _pcm(samples: np.ndarray) -> bytes:
    return bytes(np.clip(np.rint(samples * 32767), -32768, 32767).astype("<i2").tobytes())
