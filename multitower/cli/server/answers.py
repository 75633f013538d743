"""Answers, whole or in pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import torch
from fastapi import Request

from ...batch.collate import Segment
from .engine import Decoding, Piece
from .errors import Refusal
from .served import Served


@dataclass(frozen=True, eq=False)
class Answer:
    """A whole answer of one tower.

    Attributes:
        tower: The tower.
        tokens: int64, shape (length,), begin and end included.
        count: How many tokens were decoded.
        finish: "stop" or "length".
    """

    tower: str
    tokens: torch.Tensor
    count: int
    finish: str


def whole(pieces: Sequence[Piece]) -> Answer:
    """Put the pieces of one tower's answer together.

    >>> pieces = [Piece("text", torch.tensor([1, 5]), 1, None), Piece("text", torch.tensor([2]), 1, "stop")]
    >>> whole(pieces).tokens, whole(pieces).count
    (tensor([1, 5, 2]), 2)
    """
    finish = pieces[-1].finish
    assert finish is not None, "the last piece is missing"
    tokens = torch.cat([piece.tokens for piece in pieces])
    return Answer(pieces[0].tower, tokens, sum(piece.new for piece in pieces), finish)


async def answers(
    served: Served, request: Request, given: Sequence[Segment], wanted: Sequence[Decoding]
) -> list[Answer]:
    """Return whole answers, unless the client goes before they are complete.

    Raises:
        Refusal: The client has gone, or there is too much input.
    """
    served.check_given(given)
    found: dict[str, list[Piece]] = {}
    async with served.events(served.session(wanted), given, wanted) as events:
        async for event in events:
            if await request.is_disconnected():
                raise Refusal(499, "the client has gone")
            if isinstance(event, Piece):
                found.setdefault(event.tower, []).append(event)
    return [whole(found[each.tower]) for each in wanted]


async def pieces(
    served: Served, given: Sequence[Segment], wanted: Sequence[Decoding]
) -> AsyncIterator[tuple[Piece, str]]:
    """Yield the pieces of answers as they are decoded, each with what it adds to a text.

    Raises:
        Refusal: There is too much input.
    """
    served.check_given(given)
    text, tokens = Growing(), list[torch.Tensor]()
    async with served.events(served.session(wanted), given, wanted) as events:
        async for event in events:
            if isinstance(event, Piece):
                yield event, await new_text(served, event, text, tokens)


async def new_text(served: Served, piece: Piece, text: Growing, tokens: list[torch.Tensor]) -> str:
    """Return what a piece adds to a text; nothing if it is of another tower.

    Args:
        served: What decodes.
        piece: The piece.
        text: The text so far.
        tokens: Its tokens so far, to which those of the piece are added.
    """
    if piece.tower != served.offer.text:
        return ""
    tokens.append(piece.tokens)
    return text.grown(await served.decode(piece.tower, torch.cat(tokens)), last=piece.finish is not None)


class Growing:
    r"""A text that grows as its tokens come; what ends inside of a character is held back.

    >>> text = Growing()
    >>> [text.grown(whole) for whole in ("a", "a\ufffd", "aé")]
    ['a', '', 'é']
    """

    def __init__(self) -> None:
        self._text = ""

    def grown(self, text: str, *, last: bool = False) -> str:
        """Return what is new of a text; all of it with the last."""
        known = text if last else text.rstrip("\ufffd")
        new = known[len(self._text) :] if last or known.startswith(self._text) else ""
        self._text += new
        return new
