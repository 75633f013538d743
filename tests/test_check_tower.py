"""What check_tower says to the authors of towers that break what it asks for."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import multitower as mt
from broken_towers import (
    Caches,
    CachesTwice,
    CannotPadLeft,
    ChangesTheState,
    ChangesTheTokens,
    CountsFromTheFirst,
    CountsFromTheRight,
    CountsFromZero,
    DecodesAnotherLayer,
    DecodesElsewhere,
    DecodesWithoutEmbedding,
    DecodesWithoutLinks,
    DetachesALayer,
    DetachesTheState,
    DropsOut,
    EmbedsFewer,
    EmptiesTheContext,
    ForgetsItsCache,
    HasNoSizes,
    IsOfAnotherWidth,
    IsOfOneDtype,
    KeepsACount,
    KeepsTheContext,
    Leaks,
    LeaksOneToken,
    MasksFromTheFirst,
    MasksTokenZero,
    MixesExamples,
    MixesRows,
    ReadsTheFirstRow,
    RemembersElsewhere,
    RepeatsLayerOne,
    RunsOtherwise,
    RunsWithoutGradients,
    ScoresMore,
    ScoresOnePlace,
    ScoresOtherPlaces,
    SeesItsLength,
    TakesNoCache,
)
from models import causal_lm
from multitower.testing import TinyTower, check_tower, tiny_tower, tower_report


def built(kind: type[TinyTower]) -> TinyTower:
    torch.manual_seed(3)
    return kind(2, 8, 16).eval()


BROKEN = [
    (Leaks, "causality", "the logits before token 1 change with the tokens from there on"),
    (LeaksOneToken, "causality", "the logits before token 1 change with the tokens from there on"),
    (SeesItsLength, "rows", "a row alone, without what follows, is scored otherwise"),
    (MixesRows, "rows", "a row alone, without what follows, is scored otherwise"),
    (ReadsTheFirstRow, "shapes", "the logits do not depend on the tokens"),
    (DetachesALayer, "gradients", "no gradient reaches layers.0.norm.weight, layers.0.norm.bias"),
    (RunsWithoutGradients, "gradients", "no gradient reaches table.weight, layers.0|no gradient reaches lay"),
    (DetachesTheState, "gradients", "no gradient reaches layers.0.norm.weight"),
    (RepeatsLayerOne, "gradients", "no gradient reaches layers.1.norm.weight.*: is each layer run"),
    (CountsFromZero, "shapes", "layer 2 of 2 fails with IndexError"),
    (IsOfAnotherWidth, "shapes", r"embed gives \(2, 5, 8\), expected \(2, 5, 9\)"),
    (ScoresMore, "shapes", r"head gives \(2, 5, 16\), expected \(2, 5, 15\)"),
    (EmbedsFewer, "shapes", "embed fails with IndexError"),
    (HasNoSizes, "attributes", "vocab_size must be a positive whole number, not None"),
    (DropsOut, "repetition", "something random in eval mode"),
    (KeepsACount, "repetition", "kept from the call before"),
    (KeepsTheContext, "repetition", "two batches in turns.*keep what layers need in the context"),
    (EmptiesTheContext, "repetition", "a second pass with the same context gives other logits"),
    (ChangesTheState, "shapes", r"layer 1 changes in place the state.*not x \+= \.\.\."),
    (ChangesTheTokens, "shapes", "embed changes the tokens in place"),
    (ScoresOtherPlaces, "shapes", r"head_at gives other logits than head \(by"),
    (ScoresOnePlace, "shapes", r"head_at gives \(2, 1, 16\) for two places"),
    (RunsOtherwise, "shapes", "is not what embed, layer and head give"),
    (MasksTokenZero, "padding", "a row of nothing but zeros.* not finite"),
    (CountsFromTheRight, "padding", "zeros on the right change the logits before"),
    (MixesExamples, "packing", "an example in a row with others gets other logits than alone"),
    (LeaksOneToken, "packing", r"embed\(tokens, positions=positions\), .* fails with TypeError"),
    (IsOfOneDtype, "bfloat16", "RuntimeError"),
    (DecodesElsewhere, "decoding", r"6 tokens up to position 5 stand at \[1, 2, 3, 4, 5, 6\]"),
    (DecodesWithoutEmbedding, "decoding", "injects after layer 1 where layer 0 is due"),
    (DecodesAnotherLayer, "decoding", "injects after layer 2 where layer 0 is due"),
    (DecodesWithoutLinks, "decoding", "decoding 6 tokens after 0 of padding differs from a forward"),
    (TakesNoCache, "cache", r"embed\(tokens, cache\), a layer or the head fails with TypeError"),
    (ForgetsItsCache, "cache", "after 3 tokens the cache holds 0: each layer must hand"),
    (CachesTwice, "cache", "after 3 tokens the cache holds 6: each layer must hand"),
    (CountsFromTheFirst, "cache", "1 tokens after 3 in a cache get other logits than without"),
    (
        MasksFromTheFirst,
        "cache",
        "3 tokens after 4 in a cache of reordered rows get other logits than without",
    ),
    (RemembersElsewhere, "cache", "after 4 in a cache of reordered rows get other logits than without"),
    (CannotPadLeft, "left padding", "decoding 3 tokens after 3 of padding differs from a forward"),
]


@pytest.mark.parametrize(("kind", "guarantee", "message"), BROKEN)
def test_what_is_broken_is_named(kind: type[TinyTower], guarantee: str, message: str) -> None:
    tower = built(kind)
    assert re.search(message, tower_report(tower)[guarantee])
    with pytest.raises(mt.errors.TowerError, match=rf"{kind.__name__} breaks (?s:.*)\n  {guarantee}: "):
        check_tower(tower)


@pytest.mark.parametrize(
    "kind",
    [
        MixesRows,
        DetachesALayer,
        RepeatsLayerOne,
        RunsOtherwise,
        IsOfOneDtype,
        DecodesElsewhere,
        MasksFromTheFirst,
        RemembersElsewhere,
        CannotPadLeft,
    ],
)
def test_what_is_whole_is_not_blamed(kind: type[TinyTower]) -> None:
    broken = {name for name, reason in tower_report(built(kind)).items() if reason}
    consequences = {"decoding": {"left padding"}, "rows": {"left padding", "padding", "decoding"}}
    (cause,) = [guarantee for each, guarantee, _ in BROKEN if each is kind]
    assert {cause} <= broken <= {cause} | consequences.get(cause, set())


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"begin": 16}, "begin: token 16 is beyond the vocabulary of 16"),
        ({"begin": -1}, "begin: token -1 is beyond the vocabulary"),
        ({"begin": "<s>"}, "begin must be a token id, not '<s>'"),
        ({"end": (1, 20)}, "end: token 20 is beyond the vocabulary"),
        ({"end": 1}, "end must be a tuple of token ids, as in"),
        ({"end": (None,)}, "end must be a token id, not None"),
        ({"max_length": 0}, "max_length must be positive, not 0"),
        ({"depth": 0}, "depth must be a positive whole number"),
    ],
)
def test_wrong_attributes_are_named(attributes: dict, message: str) -> None:
    tower = tiny_tower()
    for key, value in attributes.items():
        setattr(tower, key, value)
    assert message in tower_report(tower)["attributes"]


def test_a_tower_that_caches_is_whole() -> None:
    check_tower(built(Caches))


def test_a_tower_without_begin_end_and_limit_is_whole() -> None:
    tower = tiny_tower()
    tower.begin, tower.end = None, ()
    check_tower(tower)


class Native(nn.Module):
    """A model of a user's own, whose forward gives more than its logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.decoder = TinyTower(2, 8, 16)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> tuple[Tensor, str]:
        return self.decoder(tokens) * self.scale, "more"


