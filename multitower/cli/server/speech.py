"""``POST /v1/audio/speech``: a text, said."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from .answers import answers
from .audio import TYPES
from .engine import Decoding
from .schemas import Speech
from .served import Served


def speech(served: Served) -> APIRouter:
    """Return the endpoint."""
    router = APIRouter()

    @router.post("/v1/audio/speech", response_model=None)
    async def speak(request: Request, body: Speech) -> Response:
        """Say a text."""
        served.check_model(body.model)
        given = [await served.text(body.input)]
        wanted = Decoding(served.audio, served.limits.tokens)
        (answer,) = await answers(served, request, given, [wanted])
        sound = await served.sound_file(answer.tokens, body.response_format)
        return Response(sound, media_type=TYPES[body.response_format])

    return router
