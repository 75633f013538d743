"""Units fitted on your own audio: log-mel frames, residual k-means, Griffin-Lim."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch

from .audio import SAMPLE_RATE, Audio, Floats
from .base import DiscreteSpeech
from .frontend import FRAME_RATE, N_MELS, griffin_lim, log_mels, mel_slots, stacked
from .layout import Layout
from .refiner import Refiner, fit_refiner, weights
from .units import codebooks_of, dequantize, fit_codebooks, quantize

SLOT_UNITS = 32


class SpeechModality(DiscreteSpeech):
    """Speech as discrete units fitted on your own audio.

    >>> noise = np.random.default_rng(0).normal(scale=0.1, size=32_000).astype(np.float32)
    >>> speech = SpeechModality.fit([noise], units=8, rate=25, refine_steps=2)
    >>> tokens = speech.encode(noise[:16_000])           # one second
    >>> tokens.shape, tokens.dtype                       # 25 units, begin and end
    (torch.Size([27]), torch.int64)
    >>> audio = speech.decode(tokens)
    >>> audio.shape, audio.dtype, speech.sample_rate
    ((16000,), dtype('float32'), 16000)

    Log-mel frames of 20 ms, stacked to the chosen rate, are clustered by k-means; further codebooks cluster
    the residuals. To decode, frames from the codebooks are smoothed by a small convolutional network and
    converted to a waveform by Griffin-Lim. `fit` fits everything on your own audio, in seconds to minutes, so
    the units suit the voices in it.

    Args:
        codebooks: Cluster centres, float32, shape (codebooks, units, 80 * frames per unit).
        refiner: The network that smooths restored frames, or None.
        pattern: How units of several codebooks are interleaved, "flattened" or "delayed": see `Layout`.

    Attributes:
        vocab_size: Number of ids: the units of all codebooks, begin and end, and the blank of the delayed
            pattern.
        begin: Id of the first token of every encoded segment.
        end: Id of the last token of every encoded segment.
        rate: Units per second of each codebook.
        sample_rate: Sample rate of the output of `decode`, 16000 Hz.

    Raises:
        ValueError: The codebooks have another shape or dtype, or there is no such pattern.
    """

    name = "speech"

    def __init__(
        self, codebooks: torch.Tensor, refiner: Refiner | None = None, *, pattern: str = "flattened"
    ) -> None:
        shape, dtype = tuple(codebooks.shape), codebooks.dtype
        if len(shape) != 3 or 0 in shape or shape[2] % N_MELS or dtype != torch.float32:
            raise ValueError(
                f"codebooks have shape {shape} and dtype {dtype}: give float32 of shape "
                f"(codebooks, units, {N_MELS} * frames per unit), as SpeechModality.fit does"
            )
        self.codebooks, self.refiner = codebooks, refiner
        self._stack = shape[2] // N_MELS
        layout = Layout(shape[0], shape[1], pattern)
        super().__init__(layout, rate=FRAME_RATE / self._stack, sample_rate=SAMPLE_RATE)

    def __repr__(self) -> str:
        count, units, _ = self.codebooks.shape
        return f"SpeechModality(units={units}, rate={self.rate:g}, codebooks={count})"

    @classmethod
    def fit(
        cls,
        waveforms: Iterable[Audio],
        *,
        units: int = 512,
        rate: float = 25,
        codebooks: int = 1,
        pattern: str = "flattened",
        refine_steps: int = 1000,
        seed: int = 0,
    ) -> Self:
        """Fit units and the refiner on audio; about ten minutes of it go a long way.

        >>> tone = np.sin(np.arange(16_000) * 0.2)
        >>> SpeechModality.fit([tone, (tone, 22_050)], units=4, rate=50, codebooks=2, refine_steps=0)
        SpeechModality(units=4, rate=50, codebooks=2)

        Args:
            waveforms: Pieces of audio, each in any form that `encode` takes.
            units: Number of units per codebook.
            rate: Units per second of each codebook: 50 over a whole number, such as 50, 25 or 50 / 3.
            codebooks: Number of codebooks; a second of speech has rate * codebooks tokens.
            pattern: How units of several codebooks are interleaved, "flattened" or "delayed": see `Layout`.
            refine_steps: Training steps of the refiner; 0 for none.
            seed: Random seed; the units are reproducible on the same machine.

        Raises:
            ValueError: An argument is out of range, there is too little audio for this number of units, or a
                waveform is invalid; the message says which.
            ImportError: The ``speech`` extra is not installed.
        """
        stack = _frames_per_unit(rate)
        Layout(codebooks, units, pattern)
        if refine_steps < 0:
            raise ValueError(f"refine_steps={refine_steps}: give at least 0")
        mels = log_mels(waveforms)
        phases = [mel[start:] for mel in mels for start in range(min(stack, len(mel)))]
        vectors = np.concatenate([stacked(frames, stack) for frames in phases])
        books = fit_codebooks(vectors, units=units, codebooks=codebooks, seed=seed)
        refiner = None
        if refine_steps:
            original = torch.from_numpy(np.concatenate([stacked(mel, stack) for mel in mels]))
            restored = dequantize(quantize(original, books), books)
            refiner = fit_refiner(restored, original, steps=refine_steps, seed=seed, residual=True)
        return cls(books, refiner, pattern=pattern)

    def codes(self, parts: Iterable[Floats]) -> Iterator[torch.Tensor]:
        """Yield the units of samples at 16 kHz as soon as they are final."""
        for mel, new in mel_slots(parts, SLOT_UNITS * self._stack, self._stack):
            mel[new.stop :] = mel[new.stop - 1]  # pads the last unit
            vectors = torch.from_numpy(mel.reshape(SLOT_UNITS, -1))
            yield quantize(vectors, self.codebooks)[new.start // self._stack : -(-new.stop // self._stack)]

    def sound(self, codes: torch.Tensor) -> Floats:
        """Return the samples of units."""
        vectors = dequantize(codes, self.codebooks)
        if self.refiner is None:
            return griffin_lim(vectors.reshape(-1, N_MELS).numpy())
        with torch.no_grad():
            return griffin_lim(self.refiner(vectors).numpy())

    def config(self) -> dict[str, Any]:
        """Return the pattern."""
        return {"pattern": self.layout.pattern}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the codebooks, and the weights of the refiner."""
        state = {} if self.refiner is None else self.refiner.state_dict(prefix="refiner.")
        return {"codebooks": self.codebooks, **state}

    @classmethod
    def restore(cls, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """Rebuild the modality from its config and tensors."""
        state = weights(tensors, "refiner.")
        refiner = Refiner.restore(state, residual=True) if state else None
        return cls(codebooks_of(tensors), refiner, pattern=config["pattern"])


def _frames_per_unit(rate: float) -> int:
    frames = FRAME_RATE / rate if rate > 0 else 0
    if round(frames) < 1 or abs(frames - round(frames)) > 1e-6:
        raise ValueError(f"rate={rate}: give {FRAME_RATE} over a whole number, such as 50, 25 or 50 / 3")
    return round(frames)
