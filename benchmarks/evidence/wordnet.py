"""Example sentences of WordNet, to be spoken, and its definitions, to pretrain a text decoder."""

from __future__ import annotations

import re
from pathlib import Path

from spoken_corpus import clean_transcript

PARTS = ("noun", "verb", "adj", "adv")
WORDS = range(3, 25)
LONGEST = 150  # characters


def read_wordnet(folder: Path) -> tuple[list[str], list[str]]:
    """Return the unique example sentences and definitions, in lower case and without punctuation.

    Sentences have 3 to 24 words and at most 150 characters, all of letters and apostrophes.

    Args:
        folder: The folder of ``data.noun`` and so on (Debian: ``wordnet-base``, in ``/usr/share/wordnet``).

    Raises:
        ValueError: A file is missing.
    """
    sentences: dict[str, None] = {}
    definitions: dict[str, None] = {}
    for part in PARTS:
        file = folder / f"data.{part}"
        if not file.is_file():
            raise ValueError(f"{file} is missing: install WordNet (Debian: apt-get install wordnet-base)")
        for line in file.read_text(encoding="utf-8").splitlines():
            _, bar, gloss = line.partition("|")
            if not bar:
                continue
            for quoted in re.findall(r'"([^"]+)"', gloss):
                if _spoken(quoted):
                    sentences[clean_transcript(quoted)] = None
            definitions[clean_transcript(re.sub(r'"[^"]*"', "", gloss))] = None
    return list(sentences), [each for each in definitions if each]


def _spoken(sentence: str) -> bool:
    letters = re.fullmatch(r"[A-Za-z' ,;.!?-]+", sentence) is not None
    return letters and len(sentence.split()) in WORDS and len(sentence) <= LONGEST
