"""Each endpoint, called by OpenAI's client over loopback, returns what the pipeline returns."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import multitower as mt
from serving import LIMIT, Running

soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
soxr = pytest.importorskip("soxr", reason="needs soxr")
openai = pytest.importorskip("openai", reason="needs OpenAI's client")

GREEDY = {"do_sample": False, "max_new_tokens": LIMIT}


def test_the_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "multitower"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_transcription(client: Any, pipe: mt.Pipeline, clip: Path) -> None:
    expected = pipe([("speech", str(clip))], output="text", **GREEDY)
    answer = client.audio.transcriptions.create(model="tiny", file=clip)
    assert answer.text == expected
    assert answer.usage.output_tokens == LIMIT
    assert client.audio.transcriptions.create(model="tiny", file=clip, response_format="text") == expected


def test_a_transcription_comes_in_pieces(client: Any, pipe: mt.Pipeline, clip: Path) -> None:
    *deltas, done = client.audio.transcriptions.create(model="tiny", file=clip, stream=True)
    assert len(deltas) > 2
    assert {delta.type for delta in deltas} == {"transcript.text.delta"}
    assert done.type == "transcript.text.done"
    assert "".join(delta.delta for delta in deltas) == done.text
    assert done.text == pipe([("speech", str(clip))], output="text", **GREEDY)


def test_speech_in_every_form(client: Any, pipe: mt.Pipeline) -> None:
    expected = pipe([("text", "two")], output="speech", **GREEDY)
    for form in ("wav", "flac"):
        said = client.audio.speech.create(model="tiny", voice="default", input="two", response_format=form)
        samples, rate = soundfile.read(io.BytesIO(said.content), dtype="float32")
        assert rate == 16_000
        np.testing.assert_allclose(samples, expected, atol=1e-4)
    said = client.audio.speech.create(model="tiny", voice="default", input="two", response_format="pcm")
    assert abs(len(said.content) / 2 - len(expected) * 24_000 / 16_000) < 0.01 * 24_000
    said = client.audio.speech.create(model="tiny", voice="default", input="two")
    assert soundfile.info(io.BytesIO(said.content)).format == "MP3"


def test_speech_is_sent_while_it_is_decoded(client: Any, pipe: mt.Pipeline, server: Running) -> None:
    asked = {"model": "tiny", "voice": "default", "input": "two", "response_format": "pcm"}
    with client.audio.speech.with_streaming_response.create(**asked) as answer:
        assert answer.headers["content-type"] == "audio/pcm;rate=24000"
        parts = list(answer.iter_bytes())
    samples = np.frombuffer(b"".join(parts), dtype="<i2") / 32767
    expected = np.concatenate(list(pipe.stream([("text", "two")], output="speech", **GREEDY)))
    whole = soxr.resample(expected, 16_000, 24_000).clip(-1, 1)
    assert abs(len(samples) - len(whole)) < 100
    shared = min(len(samples), len(whole))
    np.testing.assert_allclose(samples[:shared], whole[:shared], atol=0.01)
    with pytest.raises(openai.BadRequestError, match="the input has 898 tokens, and 200 are allowed"):
        client.audio.speech.create(**{**asked, "input": "two " * 224})
    with client.audio.speech.with_streaming_response.create(**asked):
        pass  # disconnect without reading
    server.wait_until_idle()


def test_a_chat_of_text_and_sound(client: Any, pipe: mt.Pipeline, clip: Path) -> None:
    sound = {"data": base64.b64encode(clip.read_bytes()).decode(), "format": "wav"}
    messages = [
        {"role": "system", "content": "sum up"},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": sound}]},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "more"}]},
    ]
    turns = [("text", "sum up"), ("speech", str(clip)), ("text", "one"), ("text", "and"), ("text", "more")]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
    expected = pipe(turns, output="text", do_sample=False, max_new_tokens=12)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    *chunks, last = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage == answer.usage
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"


def test_a_temperature_is_honoured(client: Any) -> None:
    messages = [{"role": "user", "content": "two"}]

    def answer(**choices: float) -> str:
        found = client.chat.completions.create(model="tiny", messages=messages, **choices)
        return found.choices[0].message.content

    assert len({answer(temperature=1.5) for _ in range(4)}) > 1
    assert answer(temperature=0.5, top_p=1e-6) == answer(), "only the likeliest token is left"


def test_a_chat_answered_in_sound(client: Any, pipe: mt.Pipeline) -> None:
    messages = [{"role": "user", "content": "two"}]
    text, sound = pipe([("text", "two")], output=["text", "speech"], **GREEDY)
    asked = {"model": "tiny", "messages": messages, "modalities": ["text", "audio"]}
    answer = client.chat.completions.create(**asked, audio={"voice": "default", "format": "wav"})
    said = answer.choices[0].message.audio
    assert said.transcript == text
    samples, _ = soundfile.read(io.BytesIO(base64.b64decode(said.data)), dtype="float32")
    np.testing.assert_allclose(samples, sound, atol=1e-4)
    chunks = list(
        client.chat.completions.create(**asked, audio={"voice": "default", "format": "pcm16"}, stream=True)
    )
    pieces = [chunk.choices[0].delta.audio for chunk in chunks if chunk.choices[0].delta.audio]
    assert "".join(piece.transcript or "" for piece in pieces) == text
    assert sum(bool(piece.data) for piece in pieces) > 1, "the sound came in one piece"
    pcm = b"".join(base64.b64decode(piece.data or "") for piece in pieces)
    assert abs(len(pcm) / 2 - len(sound) * 24_000 / 16_000) < 100


def test_health_and_metrics(server: Running, client: Any) -> None:
    with urllib.request.urlopen(f"{server.url}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    before = server.metrics
    messages = [{"role": "user", "content": "two"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=7)
    after = server.metrics
    for name, more in (
        ('multitower_decoded_tokens_total{tower="text"}', answer.usage.completion_tokens),
        ('multitower_given_tokens_total{tower="text"}', answer.usage.prompt_tokens),
        ('multitower_requests_total{endpoint="/v1/chat/completions",status="200"}', 1),
    ):
        assert after[name] - before[name] == more, name
    assert after["multitower_requests_under_way"] == 0
