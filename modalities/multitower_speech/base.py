"""Base class of speech modalities: audio input, layout of units, streaming."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
import torch

import multitower as mt
from multitower.base.extras import require

from .audio import SAMPLE_RATE, Audio, Floats, Samples, blocks, resampled
from .layout import Layout
from .seams import sound_in_pieces


class DiscreteSpeech(mt.Modality):
    """Speech as frames of units from one or several codebooks, interleaved into one stream of tokens.

    Subclasses implement ``codes`` and ``sound``.

    Args:
        layout: How the units of several codebooks are interleaved.
        rate: Frames per second.
        sample_rate: Sample rate of the input of ``codes`` and the output of ``sound``, in Hz.

    Attributes:
        vocab_size: Number of ids: the units of all codebooks, begin and end, and the blank of the delayed
            pattern.
        begin: Id of the first token of every encoded segment.
        end: Id of the last token of every encoded segment.
        rate: Frames per second; a frame has one token per codebook.
        sample_rate: Sample rate of the output of ``decode``, in Hz.
        layout: How the units of several codebooks are interleaved.
    """

    accepts = (str, os.PathLike, bytes, np.ndarray, torch.Tensor, tuple)
    media, suffix = "audio", ".wav"

    def __init__(self, layout: Layout, *, rate: float, sample_rate: int) -> None:
        self.layout, self.rate, self.sample_rate = layout, rate, sample_rate
        self.vocab_size, self.begin, self.end = layout.vocab_size, layout.begin, layout.end

    @abstractmethod
    def codes(self, parts: Iterable[Floats]) -> Iterator[torch.Tensor]:
        """Yield the units of samples as soon as they are final.

        The units do not depend on how the samples are split into parts.

        Args:
            parts: Mono samples at ``sample_rate``, float32, each of shape (length,), at least one in total.

        Yields:
            int64, shape (frames, codebooks).
        """

    @abstractmethod
    def sound(self, codes: torch.Tensor) -> Floats:
        """Return the samples of units.

        Args:
            codes: int64, shape (frames, codebooks); -1 where a unit is missing, never in the first column.

        Returns:
            Mono samples at ``sample_rate``, float32, shape (length,), within -1..1.
        """

    def encode(self, raw: Audio) -> torch.Tensor:
        """Return the tokens of one piece of audio.

        >>> from multitower_speech import SpeechModality
        >>> speech = SpeechModality(torch.randn(1, 16, 160))
        >>> speech.encode((np.zeros((8_000, 2)), 8_000)).shape
        torch.Size([27])

        Args:
            raw: The path of a sound file; the bytes of one; samples at 16 kHz; or a tuple of samples and
                their rate in Hz. Samples are arrays or tensors of shape (length,) or (length, channels):
                floats in -1..1, or PCM of dtype int16 or int32, or uint8 around 128, which is divided by
                its range. Channels are averaged. Files are read a few seconds at a time.

        Returns:
            int64, shape (length,), including begin and end.

        Raises:
            TypeError: The audio is in none of these forms.
            ValueError: It is empty, not finite, of another shape or dtype, or soundfile cannot read it.
            FileNotFoundError: There is no such file.
            ImportError: The ``speech`` extra is not installed.
        """
        return torch.cat(list(self.layout.weave_stream(self.codes(blocks(raw, self.sample_rate)))))

    def encode_stream(self, chunks: Iterable[Samples], rate: float = SAMPLE_RATE) -> Iterator[torch.Tensor]:
        """Yield the tokens of audio that arrives in chunks, as soon as they are final.

        >>> from multitower_speech import SpeechModality
        >>> speech = SpeechModality(torch.randn(1, 16, 160))
        >>> microphone = (np.zeros(500, dtype=np.int16) for _ in range(8))
        >>> [len(tokens) for tokens in speech.encode_stream(microphone)]
        [2, 1, 1, 1, 1, 2, 1]

        Args:
            chunks: Arrays or tensors of samples as for ``encode``, of any lengths.
            rate: Their rate in Hz.

        Yields:
            int64, shape (length,); the first has the begin token, the last the end token. Concatenated, they
            equal the result of ``encode``.

        Raises:
            TypeError: ``chunks``, or one of them, has another type.
            ValueError: There are no samples, or they are not finite, or of another shape or dtype.
        """
        if isinstance(chunks, str | bytes | os.PathLike | np.ndarray | torch.Tensor):
            raise TypeError(f"chunks is a single {type(chunks).__name__}: give an iterable of arrays")
        parts = resampled(chunks, rate, self.sample_rate, "the stream")
        return self.layout.weave_stream(self.codes(parts))

    def decode(self, tokens: torch.Tensor) -> Floats:
        """Return the waveform of tokens, for any sequence that a language model may generate.

        >>> from multitower_speech import SpeechModality
        >>> speech = SpeechModality(torch.randn(2, 16, 160) - 5)
        >>> speech.decode(torch.tensor([20, 3, 17, 32, 5, 99])).shape    # units 3 and 5 begin frames
        (1280,)

        A unit of the first codebook begins a frame, refined by units of the other codebooks that follow in
        order. All other tokens are dropped: begin, end, ids beyond the vocabulary, units out of order.

        Args:
            tokens: Integers, shape (length,), with or without begin and end.

        Returns:
            Samples at ``sample_rate``, float32, shape (length,), within -1..1; empty if there is no unit.

        Raises:
            ValueError: The tokens have another shape or dtype, or are negative.
            ImportError: The ``speech`` extra is not installed.
        """
        codes = self.layout.unweave(tokens)
        return self.sound(codes) if len(codes) else np.zeros(0, dtype=np.float32)

    def decode_stream(self, pieces: Iterable[torch.Tensor]) -> Iterator[Floats]:
        """Yield the waveform of tokens that arrive in pieces, half a second at a time.

        >>> from multitower_speech import SpeechModality
        >>> speech = SpeechModality(torch.randn(1, 16, 160))                # 25 units a second
        >>> pieces = list(speech.decode_stream(torch.arange(16).repeat(8).split(1)))
        >>> len(pieces), abs(sum(map(len, pieces)) - 5.12 * 16_000) <= 128  # 8 ms
        (11, True)

        Pieces are joined without clicks. If the vocoder estimates phases, as Griffin-Lim does, they are
        shifted by up to 8 ms for this, so the waveform differs slightly from that of ``decode``.

        Args:
            pieces: Tokens as for ``decode``, one or more at a time.

        Yields:
            Samples at ``sample_rate``, float32, shape (length,), within -1..1; nothing if there is no unit.

        Raises:
            ValueError: See ``decode``.
            ImportError: The ``speech`` extra is not installed.
        """
        every = self.layout.codebooks * max(1, round(self.rate / 10))
        codes = self.layout.unweave_stream(pieces, every)
        return sound_in_pieces(codes, self.sound, rate=self.rate, sample_rate=self.sample_rate)

    def write_file(self, raw: Floats, path: str | os.PathLike[str]) -> None:
        """Write a waveform from ``decode`` to a sound file; its suffix determines the format.

        Raises:
            OSError: The file cannot be written.
            ValueError: soundfile does not know the suffix.
            ImportError: The ``speech`` extra is not installed.
        """
        soundfile = require("soundfile", "speech")
        try:
            soundfile.write(os.fspath(path), raw, self.sample_rate)
        except soundfile.LibsndfileError as error:
            raise OSError(f"{os.fspath(path)} cannot be written: {error}") from error
        except TypeError as error:
            raise ValueError(f"{os.fspath(path)}: end it as a sound file, as in .wav or .flac") from error