class Wrapped(mt.Tower):
    depth, width, vocab_size = 2, 8, 16

    def __init__(self, scaled: bool = True) -> None:
        super().__init__()
        self.model = Native()
        self.scaled = scaled

    @property
    def native(self) -> nn.Module:
        return self.model

    def embed(self, tokens: Tensor) -> tuple[Tensor, None]:
        return self.model.decoder.embed(tokens)

    def layer(self, index: int, hidden: Tensor, context: None) -> Tensor:
        return self.model.decoder.layer(index, hidden, context)

    def head(self, hidden: Tensor, context: None) -> Tensor:
        logits = self.model.decoder.head(hidden, context)
        return logits * self.model.scale if self.scaled else logits


def test_a_tower_is_compared_with_its_model() -> None:
    check_tower(Wrapped())
    check_tower(Wrapped(), logits=lambda native, tokens: native(tokens)[0])
    report = tower_report(Wrapped(), logits=lambda native, tokens: 2 * native(tokens)[0])
    assert "the logits are not the model's own (they differ by" in report["identity"]
    assert "the logits are not the model's own" in report["bfloat16"]
    assert "is not the model's own" in report["gradients"]
    report = tower_report(Wrapped(), logits=lambda native, tokens: native(tokens)[0][:, -1:])
    assert "own logits have shape (3, 1, 16), the tower's (3, 9, 16); say how" in report["identity"]


def test_what_its_model_trains_and_the_tower_does_not_is_named() -> None:
    report = tower_report(Wrapped(scaled=False))
    assert report["identity"] == ""  # for the scale is 1
    assert "no gradient reaches model.scale, which the model's own forward does train" in report["gradients"]


def test_a_model_elsewhere_can_be_compared_too() -> None:
    tower, other = tiny_tower(seed=1), tiny_tower(seed=2)
    check_tower(tower, logits=lambda native, tokens: native(tokens))
    assert "not the model's own" in tower_report(tower, lambda native, tokens: other(tokens))["identity"]


def test_the_tower_is_left_as_it_was() -> None:
    tower = mt.TransformersTower(causal_lm("llama")).train()
    tower.requires_grad_(False)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    check_tower(tower)
    assert tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name])
