"""Properties of every fused model, on graphs and examples drawn by hypothesis."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import multitower as mt
from models import causal_lm
from multitower import testing
from multitower.compile.schedule import make_schedule
from multitower.declare.spec import LinkSpec
from multitower.testing.strategies import Case, cases, cyclic_structures, structures, tiny_towers

FAMILIES = ("llama", "gpt2", "bloom", "gemma3_text", "mistral")
FEWER = settings(max_examples=settings().max_examples // 3)
SEEDS = st.integers(0, 999)
ELSEWHERE = {"schedule", "order", "padding", "prefill", "session"}
"""Promises with tests of their own below: on structures only, with seeds, on towers with a cache."""


@functools.cache
def pretrained(family: str, depth: int) -> mt.TransformersTower:
    sliding = {"sliding_window": 3} if family in ("mistral", "gemma3_text") else {}
    tower = mt.TransformersTower(
        causal_lm(family, width=8, depth=depth, vocab_size=11 + depth, config=sliding)
    )
    assert tower.pads_left
    return tower


@st.composite
def transformers_towers(draw: st.DrawFn) -> mt.TransformersTower:
    """Draw towers of different family and depth; copies skip the one-time check of decoding."""
    return copy.deepcopy(pretrained(draw(st.sampled_from(FAMILIES)), draw(st.integers(1, 3))))


Structure = tuple[dict[str, int], list[LinkSpec]]


@pytest.mark.parametrize("promise", [name for name in testing.MODEL_PROMISES if name not in ELSEWHERE])
@given(case=cases())
def test_every_model_keeps_its_promises(promise: str, case: Case) -> None:
    testing.MODEL_PROMISES[promise](case.model, case.examples)


@given(cases(), SEEDS)
def test_no_order_and_no_padding_matters(case: Case, seed: int) -> None:
    testing.check_order(case.model, case.examples, seed=seed)
    testing.check_padding(case.model, case.examples, seed=seed)


@FEWER
@given(cases())
def test_the_turns_of_a_session_are_the_whole_history(case: Case) -> None:
    testing.MODEL_PROMISES["session"](case.model, case.examples)


@FEWER
@given(cases(towers=transformers_towers(), most_towers=3))
def test_transformers_towers_keep_every_promise(case: Case) -> None:
    testing.check_model(case.model, case.examples)


class Bag(mt.Tower):
    """A custom tower whose layers average over all tokens so far."""

    width, vocab_size, begin, end = 6, 10, 0, (1, 2)

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.table = nn.Embedding(self.vocab_size, self.width)
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(depth))

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return self.table(tokens), places[:, None]

    def layer(self, index: int, hidden: Tensor, context: Tensor) -> Tensor:
        return hidden + self.layers[index - 1](hidden).tanh().cumsum(1) / context

    def head(self, hidden: Tensor, context: Tensor) -> Tensor:
        return hidden @ self.table.weight.T


@st.composite
def bags(draw: st.DrawFn) -> Bag:
    torch.manual_seed(draw(SEEDS))
    return Bag(draw(st.integers(1, 4)))


@FEWER
@given(cases(towers=bags() | tiny_towers(dtypes=[torch.float32])))
def test_towers_of_other_authors_take_part(case: Case) -> None:
    testing.check_model(case.model, case.examples)


@given(structures())
def test_every_step_runs_once_in_time_and_as_early_as_it_can(case: Structure) -> None:
    testing.check_schedule(*case)


@given(cyclic_structures())
def test_cycles_are_refused_and_shown(case: Structure) -> None:
    with pytest.raises(mt.errors.GraphError, match="wait for each other"):
        make_schedule(*case)
    testing.check_schedule(*case)


@given(structures(), st.data())
def test_links_by_a_single_number_never_wait_for_each_other(case: Structure, data: st.DataObject) -> None:
    depths, links = case
    steps = [data.draw(st.integers(1, depths[link.target])) for link in links]
    numbered = [replace(link, interleave=step, taps=None) for link, step in zip(links, steps, strict=True)]
    assert make_schedule(depths, numbered).stages
