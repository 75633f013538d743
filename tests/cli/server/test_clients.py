"""Clients that disconnect, stall or come all at once, and a server that shuts down."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import multitower as mt
from processes import environment
from serving import LIMIT, Running, running

openai = pytest.importorskip("openai", reason="needs OpenAI's client")
app, limits = (
    pytest.importorskip(f"multitower.cli.server.{name}", reason="the server needs the extra serve")
    for name in ("app", "limits")
)

LONG = 100_000
"""More tokens than can be decoded during a test."""


@pytest.fixture(scope="module")
def patient(pipe: mt.Pipeline) -> Iterator[Running]:
    """A server that allows four requests at a time and long answers."""
    few = limits.Limits(requests=4, tokens=LONG, stall_seconds=1)
    with running(app.make_app(pipe, name="tiny", limits=few)) as server:
        yield server


def chat(**changes: Any) -> bytes:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "two"}], **changes}
    return json.dumps(asked).encode()


def opened(server: Running, body: bytes, *, length: int | None = None) -> socket.socket:
    """Open a socket and send a request, or the beginning of one."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    length = len(body) if length is None else length
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
    return connection


def answer_on(connection: socket.socket) -> tuple[http.client.HTTPResponse, str]:
    """Read a response; return it and its error message."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return answer, json.loads(answer.read())["error"]["message"]


def wait_for(what: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def decoded(server: Running) -> float:
    return server.metrics.get('multitower_decoded_tokens_total{tower="text"}', 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_its_decoding(patient: Running, stream: bool) -> None:
    connection = opened(patient, chat(max_tokens=LONG, stream=stream))
    before = decoded(patient)
    wait_for(lambda: decoded(patient) > before)
    assert patient.metrics["multitower_requests_under_way"] == 1
    connection.close()
    patient.wait_until_idle()
    steps = patient.metrics['multitower_step_seconds_count{tower="text"}']
    time.sleep(0.3)
    assert patient.metrics['multitower_step_seconds_count{tower="text"}'] <= steps + 1


def test_a_client_that_closes_its_half_is_gone(patient: Running) -> None:
    connection = opened(patient, chat(max_tokens=LONG, stream=True))
    assert connection.recv(10)
    connection.shutdown(socket.SHUT_WR)
    patient.wait_until_idle()
    connection.close()


def test_a_body_that_does_not_end_is_refused(patient: Running) -> None:
    with opened(patient, b'{"model":', length=1000) as connection:
        answer, reason = answer_on(connection)
        assert (answer.status, reason) == (408, "nothing more of the request came for 1 s")
        assert connection.recv(1) == b"", "the connection stays open"
    with opened(patient, b'{"model":', length=1000) as connection:
        connection.shutdown(socket.SHUT_WR)
    patient.wait_until_idle()


def test_a_body_without_end_is_refused(patient: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multitower.cli.server.gate.DISCARD_SECONDS", 0.2)
    with opened(patient, b"", length=10**12) as connection:
        answer, reason = answer_on(connection)
        assert (answer.status, reason) == (413, "a request may have 26214400 bytes; send less")
        assert connection.recv(1) == b"", "the connection stays open"


def test_a_client_that_does_not_read_ends_its_decoding(patient: Running) -> None:
    body, sent = chat(max_tokens=LONG, stream=True), []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    given = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return given.pop() if given else await asyncio.Future()

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if len(sent) > 3:
            await asyncio.Future()

    asyncio.run(asyncio.wait_for(patient.app(scope, receive, send), 20))
    assert [message["type"] for message in sent] == ["http.response.start", *["http.response.body"] * 3]
    patient.wait_until_idle()
    assert patient.metrics['multitower_requests_total{endpoint="/v1/chat/completions",status="499"}'] > 0


def test_more_than_there_is_room_for_is_told_to_come_again(patient: Running) -> None:
    connections = [opened(patient, chat(max_tokens=LONG)) for _ in range(4)]
    wait_for(lambda: patient.metrics["multitower_requests_under_way"] == 4)
    with opened(patient, chat()) as connection:
        answer, reason = answer_on(connection)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert reason == "4 requests are under way; ask again later"
    for connection in connections:
        connection.close()
    patient.wait_until_idle()


def test_answers_under_load_are_those_alone(server: Running, pipe: mt.Pipeline, clip: Path) -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=draw.randrange(1, 60))) for _ in range(12)]
    asked = [(text, draw.randrange(1, LIMIT)) for text in texts]
    expected = [
        pipe([("text", text)], output="text", do_sample=False, max_new_tokens=most) for text, most in asked
    ]
    heard = pipe([("speech", str(clip))], output="text", do_sample=False, max_new_tokens=LIMIT)

    async def all_at_once() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:

            async def answer(text: str, most: int) -> str:
                messages = [{"role": "user", "content": text}]
                found = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=most)
                return found.choices[0].message.content

            async def hear() -> str:
                return (await client.audio.transcriptions.create(model="tiny", file=clip)).text

            answers = asyncio.gather(*(answer(*each) for each in asked * 2))
            return await answers, await asyncio.gather(*(hear() for _ in range(4)))

    answers, transcripts = asyncio.run(all_at_once())
    assert answers == expected * 2
    assert transcripts == [heard] * 4
    counted = server.metrics
    single, all_of_them = (
        counted[f'multitower_rows_bucket{{le="{le}",tower="text"}}'] for le in ("1.0", "+Inf")
    )
    assert single < all_of_them / 2, "rows were not decoded together"


def test_an_answer_is_told_that_the_server_ends(pipe: mt.Pipeline) -> None:
    made = app.make_app(pipe, name="tiny", limits=limits.Limits(tokens=LONG))
    with running(made) as server, opened(server, chat(stream=True, max_tokens=LONG)) as connection:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert answer.readline()
        made.state.engine.end_within(0.1)
        assert b"the server is closing" in answer.read()


def test_the_command_ends_cleanly(fused: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "multitower", "serve", str(fused), "--port", str(port), "--grace", "20"]
    process = subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    server = Running(None, port)
    try:

        def answers() -> bool:
            assert process.poll() is None, process.communicate()
            try:
                return bool(server.metrics)
            except OSError:
                return False

        wait_for(answers, 120)
        name = fused.name
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "two"}], "stream": True})
        with opened(server, body.encode()) as connection:
            assert connection.recv(20)
            process.send_signal(signal.SIGTERM)
            rest = b""
            while part := connection.recv(100_000):
                rest += part
        assert b"[DONE]" in rest, "the running request was not completed"
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "Traceback" not in err
    finally:
        process.kill()
        process.wait()


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from multitower.cli import main

    assert main(["serve", str(tmp_path)]) == 1
    assert "error:" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--max-tokens", "0"]) == 2
