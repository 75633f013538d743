"""Packed batches. That they equal padded ones is tested in test_properties.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import frozen_sources
import multitower as mt
from models import EXAMPLES, causal_lm, pair, segment


def gradients(model: mt.FusedModel, batch: dict) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch, logits=False).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(("position", "window"), [("segment", None), ("rotary", 3)])
def test_gradients_are_those_of_the_padded_batch(family: str, position: str, window: int | None) -> None:
    speech = causal_lm(family, vocab_size=14)
    model = pair(causal_lm("qwen3"), speech, train="all", gates=True, position=position, window=window)
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
    model, batch = mt.testing.open_links(graph.compile()).eval(), mt.collate(EXAMPLES)
    expected, found = gradients(model, batch), gradients(model, mt.pack(batch))
    assert any("lora" in name for name in expected)
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["bloom", "opt", "rwkv"])
def test_families_that_cannot_tell_examples_apart_are_refused(family: str) -> None:
    text = causal_lm(family, config={"attention_hidden_size": 16} if family == "rwkv" else None)
    with pytest.raises(ValueError, match=r"'text' cannot tell .* \(\w+ForCausalLM.*\); leave out multi"):
        pair(text)(**mt.pack(mt.collate(EXAMPLES)))


def single_row_packing(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any
) -> tuple[Tensor, None]:
    """Attend like transformers' flash_attention_2, which separates examples only in batches of one row."""
    places = options["position_ids"]
    starts = torch.zeros_like(places) if len(places) > 1 else (places == 0).cumsum(-1)
    seen = (starts[:, :, None] == starts[:, None]).tril()[:, None]
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    return attended.transpose(1, 2), None


def test_examples_told_apart_in_a_single_row_alone_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "single_row", single_row_packing)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS, "single_row", lambda *args, **options: None)
    model, batch = pair(causal_lm("llama"), gates=True), mt.pack(mt.collate(EXAMPLES))
    expected = model(**batch).loss
    model.unimodal("text").config._attn_implementation = "single_row"
    torch.testing.assert_close(model(**mt.collate(EXAMPLES)).loss, expected)
    with pytest.raises(ValueError, match=r"'text' cannot tell .* by single_row\); .* choose 'sdpa' by"):
        model(**batch)
    model.unimodal("text").set_attn_implementation("sdpa")
    torch.testing.assert_close(model(**batch).loss, expected)


def test_a_label_of_a_first_token_is_never_predicted() -> None:
    batch = mt.collate(EXAMPLES)
    text = batch["streams"]["text"]
    text["labels"] = text["tokens"].masked_fill(~text["mask"], -100)
    model = pair(gates=True)
    torch.testing.assert_close(model(**mt.pack(batch)).loss, model(**batch).loss)


def test_what_is_not_packed_right_is_refused() -> None:
    batch, model = mt.collate(EXAMPLES), pair()
    packed = mt.pack(batch)["streams"]
    with pytest.raises(ValueError, match=r"a batch as collate gives it, .* not \['speech', 'text'\]"):
        mt.pack(batch["streams"])
    with pytest.raises(ValueError, match="stream 'speech' is packed already"):
        mt.pack({"streams": packed})
    with pytest.raises(ValueError, match=r"all be packed or none, but \['text'\] are not"):
        model({**packed, "text": batch["streams"]["text"]})
    text = packed["text"]
    with pytest.raises(ValueError, match="stream 'text' is packed, but the examples in a row are not in asc"):
        model({"text": {**text, "examples": text["examples"].flip(1)}})


def test_no_row_has_more_tokens_than_the_longest_example() -> None:
    lengths = {"a": [4, 1, 3, 2, 0, 1], "b": [2, 4, 1, 0, 3, 1]}
    examples = [
        [mt.Segment(name, range(2, 2 + of[number])) for name, of in lengths.items() if of[number]]
        for number in range(6)
    ]
    packed = mt.pack(mt.collate(examples))["streams"]
    rows = {
        name: [set(row[mask].tolist()) for row, mask in zip(one["examples"], one["mask"], strict=True)]
        for name, one in packed.items()
    }
    assert rows == {"a": [{0}, {1}, {2, 3}, {5}], "b": [{0}, {1}, {2}, {4, 5}]}
    assert {name: one["tokens"].shape for name, one in packed.items()} == {"a": (4, 5), "b": (4, 4)}
    alone = mt.pack(mt.collate(examples), one_row=True)["streams"]
    assert all(one["mask"].all() and len(one["mask"]) == 1 for one in alone.values())
    assert alone["a"]["examples"].tolist() == [[0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 5]]


def test_no_mask_of_a_window_reaches_another_example() -> None:
    model = pair(gates=True, window=10**15)
    batch = mt.collate(EXAMPLES)
    torch.testing.assert_close(model(**mt.pack(batch)).loss, model(**batch).loss)


def test_kept_states_are_packed_with_the_rest(tmp_path: Path) -> None:
    model = frozen_sources.fused().eval()
    batches = frozen_sources.data()
    kept = mt.train.KeptStates.compute(model, batches, tmp_path / "states")
    for batch in batches:
        ready = mt.pack(kept(batch))
        assert frozen_sources.brought(ready) == frozen_sources.brought(kept(batch)) != set()
        torch.testing.assert_close(model(**ready).loss, model(**batch).loss)
    for refused in (kept, lambda packed: mt.train.KeptStates.compute(model, [packed], tmp_path / "other")):
        with pytest.raises(ValueError, match=r"the batch is packed; .* call multitower\.pack after"):
            refused(mt.pack(batches[0]))


def test_an_estimate_foresees_what_packing_saves() -> None:
    model = pair(causal_lm("llama"))
    rows = [[segment("speech", 5), segment("text", *range(2, 2 + each), target=True)] for each in (2, 15, 6)]
    batch = mt.collate(rows)
    padded, packed = (model.estimate(each).towers["text"] for each in (batch, mt.pack(batch)))
    assert packed.forward_flops < 0.75 * padded.forward_flops
    with pytest.raises(ValueError, match="tower 'text' cannot tell"):
        pair(causal_lm("bloom")).estimate(mt.pack(batch))


@pytest.mark.slow
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


def test_a_stream_of_padding_alone_stays_one() -> None:
    model = pair(causal_lm("llama"), causal_lm("qwen3", depth=4, vocab_size=14))
    learnt = segment("text", 7, target=True)
    batch = mt.collate([[learnt], [segment("speech", 5), learnt]])
    half = {name: {key: value[:1] for key, value in each.items()} for name, each in batch["streams"].items()}
    packed = mt.pack({"streams": half})
    torch.testing.assert_close(model(**packed).loss, model(streams=half).loss)
