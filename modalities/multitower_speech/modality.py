"""16 kHz waveforms to the units of a speech tower, and back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .frontend import (
    FRAME_RATE,
    N_MELS,
    SAMPLE_RATE,
    Audio,
    Floats,
    griffin_lim,
    log_mel,
    log_mels,
    stacked,
    waveform,
)
from .refiner import Refiner, fit_refiner
from .units import dequantize, fit_codebooks, quantize

CONFIG = "modality.json"
WEIGHTS = "modality.safetensors"


@dataclass(frozen=True, eq=False, repr=False)
class SpeechModality:
    """Speech to discrete units, and back to speech.

    >>> noise = np.random.default_rng(0).normal(scale=0.1, size=32_000).astype(np.float32)
    >>> speech = SpeechModality.fit([noise], units=8, rate=25, refine_steps=2)
    >>> tokens = speech.encode(noise[:16_000])           # one second
    >>> tokens.shape, tokens.dtype                       # 25 units, begin and end
    (torch.Size([27]), torch.int64)
    >>> audio = speech.decode(tokens)
    >>> audio.shape, audio.dtype, speech.sample_rate
    ((16000,), dtype('float32'), 16000)

    Log-mel frames of 20 ms, stacked to the rate asked for, are clustered by k-means; with several
    codebooks each clusters what the one before left over. Decoding takes the frames from the codebooks,
    smooths them with a small convolutional network and finds a waveform by Griffin-Lim. All of it is
    fitted on your own audio by `fit`, in seconds to minutes, so the units suit the voices in that audio.

    Args:
        codebooks: Centres, float32, shape (codebooks, units, 80 * frames per unit).
        refiner: What smooths the restored frames, or None.

    Attributes:
        vocab_size: Number of ids: the units of all codebooks, begin and end.
        begin: Id of the token that opens every encoded segment.
        end: Id of the token that closes every encoded segment.
        rate: Units per second, of each codebook.
        sample_rate: 16000, in Hz, of what `decode` gives.

    Raises:
        ValueError: The codebooks have another shape or dtype.
    """

    codebooks: torch.Tensor
    refiner: Refiner | None = None

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.codebooks.shape), self.codebooks.dtype
        if len(shape) != 3 or 0 in shape or shape[2] % N_MELS or dtype != torch.float32:
            raise ValueError(
                f"codebooks have shape {shape} and dtype {dtype}: give float32 of shape "
                f"(codebooks, units, {N_MELS} * frames per unit), as SpeechModality.fit does"
            )

    def __repr__(self) -> str:
        count, units, _ = self.codebooks.shape
        return f"SpeechModality(units={units}, rate={self.rate:g}, codebooks={count})"

    @property
    def vocab_size(self) -> int:
        """Number of ids, begin and end included."""
        return self.end + 1

    @property
    def begin(self) -> int:
        """Id of the token that opens every encoded segment."""
        return self.codebooks.shape[0] * self.codebooks.shape[1]

    @property
    def end(self) -> int:
        """Id of the token that closes every encoded segment."""
        return self.begin + 1

    @property
    def rate(self) -> float:
        """Units per second, of each codebook."""
        return FRAME_RATE / self._stack

    @property
    def sample_rate(self) -> int:
        """Samples per second of a decoded waveform."""
        return SAMPLE_RATE

    @property
    def _stack(self) -> int:
        return self.codebooks.shape[2] // N_MELS

    @classmethod
    def fit(
        cls,
        waveforms: Iterable[Audio],
        *,
        units: int = 512,
        rate: float = 25,
        codebooks: int = 1,
        refine_steps: int = 1000,
        seed: int = 0,
    ) -> SpeechModality:
        """Fit units and their way back to sound on some audio; some ten minutes of it go a long way.

        >>> tone = np.sin(np.arange(16_000) * 0.2)
        >>> SpeechModality.fit([tone, (tone, 22_050)], units=4, rate=50, codebooks=2, refine_steps=0)
        SpeechModality(units=4, rate=50, codebooks=2)

        Args:
            waveforms: Pieces of audio, each in any form that `encode` takes.
            units: Number of units in a codebook.
            rate: Units per second of each codebook: 50 over a whole number, such as 50, 25 or 50 / 3.
            codebooks: Number of codebooks; a second of speech takes rate * codebooks tokens.
            refine_steps: Training steps of the network that smooths restored frames; 0 for none.
            seed: The same seed and audio give the same units on the same machine.

        Raises:
            ValueError: An argument is out of range, there is too little audio for so many units,
                or a waveform is unfit; the message says which.
            ImportError: The ``speech`` extra is not installed.
        """
        stack = _frames_per_unit(rate)
        for name, value, least in (
            ("units", units, 1),
            ("codebooks", codebooks, 1),
            ("refine_steps", refine_steps, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: give at least {least}")
        mels = log_mels(waveforms)
        phases = [mel[start:] for mel in mels for start in range(min(stack, len(mel)))]
        vectors = np.concatenate([stacked(frames, stack) for frames in phases])
        if len(vectors) < units:
            raise ValueError(
                f"{sum(map(len, mels))} frames of 20 ms are too few to fit units={units}: "
                "give more audio or ask for fewer units"
            )
        books = fit_codebooks(vectors, units=units, codebooks=codebooks, seed=seed)
        refiner = None
        if refine_steps:
            original = torch.from_numpy(np.concatenate([stacked(mel, stack) for mel in mels]))
            restored = dequantize(quantize(original, books), books)
            refiner = fit_refiner(
                restored.reshape(-1, N_MELS), original.reshape(-1, N_MELS), steps=refine_steps, seed=seed
            )
        return cls(books, refiner)

    def encode(self, raw: Audio) -> torch.Tensor:
        """Give the units of one piece of audio.

        >>> speech = SpeechModality(torch.randn(1, 16, 160))
        >>> speech.encode((np.zeros((8_000, 2)), 8_000)).shape
        torch.Size([27])

        Args:
            raw: The path of a sound file; float samples at 16 kHz, shape (length,); or a tuple of float
                samples, shape (length,) or (length, channels), and their rate in Hz. Channels are averaged.

        Returns:
            int64, shape (ceil(seconds * rate) * codebooks + 2,), begin and end included. Units of
            several codebooks take turns.

        Raises:
            ValueError: The audio is empty, not finite, not floating-point, of another shape, or in a file
                that soundfile cannot read.
            FileNotFoundError: There is no such file.
            ImportError: The ``speech`` extra is not installed.
        """
        vectors = torch.from_numpy(stacked(log_mel(waveform(raw)), self._stack))
        ids = quantize(vectors, self.codebooks)
        return torch.cat([ids.new_tensor([self.begin]), ids, ids.new_tensor([self.end])])

    def decode(self, tokens: torch.Tensor) -> Floats:
        """Give the waveform of units, as a language model may emit them.

        >>> speech = SpeechModality(torch.randn(2, 16, 160) - 5)
        >>> speech.decode(torch.tensor([20, 3, 17, 32, 5, 99])).shape    # units 3 and 5 begin frames
        (1280,)

        A unit of the first codebook begins a frame, refined by the units of the others that follow in
        order. Any other token is dropped: begin, end, ids past the vocabulary, units out of order.

        Args:
            tokens: Integers, shape (length,), with or without begin and end.

        Returns:
            Samples at 16 kHz, float32, shape (length,), within -1..1; empty where no unit was given.

        Raises:
            ValueError: The tokens are of another shape or dtype, or negative.
            ImportError: The ``speech`` extra is not installed.
        """
        frames = dequantize(tokens, self.codebooks).reshape(-1, N_MELS)
        if self.refiner is not None and len(frames):
            with torch.inference_mode():
                frames = self.refiner(frames)
        return griffin_lim(frames.numpy())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``modality.safetensors`` and ``modality.json`` into a folder.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SpeechModality(torch.randn(1, 16, 160)).save_pretrained(folder)
        ...     SpeechModality.from_pretrained(folder)
        SpeechModality(units=16, rate=25, codebooks=1)
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {} if self.refiner is None else self.refiner.state_dict(prefix="refiner.")
        save_file({"codebooks": self.codebooks.contiguous(), **state}, path / WEIGHTS)
        config = {"format": 1, "type": "speech", "sample_rate": SAMPLE_RATE, "rate": self.rate}
        (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> SpeechModality:
        """Load what ``save_pretrained`` wrote.

        Raises:
            FileNotFoundError: A file is missing; the message names it.
            ValueError: A file is damaged or not that of a speech modality; the message names it.
        """
        path = Path(folder)
        for file in (path / CONFIG, path / WEIGHTS):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: the folder holds no whole speech modality")
        _check_config(path / CONFIG)
        try:
            state = load_file(path / WEIGHTS)
            books, refiner = state.pop("codebooks"), None
            if state:
                refiner = Refiner().eval().requires_grad_(False)
                refiner.load_state_dict({name.removeprefix("refiner."): t for name, t in state.items()})
            return cls(books, refiner)
        except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path / WEIGHTS} is damaged or half-written: {error}") from error


def _frames_per_unit(rate: float) -> int:
    frames = FRAME_RATE / rate if rate > 0 else 0
    if round(frames) < 1 or abs(frames - round(frames)) > 1e-6:
        raise ValueError(f"rate={rate}: give {FRAME_RATE} over a whole number, such as 50, 25 or 50 / 3")
    return round(frames)


def _check_config(path: Path) -> None:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if config["format"] != 1 or config["type"] != "speech":
            raise ValueError(f"it says {config}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not that of a speech modality in format 1: {error!r}") from error
