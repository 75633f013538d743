"""Responses: complete, in pieces, or as server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ...batch.collate import Segment
from .engine import Decoding, Piece
from .errors import Refusal, as_refusal, body_of
from .served import Served

DONE = "[DONE]"

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Answer:
    """The complete output of one tower.

    Attributes:
        tower: The tower.
        tokens: int64, shape (length,), including begin and end.
        count: Number of decoded tokens.
        finish: "stop" or "length".
    """

    tower: str
    tokens: torch.Tensor
    count: int
    finish: str


def whole(pieces: Sequence[Piece]) -> Answer:
    """Join the pieces of one tower's output."""
    finish = pieces[-1].finish
    assert finish is not None, "the last piece is missing"
    tokens = torch.cat([piece.tokens for piece in pieces])
    return Answer(pieces[0].tower, tokens, sum(piece.new for piece in pieces), finish)


async def answers(
    served: Served, request: Request, given: Sequence[Segment], wanted: Sequence[Decoding]
) -> list[Answer]:
    """Return complete outputs; raise if the client disconnects before."""
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
) -> AsyncGenerator[tuple[Piece, str]]:
    """Yield pieces of output as they are decoded, each with the text it adds."""
    served.check_given(given)
    text, tokens = Growing(), list[torch.Tensor]()
    async with served.events(served.session(wanted), given, wanted) as events:
        async for event in events:
            if isinstance(event, Piece):
                yield event, await new_text(served, event, text, tokens)


async def new_text(served: Served, piece: Piece, text: Growing, tokens: list[torch.Tensor]) -> str:
    """Return the text that a piece adds; "" if it is not of the text tower."""
    if piece.tower != served.offer.text:
        return ""
    tokens.append(piece.tokens)
    return text.grown(await served.decode(piece.tower, torch.cat(tokens)), last=piece.finish is not None)


class Growing:
    r"""Incremental text; an incomplete character at the end is held back.

    >>> text = Growing()
    >>> [text.grown(whole) for whole in ("a", "a\ufffd", "aé")]
    ['a', '', 'é']
    """

    def __init__(self) -> None:
        self._text = ""

    def grown(self, text: str, *, last: bool = False) -> str:
        """Return the new part of the text so far, without an incomplete character unless ``last``."""
        known = text if last else text.rstrip("\ufffd")
        new = known[len(self._text) :] if last or known.startswith(self._text) else ""
        self._text += new
        return new


class Streamed(StreamingResponse):
    """A streaming response that closes its generator when the client disconnects."""

    def __init__(self, parts: AsyncIterator[str | bytes], media_type: str) -> None:
        self._parts = parts
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(parts, media_type=media_type, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        async with aclosing(self._parts):  # type: ignore[type-var]  # it is a generator
            await super().__call__(scope, receive, send)


async def streamed(parts: AsyncIterator[bytes], media_type: str) -> Streamed:
    """Start a stream once its first part is ready, so that earlier errors become error responses."""
    return Streamed(_after(await anext(parts, b""), parts), media_type)


async def events(documents: AsyncIterator[Any], last: str | None = None) -> Streamed:
    """Start a stream of server-sent events once its first document is ready."""
    documents = _after(await anext(documents), documents)

    async def written() -> AsyncIterator[str]:
        async with aclosing(documents):  # type: ignore[type-var]  # it is a generator
            try:
                async for document in documents:
                    yield f"data: {json.dumps(document)}\n\n"
                if last:
                    yield f"data: {last}\n\n"
            except Exception as error:
                yield f"data: {json.dumps(body_of(as_refusal(error)))}\n\n"

    return Streamed(written(), "text/event-stream")


async def _after(first: T, others: AsyncIterator[T]) -> AsyncIterator[T]:
    async with aclosing(others):  # type: ignore[type-var]  # it is a generator
        yield first
        async for each in others:
            yield each
