"""Several threads can use one model at the same time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import multitower as mt
from models import EXAMPLES, causal_lm, pair, segment


@pytest.fixture
def threads_that_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def fusion() -> mt.FusedModel:
    return pair(causal_lm("llama"), causal_lm("gpt2", depth=4, vocab_size=14), gates=True)


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@torch.no_grad()
def logits(model: mt.FusedModel, example: list) -> dict[str, Any]:
    return {name: each.tolist() for name, each in model(**mt.collate([example])).logits.items()}


def test_a_forward_in_the_midst_of_another_disturbs_neither() -> None:
    model, calls, found = fusion(), threading.local(), {}
    expected = [logits(model, example) for example in EXAMPLES]

    def another(*_: Any) -> None:
        calls.count = getattr(calls, "count", 0) + 1
        if calls.count == 2 and threading.current_thread() is outer:  # the second call is from the head
            inner = threading.Thread(target=lambda: found.update(inner=logits(model, EXAMPLES[1])))
            inner.start()
            inner.join()

    model.unimodal("text").get_input_embeddings().register_forward_hook(another)
    outer = threading.Thread(target=lambda: found.update(outer=logits(model, EXAMPLES[0])))
    outer.start()
    outer.join()
    assert found == {"outer": expected[0], "inner": expected[1]}


@pytest.mark.usefixtures("threads_that_take_turns_often")
def test_forwards_in_threads() -> None:
    model = fusion()
    expected = [logits(model, example) for example in EXAMPLES]
    for found in in_threads(4, lambda _: [logits(model, example) for example in EXAMPLES * 5]):
        assert found == expected * 5


@pytest.mark.usefixtures("threads_that_take_turns_often")
def test_gradients_in_threads() -> None:
    model = fusion()
    batches = [mt.collate([example]) for example in EXAMPLES]
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)

    def gradients(number: int) -> dict[str, Any]:
        loss = model(**batches[number % len(batches)]).loss
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return {
            name: None if each is None else each.tolist() for name, each in zip(names, found, strict=True)
        }

    expected = [gradients(number) for number in range(4)]
    assert in_threads(4, gradients) == expected


@pytest.mark.usefixtures("threads_that_take_turns_often")
@pytest.mark.parametrize("output", [["text", "speech"], [("text", "speech")]])
def test_decoding_in_threads(output: list) -> None:
    model = fusion()
    given = [[segment("speech", 5, 6, 7, 8)], [segment("text", 4, 5), segment("speech", 9, 3)]]

    def decode(number: int) -> list[str]:
        return [str(model.generate([given[number % 2]], output, max_new_tokens=5)) for _ in range(2)]

    expected = [decode(number) for number in range(2)]
    assert in_threads(8, decode) == expected * 4
