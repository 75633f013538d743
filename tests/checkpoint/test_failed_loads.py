"""A failed load changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import multitower as mt
from models import causal_lm
from multitower.testing import open_links, tiny_tower

# peft 0.21 uses a deprecated attribute of transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def snapshot(module: nn.Module) -> tuple[Any, ...]:
    modules = {name: (id(each), each.training) for name, each in module.named_modules()}
    tensors = {name: (id(each), each.clone(), each.requires_grad) for name, each in module.named_parameters()}
    return modules, tensors


def assert_untouched(before: tuple[Any, ...], module: nn.Module) -> None:
    after = snapshot(module)
    assert after[0] == before[0]
    assert after[1].keys() == before[1].keys()
    for name, (identity, value, trained) in before[1].items():
        assert after[1][name][0] == identity
        assert after[1][name][2] == trained
        assert torch.equal(after[1][name][1], value)


@pytest.mark.parametrize("fails", ["other tower", "links", "adapter", "heads"])
def test_a_failed_load_leaves_given_modules_as_they_were(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("plain", tiny_tower(1), train=peft.LoraConfig(target_modules=["attention"]))
    graph.add_tower("text", causal_lm("llama"), train="lora")
    graph.add_link("plain", "text", interleave=1)
    model = open_links(graph.compile().eval())
    model.save_pretrained(tmp_path)
    given = {"plain": tiny_tower(2).train(), "text": causal_lm("llama").train()}
    before = {name: snapshot(module) for name, module in given.items()}
    keys = {name: set(vars(module)) for name, module in given.items()}
    if fails == "other tower":
        given["text"] = causal_lm("llama", seed=9).train()
        before["text"] = snapshot(given["text"])
    elif fails == "links":
        monkeypatch.setattr("multitower.checkpoint.load.check_fit", _refuse)
    elif fails == "adapter":
        file = tmp_path / "towers/text/adapter/adapter_model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, min(tensors): tensors[min(tensors)] + 1}, file)
    else:
        monkeypatch.setattr("multitower.run.fusion.make_links", _refuse)
    with pytest.raises(mt.errors.CheckpointError):
        mt.FusedModel.from_pretrained(tmp_path, towers=given)
    for name, module in given.items():
        assert_untouched(before[name], module)
        assert set(vars(module)) == keys[name]
    monkeypatch.undo()
    if fails in ("links", "heads"):
        again = mt.FusedModel.from_pretrained(tmp_path, towers=given)
        batch = {"plain": EXAMPLE["plain"], "text": EXAMPLE["text"]}
        for name, expected in model(batch).logits.items():
            assert torch.equal(again(batch).logits[name], expected)


EXAMPLE = mt.collate([[mt.Segment("plain", [1, 5, 2]), mt.Segment("text", [1, 4, 2])]])["streams"]


def _refuse(*_: Any, **__: Any) -> None:
    raise mt.errors.CheckpointError("no")
