"""Requests that are too large or invalid get an error with the reason."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest

import multitower as mt
from letters import Letters
from serving import Running, running
from serving import send as post

soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
app, limits = (
    pytest.importorskip(f"multitower.cli.server.{name}", reason="the server needs the extra serve")
    for name in ("app", "limits")
)
make_app, Limits = app.make_app, limits.Limits


def refused(server: Running, path: str, body: bytes | dict[str, Any], kind: str = "application/json") -> str:
    """Send a request that must be refused with status 400; return the message."""
    status, answer = post(server, path, body if isinstance(body, bytes) else json.dumps(body).encode(), kind)
    error = json.loads(answer)["error"]
    assert (status, error["type"]) == (400, "invalid_request_error"), answer
    return error["message"]


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "two"}], **changes}


def form(sound: bytes, **fields: str) -> tuple[bytes, str]:
    """Return a form with a sound file, and its content type."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in {"model": "tiny", **fields}.items()
    ]
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    return b"".join([*parts, head, sound, b"\r\n--x--\r\n"]), "multipart/form-data; boundary=x"


def wave(samples: Any, rate: int = 16_000, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", **options)
    return file.getvalue()


class Written(Letters):
    media = "text"


NOISE = np.random.default_rng(0).normal(0, 0.1, 4_000).astype(np.float32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": "hi"}, "valid list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'text', 'input_audio'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
        ({"temperature": "hot"}, "valid number"),
        ({"temperature": float("nan")}, "finite number"),
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"max_tokens": 10**6}, "max_tokens=1000000, and 20 are allowed"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"max_tokens": 2, "max_completion_tokens": 2}, "not both"),
        ({"n": 2}, "n: Input should be 1"),
        ({"tools": []}, "tools: Extra inputs are not permitted"),
        ({"stop": ["x"]}, "stop: Extra inputs are not permitted"),
        ({"stream": "yes"}, "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options are for streams"),
        ({"modalities": ["text", "audio"]}, "give audio, with a format"),
        ({"audio": {"voice": "default", "format": "wav"}}, "give audio, with a format"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "302 tokens, and 200 are allowed"),
    ],
)
def test_chats_that_are_refused(server: Running, changes: dict[str, Any], reason: str) -> None:
    assert reason in refused(server, "/v1/chat/completions", chat(**changes))


def test_a_stream_of_compressed_sound_is_refused(server: Running) -> None:
    asked = chat(modalities=["audio"], audio={"voice": "default", "format": "mp3"}, stream=True)
    assert "pcm16" in refused(server, "/v1/chat/completions", asked)


def test_sound_that_is_none(server: Running) -> None:
    def said(data: str) -> str:
        part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        return refused(server, "/v1/chat/completions", chat(messages=[{"role": "user", "content": [part]}]))

    assert "base64" in said("é")
    assert "sound file" in said(base64.b64encode(b"abc").decode())
    assert "sound file" in said("")


@pytest.mark.parametrize(
    ("sound", "reason"),
    [
        (b"", "sound file"),
        (b"RIFF" + bytes(100), "sound file"),
        (wave(NOISE[:0]), "empty"),
        (wave(np.where(np.arange(4_000) == 9, np.nan, NOISE), subtype="FLOAT"), "NaN"),
        (wave(np.where(np.arange(4_000) == 9, np.inf, NOISE), subtype="FLOAT"), "NaN or infinite"),
        (wave(NOISE * 1e38, subtype="FLOAT"), "full scale is 1"),
        (wave(np.zeros(33_000), subtype="PCM_U8"), "longer than the 2 s"),
        (wave(NOISE, rate=10), "at 10 Hz"),
        (wave(np.zeros((100, 9))), "9 channels"),
    ],
    ids=["nothing", "header", "no samples", "NaN", "infinite", "loud", "long", "rate", "channels"],
)
def test_clips_that_are_refused(server: Running, sound: bytes, reason: str) -> None:
    assert reason in refused(server, "/v1/audio/transcriptions", *form(sound))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"language": "en"}, "language: Extra inputs are not permitted"),
        ({"response_format": "srt"}, "'json' or 'text'"),
        ({"temperature": "nan"}, "finite number"),
        ({"stream": "perhaps"}, "valid boolean"),
    ],
)
def test_forms_that_are_refused(server: Running, fields: dict[str, str], reason: str) -> None:
    assert reason in refused(server, "/v1/audio/transcriptions", *form(wave(NOISE), **fields))


