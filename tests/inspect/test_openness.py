from __future__ import annotations

import pytest
import torch

import multitower as mt
from models import causal_lm
from multitower.inspect.openness import openness
from multitower.inspect.summary import summarize


def make(**options: object) -> mt.FusedModel:
    graph = mt.FusionGraph()
    graph.add_tower("speech", causal_lm("llama", seed=1), adapter="gated")
    graph.add_tower("text", causal_lm("llama", width=64))
    graph.add_link("speech", "text", interleave=1, **options)
    return graph.compile()


def test_all_is_closed_at_the_start() -> None:
    for options in ({}, {"gate": "tanh"}):
        found = openness(make(**options))
        assert set(found) == {"speech adapter", "speech->text 1-1", "speech->text 2-2"}
        assert not any(found.values())


def test_a_layer_as_it_is_initialised_counts_as_open() -> None:
    model = make()
    out = model._link("speech->text")["2-2"].out
    out.reset_parameters()
    found = openness(model)
    assert found["speech->text 2-2"] == pytest.approx(1, abs=0.05)
    assert found["speech->text 1-1"] == 0
    with torch.no_grad():
        out.weight.mul_(0.5)
    assert openness(model)["speech->text 2-2"] == pytest.approx(found["speech->text 2-2"] / 2)


def test_a_gate_counts_by_its_size() -> None:
    model = make(gate="tanh")
    with torch.no_grad():
        model._link("speech->text")["1-1"].attention_gate.fill_(-0.5)
    found = openness(model)
    assert found["speech->text 1-1"] == pytest.approx(torch.tensor(0.5).tanh().item(), abs=0.05)
    assert found["speech->text 2-2"] == 0


def test_a_summary_counts_what_is_shared_once() -> None:
    shared = causal_lm("llama")
    graph = mt.FusionGraph()
    graph.add_tower("one", shared, train="all")
    graph.add_tower("other", shared, train="all")
    graph.add_link("one", "other", interleave=1)
    model = graph.compile()
    found = summarize(model)
    size = shared.num_parameters()
    assert [found["towers"][name]["parameters"] for name in ("one", "other")] == [size, size]
    assert found["parameters"] == found["trained"] == size + found["links"]["one->other"]["parameters"]


def test_a_feed_forward_counts() -> None:
    model = make(feed_forward=True)
    model._link("speech->text")["1-1"].ffn[-1].reset_parameters()
    found = openness(model)
    assert found["speech->text 1-1"] > 0
    assert found["speech->text 2-2"] == 0
