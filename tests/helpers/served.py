"""Fixtures: a server of a tiny model, and its client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import multitower as mt


@pytest.fixture(scope="module")
def pipe(fused: Path) -> mt.Pipeline:
    return mt.Pipeline.from_pretrained(fused)


@pytest.fixture(scope="module")
def clip(parts: Path) -> Path:
    return parts / "clips" / "0.wav"


@pytest.fixture(scope="module")
def server(pipe: mt.Pipeline) -> Iterator[Any]:
    """A server of the tiny model, on loopback."""
    from multitower.cli.server.app import make_app
    from multitower.cli.server.limits import Limits
    from serving import LIMIT, running

    limits = Limits(tokens=LIMIT, body_bytes=200_000, audio_seconds=2, input_tokens=200)
    with running(make_app(pipe, name="tiny", limits=limits)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[Any]:
    """OpenAI's own client."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
