"""Make the data of the comparison on real words: text and speech tokens, and pretrained decoders.

    pip install -c constraints.txt -e '.[examples,lora]'
    export PYTHONPATH=benchmarks:benchmarks/learning:examples
    python benchmarks/evidence/words.py runs/evidence/words --wordnet /usr/share/wordnet

The sentences are WordNet's examples, spoken by hibari. The text decoder is pretrained on WordNet's
definitions and on examples that are not spoken; the speech decoder on other sentences, without their
transcripts. Some definitions are held out to measure what the text decoder still knows after training: by
their perplexity, and by a cloze, a choice of the last word among four of equal length. With ``--asterisk``,
human recordings are encoded for tests. An interrupted run resumes; for other options use another folder. The
folder has the format of ``benchmarks/learning/data.py``, and ``benchmarks/learning/train.py`` trains on it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from asterisk import read_asterisk
from data import CORPUS, JUDGED, encoded
from tqdm import tqdm
from wordnet import read_wordnet

from judge import Judge
from multitower_speech import SpeechModality
from multitower_text import TextModality
from spoken_corpus import speak
from training import pretrain_decoders

FIT_ON, CHUNK = 400, 500
OTHER = "other-text"
"""A second decoder of the same text, for ``reuse.py``."""

KEPT = 500  # maximum number of held-out definitions
LONGEST_TEXT = 200  # maximum tokens of a definition


def make_corpus(
    folder: Path,
    wordnet: Path,
    *,
    pairs: int,
    unpaired: int,
    dev: int,
    test: int,
    units: int,
    rate: float,
    width: int,
    depth: int,
    pretraining: int,
    workers: int,
    seed: int,
    asterisk: Path | None,
) -> None:
    """Read WordNet, synthesise speech, encode it, and pretrain the decoders."""
    folder.mkdir(parents=True, exist_ok=True)
    sentences, definitions = read_wordnet(wordnet)
    random.Random(seed).shuffle(sentences)
    held_out, spoken = dev + test, pairs + dev + test + unpaired
    if spoken > len(sentences):
        raise ValueError(f"WordNet has {len(sentences)} sentences, {spoken} are asked for: ask for fewer")
    text = TextModality()
    text.save_pretrained(folder / "text")
    speech = fitted(sentences[held_out:], folder / "speech", units=units, rate=rate, seed=seed)
    entries = encode_in_chunks(
        sentences[:spoken], text, speech, folder / "encoded", seed=seed, workers=workers
    )
    heard = floor_and_ceiling(sentences[dev:held_out][:JUDGED], speech, folder / "heard.json", seed)

    random.Random(seed).shuffle(definitions)
    few = min(KEPT, len(definitions) // 4)
    kept, definitions = definitions[:few], definitions[few:]
    corpus = {
        "dev": entries[:dev],
        "test": entries[dev:held_out],
        "train": entries[held_out : held_out + pairs],
        "unpaired": {"text": [], "speech": []},
        "heard": heard,
        "human": [] if asterisk is None else encoded(read_asterisk(asterisk), text, speech),
        "kept": {
            "text": [text.encode(line)[:LONGEST_TEXT].tolist() for line in kept],
            "speech": [entry["speech"] for entry in entries[:held_out]],
        },
        "cloze": [[text.encode(line).tolist() for line in four] for four in last_words(kept, seed)],
    }
    written(folder / CORPUS, corpus)
    unspoken = [text.encode(line)[:LONGEST_TEXT] for line in [*definitions, *sentences[spoken:]]]
    alone = [torch.tensor(entry["speech"]) for entry in entries[held_out + pairs :]]
    jobs = [
        ("text", text, unspoken, seed),
        ("speech", speech, alone, seed),
        (OTHER, text, unspoken, seed + 1),
    ]
    for name, modality, rows, own_seed in jobs:
        if not (folder / f"{name}-decoder" / "config.json").exists():
            torch.manual_seed(own_seed)
            pretrain_decoders(
                {name: (modality, rows)},
                pretraining,
                folder,
                width=width,
                depth=depth,
                batch=32,
                seed=own_seed,
                device="cpu",
            )


def last_words(definitions: Sequence[str], seed: int) -> list[list[str]]:
    """Return definitions with four endings: the last word, then three others of the same length.

    >>> last_words(["a wet dog", "a big cat", "a red sun", "a new hat"], seed=0)[0]
    ['a wet dog', 'a wet hat', 'a wet sun', 'a wet cat']
    """
    draw = random.Random(seed)
    split = [line.rpartition(" ") for line in definitions]
    words = sorted({last for _, _, last in split})
    found = []
    for before, _, last in split:
        others = [word for word in words if len(word) == len(last) and word != last]
        if before and len(last) >= 3 and len(others) >= 3:
            found.append([f"{before} {word}" for word in (last, *draw.sample(others, 3))])
    return found


def fitted(sentences: Sequence[str], folder: Path, *, units: int, rate: float, seed: int) -> SpeechModality:
    """Fit the units on some clips, or load them if they exist."""
    if folder.exists():
        return SpeechModality.from_pretrained(folder)
    clips = [one.waveform for one in speak(sentences[:FIT_ON], seed=seed, workers=1)]
    speech = SpeechModality.fit(clips, units=units, rate=rate, seed=seed)
    speech.save_pretrained(folder)
    return speech


def encode_in_chunks(
    sentences: Sequence[str],
    text: TextModality,
    speech: SpeechModality,
    folder: Path,
    *,
    seed: int,
    workers: int,
) -> list[dict[str, Any]]:
    """Speak and encode the sentences in chunks, one file each; skip chunks whose file exists."""
    folder.mkdir(exist_ok=True)
    starts = range(0, len(sentences), CHUNK)
    jobs = [
        (sentences[start : start + CHUNK], text, speech, folder / f"{start:06d}.json", seed + start)
        for start in starts
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        done = pool.imap(_encode_chunk, jobs)
        for _ in tqdm(done, desc="speaking", unit=f"{CHUNK} clips", total=len(jobs)):
            pass
    return [entry for job in jobs for entry in json.loads(job[3].read_text())]


def _encode_chunk(job: tuple[Sequence[str], TextModality, SpeechModality, Path, int]) -> None:
    sentences, text, speech, file, seed = job
    if file.exists():
        return
    torch.set_num_threads(1)
    said = speak(sentences, seed=seed, workers=1, progress=False)
    written(file, encoded(said, text, speech, progress=False))


def written(file: Path, values: Any) -> None:
    """Write JSON; the file is complete as soon as it exists."""
    half = file.with_suffix(".part")
    half.write_text(json.dumps(values))
    half.rename(file)


def floor_and_ceiling(
    sentences: Sequence[str], speech: SpeechModality, file: Path, seed: int
) -> dict[str, list[str]]:
    """Return the judge's transcripts of the original audio, and of audio decoded from the true units."""
    if not file.exists():
        sounds = [one.waveform for one in speak(sentences, seed=seed, workers=1)]
        judge = Judge(workers=1)
        made = {
            "original audio": judge.transcribe(sounds),
            "true units": judge.transcribe([speech.decode(speech.encode(sound)) for sound in sounds]),
        }
        file.write_text(json.dumps(made))
    return json.loads(file.read_text())


def main() -> None:
    """Parse the command line, and make the data."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wordnet", type=Path, required=True, help="the folder of data.noun and so on")
    parser.add_argument("--asterisk", type=Path, help="/, or where Debian's asterisk sounds are unpacked")
    parser.add_argument("--pairs", type=int, default=12_000)
    parser.add_argument("--unpaired", type=int, default=28_000, help="clips for the speech decoder alone")
    parser.add_argument("--dev", type=int, default=100, help="sentences to choose by")
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--units", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=25, help="units a second")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--pretraining", type=int, default=2000, help="steps for each decoder")
    parser.add_argument("--workers", type=int, default=2, help="processes that speak and encode")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    make_corpus(**options)


if __name__ == "__main__":
    main()
