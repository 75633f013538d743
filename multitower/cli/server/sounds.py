"""``/v1/audio/transcriptions`` and ``/v1/audio/speech``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from ...batch.collate import Segment
from .answers import answers, events, pieces, streamed
from .audio import TYPES
from .engine import Decoding
from .schemas import Speech, Transcription
from .served import Served


def transcriptions(served: Served) -> APIRouter:
    """Return the router of the endpoint."""
    router = APIRouter()

    @router.post("/v1/audio/transcriptions", response_model=None)
    async def transcribe(
        request: Request, form: Annotated[Transcription, Form(media_type="multipart/form-data")]
    ) -> Response:
        """Transcribe a sound file."""
        served.check_model(form.model)
        given = [await served.sound(await form.file.read())]
        wanted = Decoding(served.offer.text, served.limits.tokens, form.temperature)
        if form.stream:
            return await events(_pieces(served, given, wanted))
        (answer,) = await answers(served, request, given, [wanted])
        text = await served.decode(answer.tower, answer.tokens)
        if form.response_format == "text":
            return PlainTextResponse(text)
        return JSONResponse({"text": text, "usage": _usage(given, answer.count)})

    return router


async def _pieces(served: Served, given: list[Segment], wanted: Decoding) -> AsyncIterator[dict[str, Any]]:
    text, count = "", 0
    async for piece, new in pieces(served, given, [wanted]):
        text, count = text + new, count + piece.new
        yield {"type": "transcript.text.delta", "delta": new}
    yield {"type": "transcript.text.done", "text": text, "usage": _usage(given, count)}


def _usage(given: list[Segment], decoded: int) -> dict[str, Any]:
    count = sum(len(segment.tokens) for segment in given)
    total = count + decoded
    return {"type": "tokens", "input_tokens": count, "output_tokens": decoded, "total_tokens": total}


def speech(served: Served) -> APIRouter:
    """Return the router of the endpoint."""
    router = APIRouter()

    @router.post("/v1/audio/speech", response_model=None)
    async def speak(request: Request, body: Speech) -> Response:
        """Synthesise speech from text."""
        served.check_model(body.model)
        given = [await served.text(body.input)]
        wanted = Decoding(served.audio, served.limits.tokens)
        if body.response_format == "pcm" and served.speaks_in_pieces:
            tokens = (piece.tokens async for piece, _ in pieces(served, given, [wanted]))
            return await streamed(served.pcm(tokens), TYPES["pcm"])
        (answer,) = await answers(served, request, given, [wanted])
        sound = await served.sound_file(answer.tokens, body.response_format)
        return Response(sound, media_type=TYPES[body.response_format])

    return router
