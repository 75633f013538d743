"""Mutations of the files of a checkpoint: of JSON, of safetensors headers and bodies, of raw bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    10**9,
    2**63,
    -(2**64),
    10**40,
    0.5,
    1e308,
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "loader://x",
    "a\0b",
    "\ud800",
    "x" * 10_000,
    "(a+)+$",
    [],
    [[]],
    [0, 1],
    [None],
    [10**9, 10**9],
    {},
    {"": None},
    {"__class__": "os.system"},
]
TEXTS = [
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 5000 + "]" * 5000,
    '{"a":1,"a":2}',
    "0x1",
    "// x",
    "{" * 99,
]

Mutated = tuple[str, bytes]


def mutate(name: str, data: bytes, chance: random.Random) -> Mutated:
    """Return a description of one change to a file, and the changed file."""
    kinds = [_raw]
    if name.endswith(".json"):
        kinds = [_json, _json, _json, _text, _raw]
    elif name.endswith(".safetensors"):
        kinds = [_header, _header, _header_length, _body, _body, _raw]
    kind = chance.choice(kinds)
    said, changed = kind(data, chance)
    return f"{name}: {kind.__name__.strip('_')} {said}", changed


def _raw(data: bytes, chance: random.Random) -> Mutated:
    at, length = chance.randrange(len(data) + 1), chance.choice([1, 2, 8, 100])
    ways: list[Callable[[], bytes]] = [
        lambda: data[:at],
        lambda: data[:at] + data[at + length :],
        lambda: data[:at] + chance.randbytes(length) + data[at:],
        lambda: data[:at] + chance.randbytes(length) + data[at + length :],
        lambda: data[:at] + data[at : at + length] * 2 + data[at + length :],
        lambda: b"",
        lambda: data + chance.randbytes(length),
        lambda: _flipped(data, min(at, len(data) - 1), chance),
    ]
    way = chance.randrange(len(ways))
    return f"way {way} at {at}, {length} bytes", ways[way]()


def _flipped(data: bytes, at: int, chance: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def _json(data: bytes, chance: random.Random) -> Mutated:
    document = json.loads(data)
    said = _change(document, chance)
    return said, json.dumps(document).encode()


def _text(data: bytes, chance: random.Random) -> Mutated:
    """Replace a value by text that no JSON library would write."""
    document = json.loads(data)
    places = list(_places(document))
    container, key = chance.choice(places)
    container[key] = "\0here\0"
    text = chance.choice(TEXTS)
    return f"{key!r} = {text[:20]}", json.dumps(document).replace('"\\u0000here\\u0000"', text).encode()


def _change(document: Any, chance: random.Random) -> str:
    container, key = chance.choice(list(_places(document)))
    way = chance.choice(["put", "put", "put", "take", "rename", "add", "swap", "count", "repeat"])
    value = chance.choice(NASTY)
    if way == "put":
        container[key] = value
    elif way == "take":
        del container[key]
    elif way == "rename" and isinstance(container, dict):
        container[str(value)] = container.pop(key)
    elif way == "add" and isinstance(container, dict):
        container[chance.choice(["x", "adapters", "shared_with", "auto_map", "peft", "../x"])] = value
    elif way == "swap":
        other, name = chance.choice(list(_places(document)))
        container[key] = json.loads(json.dumps(other[name]))
        value = name
    elif way == "count" and isinstance(container[key], int):
        container[key] += chance.choice([-1, 1, 7, 10**6])
        value = container[key]
    else:
        container[key] = [container[key]] * 3
    return f"{way} {key!r} {str(value)[:40]!r}"


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        yield document, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _split(data: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def _joined(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def _header(data: bytes, chance: random.Random) -> Mutated:
    header, body = _split(data)
    said, changed = chance.choice([_json, _json, _text, _raw])(header, chance)
    return said, _joined(changed, body)


def _header_length(data: bytes, chance: random.Random) -> Mutated:
    length = int.from_bytes(data[:8], "little")
    lie = chance.choice([0, 1, length - 1, length + 1, 2 * length, 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1])
    return f"{lie}", lie.to_bytes(8, "little") + data[8:]


def _body(data: bytes, chance: random.Random) -> Mutated:
    header, body = _split(data)
    at = chance.randrange(len(body))
    return f"bit at {at}", _joined(header, _flipped(body, at, chance))
