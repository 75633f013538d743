"""Merging adapters keeps the logits; a merge that fails changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import multitower as mt
from adapted import assert_same, fused, logits
from models import causal_lm
from multitower.testing import tiny_tower

# peft 0.21 uses a deprecated attribute of transformers 5.23 when tests call it directly.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter .default.. 4 LoRA tensor"),  # these are biases
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_merge_that_fails_half_way_changes_nothing(family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_bias=True)
    model = fused(causal_lm(family), config)
    state, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    expected, declared = logits(model), model.graph
    with pytest.raises(mt.errors.TowerError, match=r"tower 'text': peft cannot merge these adapters: .*bias"):
        model.merge_and_unload("text")
    assert dict(model.named_modules()) == modules
    assert model.graph == declared
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value), key
    for name, value in logits(model).items():
        assert torch.equal(value, expected[name])
    model.save_pretrained(tmp_path / "fused")
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "fused"))


def test_whatever_peft_raises_the_tower_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fused(tiny_tower(depth=2, width=8, vocab_size=20), peft.LoraConfig(target_modules=["attention"]))
    state = copy.deepcopy(model.state_dict())
    merge, calls = peft.tuners.lora.Linear.merge, []

    def break_off(self: Any, *args: Any, **kwargs: Any) -> None:
        merge(self, *args, **kwargs)
        calls.append(self)
        if len(calls) == 2:
            raise KeyError("out of luck")

    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", break_off)
    with pytest.raises(mt.errors.TowerError, match="out of luck"):
        model.merge_and_unload("text")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    monkeypatch.undo()
    assert not any(module.merged for module in calls)
    before = logits(model)["text"]
    model.merge_and_unload("text")
    torch.testing.assert_close(logits(model)["text"], before)


def tokens_trained(indices: Any, *, tied: bool) -> mt.FusedModel:
    text = causal_lm("llama", config={"tie_word_embeddings": tied})
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices)
    return fused(text, config)


@pytest.mark.parametrize("indices", [{"lm_head": [4, 5]}, {"embed_tokens": [1, 2], "lm_head": [4, 5]}])
def test_rows_of_tied_tables_that_learnt_apart_are_not_merged(indices: Any) -> None:
    model = tokens_trained(indices, tied=True)
    before = logits(model)["text"]
    with pytest.raises(mt.errors.TowerError, match=r"embed_tokens\.weight and lm_head\.weight are tied"):
        model.merge_and_unload("text")
    assert torch.equal(logits(model)["text"], before)


@pytest.mark.parametrize(
    ("indices", "tied"), [([4, 5], True), ([4, 5], False), ({"lm_head": [4, 5]}, False)], ids=str
)
def test_rows_that_can_be_merged_leave_the_logits(indices: Any, tied: bool) -> None:
    model = tokens_trained(indices, tied=tied)
    before = logits(model)["text"]
    model.merge_and_unload("text")
    torch.testing.assert_close(logits(model)["text"], before)
