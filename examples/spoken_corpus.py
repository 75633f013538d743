"""Spoken corpora, from a synthetic voice or a folder of recordings.

```python
phrases = number_phrases(2000, seed=0)
train, held_out = split(speak(phrases, seed=0), held_out=60, seed=0)        # pairs
text = number_phrases(2000, seed=1, exclude=phrases)                        # unpaired text: never spoken
others = number_phrases(2000, seed=2, exclude=phrases + text)
speech = [one.waveform for one in speak(others, seed=2)]                    # unpaired speech: text dropped

write_corpus(train, "corpus")
train = read_corpus("corpus")                                               # or your own recordings
```

On disk, a corpus has the layout of LJSpeech: `metadata.csv`, with one line `id|transcript` per clip, and the
clips in `wavs/`. For unpaired data from recordings, use the transcripts of one half and the waveforms of the
other.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import librosa
import numpy as np
import soundfile

from phrases import DIGITS

SAMPLE_RATE = 16_000
MARGIN = SAMPLE_RATE // 20  # silence kept on either side of the speech, in samples


@dataclass(frozen=True, eq=False)
class Utterance:
    """A transcript and its waveform: float32, mono, 16 kHz, within [-1, 1]."""

    transcript: str
    waveform: np.ndarray


Item = TypeVar("Item", str, Utterance)


def split(items: Sequence[Item], held_out: int, seed: int) -> tuple[list[Item], list[Item]]:
    """Split utterances (or transcripts) so that no transcript is in both lists.

    Args:
        items: the items; both lists keep their order.
        held_out: number of distinct transcripts in the second list.
        seed: random seed.

    Raises:
        ValueError: a list would be empty.
    """

    def transcript(item: Item) -> str:
        return item if isinstance(item, str) else item.transcript

    distinct = list(dict.fromkeys(map(transcript, items)))
    if not 0 < held_out < len(distinct):
        raise ValueError(
            f"cannot hold out {held_out} of {len(distinct)} distinct transcripts: "
            f"choose between 1 and {len(distinct) - 1}"
        )
    chosen = set(random.Random(seed).sample(distinct, held_out))
    kept = [item for item in items if transcript(item) not in chosen]
    return kept, [item for item in items if transcript(item) in chosen]


def speak(
    transcripts: Sequence[str], *, seed: int, tempo: float = 0.0, workers: int = 2, progress: bool = True
) -> list[Utterance]:
    """Synthesise the transcripts with a neural voice (hibari), trimming silence at both ends.

    The prosody depends only on the words; the seed varies the breath noise, so no two readings are identical.
    Threads suffice, because synthesis releases the GIL.

    Args:
        transcripts: lower-case words.
        seed: random seed; the result does not depend on `workers`.
        tempo: spread of the speaking rate: 0.1 draws rates from 0.9 to 1.1. Random rates make speech harder
            to learn to generate.
        workers: number of threads.
        progress: show a progress bar.

    Raises:
        ImportError: hibari is not installed.
    """
    try:
        from hibari import Hibari
    except ImportError as error:
        raise ImportError("speak() needs a synthesiser: pip install multitower[examples]") from error
    voice = Hibari(threads=1)
    voice("ready")  # loads the dictionaries that the threads share

    def read_aloud(task: tuple[int, str]) -> Utterance:
        index, transcript = task
        rng = np.random.default_rng((seed, index))
        rate = 1.0 + rng.uniform(-tempo, tempo)
        sound = voice(_script(transcript), speed=rate, seed=int(rng.integers(2**31)))
        sound = librosa.resample(sound, orig_sr=voice.sample_rate, target_sr=SAMPLE_RATE, res_type="soxr_hq")
        return Utterance(transcript, _pcm(_trim(sound)).astype(np.float32) / 2**15)

    with ThreadPoolExecutor(workers) as pool:
        readings = pool.map(read_aloud, enumerate(transcripts))
        return list(_progress(readings, len(transcripts), "speaking", progress))


def _script(transcript: str) -> str:
    """Add punctuation: commas between digits, a full stop at the end."""
    words = transcript.split()
    return (", " if set(words) <= set(DIGITS) else " ").join(words) + "."


def _trim(sound: np.ndarray) -> np.ndarray:
    _, (start, stop) = librosa.effects.trim(sound, top_db=40, frame_length=512, hop_length=128)
    return sound[max(0, start - MARGIN) : stop + MARGIN]


def _pcm(waveform: np.ndarray) -> np.ndarray:
    return np.clip(np.round(waveform * 2**15), -(2**15), 2**15 - 1).astype(np.int16)


def _progress(items: Iterable[Utterance], total: int, title: str, shown: bool) -> Iterable[Utterance]:
    from tqdm import tqdm

    return tqdm(items, desc=title, total=total, unit="clip", disable=not shown)


def write_corpus(utterances: Sequence[Utterance], folder: str | Path) -> Path:
    """Write a corpus for `read_corpus`: 16-bit WAV files and `metadata.csv`.

    The folder is renamed to its name when it is complete, so a killed run leaves no partial corpus.

    Returns:
        The folder.

    Raises:
        ValueError: the folder exists already, or a transcript does not fit on a line of the file.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already: choose another folder or remove it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "wavs").mkdir(parents=True)
    lines = []
    for number, utterance in enumerate(utterances):
        if not utterance.transcript or clean_transcript(utterance.transcript) != utterance.transcript:
            raise ValueError(
                f"utterance {number}: pass its transcript {utterance.transcript!r} through clean_transcript"
            )
        lines.append(f"{number:05d}|{utterance.transcript}\n")
        path = partial / "wavs" / f"{number:05d}.wav"
        soundfile.write(path, _pcm(utterance.waveform), SAMPLE_RATE, subtype="PCM_16")
    (partial / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    os.replace(partial, folder)
    return folder


def read_corpus(folder: str | Path, *, limit: int | None = None, progress: bool = True) -> list[Utterance]:
    """Read a folder of recordings with their transcripts, in the layout of LJSpeech.

    Args:
        folder: contains `metadata.csv`, with lines `id|transcript` or `id|transcript|normalised` (the latter
            is preferred), and audio files named by id, in `wavs/` or beside it, in any format and rate.
        limit: maximum number of lines to read.
        progress: show a progress bar.

    Raises:
        ValueError: the folder, a line or a sound file is missing, empty or malformed; the message says which.
    """
    metadata = Path(folder) / "metadata.csv"
    if not metadata.is_file():
        raise ValueError(f"{metadata} is missing: write it with one line `id|transcript` for each recording")
    lines = metadata.read_text(encoding="utf-8-sig").splitlines()[:limit]
    if not lines:
        raise ValueError(f"{metadata} is empty: write one line `id|transcript` for each recording")
    sounds = {}
    for place in (metadata.parent, metadata.parent / "wavs"):
        for path in sorted(place.glob("*.*")):
            sounds[path.stem] = sounds[path.name] = path

    def read(task: tuple[int, str]) -> Utterance:
        number, line = task
        where = f"{metadata}, line {number}"
        name, *texts = (field.strip() for field in line.split("|"))
        if not name or len(texts) not in (1, 2):
            raise ValueError(f"{where}: expected `id|transcript` or `id|transcript|normalised`, got {line!r}")
        if not (transcript := clean_transcript(texts[-1] or texts[0])):
            raise ValueError(
                f"{where}: the transcript of {name!r} has no words: write them or remove the line"
            )
        if name not in sounds:
            raise ValueError(
                f"{where}: no sound file {name!r} in {metadata.parent} or its folder wavs: add it"
            )
        return Utterance(transcript, _read_sound(sounds[name], where))

    return list(_progress(map(read, enumerate(lines, start=1)), len(lines), "reading", progress))


def _read_sound(path: Path, where: str) -> np.ndarray:
    try:
        sound, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ValueError(f"{where}: cannot read {path} ({error}): replace it or remove the line") from error
    if not len(sound):
        raise ValueError(f"{where}: {path} contains no sound: replace it or remove the line")
    mono = sound.mean(axis=1)
    if rate == SAMPLE_RATE:
        return mono
    return librosa.resample(mono, orig_sr=rate, target_sr=SAMPLE_RATE, res_type="soxr_hq")


def clean_transcript(text: str) -> str:
    """Convert to lower case and drop punctuation, except apostrophes within words.

    >>> clean_transcript("Don't stop -- it's Room 4!")
    "don't stop it's room 4"
    """
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.replace("\u2019", "'").lower())
    return " ".join(words)
