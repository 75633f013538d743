"""The command that serves a checkpoint."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

from ...base.extras import require
from ..arguments import CheckpointArgument, DeviceOption, load
from .limits import Limits

typer: Any = require("typer", "cli")

LATER = 5
"""Seconds from the end of the grace period until connections are cut, for error responses to arrive."""

NEEDED = ("fastapi", "prometheus_client", "python_multipart", "websockets")

SWITCH_SECONDS = 0.0005
"""After how long a thread has to let another one run. The engine gives way at each of torch's many small
operations, and by Python's default would wait 5 ms each time to go on beside a thread that makes sound."""


def serve(
    checkpoint: CheckpointArgument,
    host: Annotated[str, typer.Option(help="0.0.0.0 to be seen from other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where the server listens.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; as the checkpoint unless given.")
    ] = None,
    text_tower: Annotated[
        str | None, typer.Option(help="The tower of text, if there are several.", show_default=False)
    ] = None,
    audio_tower: Annotated[
        str | None, typer.Option(help="The tower of sound, if there are several.", show_default=False)
    ] = None,
    max_requests: Annotated[
        int, typer.Option(min=1, help="How many are answered at once.")
    ] = Limits.requests,
    max_body: Annotated[
        int, typer.Option(min=1, help="How large a request may be, in bytes.")
    ] = Limits.body_bytes,
    max_audio: Annotated[
        float, typer.Option(help="How long a sound may be, in seconds.")
    ] = Limits.audio_seconds,
    max_input_tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens may be given in a request.")
    ] = Limits.input_tokens,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="How many tokens may be decoded for a request.")
    ] = Limits.tokens,
    timeout: Annotated[float, typer.Option(help="How long an answer may take, in seconds.")] = Limits.seconds,
    stall: Annotated[
        float, typer.Option(help="How long a client may neither send nor read, in seconds.")
    ] = Limits.stall_seconds,
    grace: Annotated[
        int, typer.Option(min=0, help="How long what is under way may take when the server is to end.")
    ] = 30,
    device: DeviceOption = "cpu",
) -> None:
    """Serve a checkpoint with an OpenAI-compatible API: transcriptions, speech, chat, live sessions."""
    for module in NEEDED:
        require(module, "serve")
    uvicorn = require("uvicorn", "serve")
    from .app import make_app

    limits = Limits(
        requests=max_requests,
        body_bytes=max_body,
        audio_seconds=max_audio,
        input_tokens=max_input_tokens,
        tokens=max_tokens,
        seconds=timeout,
        stall_seconds=stall,
    )
    app = make_app(
        load(checkpoint, device),
        name=name or Path(checkpoint).name,
        limits=limits,
        text_tower=text_tower,
        audio_tower=audio_tower,
    )
    sys.setswitchinterval(SWITCH_SECONDS)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        ws="websockets-sansio",
        ws_max_size=limits.body_bytes,
        timeout_graceful_shutdown=grace + LATER,
        log_level="warning",
    )
    _run(uvicorn, config, grace)


def _run(uvicorn: Any, config: Any, grace: int) -> None:
    """Run a server until a signal; after SIGTERM, exit normally."""

    class Server(uvicorn.Server):  # type: ignore[misc]  # known only at run time
        def handle_exit(self, number: int, frame: Any) -> None:
            config.app.state.engine.end_within(grace)
            super().handle_exit(number, frame)

    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again on exit
    server = Server(config)
    server.run()
    if not server.started:
        raise OSError(f"the server could not listen on {config.host}:{config.port}; the log says why")
