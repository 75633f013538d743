"""What all speech modalities share: forms of audio, layouts of units, streaming."""

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
    """Speech as frames of units from one or several codebooks, laid out in one stream of tokens.

    `SpeechModality`, `CodecModality` and `HubertModality` say by ``codes`` and ``sound`` which units.

    Args:
        layout: How the units of several codebooks take turns.
        rate: Frames per second.
        sample_rate: Samples per second of what ``sound`` gives, and of what ``codes`` gets.

    Attributes:
        vocab_size: Number of ids: the units of all codebooks, begin and end, and the blank of the delayed
            pattern.
        begin: Id of the token that opens every encoded segment.
        end: Id of the token that closes every encoded segment.
        rate: Frames per second; every frame takes a token for each codebook.
        sample_rate: Samples per second of what ``decode`` gives.
        layout: How the units of several codebooks take turns.
    """

    accepts = (str, os.PathLike, bytes, np.ndarray, torch.Tensor, tuple)
    media, suffix = "audio", ".wav"

    def __init__(self, layout: Layout, *, rate: float, sample_rate: int) -> None:
        self.layout, self.rate, self.sample_rate = layout, rate, sample_rate
        self.vocab_size, self.begin, self.end = layout.vocab_size, layout.begin, layout.end

    @abstractmethod
    def codes(self, parts: Iterable[Floats]) -> Iterator[torch.Tensor]:
        """Return the units of samples as soon as they are certain.

        However the samples are cut, the units together are the same.

        Args:
            parts: Mono samples at ``sample_rate``, float32, each of shape (length,), in all at least one.

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
                its range. Channels are averaged. Files are read some seconds at a time.

        Returns:
            int64, shape (length,), begin and end included.

        Raises:
            TypeError: It is none of these.
            ValueError: The audio is empty, not finite, of another shape or dtype, or no sound that soundfile
                reads.
            FileNotFoundError: There is no such file.
            ImportError: The ``speech`` extra is not installed.
        """
        return torch.cat(list(self.layout.weave_stream(self.codes(blocks(raw, self.sample_rate)))))

    def encode_stream(self, chunks: Iterable[Samples], rate: float = SAMPLE_RATE) -> Iterator[torch.Tensor]:
        """Return the tokens of audio that arrives in chunks, as soon as they are certain.

        >>> from multitower_speech import SpeechModality
        >>> speech = SpeechModality(torch.randn(1, 16, 160))
        >>> microphone = (np.zeros(500, dtype=np.int16) for _ in range(8))
        >>> [len(tokens) for tokens in speech.encode_stream(microphone)]
        [2, 1, 1, 1, 1, 2, 1]

        Args:
            chunks: Samples in the forms that ``encode`` takes, in chunks of any lengths.
            rate: Their rate in Hz.

        Yields:
            int64, shape (length,): begin with the first, end at the last. Together they are what ``encode``
            gives for the whole, to the last token.

        Raises:
            TypeError: ``chunks``, or one of them, is of another type.
            ValueError: There are no samples, or they are not finite, or of another shape or dtype.
        """
        if isinstance(chunks, str | bytes | os.PathLike | np.ndarray | torch.Tensor):
            raise TypeError(f"chunks is a single {type(chunks).__name__}: give an iterable of arrays")
        parts = resampled(chunks, rate, self.sample_rate, "the stream")
        return self.layout.weave_stream(self.codes(parts))

    def decode(self, tokens: torch.Tensor) -> Floats:
        """Return the waveform of tokens, as a language model may emit them.

        >>> from multitower_speech import SpeechModality
        >>> speech = SpeechModality(torch.randn(2, 16, 160) - 5)
        >>> speech.decode(torch.tensor([20, 3, 17, 32, 5, 99])).shape    # units 3 and 5 begin frames
        (1280,)

        A unit of the first codebook begins a frame, refined by the units of the others that follow in
        order. Any other token is dropped: begin, end, ids past the vocabulary, units out of order.

        Args:
            tokens: Integers, shape (length,), with or without begin and end.

        Returns:
            Samples at ``sample_rate``, float32, shape (length,), within -1..1; empty where no unit was given.

        Raises:
            ValueError: The tokens are of another shape or dtype, or negative.
            ImportError: The ``speech`` extra is not installed.
        """
        codes = self.layout.unweave(tokens)
        return self.sound(codes) if len(codes) else np.zeros(0, dtype=np.float32)

    def decode_stream(self, pieces: Iterable[torch.Tensor]) -> Iterator[Floats]:
        """Return the waveform of tokens that come in pieces, half a second at a time.

        >>> from multitower_speech import SpeechModality
        >>> speech = SpeechModality(torch.randn(1, 16, 160))                # 25 units a second
        >>> pieces = list(speech.decode_stream(torch.arange(16).repeat(8).split(1)))
        >>> len(pieces), abs(sum(map(len, pieces)) - 5.12 * 16_000) <= 128  # 8 ms
        (11, True)

        The pieces pass into each other without a click. Where a vocoder guesses phases, as Griffin-Lim does,
        they are moved by up to 8 ms for that, and the waveform is as good as that of ``decode``, but not the
        same.

        Args:
            pieces: As ``decode`` takes tokens; each may be a single one.

        Yields:
            Samples at ``sample_rate``, float32, shape (length,), within -1..1; nothing where no unit came.

        Raises:
            ValueError: See ``decode``.
            ImportError: The ``speech`` extra is not installed.
        """
        every = self.layout.codebooks * max(1, round(self.rate / 10))
        codes = self.layout.unweave_stream(pieces, every)
        return sound_in_pieces(codes, self.sound, rate=self.rate, sample_rate=self.sample_rate)

    def write_file(self, raw: Floats, path: str | os.PathLike[str]) -> None:
        """Write a waveform, as ``decode`` returns it, to a sound file; its ending says which kind.

        Raises:
            OSError: The file cannot be written.
            ValueError: soundfile does not know the ending.
            ImportError: The ``speech`` extra is not installed.
        """
        soundfile = require("soundfile", "speech")
        try:
            soundfile.write(os.fspath(path), raw, self.sample_rate)
        except soundfile.LibsndfileError as error:
            raise OSError(f"{os.fspath(path)} cannot be written: {error}") from error
        except TypeError as error:
            raise ValueError(f"{os.fspath(path)}: end it as a sound file, as in .wav or .flac") from error
