"""Middleware that limits the number and size of requests, and drops clients that stall."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .errors import Refusal, answer_of, body_of
from .limits import Limits
from .metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DISCARD_SECONDS = 5.0
"""How long the rest of a request is read and discarded before it is refused: most clients read no response
before they have sent everything."""

CLOSE = {"Connection": "close"}
"""Headers of a response to a request that may not have been read completely."""


class Gate:
    """ASGI middleware that enforces limits and records metrics."""

    def __init__(
        self, app: Any, limits: Limits, metrics: Metrics, works: frozenset[str], others: frozenset[str]
    ) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.works, self.others = works, others
        self.under_way = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request to the app, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        path, started = scope["path"], time.monotonic()
        caller = _Caller(scope, receive, send, self.limits)
        try:
            if path not in self.works:
                await caller.call(self.app)
            elif self.under_way >= self.limits.requests:
                await caller.refuse(
                    Refusal(
                        503,
                        f"{self.limits.requests} requests are under way; ask again later",
                        code="overloaded",
                        headers={"Retry-After": "1", **CLOSE},
                    )
                )
            else:
                self.under_way += 1
                self.metrics.under_way.set(self.under_way)
                try:
                    await caller.call(self.app)
                finally:
                    self.under_way -= 1
                    self.metrics.under_way.set(self.under_way)
        finally:
            known = path if path in self.works | self.others else "other"
            self.metrics.answered(known, caller.status, time.monotonic() - started)


class _Caller:
    """One request, with its limits on size and time."""

    def __init__(self, scope: Message, receive: Receive, send: Send, limits: Limits) -> None:
        self.scope, self._receive, self._send, self.limits = scope, receive, send, limits
        self.size, self.complete, self.stalled = 0, scope["type"] != "http", False
        self.status = 499
        """Status of the response; 499 if the client disconnected first."""

    async def call(self, app: Any) -> None:
        """Run the app on this request."""
        if self._declared() > self.limits.body_bytes:
            await self.refuse(self._too_large())
            return
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:
            if not self.stalled:
                raise

    async def refuse(self, error: Refusal) -> None:
        """Answer with an error."""
        if self.scope["type"] == "websocket":
            await self._receive()
            self.status = error.status_code
            await self._send({"type": "websocket.accept"})
            await self._send(
                {"type": "websocket.send", "text": json.dumps({"type": "error", **body_of(error)})}
            )
            await self._send({"type": "websocket.close", "code": 1013, "reason": str(error.detail)[:100]})
            return
        await self._discard()
        await answer_of(error)(self.scope, self.receive, self.send)

    async def receive(self) -> Message:
        """Return the next ASGI message; raise if it exceeds the limits of size or time."""
        if self.complete:
            return await self._receive()
        try:
            async with asyncio.timeout(self.limits.stall_seconds):
                message = await self._receive()
        except TimeoutError:
            self.complete = True
            reason = f"nothing more of the request came for {self.limits.stall_seconds:g} s"
            raise Refusal(408, reason, code="stalled", headers=CLOSE) from None
        self.size += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self.size > self.limits.body_bytes:
            await self._discard()
            raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        """Send an ASGI message; raise if the client does not read it in time."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "websocket.accept":
            self.status = 101
        try:
            async with asyncio.timeout(self.limits.stall_seconds):
                await self._send(message)
        except TimeoutError:
            self.stalled, self.status = True, 499
            raise ConnectionError("the client does not read") from None

    async def _discard(self) -> None:
        """Read and discard the rest of the body, for a limited time."""
        try:
            async with asyncio.timeout(DISCARD_SECONDS):
                while not self.complete:
                    self.complete = not (await self._receive()).get("more_body", False)
        except TimeoutError:
            self.complete = True

    def _declared(self) -> int:
        length = dict(self.scope["headers"]).get(b"content-length", b"0")
        return int(length) if length.isdigit() else 0

    def _too_large(self) -> Refusal:
        reason = f"a request may have {self.limits.body_bytes} bytes; send less"
        return Refusal(413, reason, code="too_large", headers=CLOSE)
