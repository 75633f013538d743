from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import multitower as mt
from adapted import CONFIGS, assert_same, fused, logits, randomise, trainable
from models import EXAMPLES, causal_lm, segment, transformers_families
from multitower.testing import tiny_tower
from multitower.tower.peft_tower import base_state

# peft 0.21 uses a deprecated attribute of transformers 5.23 when tests call it directly.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    causal_lm("llama", seed=3).save_pretrained(tmp_path / "text-model")
    return tmp_path / "text-model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fused"


@pytest.mark.parametrize("family", transformers_families)
def test_nothing_changes_at_the_start(family: str) -> None:
    text, before = causal_lm(family), causal_lm(family)
    tokens = mt.collate(EXAMPLES)["streams"]["text"]["tokens"]
    model = fused(text, trained=False)
    assert torch.equal(logits(model)["text"], before(tokens).logits)
    assert torch.equal(model.unimodal("text")(tokens).logits, before(tokens).logits)
    assert {type(config) for config in model.unimodal("text").peft_config.values()} == {peft.LoraConfig}


def test_exactly_the_adapters_are_trained() -> None:
    model = fused(causal_lm("llama"))
    expected = {name for name, _ in model.tower("text").named_parameters() if "lora_" in name}
    assert len(expected) == 2 * 2 * 7
    assert trainable(model.tower("text")) == expected
    assert trainable(model.tower("speech")) == set()
    before = {name: tensor.clone() for name, tensor in base_state(model.unimodal("text")).items()}
    adapters = {name: model.tower("text").get_parameter(name).clone() for name in expected}
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=0.1))
    model(**mt.collate(EXAMPLES)).loss.backward()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert all(model.tower("text").get_parameter(name).grad.abs().sum() > 0 for name in expected)
    optimizer.step()
    for name, tensor in base_state(model.unimodal("text")).items():
        assert torch.equal(tensor, before[name])
    for name, value in adapters.items():
        assert not torch.equal(model.tower("text").get_parameter(name), value)


def test_adapters_train_from_the_first_step() -> None:
    model = fused(causal_lm("llama"), trained=False)
    model(**mt.collate(EXAMPLES)).losses["text"].backward()
    for name, parameter in model.tower("text").named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == ("lora_B" in name)


def test_dropout_is_on_only_where_something_is_trained() -> None:
    model = fused(causal_lm("llama"), peft.LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    assert not any(module.training for module in model.tower("text").modules())
    assert torch.equal(logits(model)["text"], logits(model)["text"])
    model.train()
    assert all(module.training for module in model.tower("text").modules())
    assert not any(module.training for module in model.tower("speech").modules())
    assert not torch.equal(logits(model)["text"], logits(model)["text"])


def test_a_deep_copy_stands_alone() -> None:
    model = fused(causal_lm("llama"))
    before, twin = logits(model)["text"], copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(twin)["text"], before)
    assert twin.unimodal("text").get_base_model() is twin.tower("text").model
    assert twin.unimodal("text") is not model.unimodal("text")


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    torch._dynamo.reset()
    model = fused(causal_lm("llama"))
    batch = mt.collate(EXAMPLES)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_unimodal_use_is_pefts() -> None:
    model, plain = fused(causal_lm("llama")), causal_lm("llama")
    native, tokens = model.unimodal("text"), torch.tensor([[0, 5, 6, 7]])
    assert isinstance(native, peft.PeftModel)
    torch.testing.assert_close(native(tokens, use_cache=False).logits, model.tower("text")(tokens))
    assert not torch.equal(native(tokens).logits, plain(tokens).logits)
    with native.disable_adapter():
        assert torch.equal(native(tokens).logits, plain(tokens).logits)
        assert torch.equal(model.tower("text")(tokens), plain(tokens, use_cache=False).logits)
    written = native.generate(input_ids=tokens, max_new_tokens=8, do_sample=False, pad_token_id=1)
    merged = copy.deepcopy(native).merge_and_unload()
    assert torch.equal(merged.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=1), written)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_decoding_uses_the_adapters_cached_or_not(num_beams: int) -> None:
    model = fused(causal_lm("llama"))
    given = [[segment("speech", 5, 6, 7)], [segment("text", 4), segment("speech", 9, 3, 2, 8)]]

    def decode(**options: Any) -> list[list[int]]:
        options |= {"max_new_tokens": 8, "num_beams": num_beams}
        return [row[0].tokens.tolist() for row in model.generate(given, output=["text"], **options)]

    with_adapters = decode()
    assert decode(use_cache=False) == with_adapters
    with model.unimodal("text").disable_adapter():
        assert decode() != with_adapters


def test_merged_adapters_leave_an_ordinary_tower(origin: Path, folder: Path) -> None:
    import transformers

    model = fused(origin)
    expected = logits(model)
    model.train()
    merged = model.merge_and_unload("text")
    assert type(merged) is transformers.LlamaForCausalLM
    assert merged is model.unimodal("text")
    assert (
        model.tower("text").state_dict().keys()
        == mt.TransformersTower(causal_lm("llama")).state_dict().keys()
    )
    torch.testing.assert_close(logits(model), expected)
    assert trainable(model.tower("text")) == set()
    assert not merged.training
    spec = model.graph.towers["text"]
    assert (spec.source, spec.train, spec.peft) == (None, "none", None)
    model.save_pretrained(folder)
    shutil.rmtree(origin)
    assert not (folder / "towers/text/adapter").exists()
    assert_same(model, mt.FusedModel.from_pretrained(folder))
    with pytest.raises(mt.errors.TowerError, match="tower 'text': it has no peft adapters"):
        model.merge_and_unload("text")


