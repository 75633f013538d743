"""Make the data of the learning benchmark: spoken digits as tokens, and two small pretrained decoders.

    pip install -c constraints.txt -e '.[examples,lora]'
    export PYTHONPATH=benchmarks:examples
    python benchmarks/learning/data.py runs/learning/short             # phrases of 1 to 5 digits
    python benchmarks/learning/data.py runs/learning/long --digits 30 --pairs 3000

The folder then holds the modalities, both decoders as transformers checkpoints, the tokens of every phrase
(``corpus.json``), and, for test phrases, whisper's transcripts of the original audio and of audio decoded
from the true units. Their error rates are bounds for synthesis.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from score import KINDS, score
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

from judge import Judge
from multitower_speech import SpeechModality
from multitower_text import TextModality
from phrases import number_phrases
from spoken_corpus import Utterance, speak
from training import pretrain_decoders

CORPUS = "corpus.json"
RATE, UNIT_CLIPS = 50 / 3, 300
WIDTH, DEPTH, BATCH = 128, 4, 32
SPLITS = ("train", "dev", "test")
JUDGED = 100


@dataclass(frozen=True, eq=False)
class Pair:
    """A phrase, and its tokens in both modalities, int64, shape (length,)."""

    transcript: str
    text: Tensor
    speech: Tensor


@dataclass(frozen=True, eq=False)
class Corpus:
    """Modalities, folders of pretrained decoders, and phrases for training, development and test.

    ``benchmarks/evidence/words.py`` adds human recordings; held-out tokens (``kept``) that measure what each
    decoder still knows; and texts with four endings, the first of which is correct (``cloze``).
    """

    text: TextModality
    speech: SpeechModality
    decoders: dict[str, str]
    train: list[Pair]
    dev: list[Pair]
    test: list[Pair]
    unpaired: dict[str, list[Tensor]]
    heard: dict[str, list[str]]
    human: list[Pair] = field(default_factory=list)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    cloze: list[list[Tensor]] = field(default_factory=list)

    def longest(self, name: str) -> int:
        """Return a generous limit on the number of tokens to decode."""
        return 10 + max(len(getattr(pair, name)) for pair in (*self.train, *self.dev, *self.test))


def load_corpus(folder: str | Path) -> Corpus:
    """Read what ``make_corpus`` wrote."""
    root = Path(folder)
    data = json.loads((root / CORPUS).read_text())
    splits = {name: [_pair(entry) for entry in data[name]] for name in SPLITS}
    return Corpus(
        TextModality.from_pretrained(root / "text"),
        SpeechModality.from_pretrained(root / "speech"),
        {name: str(root / f"{name}-decoder") for name in ("text", "speech")},
        **splits,
        unpaired={name: _tensors(rows) for name, rows in data["unpaired"].items()},
        heard=data["heard"],
        human=[_pair(entry) for entry in data.get("human", [])],
        kept={name: _tensors(rows) for name, rows in data.get("kept", {}).items()},
        cloze=[_tensors(rows) for rows in data.get("cloze", [])],
    )


def make_corpus(
    folder: Path,
    *,
    digits: int,
    pairs: int,
    dev: int,
    test: int,
    unpaired: int,
    texts: int,
    units: int,
    pretraining: int,
    seed: int,
) -> None:
    """Synthesise speech, fit units, encode, pretrain both decoders, and transcribe the test audio."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = dev + test
    lengths = None if digits == 5 else dict.fromkeys(range(1, digits + 1), 1.0)
    paired = number_phrases(pairs + held_out, seed, lengths=lengths)
    alone = number_phrases(unpaired, seed + 1, exclude=paired, lengths=lengths)
    unspoken = number_phrases(texts, seed + 2, exclude=paired, lengths=lengths)
    spoken = speak([*paired, *alone], seed=seed)
    pool, others = spoken[: len(paired)], spoken[len(paired) :]
    random.Random(seed).shuffle(pool)

    speech = SpeechModality.fit(
        [one.waveform for one in [*others, *pool[held_out:]][:UNIT_CLIPS]], units=units, rate=RATE, seed=seed
    )
    text = TextModality()
    text.save_pretrained(folder / "text")
    speech.save_pretrained(folder / "speech")
    entries = {name: encoded(part, text, speech) for name, part in (("pairs", pool), ("others", others))}
    rows = {
        "text": [text.encode(line) for line in unspoken],
        "speech": [torch.tensor(entry["speech"]) for entry in entries["others"]],
    }
    pretrain_decoders(
        {"text": (text, rows["text"]), "speech": (speech, rows["speech"])},
        pretraining,
        folder,
        width=WIDTH,
        depth=DEPTH,
        batch=BATCH,
        seed=seed,
        device="cpu",
    )
    judged = pool[dev:held_out][:JUDGED]
    judge = Judge(workers=1)
    heard = {
        "original audio": judge.transcribe([one.waveform for one in judged]),
        "true units": judge.transcribe(
            [
                speech.decode(torch.tensor(entry["speech"]))
                for entry in entries["pairs"][dev:held_out][:JUDGED]
            ]
        ),
    }
    for name, said in heard.items():
        counts = score([one.transcript for one in judged], said)
        shares = {kind: round(100 * counts[kind] / sum(counts["words"]), 1) for kind in KINDS}
        print(f"{name}: WER {counts['wer']} %, of a hundred words {shares}")
    corpus = {
        "dev": entries["pairs"][:dev],
        "test": entries["pairs"][dev:held_out],
        "train": entries["pairs"][held_out:],
        "unpaired": {name: [row.tolist() for row in each] for name, each in rows.items()},
        "heard": heard,
    }
    (folder / CORPUS).write_text(json.dumps(corpus))


def encoded(
    utterances: Sequence[Utterance], text: TextModality, speech: SpeechModality, *, progress: bool = True
) -> list[dict[str, Any]]:
    """Return the entries of a corpus: transcripts, and their tokens in both modalities."""
    with threadpool_limits(1):
        return [
            {
                "transcript": one.transcript,
                "text": text.encode(one.transcript).tolist(),
                "speech": speech.encode(one.waveform).tolist(),
            }
            for one in tqdm(utterances, desc="encoding", unit="clip", disable=not progress)
        ]


def _tensors(rows: Iterable[list[int]]) -> list[Tensor]:
    return [torch.tensor(row) for row in rows]


def _pair(entry: dict[str, Any]) -> Pair:
    return Pair(entry["transcript"], torch.tensor(entry["text"]), torch.tensor(entry["speech"]))


def main() -> None:
    """Parse the command line, and make the data."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--digits", type=int, default=5, help="how many digits a phrase has at most")
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--dev", type=int, default=100, help="phrases to choose by")
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--units", type=int, default=512)
    parser.add_argument("--unpaired", type=int, default=1000, help="clips that only the speech decoder hears")
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--pretraining", type=int, default=300, help="steps for each decoder")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    torch.manual_seed(options["seed"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    make_corpus(**options)


if __name__ == "__main__":
    main()
