"""Randomly damaged requests get a response or an error message, never a traceback."""

from __future__ import annotations

import base64
import copy
import io
import json
import random
from typing import Any

import pytest

from serving import Running
from serving import send as post

np = pytest.importorskip("numpy", reason="needs numpy")
soundfile = pytest.importorskip("soundfile", reason="needs soundfile")

pytestmark = [
    # Mutated uploads may be truncated audio, which is read as far as it goes.
    pytest.mark.filterwarnings("ignore:.* is cut off:UserWarning"),
    # A refused upload leaves starlette's temporary file to the garbage collector.
    pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning"),
]
"""Truncated sounds are read with a warning; files of unfinished forms are closed by Python."""

ODD: list[Any] = [
    None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "x" * 5_000, "\ud800", "\x00", [], {},
    [[]], [None], {"type": "text"}, {"": {}}, "tiny", "audio", [{"role": "user", "content": "a"}],
]  # fmt: skip
"""Replacements for a value."""


def places(document: Any) -> list[tuple[Any, Any]]:
    """Return every container of a document with each of its keys."""
    keys = list(document) if isinstance(document, dict) else range(len(document))
    found = [(document, key) for key in keys]
    inner = [document[key] for key in keys if isinstance(document[key], dict | list)]
    return found + [place for each in inner for place in places(each)]


def mutated_json(draw: random.Random, document: dict[str, Any]) -> bytes:
    document = copy.deepcopy(document)
    for _ in range(draw.randrange(1, 4)):
        holder, key = draw.choice(places(document) or [(document, "model")])
        change = draw.randrange(4)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[draw.choice(["", "stop", "\ud800", "x" * 99])] = draw.choice(ODD)
        else:
            holder[key] = copy.deepcopy(draw.choice(ODD))
    return (
        mutated_bytes(draw, json.dumps(document).encode())
        if draw.random() < 0.3
        else json.dumps(document).encode()
    )


def mutated_bytes(draw: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(draw.randrange(1, 8)):
        place = draw.randrange(len(damaged) + 1)
        change = draw.randrange(4)
        if change == 0:
            del damaged[place : place + draw.randrange(1, 200)]
        elif change == 1:
            damaged[place:place] = draw.randbytes(draw.randrange(1, 20))
        elif change == 2:
            damaged[place : place + 4] = draw.choice(
                [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\r\n\r\n"]
            )
        else:
            damaged[place:place] = damaged[: draw.randrange(1, 100)]
    return bytes(damaged)


def sounds() -> list[bytes]:
    """Return sound files of several kinds."""
    noise, found = np.random.default_rng(0).normal(0, 0.1, 800), []
    for kind, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", None), ("MP3", None)):
        file = io.BytesIO()
        soundfile.write(file, noise, 16_000, format=kind, subtype=subtype)
        found.append(file.getvalue())
    return found


def requests(count: int, seed: int) -> list[tuple[str, bytes, str]]:
    """Return damaged requests: the path, the body, and its type."""
    draw, clips, found = random.Random(seed), sounds(), []
    for _ in range(count):
        clip = draw.choice(clips)
        sound = {"data": base64.b64encode(clip).decode(), "format": "wav"}
        content = [{"type": "text", "text": "two"}, {"type": "input_audio", "input_audio": sound}]
        whole = {
            "model": "tiny",
            "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": content}],
            "max_tokens": 2,
            "temperature": 0.0,
            "stream": draw.random() < 0.3,
        }
        spoken = {"model": "tiny", "input": "two", "voice": "default", "response_format": "wav"}
        kind = draw.choice(["application/json"] * 9 + ["text/plain", "", "application/json; charset=\xff"])
        choice = draw.randrange(4)
        if choice == 0:
            found.append(("/v1/chat/completions", mutated_json(draw, whole), kind))
        elif choice == 1:
            sound["data"] = base64.b64encode(mutated_bytes(draw, clip)).decode()
            found.append(("/v1/chat/completions", json.dumps(whole).encode(), kind))
        elif choice == 2:
            found.append(("/v1/audio/speech", mutated_json(draw, spoken), kind))
        else:
            fields = "".join(
                f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
                for name, value in (("model", "tiny"), ("stream", draw.choice(["true", "false", "é", ""])))
            )
            head = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
            body = (fields + head).encode() + mutated_bytes(draw, clip) + b"\r\n--x--\r\n"
            body = mutated_bytes(draw, body) if draw.random() < 0.5 else body
            boundary = draw.choice(["x"] * 8 + ["y", "", "x" * 500])
            found.append(("/v1/audio/transcriptions", body, f"multipart/form-data; boundary={boundary}"))
    return found


def check(server: Running, count: int, seed: int) -> dict[int, int]:
    """Send damaged requests; return how many got each status."""
    statuses: dict[int, int] = {}
    for path, body, kind in requests(count, seed):
        status, answer = post(server, path, body, kind)
        statuses[status] = statuses.get(status, 0) + 1
        case = (path, body[:2_000], kind, answer)
        assert status == 200 or 400 <= status < 500, case
        assert b"Traceback" not in answer, case
        if status != 200:
            assert json.loads(answer)["error"]["message"], case
    assert post(server, "/v1/chat/completions", GOOD, "application/json")[0] == 200
    return statuses


GOOD = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "two"}]}).encode()


def test_a_hundred_damaged_requests(server: Running) -> None:
    statuses = check(server, 100, seed=0)
    assert statuses[400] > 50
    assert server.metrics["multitower_requests_under_way"] == 0


@pytest.mark.slow
def test_a_thousand_damaged_requests(server: Running) -> None:
    statuses = check(server, 1_000, seed=1)
    assert statuses[400] > 500
    assert server.metrics["multitower_requests_under_way"] == 0