def test_adapters_that_a_model_has_are_trained_as_they_are_set(folder: Path) -> None:
    text = peft.get_peft_model(causal_lm("llama"), peft.LoraConfig(r=2), "first")
    text.add_adapter("second", peft.LoraConfig(target_modules=["gate_proj"], r=3))
    text.set_adapter("second")
    model = fused(text)
    assert model.unimodal("text") is text
    assert trainable(model.tower("text")) == {
        name for name, _ in model.tower("text").named_parameters() if "second" in name
    }
    randomise(model)
    model.save_pretrained(folder)
    assert sorted(path.name for path in (folder / "towers/text/adapter").iterdir()) == [
        "README.md",
        "first",
        "second",
    ]
    again = mt.FusedModel.from_pretrained(folder)
    assert_same(model, again)
    assert again.unimodal("text").active_adapter == "second"
    assert trainable(again) == trainable(model)
    for each in (model, again):
        each.unimodal("text").set_adapter("first")
    assert_same(model, again)


@pytest.mark.parametrize("train", ["none", "all"])
def test_a_peft_model_may_be_frozen_or_trained_whole(folder: Path, train: str) -> None:
    text = peft.get_peft_model(causal_lm("llama"), peft.LoraConfig(init_lora_weights=False))
    model = fused(text, train)
    tower = model.tower("text")
    assert len(trainable(tower)) == (len(list(tower.parameters())) if train == "all" else 0)
    model.save_pretrained(folder)
    again = mt.FusedModel.from_pretrained(folder)
    assert_same(model, again)
    assert trainable(again) == trainable(model)
    assert isinstance(again.unimodal("text"), peft.PeftModel)


def test_initialisation_that_changes_the_model(folder: Path) -> None:
    config = peft.LoraConfig(init_lora_weights="pissa", target_modules="all-linear", r=2)
    with pytest.raises(
        mt.errors.TowerError, match="tower 'text': this peft config changes the model's own tensors"
    ):
        fused(causal_lm("llama"), config)
    model = fused(peft.get_peft_model(causal_lm("llama"), config))
    model.save_pretrained(folder)
    assert_same(model, mt.FusedModel.from_pretrained(folder))


def test_plain_towers(folder: Path) -> None:
    def text() -> mt.Tower:
        return tiny_tower(2, vocab_size=20)

    tokens = mt.collate(EXAMPLES)["streams"]["text"]["tokens"]
    config = peft.LoraConfig(target_modules=["attention", "out"])
    assert torch.equal(logits(fused(text(), config, trained=False))["text"], text()(tokens))
    model = fused(text(), config)
    assert trainable(model.tower("text")) == {
        name for name, _ in model.tower("text").named_parameters() if "lora_" in name
    }
    twin = copy.deepcopy(model)
    assert twin.unimodal("text").get_base_model() is twin.tower("text").tower
    assert torch.equal(model.unimodal("text")(tokens), model.tower("text")(tokens))
    given = [[segment("speech", 5, 6, 7)]]
    assert len(model.generate(given, output=["text"], max_new_tokens=4)[0][0].tokens) > 1
    model.save_pretrained(folder)
    assert load_file(folder / "towers/text/model.safetensors").keys() == text().state_dict().keys()
    again = mt.FusedModel.from_pretrained(folder, towers={"text": tiny_tower(9, vocab_size=20)})
    assert_same(model, again)
    expected = logits(model)
    assert type(again.merge_and_unload("text")) is type(text())
    torch.testing.assert_close(logits(again), expected)


def test_a_tower_with_its_own_list_of_layers() -> None:
    tower = mt.TransformersTower(causal_lm("llama"), layers="model.layers")
    assert isinstance(fused(tower).unimodal("text"), peft.PeftModel)


def test_json_round_trip() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("speech", "speech-model", train="lora")
    graph.add_tower("text", "text-model", train=CONFIGS["lora"](), adapter=None)
    again = mt.FusionGraph.from_json(graph.to_json())
    assert again == graph
    spec = again.towers["text"]
    assert spec.train == "lora"
    assert spec.peft["target_modules"] == ["q_proj", "v_proj"]
    assert peft.get_peft_config(dict(spec.peft)) == CONFIGS["lora"]()
    assert again.towers["speech"].peft is None
    assert "tower text: text-model, train=lora (LORA)" in repr(again)


def test_a_graph_from_json_compiles(origin: Path) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", origin, train=peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    model = mt.FusionGraph.from_json(graph.to_json()).compile()
    assert trainable(model.tower("text")) == {
        f"model.model.layers.{layer}.self_attn.q_proj.ia3_l.default" for layer in range(2)
    }
