"""Rows join and leave a batch, and each gets the same tokens as alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import pytest
import torch

import multitower as mt
from models import causal_lm, pair
from multitower.cli.server.engine import Decoding, Engine, Job, Piece
from multitower.generate.session import Session
from multitower.pipeline.codec import Codec
from multitower.testing import tiny_tower

OUTPUTS = ("speech", "text")


@dataclass
class Asked:
    """A job and its events."""

    job: Job
    events: Queue[Any] = field(default_factory=Queue)

    seen: list[Any] = field(default_factory=list)

    def wait(self) -> Any:
        """Wait for the next event."""
        self.seen.append(self.events.get(timeout=30))
        return self.seen[-1]

    def rest(self) -> list[Any]:
        """Wait for the end of the job; return all events."""
        while not self.seen or isinstance(self.seen[-1], Piece):
            self.wait()
        return self.seen

    def tokens(self) -> dict[str, list[int]]:
        *pieces, end = self.rest()
        assert isinstance(end, Session), end
        found: dict[str, list[int]] = {}
        for piece in pieces:
            found.setdefault(piece.tower, []).extend(piece.tokens.tolist())
        return found


@pytest.fixture(scope="module")
def model() -> mt.FusedModel:
    return pair(causal_lm("llama"), causal_lm("llama", vocab_size=14, seed=3), gates=True)


@pytest.fixture
def engine(model: mt.FusedModel) -> Iterator[Engine]:
    engine = Engine(Codec(model, {}), OUTPUTS, chunk=3)
    yield engine
    engine.close()


def asked(
    model: mt.FusedModel, number: int, *wanted: Decoding, seconds: float = 60, lasting: bool = True
) -> Asked:
    draw = random.Random(number)
    given = [
        mt.Segment(name, [1, *(draw.randrange(3, 14) for _ in range(draw.randrange(1, 20))), 2])
        for name in draw.choices(OUTPUTS, k=draw.randrange(1, 4))
    ]
    events: Queue[Any] = Queue()
    session = model.session(outputs=OUTPUTS)
    job = Job(session, given, wanted, seconds=seconds, emit=events.put, lasting=lasting)
    return Asked(job, events)


def wanted(number: int) -> list[Decoding]:
    draw = random.Random(-number)
    return [Decoding(name, draw.randrange(1, 30)) for name in draw.sample(OUTPUTS, draw.randrange(1, 3))]


def test_each_gets_what_it_gets_alone(model: mt.FusedModel, engine: Engine) -> None:
    several = [asked(model, number, *wanted(number), lasting=number % 2 == 0) for number in range(12)]
    for each in several[:5]:
        engine.submit(each.job)
    several[0].wait()  # so the others join while these are running
    for each in several[5:]:
        engine.submit(each.job)
    for number, each in enumerate(several):
        outputs = wanted(number)
        most = {one.tower: one.most for one in outputs}
        ((alone),) = model.generate(
            [asked(model, number).job.given],
            [one.tower for one in outputs],
            do_sample=False,
            max_new_tokens=most,
        )
        expected = {segment.tower: torch.as_tensor(segment.tokens).tolist() for segment in alone}
        assert each.tokens() == expected, number


def test_rows_decode_together(model: mt.FusedModel) -> None:
    steps: list[int] = []
    engine = Engine(Codec(model, {}), OUTPUTS, chunk=3, observe=lambda _, rows, seconds: steps.append(rows))
    try:
        several = [asked(model, number, Decoding("text", 12)) for number in range(6)]
        for each in several:
            engine.submit(each.job)
        for each in several:
            each.tokens()
    finally:
        engine.close()
    assert max(steps) >= 5


def test_one_that_fails_harms_no_other(model: mt.FusedModel, engine: Engine) -> None:
    good, bad = asked(model, 1, Decoding("text", 9)), asked(model, 2, Decoding("text", 9))
    bad.job.given = [mt.Segment("text", [1, 99, 2])]
    alone = asked(model, 1, Decoding("text", 9))
    for each in (good, bad):
        engine.submit(each.job)
    (error,) = bad.rest()
    assert isinstance(error, ValueError)
    assert "99" in str(error)
    engine.submit(alone.job)
    assert good.tokens() == alone.tokens()


def test_what_is_cancelled_is_let_go(model: mt.FusedModel, engine: Engine) -> None:
    endless = endless_of(model)
    engine.submit(endless.job)
    endless.wait()
    endless.job.cancel()
    for _ in range(2):  # the second starts after the last step that may include the cancelled job
        after = asked(model, 4, Decoding("text", 3))
        engine.submit(after.job)
        after.rest()
    count = endless.events.qsize()
    after = asked(model, 4, Decoding("text", 30))
    engine.submit(after.job)
    after.rest()
    assert endless.events.qsize() == count


def test_what_takes_too_long_ends(model: mt.FusedModel, engine: Engine) -> None:
    endless = endless_of(model, seconds=0.5)
    engine.submit(endless.job)
    *pieces, error = endless.rest()
    assert pieces
    assert isinstance(error, TimeoutError)
    assert "0.5 s" in str(error)


def endless_of(model: mt.FusedModel, seconds: float = 60) -> Asked:
    """Return a job that does not end by itself: each answer is followed by another."""
    each = asked(model, 3, Decoding("text", 10**9), seconds=seconds)
    each.job.wanted = [Decoding("text", 10**9)] * 1000
    return each


def test_a_tower_without_room_ends_the_answer() -> None:
    model = pair(gates=True)
    model.tower("text").hard_limit = 10
    engine = Engine(Codec(model, {}), OUTPUTS, chunk=4)
    try:
        short, full = (asked(model, 1, Decoding("text", 50), lasting=False) for _ in range(2))
        short.job.given = [mt.Segment("text", [1, 5, 2]), mt.Segment("speech", [1, 6, 2])]
        full.job.given = [mt.Segment("text", [1, *[5] * 8, 2])]
        engine.submit(short.job)
        engine.submit(full.job)
        assert len(short.tokens()["text"]) <= 7
        (error,) = full.rest()
        assert "10 tokens, 10 of which are taken" in str(error)
    finally:
        engine.close()


def test_a_tower_that_forgets_has_room_for_each_segment() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", tiny_tower(1))
    graph.add_tower("text", tiny_tower(2), memory="segment")
    graph.add_link("speech", "text", interleave=1)
    model = graph.compile()
    model.tower("text").hard_limit = 10
    engine = Engine(Codec(model, {}), OUTPUTS, chunk=4)
    try:
        each = asked(model, 1, Decoding("text", 5))
        each.job.given = [mt.Segment("text", [1, *[5] * 8, 2]), mt.Segment("speech", [1, 6, 2])]
        engine.submit(each.job)
        assert 2 <= len(each.tokens()["text"]) <= 6
    finally:
        engine.close()


def test_a_closed_engine_says_so(model: mt.FusedModel) -> None:
    engine = Engine(Codec(model, {}), OUTPUTS)
    under_way, late = endless_of(model), asked(model, 1, Decoding("text", 9))
    engine.submit(under_way.job)
    under_way.wait()
    engine.close()
    engine.submit(late.job)
    assert not engine.alive
    for each in (under_way, late):
        assert isinstance(each.rest()[-1], ConnectionError)


# The error ends its thread.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_one_waits_for_an_engine_that_broke(model: mt.FusedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(Codec(model, {}), OUTPUTS)

    def broken(job: Job) -> Any:
        raise MemoryError

    monkeypatch.setattr(engine, "_key", broken)
    for _ in range(2):
        each = asked(model, 1, Decoding("text", 9))
        engine.submit(each.job)
        assert isinstance(each.rest()[-1], ConnectionError)
    engine.close()
    assert not engine.alive


def test_what_counts_from_the_beginning_is_refused() -> None:
    text = causal_lm("llama")
    text.generation_config.min_new_tokens = 3
    with pytest.raises(ValueError, match="min_new_tokens: a server decodes tower 'text'"):
        Engine(Codec(pair(text), {}), OUTPUTS)


def test_beams_are_refused() -> None:
    text = causal_lm("llama")
    text.generation_config.num_beams = 3
    with pytest.raises(ValueError, match="beam"):
        Engine(Codec(pair(text), {}), OUTPUTS)
