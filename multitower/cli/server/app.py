"""The ASGI app."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from ...base.version import __version__
from ...pipeline.pipeline import Pipeline
from .chat import chat
from .errors import Refusal, add_handlers
from .gate import Gate
from .limits import Limits
from .live import live
from .metrics import Metrics
from .served import Served, offer_of
from .sounds import speech, transcriptions

CHAT, LIVE = "/v1/chat/completions", "/v1/live"
HEAR, SPEAK = "/v1/audio/transcriptions", "/v1/audio/speech"
LIGHT = frozenset({"/health", "/metrics", "/v1/models"})


def make_app(
    pipe: Pipeline,
    *,
    name: str = "multitower",
    limits: Limits | None = None,
    text_tower: str | None = None,
    audio_tower: str | None = None,
) -> FastAPI:
    """Return an ASGI app that serves a pipeline with the endpoints of OpenAI's API that its towers support.

    >>> import uvicorn                                                          # doctest: +SKIP
    >>> uvicorn.run(make_app(mt.Pipeline.from_pretrained("fused")))             # doctest: +SKIP

    The app has one decoding thread, which ends with its lifespan.

    Args:
        pipe: The pipeline.
        name: The model's name for clients.
        limits: Limits on requests.
        text_tower: The text tower, if there are several.
        audio_tower: The audio tower, if there are several.

    Raises:
        ValueError: No tower has a text modality; several towers are of one kind and none was chosen; or a
            tower's generation config does not allow decoding in chunks.
    """
    limits, metrics = limits or Limits(), Metrics()
    served = Served(pipe, offer_of(pipe, text_tower, audio_tower), limits, name, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        served.close()

    app = FastAPI(title=f"multitower: {name}", version=__version__, lifespan=lifespan)
    app.state.engine = served.engine
    add_handlers(app)
    routers = {CHAT: chat, LIVE: live}
    routers |= {HEAR: transcriptions} if served.offer.hears else {}
    routers |= {SPEAK: speech} if served.offer.speaks else {}
    for router in routers.values():
        app.include_router(router(served))
    _add_light(app, served)
    app.add_middleware(Gate, limits=limits, metrics=metrics, works=frozenset(routers), others=LIGHT)
    return app


def _add_light(app: FastAPI, served: Served) -> None:
    """Add the endpoints that do not need the model."""
    model = {"id": served.name, "object": "model", "created": served.created, "owned_by": "multitower"}

    @app.get("/health", response_model=None)
    async def health() -> dict[str, str]:
        """Report whether the server accepts requests."""
        if not served.engine.alive:
            raise Refusal(503, "the engine does not run", code="closing")
        return {"status": "ok"}

    @app.get("/metrics", response_model=None)
    async def metrics() -> PlainTextResponse:
        """Return metrics in Prometheus' text format."""
        return PlainTextResponse(served.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", response_model=None)
    async def models() -> dict[str, Any]:
        """List the model."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", response_model=None)
    async def one_model(name: str) -> dict[str, Any]:
        """Describe the model."""
        served.check_model(name)
        return model
