"""Messages of check_tower about towers that break a promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import multitower as mt
from broken import Breakage
from broken_towers import BROKEN, Caches
from models import causal_lm
from multitower.testing import TOWER_PROMISES, TinyTower, check_tower, tiny_tower, tower_report

MODEL_OWN = ["identity", "gradients", "bfloat16"]
"""Promises that compare a tower with the model that it wraps."""


def built(kind: type[TinyTower]) -> TinyTower:
    torch.manual_seed(3)
    return kind(2, 8, 16).eval()


@BROKEN.each()
def test_what_is_broken_is_named(broken: Breakage) -> None:
    with pytest.raises(AssertionError, match=broken.report):
        check_tower(built(broken.kind), promises=[broken.promise])


def test_every_promise_can_be_broken() -> None:
    assert {broken.promise for broken in BROKEN} | {"identity"} == set(TOWER_PROMISES)


@BROKEN.each(alone=True)
def test_what_is_whole_is_not_blamed(broken: Breakage) -> None:
    found = {name for name, reason in tower_report(built(broken.kind)).items() if reason}
    consequences = {"decoding": {"left padding"}, "rows": {"left padding", "padding", "decoding"}}
    assert {broken.promise} <= found <= {broken.promise} | consequences.get(broken.promise, set())


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
    assert message in tower_report(tower, promises=["attributes"])["attributes"]


def test_a_tower_that_caches_is_whole() -> None:
    check_tower(built(Caches))


def test_a_tower_without_begin_end_and_limit_is_whole() -> None:
    tower = tiny_tower()
    tower.begin, tower.end = None, ()
    check_tower(tower)


class Native(nn.Module):
    """A custom model whose forward returns more than logits."""

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
    report = tower_report(Wrapped(), logits=lambda native, tokens: 2 * native(tokens)[0], promises=MODEL_OWN)
    assert "the logits are not the model's own (by" in report["identity"]
    assert "the logits are not the model's own" in report["bfloat16"]
    assert "is not the model's own" in report["gradients"]
    report = tower_report(Wrapped(), lambda native, tokens: native(tokens)[0][:, -1:], promises=["identity"])
    assert "own logits have shape (3, 1, 16), the tower's (3, 9, 16); say how" in report["identity"]


def test_what_its_model_trains_and_the_tower_does_not_is_named() -> None:
    report = tower_report(Wrapped(scaled=False), promises=MODEL_OWN)
    assert report["identity"] == ""  # because the scale is 1
    assert "no gradient reaches model.scale, which the model's own forward does train" in report["gradients"]


def test_a_model_elsewhere_can_be_compared_too() -> None:
    tower, other = tiny_tower(seed=1), tiny_tower(seed=2)
    check_tower(tower, logits=lambda native, tokens: native(tokens))
    report = tower_report(tower, lambda native, tokens: other(tokens), promises=MODEL_OWN)
    assert "not the model's own" in report["identity"]


def test_the_tower_is_left_as_it_was() -> None:
    tower = mt.TransformersTower(causal_lm("llama")).train()
    tower.requires_grad_(False)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    check_tower(tower)
    assert tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name])
