"""``POST /v1/chat/completions``: messages of text and audio, answered in text, audio, or both."""

from __future__ import annotations

import base64
import binascii
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ...batch.collate import Segment
from .answers import DONE, Answer, answers, events, pieces
from .engine import Decoding, Piece
from .errors import Refusal
from .schemas import AudioPart, Chat
from .served import Served

FORMS = {"pcm16": "pcm"}
"""Audio formats with another name in chats."""


def chat(served: Served) -> APIRouter:
    """Return the router of the endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def complete(request: Request, body: Chat) -> Response:
        """Answer a chat."""
        wanted = _wanted(served, body)
        given = await _given(served, body)
        reply = _Reply(served, body, given)
        if body.stream:
            return await events(reply.chunks(wanted), DONE)
        return JSONResponse(await reply.whole(await answers(served, request, given, wanted)))

    return router


def _wanted(served: Served, body: Chat) -> list[Decoding]:
    """Return what to decode: first the text, which the audio tower then reads."""
    served.check_model(body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise Refusal(400, "give max_completion_tokens or max_tokens, not both", "max_tokens")
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "stream_options are for streams", "stream_options")
    speaks = "audio" in body.modalities
    if speaks and not served.offer.speaks:
        raise Refusal(400, "this model gives no sound", "modalities")
    if speaks != (body.audio is not None):
        raise Refusal(400, "give audio, with a format, if and only if modalities have 'audio'", "audio")
    if body.stream and body.audio is not None and body.audio.format != "pcm16":
        raise Refusal(400, "a stream of sound is in format 'pcm16'", "audio.format")
    most = served.most(body.max_completion_tokens or body.max_tokens)
    towers = [served.offer.text] * ("text" in body.modalities) + [served.offer.audio] * speaks
    return [Decoding(tower, most, body.temperature, body.top_p) for tower in towers if tower is not None]


async def _given(served: Served, body: Chat) -> list[Segment]:
    """Encode the parts of all messages."""
    given = []
    for number, message in enumerate(body.messages):
        if isinstance(message.content, str):
            given.append(await served.text(message.content))
            continue
        for part in message.content:
            if not isinstance(part, AudioPart):
                given.append(await served.text(part.text))
                continue
            if not served.offer.hears:
                raise Refusal(400, "this model does not read sound", f"messages.{number}.content")
            try:
                data = base64.b64decode(part.input_audio.data, validate=True)
            except (binascii.Error, ValueError) as error:
                raise Refusal(400, f"no base64: {error}", f"messages.{number}.content") from error
            given.append(await served.sound(data))
    return given


class _Reply:
    """Builds the response to a chat."""

    def __init__(self, served: Served, body: Chat, given: list[Segment]) -> None:
        self.served, self.body, self.given = served, body, given
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.sound_id = f"audio-{self.id}"

    async def whole(self, found: list[Answer]) -> dict[str, Any]:
        """Return the completion."""
        by_tower = {answer.tower: answer for answer in found}
        spoken, written = by_tower.get(self.served.offer.audio or ""), by_tower.get(self.served.offer.text)
        text = None if written is None else await self.served.decode(written.tower, written.tokens)
        message = {"role": "assistant", "content": text, "refusal": None}
        if spoken is not None:
            data = await self._sound(spoken.tokens)
            sound = {
                "id": self.sound_id,
                "data": data,
                "expires_at": self.created,
                "transcript": text or "",
            }
            message = {**message, "content": None, "audio": sound}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": found[-1].finish}
        count = sum(answer.count for answer in found)
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(count)}

    async def chunks(self, wanted: list[Decoding]) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a stream."""
        speaks, came = self.body.audio is not None, list[Piece]()

        async def heard(coming: AsyncIterator[tuple[Piece, str]]) -> AsyncIterator[torch.Tensor]:
            yield came[-1].tokens
            async for piece, _ in coming:
                came.append(piece)
                yield piece.tokens

        async with aclosing(pieces(self.served, self.given, wanted)) as coming:
            async for piece, new in coming:
                if not came:  # earlier errors can still become error responses
                    yield self._chunk({"role": "assistant", "content": None if speaks else ""})
                came.append(piece)
                if piece.tower == self.served.offer.audio:
                    async with aclosing(self._streamed(heard(coming))) as parts:
                        async for data in parts:
                            yield self._chunk({"audio": {"id": self.sound_id, "data": data}})
                elif new:
                    said = {"audio": {"id": self.sound_id, "transcript": new}} if speaks else {"content": new}
                    yield self._chunk(said)
        yield self._chunk({}, came[-1].finish)
        count = sum(piece.new for piece in came)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(count)}

    async def _streamed(self, tokens: AsyncIterator[torch.Tensor]) -> AsyncGenerator[str]:
        """Yield audio in base64, while tokens arrive if the modality supports streaming."""
        if self.served.speaks_in_pieces:
            async for part in self.served.pcm(tokens):
                yield base64.b64encode(part).decode()
        else:
            yield await self._sound(torch.cat([part async for part in tokens]))

    async def _sound(self, tokens: torch.Tensor) -> str:
        assert self.body.audio is not None
        form = FORMS.get(self.body.audio.format, self.body.audio.format)
        return base64.b64encode(await self.served.sound_file(tokens, form)).decode()

    def _chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}

    def _usage(self, decoded: int) -> dict[str, int]:
        count = sum(len(segment.tokens) for segment in self.given)
        return {"prompt_tokens": count, "completion_tokens": decoded, "total_tokens": count + decoded}
