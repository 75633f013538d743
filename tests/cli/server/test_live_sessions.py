"""Live sessions over WebSockets: audio in pieces, texts, and answers equal to the pipeline's."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import multitower as mt
from serving import LIMIT, Running, running

soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
client = pytest.importorskip("websockets.sync.client", reason="live sessions need websockets")
ConnectionClosed = pytest.importorskip(
    "websockets.exceptions", reason="live sessions need websockets"
).ConnectionClosed
app, limits = (
    pytest.importorskip(f"multitower.cli.server.{name}", reason="the server needs the extra serve")
    for name in ("app", "limits")
)

GREEDY = {"do_sample": False, "max_new_tokens": LIMIT}


@pytest.fixture
def samples(clip: Path) -> np.ndarray:
    return soundfile.read(clip, dtype="int16")[0]


def connected(server: Running, query: str = "") -> Any:
    return client.connect(f"{server.url.replace('http', 'ws')}/v1/live{query}")


def answered(socket: Any, **asked: Any) -> tuple[str, dict[str, Any]]:
    """Commit; return the joined deltas, and the last message."""
    socket.send(json.dumps({"type": "commit", **asked}))
    deltas = ""
    while (message := json.loads(socket.recv(timeout=30)))["type"] == "delta":
        deltas += message["delta"]
    return deltas, message


def test_a_conversation(server: Running, pipe: mt.Pipeline, samples: np.ndarray) -> None:
    turns: list[Any] = [("speech", samples)]
    with connected(server) as socket:
        for start in range(0, len(samples), 500):
            socket.send(samples[start : start + 500].tobytes())
        deltas, message = answered(socket)
        expected = pipe(turns, output="text", return_segments=True, **GREEDY)
        assert message == {"type": "done", "finish_reason": "length", "text": pipe.decode(expected)}
        assert deltas == message["text"]
        turns += [expected, ("text", "again"), ("speech", samples[:3000])]
        socket.send(json.dumps({"type": "text", "text": "again"}))
        socket.send(samples[:3000].tobytes())
        _, message = answered(socket, output="audio", max_tokens=9)
        sound = pipe(turns, output="speech", do_sample=False, max_new_tokens=9)
        heard, rate = soundfile.read(io.BytesIO(base64.b64decode(message["audio"])), dtype="float32")
        assert rate == 16_000
        np.testing.assert_allclose(heard, sound, atol=1e-4)


def test_sound_at_another_rate(server: Running, pipe: mt.Pipeline, samples: np.ndarray) -> None:
    with connected(server, "?rate=8000") as socket:
        socket.send(samples[:3000].tobytes())
        socket.send(samples[3000:].tobytes())
        _, message = answered(socket)
    assert message["text"] == pipe([("speech", (samples, 8_000))], output="text", **GREEDY)


@pytest.mark.parametrize(
    ("query", "sent", "reason"),
    [
        ("", b"abc", "3 bytes, which is no whole number"),
        ("", bytes(66_000), "longer than 2 s"),
        ("?rate=1", bytes(2), "rate='1'"),
        ("?rate=" + "9" * 5_000, bytes(2), "rate="),
        ("", "{", "Invalid JSON"),
        ("", '{"type": "dance"}', "'text', 'commit'"),
        ("", '{"type": "text"}', "Field required"),
        ("", '{"type": "text", "text": "' + "x" * 300 + '"}', "302 tokens, and 200 are allowed"),
        ("", '{"type": "commit", "output": "smell"}', "'text' or 'audio'"),
        ("", '{"type": "commit", "max_tokens": 99999}', "and 20 are allowed"),
        ("", '{"type": "commit", "temperature": NaN}', "finite number"),
    ],
)
def test_what_cannot_be_used_is_refused(server: Running, query: str, sent: Any, reason: str) -> None:
    with connected(server, query) as socket:
        with suppress(ConnectionClosed):  # the server may have closed the connection already
            socket.send(sent)
        message = json.loads(socket.recv(timeout=30))
        assert message["type"] == "error"
        assert reason in message["error"]["message"]
        with pytest.raises(ConnectionClosed, match="1008"):
            socket.recv(timeout=30)
    server.wait_until_idle()


@pytest.fixture(scope="module")
def short(pipe: mt.Pipeline) -> Iterator[Running]:
    few = limits.Limits(requests=1, tokens=LIMIT, seconds=2, body_bytes=1_000)
    with running(app.make_app(pipe, name="tiny", limits=few), ws_max_size=1_000) as server:
        yield server


def test_one_who_goes_leaves_nothing(short: Running, samples: np.ndarray) -> None:
    with connected(short) as socket:
        socket.send(samples[:400].tobytes())
        with connected(short) as late:
            message = json.loads(late.recv(timeout=30))
            assert message["error"]["code"] == "overloaded"
    short.wait_until_idle()


def test_one_who_says_nothing_is_let_go(short: Running) -> None:
    with connected(short) as socket:
        message = json.loads(socket.recv(timeout=30))
        assert message["error"]["message"] == "nothing came for 2 s"
    short.wait_until_idle()


def test_messages_that_are_too_large_close_the_socket(short: Running) -> None:
    with connected(short) as socket:
        socket.send(bytes(2_000))
        with pytest.raises(ConnectionClosed, match="1009"):
            socket.recv(timeout=30)
    short.wait_until_idle()
