"""Compare a fused model with the same fusion by forward hooks, which benchmarks/peer_hooks.py times."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import multitower as mt
from models import causal_lm
from multitower.testing import open_links
from paths import ROOT

TAPS = [(1, 2), (2, 1), (3, 4)]
LENGTHS = {"full": ((6, 6, 6), (5, 5, 5)), "ragged": ((6, 3, 4), (5, 7, 2))}


def both(*, careful: bool) -> tuple[mt.FusedModel, Any, list[Any]]:
    """Return a fused model, its hook version with equal weights, and its taps in the order of TAPS."""
    graph = mt.FusionGraph()
    graph.add_tower("source", causal_lm("llama", depth=3, seed=1), adapter=None)
    graph.add_tower("text", causal_lm("llama", depth=4, seed=3), adapter=None)
    zipper = {"gate": "tanh", "projection": "mlp", "feed_forward": True, "position": None}
    graph.add_link("source", "text", taps=TAPS, relative=False, **zipper)
    model = open_links(graph.compile())
    modules = {(tap.source_layer, tap.target_layer): model.tap(tap) for tap in model.schedule.taps}
    taps = [modules[pair] for pair in TAPS]
    hooked_class = runpy.run_path(str(ROOT / "benchmarks" / "hook_version.py"))["Hooked"]
    source, target = causal_lm("llama", depth=3, seed=1), causal_lm("llama", depth=4, seed=3)
    hooked = hooked_class(source, target, TAPS, heads=taps[0].heads, careful=careful)
    for own, tap in zip(hooked.taps, taps, strict=True):
        own.load_state_dict(tap.state_dict())
    return model, hooked, taps


def draw(lengths: tuple[int, ...]) -> list[Tensor]:
    return [torch.randint(2, 14, (length,)) for length in lengths]


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_loss_and_gradients_are_the_same(lengths: str, careful: bool) -> None:
    torch.manual_seed(0)
    model, hooked, taps = both(careful=careful)
    sources, texts = (draw(each) for each in LENGTHS[lengths])
    batch = mt.collate(
        [
            [mt.Segment("source", one), mt.Segment("text", two, target=True)]
            for one, two in zip(sources, texts, strict=True)
        ]
    )
    loss = model(**batch).loss
    given, tokens = (pad_sequence(each, batch_first=True) for each in (sources, texts))
    mask = torch.arange(given.shape[1]) < torch.tensor(LENGTHS[lengths][0])[:, None]
    labels = pad_sequence(texts, batch_first=True, padding_value=-100)
    other = hooked(given, tokens, labels, None if lengths == "full" else mask)
    torch.testing.assert_close(loss, other)
    loss.backward()
    other.backward()
    for tap, own in zip(taps, hooked.taps, strict=True):
        theirs = dict(own.named_parameters())
        assert set(theirs) == {name for name, _ in tap.named_parameters()}
        for name, parameter in tap.named_parameters():
            assert parameter.grad.any()
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in hooked.target.parameters())


@pytest.mark.parametrize("careful", [False, True])
def test_greedy_tokens_are_the_same(careful: bool) -> None:
    torch.manual_seed(0)
    model, hooked, _ = both(careful=careful)
    (source,) = draw((6,))
    limits = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    ((segment,),) = model.generate([[mt.Segment("source", source)]], ["text"], **limits)
    begin = torch.tensor([[model.tower("text").begin]])
    tokens = hooked.generate(source[None], begin, **limits, pad_token_id=0)
    assert segment.tokens.tolist() == tokens[0].tolist()
    assert len(set(segment.tokens.tolist())) > 2
