from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import multitower as mt
from letters import STEPS, Letters, Tune, pipe_of_other_edges, simple_pipe
from models import causal_lm, pair, segment
from multitower.pipeline.streaming import in_a_thread, stream


class Pieces(Letters):
    """Tokens of spaces, newlines, and whole or partial UTF-8 characters; a leading space is dropped."""

    name, vocab_size = "pieces", 11
    TABLE = (b"", b"", b"", b"a", b" ", b"\n", b"\xc3", b"\xa9", "你".encode(), b"\xe4\xbd", b" b")

    def decode(self, tokens: Tensor) -> str:
        raw = b"".join(self.TABLE[token] for token in tokens.tolist() if token < 11)
        return raw.decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_the_pieces_of_a_stream_are_the_text(kind: str) -> None:
    model = pair(gates=True) if kind == "plain" else pair(causal_lm("llama"), gates=True)
    pipe, given, several = mt.Pipeline(model, {"text": Pieces()}), [segment("speech", 5, 6)], 0
    likely = {(token,): 3.0 for token in range(3, 11)}
    options = {"do_sample": True, "max_new_tokens": 24, "sequence_bias": likely}
    for seed in range(12):
        torch.manual_seed(seed)
        whole = pipe(given, "text", **options)
        torch.manual_seed(seed)
        pieces = list(pipe.stream(given, "text", **options))
        assert "".join(pieces) == whole
        assert all(pieces)
        several += len(pieces) > 2
    assert several > 6


class Words(Letters):
    name = "words"

    def decode(self, tokens: Tensor) -> str:
        return "".join(f"w{token} " for token in tokens.tolist() if token > 2)


class Count(transformers.StoppingCriteria):
    def __init__(self, fail_at: int | None = None) -> None:
        self.steps, self.fail_at = 0, fail_at

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("out of memory")
        return torch.zeros(len(input_ids), dtype=torch.bool)


ENDLESS = {"do_sample": True, "eos_token_id": None, "max_new_tokens": 1000}


def test_a_stream_that_is_left_stops_decoding() -> None:
    pipe, count = mt.Pipeline(pair(gates=True), {"text": Words()}), Count()
    threads = threading.active_count()
    pieces = pipe.stream([segment("speech", 5)], "text", stopping_criteria=[count], **ENDLESS)
    assert next(pieces).startswith("w")
    pieces.close()
    steps = count.steps
    assert 1 <= steps < 1000
    assert threading.active_count() == threads
    assert not pipe.model.training
    assert count.steps == steps


def test_what_fails_in_the_thread_is_raised_where_the_text_is_read() -> None:
    pipe = mt.Pipeline(pair(gates=True), {"text": Words()})
    pieces = pipe.stream([segment("speech", 5)], "text", stopping_criteria=[Count(fail_at=9)], **ENDLESS)
    found = []
    with pytest.raises(RuntimeError, match="out of memory"):
        found.extend(pieces)
    assert found
    with pytest.raises(ValueError, match="num_beamz"):
        list(pipe.stream([segment("speech", 5)], "text", num_beamz=2))


def test_a_stream_of_other_edges() -> None:
    other_edges = pipe_of_other_edges()
    given = [("speech", [5, 6])]
    assert "".join(other_edges.stream(given, "text", **STEPS)) == other_edges(given, "text", **STEPS)


def test_a_stream_opens_with_what_its_begin_token_says() -> None:
    pipe, given = mt.Pipeline(pair(gates=True), {"text": Words()}), [segment("speech", 5, 6)]
    options = {"bos_token_id": {"text": 7}, "max_new_tokens": 5}
    whole = pipe(given, "text", **options)
    assert whole.startswith("w7 ")
    assert "".join(pipe.stream(given, "text", **options)) == whole


class Surroundings(transformers.StoppingCriteria):
    def __init__(self) -> None:
        self.seen: set[tuple[Any, ...]] = set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        cast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self.seen.add((*cast, torch.is_autocast_cache_enabled(), torch.get_default_device().type, name.get()))
        return torch.zeros(len(input_ids), dtype=torch.bool, device="cpu")


name: ContextVar[str] = ContextVar("name", default="none")


def test_a_stream_is_decoded_under_what_its_caller_is_under() -> None:
    pipe, given = mt.Pipeline(pair(causal_lm("llama"), gates=True), {"text": Words()}), [segment("speech", 5)]
    options = {"max_new_tokens": 3, "eos_token_id": None, "suppress_tokens": [0, 1, 2]}
    plain, cast, apart = (Surroundings() for _ in range(3))
    whole = pipe(given, "text", stopping_criteria=[plain], **options)
    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        token = name.set("some")
        pieces = pipe.stream(given, "text", stopping_criteria=[cast], **options)
        name.reset(token)
    assert "".join(pieces)
    assert "".join(pipe.stream(given, "text", stopping_criteria=[apart], **options)) == whole
    assert plain.seen == apart.seen == {(False, torch.bfloat16, True, "cpu", "none")}
    assert cast.seen == {(True, torch.float16, False, "cpu", "some")}


