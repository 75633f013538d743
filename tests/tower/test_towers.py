from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import multitower as mt
from models import BEGIN, END, EXAMPLES, causal_lm, pair, transformers_families
from multitower.testing import open_links
from multitower.tower import as_tower


@pytest.mark.parametrize("family", transformers_families)
def test_tower_is_bit_equal_to_the_model(family: str) -> None:
    model = causal_lm(family, depth=3)
    tower = mt.TransformersTower(model)
    tokens = torch.randint(0, 20, (3, 9))
    assert torch.equal(tower(tokens), model(tokens, use_cache=False).logits)
    assert (tower.depth, tower.width, tower.vocab_size, tower.begin, tower.end) == (3, 16, 20, BEGIN, (END,))
    assert tower.native is model


@pytest.mark.parametrize("family", transformers_families)
def test_closed_gates_are_bit_equal_in_a_fusion(family: str) -> None:
    text = causal_lm(family)
    batch = mt.collate(EXAMPLES)
    model = pair(text, causal_lm("gpt2", width=24, depth=4, vocab_size=14))
    assert torch.equal(model(**batch).logits["text"], text(batch["streams"]["text"]["tokens"]).logits)


def test_a_model_that_reads_its_mask_after_its_layers_is_handed_none() -> None:
    from transformers import LlamaForCausalLM

    class Shifted(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options):
            out = super().forward(input_ids, attention_mask=attention_mask, **options)
            if attention_mask is not None:
                out.logits = out.logits + attention_mask.float().mean()
            return out

    model = Shifted(causal_lm("llama").config).eval()
    tokens = torch.tensor([[0, 3, 4, 5]])
    assert torch.equal(mt.TransformersTower(model)(tokens), model(tokens, use_cache=False).logits)


def test_gradients_flow_as_through_the_model() -> None:
    model = causal_lm("llama")
    tokens = torch.tensor([[0, 3, 4, 5]])
    model(tokens).logits.square().sum().backward()
    native = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    mt.TransformersTower(model)(tokens).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, native[name])


def test_parameters_are_counted_once() -> None:
    model = causal_lm("llama")
    tower = mt.TransformersTower(model)
    assert sorted(name.removeprefix("model.") for name, _ in tower.named_parameters()) == sorted(
        name for name, _ in model.named_parameters()
    )


def test_a_deep_copy_stands_alone() -> None:
    original = pair(causal_lm("llama"), gates=True)
    batch = mt.collate(EXAMPLES)
    before = original(**batch).logits["text"]
    twin = copy.deepcopy(original)
    for parameter in original.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(**batch).logits["text"], before)


def test_wrapping_leaves_the_model_as_it_was() -> None:
    model = causal_lm("llama").train()
    keys = list(model.state_dict())
    mt.TransformersTower(model)
    assert model.training
    assert all(module.training for module in model.modules())
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    torch._dynamo.reset()
    model = open_links(pair(causal_lm("llama"), causal_lm("gpt2", depth=4, vocab_size=14)))
    batch = mt.collate(EXAMPLES)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_layers_out_of_order_are_refused() -> None:
    model = causal_lm("llama")
    forward = model.model.layers[1].forward

    def twice(*args: object, **kwargs: object) -> torch.Tensor:
        model.model.layers[0](*args, **kwargs)
        return forward(*args, **kwargs)

    model.model.layers[1].forward = twice
    with pytest.raises(mt.errors.TowerError, match=r"in the order \[1, 1, 2\]"):
        mt.TransformersTower(model)


def test_a_model_that_differs_layer_by_layer_is_refused() -> None:
    model = causal_lm("llama")
    model.model.norm.register_forward_hook(lambda module, inputs, output: output + next(noise))
    noise = itertools.count()
    with pytest.raises(mt.errors.TowerError, match="other logits than its own forward"):
        mt.TransformersTower(model)


def test_a_replaced_forward_is_refused() -> None:
    model = causal_lm("llama")
    native = model.model.forward
    model.model.forward = lambda *args, **kwargs: native(*args, **kwargs)
    with pytest.raises(mt.errors.TowerError, match="Was a forward of the model replaced"):
        mt.TransformersTower(model)


def test_no_list_of_layers() -> None:
    with pytest.raises(
        mt.errors.TowerError, match="tower 'text': Linear is neither a transformers causal LM nor"
    ):
        as_tower("text", torch.nn.Linear(2, 2))
    with pytest.raises(mt.errors.TowerError, match=r"found none among model\.layers"):
        mt.TransformersTower(causal_lm("llama"), layers="decoder.layers")


def test_a_source_that_cannot_be_loaded_names_its_tower(tmp_path: object) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", str(tmp_path))
    with pytest.raises(mt.errors.TowerError, match="tower 'text': cannot load"):
        graph.compile()


def test_an_encoder_decoder_is_no_tower(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=20, d_model=8, d_ff=16, d_kv=4, num_layers=1, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    with pytest.raises(mt.errors.TowerError, match="It has an encoder, and a tower is a decoder alone"):
        as_tower("text", model)
    model.save_pretrained(tmp_path)
    with pytest.raises(mt.errors.TowerError, match=r"as a causal LM: .*T5Config.*CausalLM\.$"):
        as_tower("text", str(tmp_path))


def test_plain_towers_fuse_without_transformers() -> None:
    script = """
import sys
sys.modules["transformers"] = None
import multitower as mt
from multitower.testing import tiny_model
batch = mt.collate([[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7, 2], target=True)]])
model = tiny_model()
model(**batch).loss.backward()
try:
    model.generate([[mt.Segment("speech", [1, 5, 2])]], output=["text"])
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'multitower[transformers]'" in done.stdout
