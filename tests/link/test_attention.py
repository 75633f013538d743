"""Links give the same results with flex_attention as with sdpa.

Uncompiled, flex_attention is slow, but needs no C++ compiler; compiled, it has no backward on the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.utils._pytree import tree_map_only

import multitower as mt
from models import EXAMPLES, causal_lm, pair, segment
from multitower.link import attention
from multitower.link.attention import block_visibility, visibility

pytestmark = [
    # It is eager on purpose.
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    # torch warns about its own code while it traces and compiles
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

ROWS = [
    [
        segment("speech", *range(2, 13)),
        segment("text", *range(2, 18), target=True),
        segment("speech", *range(3, 9), target=True),
    ],
    [segment("text", 5), segment("speech", 7, target=True)],
    [segment("text", 4, 5, 6)],
]


@pytest.fixture(autouse=True)
def uncompiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WITHOUT_FLEX", ())
    if "slow" not in request.keywords:
        monkeypatch.setattr(attention, "_compiled", lambda: attention.flex_attention)


def both(model: mt.FusedModel, batch: dict) -> tuple[mt.run.output.FusedOutput, mt.run.output.FusedOutput]:
    outputs = []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        outputs.append(model(**batch))
    return outputs[0], outputs[1]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_flex_attention_gives_what_sdpa_gives(window: int | None, packed: bool) -> None:
    model = pair(gates=True, window=window, position="rotary")
    batch = mt.collate(ROWS)
    streams = batch["streams"]
    expected, found = both(model, mt.pack(batch, one_row=True) if packed else batch)
    for name, logits in expected.logits.items():
        real = streams[name]["mask"] if not packed else slice(None)
        torch.testing.assert_close(found.logits[name][real], logits[real])
        assert found.logits[name].isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled flex_attention needs a GPU")
@torch.no_grad()
def test_compiled_it_gives_the_same_for_all_lengths() -> None:
    torch._dynamo.reset()
    model = pair(gates=True, window=4, position="rotary").cuda()
    for number in range(1, 12):
        batch = mt.pack(mt.collate(ROWS * number))
        expected, found = both(model, tree_map_only(torch.Tensor, torch.Tensor.cuda, batch))
        torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_blocks_hold_what_is_seen(window: int | None) -> None:
    torch.manual_seed(1)
    times = torch.stack([torch.randperm(40)[:30].sort().values for _ in range(6)])
    keys, queries = times[:3, :25], times[3:]
    real = torch.arange(25) < torch.tensor([25, 12, 0])[:, None]
    dense, blocks = (kind(queries, keys, real, window) for kind in (visibility, block_visibility))
    assert torch.equal(blocks.sees, dense.sees)
    for row in range(3):
        for query in range(30):
            seen = blocks.mask.mask_mod(
                torch.tensor(row), torch.tensor(0), torch.tensor(query), torch.arange(25)
            )
            open_ = (dense.mask[row, 0, query] == 0) & dense.sees[row, query]
            assert torch.equal(seen, open_)


def test_on_the_cpu_links_attend_by_sdpa_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    expected, found = both(pair(gates=True), mt.pack(mt.collate(ROWS)))
    assert torch.equal(found.loss, expected.loss)
    found.loss.backward()


@torch.no_grad()
def test_attention_weights_are_those_of_sdpa() -> None:
    model, batch = pair(gates=True), mt.collate(EXAMPLES)
    expected = model(**batch, output_attentions=True).attentions
    model.set_attn_implementation("flex_attention")
    found = model(**batch, output_attentions=True).attentions
    for link, taps in expected.items():
        for tap, weights in taps.items():
            assert torch.equal(found[link][tap], weights)


def test_what_is_chosen_stays_in_what_is_made_of_it(tmp_path: Path) -> None:
    model = pair(causal_lm("llama"))
    model.set_attn_implementation("flex_attention")
    assert model.drop("speech->text").attn_implementation == "flex_attention"
    assert model.estimate(mt.collate(EXAMPLES)).total.forward_flops
    with pytest.raises(ValueError, match="by 'sdpa' or 'flex_attention', not by 'flash'"):
        model.set_attn_implementation("flash")
    speech = model.unimodal("speech")
    model.save_pretrained(tmp_path / "fused")
    loaded = mt.FusedModel.from_pretrained(
        tmp_path / "fused", towers={"speech": speech, "text": causal_lm("llama")}
    )
    assert loaded.attn_implementation == "sdpa"


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_for_packed_batches_of_any_size() -> None:
    graphs: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model = pair(gates=True)
    model.set_attn_implementation("flex_attention")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for number in range(1, 4):
        batch = mt.pack(mt.collate(ROWS * number))
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
    assert len(graphs) == 1


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_sdpa(
    monkeypatch: pytest.MonkeyPatch, window: int | None, packed: bool
) -> None:
    # torch refuses a backward on the CPU because it has no kernel; uncompiled, it needs none.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
    check_gradients(pair(gates=True, window=window, position="rotary"), torch.device("cpu"), packed)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="its compiled backward needs a GPU")
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_gradients_are_those_of_sdpa(packed: bool) -> None:
    model = pair(causal_lm("llama", width=64), causal_lm("qwen3", width=64, vocab_size=14), gates=True)
    check_gradients(model.cuda(), torch.device("cuda"), packed, rtol=1e-3, atol=1e-5)


def check_gradients(model: mt.FusedModel, device: torch.device, packed: bool, **tolerance: float) -> None:
    batch = mt.collate(ROWS)
    batch = tree_map_only(torch.Tensor, lambda each: each.to(device), mt.pack(batch) if packed else batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected, found = (torch.autograd.grad(output.loss, trained) for output in both(model, batch))
    assert all(gradient.any() for gradient in expected)
    torch.testing.assert_close(found, expected, **tolerance)
