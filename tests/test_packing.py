"""Batches without padding. That they give what padded ones give is a property: see test_properties.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import frozen_sources
import multitower as mt
from models import EXAMPLES, causal_lm, pair, segment


def gradients(model: mt.FusedModel, batch: dict) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch, logits=False).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_are_those_of_the_padded_batch(family: str, window: int | None) -> None:
    speech = causal_lm(family, vocab_size=14)
    model = pair(causal_lm("qwen3"), speech, train="all", gates=True, position="rotary", window=window)
    batch = mt.collate(EXAMPLES)
    expected, found = gradients(model, batch), gradients(model, mt.pack(batch))
    assert expected.keys() == found.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=1e-3, atol=1e-6, msg=name)


def test_peft_adapters_learn_the_same() -> None:
    peft = pytest.importorskip("peft", reason="adapters need the lora extra")
    graph = mt.FusionGraph()
    graph.add_tower("speech", causal_lm("llama"), train="lora")
    config = peft.LoraConfig(target_modules=["attention"])
    graph.add_tower("text", mt.testing.tiny_tower(vocab_size=20), train=config)
    graph.add_link("speech", "text", interleave=1)
    model, batch = mt.testing.open_gates(graph.compile()).eval(), mt.collate(EXAMPLES)
    expected, found = gradients(model, batch), gradients(model, mt.pack(batch))
    assert any("lora" in name for name in expected)
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["bloom", "opt", "rwkv"])
def test_families_that_cannot_tell_examples_apart_are_refused(family: str) -> None:
    text = causal_lm(family, config={"attention_hidden_size": 16} if family == "rwkv" else None)
    with pytest.raises(ValueError, match=r"tower 'text' cannot tell .* \(\w+ForCausalLM\); leave out multi"):
        pair(text)(**mt.pack(mt.collate(EXAMPLES)))


def test_a_label_of_a_first_token_is_never_predicted() -> None:
    batch = mt.collate(EXAMPLES)
    text = batch["streams"]["text"]
    text["labels"] = text["tokens"].masked_fill(~text["mask"], -100)
    model = pair(gates=True)
    torch.testing.assert_close(model(**mt.pack(batch)).loss, model(**batch).loss)


def test_what_is_not_packed_right_is_refused() -> None:
    batch, model = mt.collate(EXAMPLES), pair()
    packed = mt.pack(batch)["streams"]
    with pytest.raises(ValueError, match="stream 'speech' is packed already"):
        mt.pack({"streams": packed})
    with pytest.raises(ValueError, match=r"all be packed or none, but \['text'\] are not"):
        model({**packed, "text": batch["streams"]["text"]})
    text = packed["text"]
    for change in (
        {"examples": text["examples"].flip(1)},
        {"mask": torch.arange(text["mask"].shape[1])[None] < 3},
        {key: each.repeat(2, 1) for key, each in text.items()},
    ):
        with pytest.raises(ValueError, match="stream 'text' is packed, which is one row without padding"):
            model({"text": {**text, **change}})


def test_no_mask_of_a_window_reaches_another_example() -> None:
    model = pair(gates=True, window=10**15)
    batch = mt.collate(EXAMPLES)
    torch.testing.assert_close(model(**mt.pack(batch)).loss, model(**batch).loss)


def test_kept_states_are_packed_with_the_rest(tmp_path: Path) -> None:
    model = frozen_sources.fused().eval()
    batches = frozen_sources.data()
    kept = mt.KeptStates.compute(model, batches, tmp_path / "states")
    for batch in batches:
        ready = mt.pack(kept(batch))
        assert frozen_sources.brought(ready) == frozen_sources.brought(kept(batch)) != set()
        torch.testing.assert_close(model(**ready).loss, model(**batch).loss)
    for refused in (kept, lambda packed: mt.KeptStates.compute(model, [packed], tmp_path / "other")):
        with pytest.raises(ValueError, match=r"the batch is packed; .* call multitower\.pack after"):
            refused(mt.pack(batches[0]))


def test_an_estimate_foresees_what_packing_saves() -> None:
    model = pair(causal_lm("llama"))
    rows = [[segment("speech", 5), segment("text", *range(2, 2 + length), target=True)] for length in (2, 15)]
    batch = mt.collate(rows)
    padded, packed = (model.estimate(each).towers["text"] for each in (batch, mt.pack(batch)))
    assert packed.forward_flops < 0.75 * padded.forward_flops
    with pytest.raises(ValueError, match="tower 'text' cannot tell"):
        pair(causal_lm("bloom")).estimate(mt.pack(batch))


def test_packed_batches_of_any_size_are_one_graph() -> None:
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = pair(causal_lm("llama"), train="all", gates=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for number in range(2, 6):
        rows = [
            [segment("speech", *range(2, 4 + row)), segment("text", *range(2, 9 - row), target=True)]
            for row in range(number)
        ]
        batch = mt.pack(mt.collate(rows))
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
    assert len(graphs) == 1
