from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import multitower as mt
from adapted import CONFIGS, assert_same, fused, logits, randomise, ready, trainable
from models import EXAMPLES, causal_lm, segment, transformers_families
from multitower.testing import tiny_tower
from multitower.tower.lora import base_state

# peft 0.21 asks transformers 5.23 in the old way when these tests call peft themselves.
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
    with pytest.raises(mt.TowerError, match="tower 'text': it has no peft adapters"):
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
    with pytest.raises(mt.TowerError, match="tower 'text': this peft config changes the model's own tensors"):
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


def test_plain_towers_need_to_be_told_where() -> None:
    with pytest.raises(mt.TowerError, match=r"tower 'text': .*a Tower needs target_modules by name"):
        fused(tiny_tower(2, vocab_size=20))


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


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1),
        peft.LoraConfig(alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
        peft.LoraConfig(layer_replication=[(0, 2), (1, 2)]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_without_a_place_in_a_tower_are_refused(config: peft.PeftConfig) -> None:
    with pytest.raises(mt.GraphError, match=rf"tower 'text': {type(config).__name__} \(\w+\)"):
        mt.FusionGraph().add_tower("text", "model", train=config)
    ready = peft.get_peft_model(causal_lm("llama"), config)
    with pytest.raises(mt.TowerError, match=rf"tower 'text': {type(config).__name__} \(\w+\)"):
        fused(ready, "none")


def test_a_peft_model_that_is_more_than_its_model_is_refused() -> None:
    ready = peft.get_peft_model(causal_lm("llama"), peft.PolyConfig(target_modules=["q_proj"], n_tasks=2))
    with pytest.raises(mt.TowerError, match="tower 'text': its ShadowModel has parameters of its own"):
        fused(peft.get_peft_model(causal_lm("llama"), peft.ShadowConfig(task_type="CAUSAL_LM")))
    with pytest.raises(mt.TowerError, match=r"tower 'text': .*task_ids"):
        fused(ready)
    doubled = peft.get_peft_model(causal_lm("llama"), peft.LoraConfig())
    doubled.register_forward_hook(
        lambda module, inputs, output: type(output)(logits=2 * output.logits, hidden_states=None)
    )
    with pytest.raises(mt.TowerError, match=r"tower 'text': .* gives other logits than its own forward"):
        fused(doubled)


@pytest.mark.parametrize(
    ("text", "train", "message"),
    [
        (lambda: ready(), CONFIGS["lora"](), "it has peft adapters already"),
        (
            lambda: ready().requires_grad_(False),
            "lora",
            "its adapters are frozen",
        ),
        (lambda: ready().get_base_model(), "lora", "it has peft layers, but no PeftModel around it"),
        (lambda: ready().get_base_model(), "none", "it has peft layers, but no PeftModel around it"),
        (lambda: causal_lm("llama"), peft.LoraConfig(target_modules=["nowhere"]), "Target modules .*nowhere"),
    ],
)
def test_sources_that_do_not_fit_teach(text: Callable[[], nn.Module], train: Any, message: str) -> None:
    with pytest.raises(mt.TowerError, match=f"tower 'text'.*{message}"):
        fused(text(), train)


def test_a_graph_with_a_module_compiles_once() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", causal_lm("llama"), train="lora")
    graph.compile()
    with pytest.raises(mt.TowerError, match="tower 'text': it has peft layers"):
        graph.compile()


def test_an_adapter_folder_is_no_source(tmp_path: Path, origin: Path) -> None:
    peft.get_peft_model(
        causal_lm("llama", seed=3), peft.LoraConfig(base_model_name_or_path=None)
    ).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(origin)}))
    with pytest.raises(mt.TowerError, match="tower 'text': it has peft layers"):
        fused(tmp_path / "adapter", "none")


def test_bad_specs_are_refused() -> None:
    entry = {"name": "text", "source": "x"}
    for wrong in ({"peft": {"peft_type": "LORA"}}, {"train": "lora", "peft": {"r": 2}}):
        with pytest.raises(mt.GraphError, match="tower 'text': a peft config"):
            mt.FusionGraph.from_dict({"towers": [{**entry, **wrong}], "links": []})
    graph = mt.FusionGraph.from_dict(
        {"towers": [{**entry, "train": "lora", "peft": {"peft_type": "NEW"}}], "links": []}
    )
    graph._modules["text"] = causal_lm("llama")
    with pytest.raises(mt.TowerError, match=r"tower 'text': this is no config of peft .*NEW"):
        graph.compile()


def test_without_peft_the_extra_is_named(origin: Path, folder: Path) -> None:
    fused(origin).save_pretrained(folder)
    script = f"""
import sys
sys.modules["peft"] = None
import multitower as mt
graph = mt.FusionGraph()
graph.add_tower("text", {str(origin)!r}, train="lora")
for build in (graph.compile, lambda: mt.FusedModel.from_pretrained({str(folder)!r})):
    try:
        build()
    except ImportError as error:
        print(error)
plain = mt.FusionGraph()
plain.add_tower("text", {str(origin)!r})
print(plain.compile().gates())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("it comes with the extra: pip install 'multitower[lora]'") == 2
    assert "{'text adapter': 0.0}" in done.stdout
