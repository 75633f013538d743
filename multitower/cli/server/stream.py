"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import as_refusal, body_of

DONE = "[DONE]"


class Events(StreamingResponse):
    """A stream of server-sent events, which ends what makes them when the client goes.

    Args:
        documents: What is sent, as JSON.
        last: What is sent after the last, as it stands.
    """

    def __init__(self, documents: AsyncIterator[Any], last: str | None = None) -> None:
        self._documents, self._last = documents, last
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._written(), media_type="text/event-stream", headers=headers)

    @classmethod
    async def begin(cls, documents: AsyncIterator[Any], last: str | None = None) -> Events:
        """Begin a stream once the first document is there: an error before it is an answer itself."""
        first = await anext(documents)

        async def all_of_them() -> AsyncIterator[Any]:
            async with aclosing(documents):  # type: ignore[type-var]  # it is a generator
                yield first
                async for document in documents:
                    yield document

        return cls(all_of_them(), last)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        async with aclosing(self._documents):  # type: ignore[type-var]  # it is a generator
            await super().__call__(scope, receive, send)

    async def _written(self) -> AsyncIterator[str]:
        try:
            async for document in self._documents:
                yield f"data: {json.dumps(document)}\n\n"
            if self._last:
                yield f"data: {self._last}\n\n"
        except Exception as error:
            yield f"data: {json.dumps(body_of(as_refusal(error)))}\n\n"