def test_speech_that_is_refused(server: Running) -> None:
    said = {"model": "tiny", "input": "two"}
    assert "voice: Input should be 'default'" in refused(
        server, "/v1/audio/speech", {**said, "voice": "alloy"}
    )
    assert "'mp3', 'wav'" in refused(server, "/v1/audio/speech", {**said, "response_format": "aac"})
    assert "speed: Input should be 1" in refused(server, "/v1/audio/speech", {**said, "speed": 2.0})
    assert "at least 1 character" in refused(server, "/v1/audio/speech", {**said, "input": ""})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 10_000, b"\xff\xfe", b'{"a": 1e999}', b"1" * 5_000, b"null", b'"hi"']
)
def test_garbage_is_refused(server: Running, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/audio/speech"):
        assert refused(server, path, body)


def test_other_models_paths_and_methods(server: Running) -> None:
    status, answer = post(server, "/v1/chat/completions", json.dumps(chat(model="\ud800")).encode())
    assert status in (400, 404)
    assert "error" in json.loads(answer)
    status, answer = post(server, "/v1/nothing", b"{}")
    assert (status, json.loads(answer)["error"]["message"]) == (404, "Not Found")
    status, answer = post(server, "/v1/models", b"{}")
    assert (status, json.loads(answer)["error"]["message"]) == (405, "Method Not Allowed")


@pytest.mark.parametrize("size", [200_001, 100_000_000])
def test_a_large_body_is_refused_while_it_comes(server: Running, size: int) -> None:
    status, answer = post(server, "/v1/chat/completions", bytes(size))
    assert (status, json.loads(answer)["error"]["code"]) == (413, "too_large")
    status, answer = post(server, "/v1/audio/transcriptions", *form(bytes(size)))
    assert (status, json.loads(answer)["error"]["code"]) == (413, "too_large")


def test_checkpoints_offer_what_their_modalities_are(pipe: mt.Pipeline) -> None:
    from starlette.testclient import TestClient

    only_text = mt.Pipeline(pipe.model, {"text": pipe.modalities["text"]})
    with TestClient(make_app(only_text, name="tiny")) as client:
        assert client.post("/v1/audio/speech", json={"model": "tiny", "input": "two"}).status_code == 404
        assert client.post("/v1/chat/completions", json=chat(max_tokens=3)).status_code == 200
        part = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
        answer = client.post(
            "/v1/chat/completions", json=chat(messages=[{"role": "user", "content": [part]}])
        )
        assert "does not read sound" in answer.json()["error"]["message"]
    with pytest.raises(ValueError, match="no tower has a modality of text"):
        make_app(mt.Pipeline(pipe.model, {"speech": pipe.modalities["speech"]}))
    both = mt.Pipeline(pipe.model, {"text": pipe.modalities["text"], "speech": Written()})
    with pytest.raises(ValueError, match="several towers are of text: text, speech"):
        make_app(both)
    with pytest.raises(ValueError, match="'nose' is none of text"):
        make_app(both, text_tower="nose")


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="seconds=0 must be more than 0"):
        Limits(seconds=0)


def test_an_answer_that_takes_too_long(pipe: mt.Pipeline) -> None:
    with running(make_app(pipe, name="tiny", limits=Limits(seconds=1e-6))) as server:
        status, answer = post(server, "/v1/chat/completions", json.dumps(chat()).encode())
        assert (status, json.loads(answer)["error"]["code"]) == (504, "timeout")
