"""Replace modules other than the layers in a model that is already a tower."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import multitower as mt
from adapted import fused, logits, randomise
from models import EXAMPLES, causal_lm, pair, segment

GIVEN = [[segment("speech", 5, 6, 7, 8)]]


def another(module: nn.Module) -> nn.Module:
    """Return a copy of a module with other values."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    return twin


def head(model: nn.Module) -> None:
    model.lm_head = another(model.lm_head)


def norm(model: nn.Module) -> None:
    model.model.norm = another(model.model.norm)


def embedding(model: nn.Module) -> None:
    model.set_input_embeddings(another(model.get_input_embeddings()))


def longer(model: nn.Module) -> None:
    model.lm_head = nn.Sequential(model.lm_head, another(nn.Linear(model.config.vocab_size, 20)))


def check(model: mt.FusedModel) -> None:
    """Check that forward, decoding with and without a cache, and the native model agree."""
    options = {"max_new_tokens": 6, "eos_token_id": None}
    ((text,),) = model.generate(GIVEN, output=["text"], **options)
    ((slow,),) = model.generate(GIVEN, output=["text"], use_cache=False, **options)
    assert text.tokens.tolist() == slow.tokens.tolist()
    scored = model(**mt.collate([[GIVEN[0][0], text]])).logits["text"][0, :-1]
    assert scored.argmax(-1).tolist() == text.tokens[1:].tolist()
    tokens = torch.tensor([[0, 5, 6]])
    assert torch.equal(model.tower("text")(tokens), model.unimodal("text")(tokens, use_cache=False).logits)


@pytest.mark.parametrize("replace", [head, norm, embedding, longer])
def test_forward_and_generate_take_the_new_module(replace: Callable[[nn.Module], None]) -> None:
    model = pair(causal_lm("llama"), gates=True)
    before = logits(model)["text"]
    replace(model.unimodal("text"))
    check(model)
    assert not torch.equal(logits(model)["text"], before)


@pytest.mark.slow
def test_a_compiled_model_takes_the_new_module() -> None:
    torch._dynamo.reset()
    model, batch = pair(causal_lm("llama"), gates=True), mt.collate(EXAMPLES)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = compiled(**batch).logits["text"]
    head(model.unimodal("text"))
    with torch.no_grad():
        after = compiled(**batch).logits["text"]
        torch.testing.assert_close(after, model(**batch).logits["text"])
    assert not torch.equal(after, before)


def test_an_adapter_that_brings_a_head_is_followed(tmp_path: Path) -> None:
    model = fused(causal_lm("llama", seed=3))
    native = model.unimodal("text")
    with_first = logits(model)
    native.add_adapter("b", peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert torch.equal(logits(model)["text"], with_first["text"])
    native.set_adapter("b")
    randomise(model)
    assert not torch.equal(logits(model)["text"], with_first["text"])
    check(model)
    model(**mt.collate(EXAMPLES)).loss.backward()
    assert native.get_base_model().lm_head.modules_to_save["b"].weight.grad.any()
    model.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"speech": model.tower("speech")})
    assert torch.equal(logits(again)["text"], logits(model)["text"])
    native.set_adapter("default")
    assert torch.equal(logits(model)["text"], with_first["text"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("size", [26, 16])
def test_resized_embeddings_are_followed(tmp_path: Path, family: str, size: int) -> None:
    model = pair(causal_lm(family), gates=True)
    model.unimodal("text").resize_token_embeddings(size, mean_resizing=False)
    assert model.tower("text").vocab_size == size
    check(model)
    batch = mt.collate([[segment("speech", 5), mt.Segment("text", [1, size - 1, 2], target=True)]])
    assert model(**batch).logits["text"].shape[-1] == size
    batch["streams"]["text"]["tokens"][0, 1] = size
    with pytest.raises(ValueError, match="text"):
        model(**batch)
    with pytest.raises(ValueError, match="text"):
        model.generate([[mt.Segment("text", [1, size])]], output=["text"], max_new_tokens=2)
    model.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"speech": model.tower("speech")})
    assert again.tower("text").vocab_size == size
    check(again)
    assert torch.equal(logits(again)["text"], logits(model)["text"])


def test_other_layers_are_refused() -> None:
    model = pair(causal_lm("llama"), gates=True)
    native = model.unimodal("text")
    decoder = native.model
    native.model = causal_lm("llama", seed=8).model
    with pytest.raises(mt.errors.TowerError, match="'model' of LlamaForCausalLM was replaced"):
        logits(model)
    native.model = decoder
    logits(model)
    decoder.layers.append(copy.deepcopy(decoder.layers[0]))
    with pytest.raises(mt.errors.TowerError, match=r"'layers' of LlamaModel .* another number of layers"):
        logits(model)
