from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import multitower as mt
from models import EXAMPLES, causal_lm, pair
from multitower.cache import TapCache
from multitower.stream import Batch
from multitower.testing.strategies import cases

FAMILIES = ("llama", "gpt2", "qwen3", "gemma3_text")


def saved(model: mt.FusedModel, batch: Batch) -> int:
    """The bytes that a real forward on the CPU saves for its backward."""
    given = [tensor for stream in batch["streams"].values() for tensor in stream.values()]
    known = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers(), *given]}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def flops(model: mt.FusedModel, batch: Batch, *, backward: bool) -> int:
    """The FLOPs of a real run, attention on the CPU included."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter:
        loss = model(**batch).loss
        if backward and loss is not None and loss.requires_grad:
            loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def check(model: mt.FusedModel, batch: Batch) -> mt.Estimate:
    """Compare an estimate with what is measured."""
    found = model.estimate(batch)
    total = found.total
    assert total.parameters == sum(each.numel() for each in model.parameters())
    assert total.trained == sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert total.parameter_bytes == sum(each.nbytes for each in model.parameters())
    assert total.saved_bytes == saved(model, batch)
    assert total.forward_flops == flops(model, batch, backward=False)
    assert total.step_flops == flops(model, batch, backward=True)
    return found


@settings(max_examples=15, phases=(Phase.generate,))
@given(cases())
def test_an_estimate_is_what_is_measured(case):
    batch = mt.collate(case.examples)
    found = check(case.model.train(), batch)
    cache = TapCache.fill(case.model, batch["streams"], list(case.model.towers))
    for name, cost in found.links.items():
        entries = [entry.source for tap, entry in cache.entries.items() if tap.link == name]
        assert cost.cache_bytes == sum(part.nbytes for entry in entries for part in entry)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", ["none", "all", "lora"])
def test_towers_from_transformers(family, train):
    text, speech = causal_lm(family), causal_lm(family, depth=4, seed=3)
    check(pair(text, speech, train=train, gates=True).train(), mt.collate(EXAMPLES))
