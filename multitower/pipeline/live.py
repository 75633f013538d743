"""Simultaneous generation: policies that decide when to read and when to write."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..batch.collate import Segment
from ..generate.options import options_of, settle
from ..generate.session import Session


class LivePolicy(Protocol):
    """Decides after every piece of input what to decode and write; see ``Agreement`` and ``WaitK``."""

    def limit(self, read: Sequence[Tensor], written: int) -> int | None:
        """Return how many more tokens to decode: 0 to read on, None for no limit.

        Args:
            read: The pieces read so far, int64 of shape (length,).
            written: The number of tokens written so far.
        """

    def settled(self, hypotheses: Sequence[Sequence[int]]) -> int:
        """Return how many tokens of the last hypothesis are final and written.

        Args:
            hypotheses: What was decoded after each piece, including the tokens already written.
        """


@dataclass(frozen=True)
class Agreement:
    """Decode after every piece, and write the prefix on which several consecutive hypotheses agree.

    >>> Agreement(2, hold=0).settled([[5], [5, 6, 7], [5, 6, 8]])
    2
    >>> Agreement(2, hold=1).settled([[5], [5, 6], [5, 6]])
    1

    Source: Liu et al., "Low-Latency Sequence-to-Sequence Speech Recognition and Translation by Partial
    Hypothesis Selection" (arXiv 2005.11185): local agreement and hold-n, together.

    Attributes:
        hypotheses: How many consecutive hypotheses have to agree.
        hold: How many tokens at the end of a hypothesis are held back, because more input may change them:
            about a word if the model was not trained on truncated speech.
        ahead: How many tokens are decoded at most beyond those written; bounds the cost of a piece.

    Raises:
        ValueError: With these values, nothing would be written before the end, as when ``hold`` is not less
            than ``ahead``.
    """

    hypotheses: int = 3
    hold: int = 6
    ahead: int = 16

    def __post_init__(self) -> None:
        if self.hypotheses < 1 or not 0 <= self.hold < self.ahead:
            raise ValueError(
                f"{self} would write nothing before the end: hypotheses must be at least 1, and hold from 0 "
                "to less than ahead"
            )

    def limit(self, read: Sequence[Tensor], written: int) -> int | None:
        """Return ``ahead``."""
        return self.ahead

    def settled(self, hypotheses: Sequence[Sequence[int]]) -> int:
        """Return the length of the common prefix of the last hypotheses, without the tokens held back."""
        if len(hypotheses) < self.hypotheses:
            return 0
        last = hypotheses[-self.hypotheses :]
        agreed = sum(
            itertools.takewhile(bool, (len(set(tokens)) == 1 for tokens in zip(*last, strict=False)))
        )
        return max(0, min(agreed, min(map(len, last)) - self.hold))


@dataclass(frozen=True)
class WaitK:
    """Read some pieces, then write a fixed number of tokens per further piece.

    >>> piece = torch.tensor([5])
    >>> [WaitK(2).limit([piece] * count, written=0) for count in (1, 2, 3)]
    [0, 1, 2]

    Source: Ma et al., "STACL: Simultaneous Translation with Implicit Anticipation and Controllable Latency
    using Prefix-to-Prefix Framework" (arXiv 1810.08398).

    Attributes:
        pieces: Number of pieces read before the first token is written.
        tokens: Tokens written per piece, on average.
    """

    pieces: int
    tokens: float = 1.0

    def limit(self, read: Sequence[Tensor], written: int) -> int | None:
        """Return the number of tokens due and not yet written."""
        return max(0, int((len(read) - self.pieces + 1) * self.tokens) - written)

    def settled(self, hypotheses: Sequence[Sequence[int]]) -> int:
        """Write all that was decoded."""
        return len(hypotheses[-1])


@dataclass(frozen=True)
class AtPauses:
    """Write whenever the speaker pauses, that is whenever the last tokens read are all silence.

    >>> policy = AtPauses(frozenset({3}), tokens=2)
    >>> pieces = [torch.tensor(each) for each in ([1, 7, 3], [3], [8, 3])]
    >>> [policy.limit(pieces[:count], written=0) for count in (1, 2, 3)]
    [0, None, 0]

    Attributes:
        silence: The tokens that encode silence.
        tokens: How many of them in a row make a pause.
    """

    silence: frozenset[int]
    tokens: int = 10

    def limit(self, read: Sequence[Tensor], written: int) -> int | None:
        """Return None at a pause, else 0."""
        last = torch.cat(list(read))[-self.tokens :].tolist()
        return None if len(last) == self.tokens and self.silence.issuperset(last) else 0

    def settled(self, hypotheses: Sequence[Sequence[int]]) -> int:
        """Write all that was decoded."""
        return len(hypotheses[-1])


@dataclass(frozen=True)
class AtEnd:
    """Read all input, then write."""

    def limit(self, read: Sequence[Tensor], written: int) -> int | None:
        """Return 0."""
        return 0

    def settled(self, hypotheses: Sequence[Sequence[int]]) -> int:
        """Return 0."""
        return 0


def listen(
    session: Session,
    source: str,
    pieces: Iterable[Tensor],
    output: str,
    policy: LivePolicy,
    options: Mapping[str, Any],
) -> Iterator[list[int]]:
    """Append the pieces of a segment as they arrive, int64 of shape (length,), and decode another meanwhile.

    Decoding before the last piece is tentative: the session is rolled back before it reads on. In the end it
    contains the segment read and the one written. Yields the tokens written, without the begin token.
    """
    settings = settle(output, session.model.tower(output), options_of(output, options))
    written: list[int] = []
    hypotheses: list[list[int]] = []

    def decoded(limit: int | None) -> list[int]:
        """Return the tokens written so far and newly decoded ones, up to the limits."""
        most = settings.config.max_new_tokens
        room = [each for each in (None if most is None else most - len(written), limit) if each is not None]
        if written:
            session.append(Segment(output, [settings.begin, *written]))
        if room and min(room) <= 0:
            return list(written)
        asked = {**options, **({"max_new_tokens": min(room)} if room else {})}
        ((segment,),) = session.generate([output], continue_segment=bool(written), **asked)
        assert isinstance(segment, Segment)
        return [*written, *map(int, segment.tokens[0 if written else 1 :])]

    read: list[Tensor] = []
    for piece in pieces:
        session.append(Segment(source, piece))
        read.append(piece)
        limit = policy.limit(read, len(written))
        if limit == 0:
            continue
        mark = session.mark()
        tokens = decoded(limit)
        session.rollback(mark)
        ended = bool(tokens) and tokens[-1] in settings.ends  # more input may still follow
        hypotheses.append(tokens[:-1] if ended else tokens)
        new = hypotheses[-1][len(written) : policy.settled(hypotheses)]
        if new:
            written += new
            yield new
    yield decoded(None)[len(written) :]
