"""When to read on and when to write, while what is read still comes in."""

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
    """Decides after every piece that was read what is written; see ``Agreement`` and ``WaitK``."""

    def limit(self, read: Sequence[Tensor], written: int) -> int | None:
        """Return how many more tokens to decode: 0 to read on, None for as many as there come.

        Args:
            read: The pieces that have been read, int64 of shape (length,).
            written: How many tokens have been written.
        """

    def settled(self, hypotheses: Sequence[Sequence[int]]) -> int:
        """Return how many tokens of the last hypothesis are written, never to be changed.

        Args:
            hypotheses: What was decoded after each piece that was read, what was written before included.
        """


@dataclass(frozen=True)
class Agreement:
    """Decode after every piece, and write what several such answers in a row begin with.

    >>> Agreement(2, hold=0).settled([[5], [5, 6, 7], [5, 6, 8]])
    2
    >>> Agreement(2, hold=1).settled([[5], [5, 6], [5, 6]])
    1

    Source: Liu et al., "Low-Latency Sequence-to-Sequence Speech Recognition and Translation by Partial
    Hypothesis Selection" (arXiv 2005.11185): local agreement and hold-n, together.

    Attributes:
        hypotheses: How many in a row have to agree.
        hold: How many tokens at the end of each answer are not relied on, as more speech may change them:
            about a word, where the model was never trained on speech that is cut off.
        ahead: How many tokens are decoded at most beyond those written, which bounds what a piece costs.

    Raises:
        ValueError: ``hold`` is not less than ``ahead``, so that nothing would ever be written.
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
        """Decode so far ahead."""
        return self.ahead

    def settled(self, hypotheses: Sequence[Sequence[int]]) -> int:
        """Return how many tokens the last ones have in common, but for the end of each."""
        if len(hypotheses) < self.hypotheses:
            return 0
        last = hypotheses[-self.hypotheses :]
        agreed = sum(
            itertools.takewhile(bool, (len(set(tokens)) == 1 for tokens in zip(*last, strict=False)))
        )
        return max(0, min(agreed, min(map(len, last)) - self.hold))


@dataclass(frozen=True)
class WaitK:
    """Read some pieces, then write so many tokens for each further one.

    >>> piece = torch.tensor([5])
    >>> [WaitK(2).limit([piece] * count, written=0) for count in (1, 2, 3)]
    [0, 1, 2]

    Source: Ma et al., "STACL: Simultaneous Translation with Implicit Anticipation and Controllable Latency
    using Prefix-to-Prefix Framework" (arXiv 1810.08398).

    Attributes:
        pieces: How many are read before the first token is written.
        tokens: How many tokens are written for each, on average.
    """

    pieces: int
    tokens: float = 1.0

    def limit(self, read: Sequence[Tensor], written: int) -> int | None:
        """Return how many tokens are due."""
        return max(0, int((len(read) - self.pieces + 1) * self.tokens) - written)

    def settled(self, hypotheses: Sequence[Sequence[int]]) -> int:
        """Write all that was decoded."""
        return len(hypotheses[-1])


@dataclass(frozen=True)
class AtPauses:
    """Write whenever the speaker pauses: whenever the last tokens that were read are all silence.

    >>> policy = AtPauses(frozenset({3}), tokens=2)
    >>> pieces = [torch.tensor(each) for each in ([1, 7, 3], [3], [8, 3])]
    >>> [policy.limit(pieces[:count], written=0) for count in (1, 2, 3)]
    [0, None, 0]

    Attributes:
        silence: The tokens of silence, as a modality encodes it.
        tokens: How many of them in a row are a pause.
    """

    silence: frozenset[int]
    tokens: int = 10

    def limit(self, read: Sequence[Tensor], written: int) -> int | None:
        """Decode all that there is at a pause, and nothing elsewhere."""
        last = torch.cat(list(read))[-self.tokens :].tolist()
        return None if len(last) == self.tokens and self.silence.issuperset(last) else 0

    def settled(self, hypotheses: Sequence[Sequence[int]]) -> int:
        """Write all that was decoded."""
        return len(hypotheses[-1])


@dataclass(frozen=True)
class AtEnd:
    """Read all, then write."""

    def limit(self, read: Sequence[Tensor], written: int) -> int | None:
        """Decode nothing."""
        return 0

    def settled(self, hypotheses: Sequence[Sequence[int]]) -> int:
        """Write nothing."""
        return 0


def listen(
    session: Session,
    source: str,
    pieces: Iterable[Tensor],
    output: str,
    policy: LivePolicy,
    options: Mapping[str, Any],
) -> Iterator[list[int]]:
    """Append the pieces of a segment as they come, int64 of shape (length,), and decode another meanwhile.

    What is decoded before the last piece is only tried: the session then goes back and reads on. In the end
    it holds the segment that was read and the one that was written. Yielded are the tokens that are written,
    without the begin token.
    """
    settings = settle(output, session.model.tower(output), options_of(output, options))
    written: list[int] = []
    hypotheses: list[list[int]] = []

    def decoded(limit: int | None) -> list[int]:
        """Return what is written by now, and as many more tokens as may be."""
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
        ended = bool(tokens) and tokens[-1] in settings.ends  # which says only that what was read ends
        hypotheses.append(tokens[:-1] if ended else tokens)
        new = hypotheses[-1][len(written) : policy.settled(hypotheses)]
        if new:
            written += new
            yield new
    yield decoded(None)[len(written) :]
