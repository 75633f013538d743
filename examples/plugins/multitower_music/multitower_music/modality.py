"""Tunes in ABC notation as musical tokens."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch

from multitower import Modality
from multitower.plugins import check_tokens

BYTES = 256

FIELD = re.compile(r"[A-Za-z]:(?![|:])|%")
TEXT = re.compile(
    r"""^(?:[A-Za-z]:|%+)                           # the name of a field, a comment
    |[ ]?[\w/\#]+                                   # a word, a metre, a key
    |.                                              # punctuation, spaces""",
    re.VERBOSE | re.DOTALL,
)
MUSIC = re.compile(
    r"""(?:[_=^]*[A-Ga-g][,']*|[zxZX])\d*/*\d*      # a note: accidental, pitch, octave, length; a rest
    |[<>]+                                          # a broken rhythm
    |\(\d(?::\d?)*                                  # a tuplet
    |[ ]?(?:\[?[|:]+\]?|\|\])(?:\d[,\d]*)?[ ]?     # a bar, a repeat and its ending
    |\[[A-Za-z]:[^\]\n]*\]                          # a field within the line
    |"[^"\n]*"|![^!\n]+!                            # the name of a chord, a decoration
    |.                                              # slurs, ties, grace notes, ornaments, spaces""",
    re.VERBOSE | re.DOTALL,
)


class MusicModality(Modality):
    r"""Tunes in ABC notation as tokens, a lossless codec.

    >>> tune = "X:1\nM:6/8\nK:Gm\n|: ^F2G {a}g>d :|\n"
    >>> music = MusicModality.fit([tune])
    >>> music.decode(music.encode(tune)) == tune
    True
    >>> [music.decode(token[None]) for token in music.encode("|: ^F2G")]
    ['', '|: ', '^F2', 'G', '']

    A token is what a musician reads as one sign: a note with its accidental, octave and length, a bar, a
    chord name, a header field or a word in it. Signs outside the vocabulary are encoded as UTF-8 bytes, so
    every tune can be restored exactly.

    Args:
        signs: The musical tokens, distinct texts that are not empty.

    Attributes:
        vocab_size: Number of ids: 256 bytes, the signs, begin and end.
        signs: The musical tokens; the first has id 256.

    Raises:
        ValueError: A sign is empty, not a str, or given twice.
    """

    name = "music"
    accepts = (str,)
    media, suffix = "text", ".abc"

    def __init__(self, signs: Iterable[str]) -> None:
        self.signs = tuple(signs)
        if not all(isinstance(sign, str) and sign for sign in self.signs):
            raise ValueError("a sign is empty or no text: take the signs that MusicModality.fit finds")
        self._ids = {sign: BYTES + index for index, sign in enumerate(self.signs)}
        if len(self._ids) < len(self.signs):
            raise ValueError(f"{len(self.signs) - len(self._ids)} signs are given twice")
        self._spelling = [bytes([byte]) for byte in range(BYTES)] + [sign.encode() for sign in self.signs]
        self.begin = len(self._spelling)
        self.end = self.begin + 1
        self.vocab_size = self.end + 1

    def __repr__(self) -> str:
        return f"MusicModality({len(self.signs)} musical tokens, vocab_size={self.vocab_size})"

    @classmethod
    def fit(cls, tunes: Iterable[str], *, signs: int = 1024) -> Self:
        """Use the most frequent signs of tunes as the vocabulary.

        Args:
            tunes: Tunes, each with its header.
            signs: Maximum number of signs.

        Raises:
            TypeError: A tune is not a str.
            ValueError: The tunes have no signs.
        """
        found = Counter(sign for tune in tunes for sign in read(tune))
        if not found:
            raise ValueError("the tunes hold no musical tokens: give some in ABC notation")
        return cls(sign for sign, _ in found.most_common(signs))

    def encode(self, raw: str) -> torch.Tensor:
        """Return the tokens of a tune: int64, shape (length,), including begin and end.

        Raises:
            TypeError: The tune is not a str.
            ValueError: It contains lone surrogates, which UTF-8 cannot encode.
        """
        ids = [self.begin]
        for sign in read(raw):
            ids += [self._ids[sign]] if sign in self._ids else sign.encode()
        return torch.tensor([*ids, self.end], dtype=torch.int64)

    def decode(self, tokens: torch.Tensor) -> str:
        """Return the tune of any sequence of tokens.

        Begin, end and ids beyond the vocabulary are dropped. Invalid UTF-8 becomes U+FFFD.
        """
        spelt = b"".join(self._spelling[token] for token in check_tokens(tokens) if token < self.begin)
        return spelt.decode(errors="replace")

    def config(self) -> dict[str, Any]:
        """Return the musical tokens."""
        return {"signs": list(self.signs)}


def read(tune: str) -> Iterator[str]:
    r"""Split a tune into signs; joined, they are the tune.

    >>> list(read("T:A Reel\nA2 | (3BcB"))
    ['T:', 'A', ' Reel', '\n', 'A2', ' | ', '(3', 'B', 'c', 'B']

    Raises:
        TypeError: The tune is not a str.
    """
    if not isinstance(tune, str):
        raise TypeError(f"a tune must be a str in ABC notation, not {type(tune).__name__}")
    for line in tune.splitlines(keepends=True):
        yield from (TEXT if FIELD.match(line) else MUSIC).findall(line)
