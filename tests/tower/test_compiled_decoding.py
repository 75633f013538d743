"""Compiled decoding is compiled once for all calls, and correct in each of them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import multitower as mt
from models import causal_lm, pair, segment


def compiled(backend: Any = "eager", **options: Any) -> dict[str, Any]:
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config, "eos_token_id": None, **options}


def fusion(family: str = "llama", **options: Any) -> mt.FusedModel:
    return pair(causal_lm(family), gates=True, **options)


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 14, (count,), generator=generator).tolist()


def given(rows: int, seed: int, prompts: tuple[int, ...] = (3, 5, 2, 0)) -> list[mt.batch.Example]:
    """Return rows with sources of different lengths, some with a prompt."""
    lengths = [prompts[(seed + row) % len(prompts)] for row in range(rows)]
    return [
        [
            *([segment("text", *tokens(length, seed))] if length else []),
            segment("speech", *tokens(3 + (5 * seed + 3 * row) % 17, seed + row)),
        ]
        for row, length in enumerate(lengths)
    ]


def lists(decoded: Any) -> list[list[list[int]]]:
    return [[part.tokens.tolist() for part in row] for row in decoded]


def decode(model: mt.FusedModel, examples: Any, output: Any = ("text",), **options: Any) -> Any:
    torch.manual_seed(0)
    return lists(model.generate(examples, list(output), **compiled(**options)))


def eagerly(model: mt.FusedModel, examples: Any, output: Any = ("text",), **options: Any) -> Any:
    torch.manual_seed(0)
    return lists(model.generate(examples, list(output), eos_token_id=None, **options))


@pytest.fixture(autouse=True)
def nothing_is_compiled_before_and_something_after() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize(
    ("rows", "options", "link"),
    [
        (1, {}, {}),
        pytest.param(3, {}, {"position": "rotary"}, marks=pytest.mark.slow),
        pytest.param(1, {}, {"window": 4}, marks=pytest.mark.slow),
        pytest.param(
            2,
            {"do_sample": True, "num_return_sequences": 3},
            {"position": "rotary"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_later_calls_compile_nothing_and_read_their_own_source(
    rows: int, options: dict[str, Any], link: dict[str, Any]
) -> None:
    model = fusion(**link)
    for seed in range(3):
        decode(model, given(rows, seed), max_new_tokens=5 + seed, **options)
    found = []
    for seed in range(3, 8):
        examples, every = given(rows, seed), {"max_new_tokens": 3 + seed, **options}
        with torch.compiler.set_stance("fail_on_recompile"):
            found.append(decode(model, examples, **every))
        assert found[-1] == eagerly(model, examples, **every)
    assert len({str(each) for each in found}) == len(found)


@pytest.mark.slow
def test_what_was_compiled_for_one_number_of_rows_serves_any_later() -> None:
    model = fusion()
    for seed, rows in enumerate((2, 3, 2)):
        decode(model, given(rows, seed), max_new_tokens=4 + seed)
    for seed, rows in enumerate((5, 2, 4), 3):
        examples = given(rows, seed)
        with torch.compiler.set_stance("fail_on_recompile"):
            found = decode(model, examples, max_new_tokens=6)
        assert found == eagerly(model, examples, max_new_tokens=6)


@pytest.mark.slow
def test_what_else_is_decoded_makes_no_difference_to_what_is_compiled() -> None:
    model = fusion()
    for seed in range(2):
        decode(model, given(1, seed), ["text", "speech"], max_new_tokens=5 + seed)
    for seed, output in enumerate((["text"], ["speech", "text"]), 2):
        with torch.compiler.set_stance("fail_on_recompile"):
            found = decode(model, given(1, seed), output, max_new_tokens=6)
        assert found == eagerly(model, given(1, seed), output, max_new_tokens=6)


@pytest.mark.parametrize("link", [{}, {"position": "rotary", "window": 4}])
def test_a_compiled_step_gives_its_logits_and_leaves_nothing_behind(link: dict[str, Any]) -> None:
    given_back = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        given_back.append(len(graph.graph.output_node().args[0]))
        return graph.forward

    decode(fusion(**link), given(2, 0), backend=backend, max_new_tokens=4)
    assert given_back == [1]


@pytest.mark.slow
def test_a_compiled_prefill_in_chunks_reads_its_own_source() -> None:
    model = fusion(position="rotary")
    for seed in range(3):
        examples = given(1, seed, prompts=(4, 8, 12))
        every = {"max_new_tokens": 4, "prefill_chunk_size": 3}
        assert decode(model, examples, **every) == eagerly(model, examples, max_new_tokens=4)


@pytest.mark.slow
def test_a_call_within_a_call_reads_its_own_source() -> None:
    model = fusion()
    inner: list[Any] = []

    def calls(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        inner.append(decode(model, given(1, len(inner) + 1), max_new_tokens=4))
        return scores

    found = decode(model, given(1, 0), max_new_tokens=5, logits_processor=[calls])
    assert found == eagerly(model, given(1, 0), max_new_tokens=5)
    assert inner == [eagerly(model, given(1, seed), max_new_tokens=4) for seed in range(1, 6)]


@pytest.mark.slow
def test_calls_in_threads_read_their_own_sources() -> None:
    model = fusion().eval()
    for seed in range(2):
        decode(model, given(1, seed), max_new_tokens=6 + seed)
    found: dict[int, list[Any]] = {}

    def work(first: int) -> None:
        found[first] = [decode(model, given(1, first + each), max_new_tokens=8) for each in range(5)]

    threads = [threading.Thread(target=work, args=(first,)) for first in (10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for first in (10, 20, 30):
        assert found[first] == [eagerly(model, given(1, first + each), max_new_tokens=8) for each in range(5)]


@pytest.mark.slow
def test_what_is_compiled_is_of_the_model_as_it_is_now() -> None:
    model, examples = fusion(position="rotary"), given(1, 0)

    def same(model: mt.FusedModel, *parts: str) -> list[Any]:
        kept = {"max_new_tokens": 7}
        found = decode(model, examples, **kept)
        assert found == decode(model, examples, **kept) == eagerly(model, examples, **kept)
        return found

    first = same(model)
    with torch.no_grad():
        for gate in (gate for name, gate in model.named_parameters() if name.endswith("gate")):
            gate.neg_()
    second = same(model)
    assert second != first
    twin = copy.deepcopy(model)
    assert same(twin) == second
    with torch.no_grad():
        twin.unimodal("text").get_input_embeddings().weight.neg_()
    assert same(twin) != second
    assert same(model) == second
    assert same(model.double()) == second
    assert same(model.train()) == second
    assert same(model.float().drop("speech->text")) != second
    assert same(model) == second
