from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

import multitower as mt
from adapted import CONFIGS, fused, ready
from models import causal_lm
from multitower.testing import tiny_tower

# peft 0.21 uses a deprecated attribute of transformers 5.23 when tests call it directly.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    causal_lm("llama", seed=3).save_pretrained(tmp_path / "text-model")
    return tmp_path / "text-model"


def test_plain_towers_need_to_be_told_where() -> None:
    with pytest.raises(mt.errors.TowerError, match=r"tower 'text': .*a Tower needs target_modules by name"):
        fused(tiny_tower(2, vocab_size=20))


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
    with pytest.raises(mt.errors.GraphError, match=rf"tower 'text': {type(config).__name__} \(\w+\)"):
        mt.FusionGraph().add_tower("text", "model", train=config)
    ready = peft.get_peft_model(causal_lm("llama"), config)
    with pytest.raises(mt.errors.TowerError, match=rf"tower 'text': {type(config).__name__} \(\w+\)"):
        fused(ready, "none")


def test_a_peft_model_that_is_more_than_its_model_is_refused() -> None:
    ready = peft.get_peft_model(causal_lm("llama"), peft.PolyConfig(target_modules=["q_proj"], n_tasks=2))
    with pytest.raises(mt.errors.TowerError, match="tower 'text': its ShadowModel has parameters of its own"):
        fused(peft.get_peft_model(causal_lm("llama"), peft.ShadowConfig(task_type="CAUSAL_LM")))
    with pytest.raises(mt.errors.TowerError, match=r"tower 'text': .*task_ids"):
        fused(ready)
    doubled = peft.get_peft_model(causal_lm("llama"), peft.LoraConfig())
    doubled.register_forward_hook(
        lambda module, inputs, output: type(output)(logits=2 * output.logits, hidden_states=None)
    )
    with pytest.raises(
        mt.errors.TowerError, match=r"tower 'text': .* gives other logits than its own forward"
    ):
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
    with pytest.raises(mt.errors.TowerError, match=f"tower 'text'.*{message}"):
        fused(text(), train)


def test_a_graph_with_a_module_compiles_once() -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", causal_lm("llama"), train="lora")
    graph.compile()
    with pytest.raises(mt.errors.TowerError, match="tower 'text': it has peft layers"):
        graph.compile()


def test_an_adapter_folder_is_no_source(tmp_path: Path, origin: Path) -> None:
    peft.get_peft_model(
        causal_lm("llama", seed=3), peft.LoraConfig(base_model_name_or_path=None)
    ).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(origin)}))
    with pytest.raises(mt.errors.TowerError, match="tower 'text': it has peft layers"):
        fused(tmp_path / "adapter", "none")


def test_bad_specs_are_refused() -> None:
    entry = {"name": "text", "source": "x"}
    for wrong in ({"peft": {"peft_type": "LORA"}}, {"train": "lora", "peft": {"r": 2}}):
        with pytest.raises(mt.errors.GraphError, match="tower 'text': a peft config"):
            mt.FusionGraph.from_dict({"towers": [{**entry, **wrong}], "links": []})
    graph = mt.FusionGraph.from_dict(
        {"towers": [{**entry, "train": "lora", "peft": {"peft_type": "NEW"}}], "links": []}
    )
    graph._modules["text"] = causal_lm("llama")
    with pytest.raises(mt.errors.TowerError, match=r"tower 'text': this is no config of peft .*NEW"):
        graph.compile()


def test_without_peft_the_extra_is_named(tmp_path: Path, origin: Path) -> None:
    folder = tmp_path / "fused"
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
plain.add_tower("text", {str(origin)!r}, adapter="gated")
print(plain.compile().gates())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.count("it comes with the extra: pip install 'multitower[lora]'") == 2
    assert "{'text adapter': 0.0}" in done.stdout