@pytest.mark.parametrize("setting", ["with", "for good"])
def test_the_default_device_of_a_stream_is_its_callers(setting: str) -> None:
    found = []

    def generate(**unused: Any) -> None:
        found.append(torch.empty(1).device.type)

    with torch.device("meta") if setting == "with" else nullcontext():
        if setting == "for good":
            torch.set_default_device("meta")
        try:
            pieces = stream(generate, Words(), None, {})
        finally:
            if setting == "for good":
                torch.set_default_device(None)
    assert list(pieces) == []
    list(stream(generate, Words(), None, {}))
    assert found == ["meta", "cpu"]


@pytest.mark.parametrize(
    ("output", "options", "error", "reason"),
    [
        ("speech", {}, TypeError, "modality 'tune' does not say how to decode in pieces"),
        (["text"], {}, TypeError, "give its name as output"),
        ("smell", {}, ValueError, "there is no tower 'smell'"),
        ("text", {"streamer": object()}, ValueError, "stream has a streamer of its own"),
        ("text", {"max_new_tokens": {"txt": 3}}, ValueError, "'txt': ...}: there is no such tower"),
    ],
)
def test_a_stream_that_cannot_be_is_refused_at_once(
    output: Any, options: dict, error: type[Exception], reason: str
) -> None:
    pipe = simple_pipe()
    with pytest.raises(error, match=reason):
        pipe.stream([("speech", [5])], output, **options)


class Melody(Tune):
    """Streams notes in pairs, as soon as there are two."""

    name = "melody"

    def decode_stream(self, pieces: Iterable[Tensor]) -> Iterator[list[int]]:
        held: list[int] = []
        for piece in pieces:
            held += self.decode(piece)
            while len(held) > 1:
                yield held[:2]
                held = held[2:]
        if held:
            yield held


@pytest.mark.parametrize("kind", ["plain", "llama"])
def test_other_raw_data_come_as_their_modality_says(kind: str) -> None:
    model = pair(gates=True) if kind == "plain" else pair(causal_lm("llama"), gates=True)
    pipe = mt.Pipeline(model, {"speech": Melody(), "text": Letters()})
    options = {"max_new_tokens": 7, "do_sample": False, "suppress_tokens": [1, 2]}
    whole = pipe([("text", "ab")], "speech", **options)
    pieces = list(pipe.stream([("text", "ab")], "speech", **options))
    assert len(pieces) == (len(whole) + 1) // 2 > 2
    assert [note for piece in pieces for note in piece] == whole


def test_a_melody_that_is_left_stops_decoding() -> None:
    pipe, count = mt.Pipeline(pair(gates=True), {"speech": Melody(), "text": Letters()}), Count()
    pieces = pipe.stream([segment("text", 5)], "speech", stopping_criteria=[count], **ENDLESS)
    next(pieces)
    pieces.close()
    assert count.steps < 200


async def _all(pieces: AsyncIterator[Any]) -> list:
    return [piece async for piece in pieces]


@pytest.mark.parametrize("output", ["text", "speech"])
def test_pieces_are_waited_for_without_holding_up_others(output: str) -> None:
    pipe = mt.Pipeline(pair(gates=True), {"speech": Melody(), "text": Words()})
    given = [("text", "ab"), ("speech", [5])]
    expected = list(pipe.stream(given, output, **STEPS))

    async def both() -> list:
        return await asyncio.gather(*(_all(pipe.astream(given, output, **STEPS)) for _ in range(3)))

    assert asyncio.run(both()) == [expected] * 3
    assert expected


def test_a_piece_may_be_none() -> None:
    async def waited_for() -> list:
        return await _all(in_a_thread(lambda: (each for each in (1, None, 2))))

    assert asyncio.run(waited_for()) == [1, None, 2]


def test_a_task_that_is_cancelled_stops_decoding() -> None:
    pipe, count = mt.Pipeline(pair(gates=True), {"text": Words()}), Count()

    async def leave() -> None:
        pieces = pipe.astream([segment("speech", 5)], "text", stopping_criteria=[count], **ENDLESS)
        task = asyncio.ensure_future(_all(pieces))
        while not count.steps:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    steps = count.steps
    time.sleep(0.05)
    assert count.steps == steps < 500


def test_what_a_stream_raises_reaches_the_task() -> None:
    pipe = simple_pipe()
    with pytest.raises(ValueError, match="there is no tower 'smell'"):
        asyncio.run(_all(pipe.astream([("speech", [5])], "smell")))
