"""Models with custom code, as towers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

import multitower as mt
from models import EXAMPLES, causal_lm, pair

BATCH = mt.collate(EXAMPLES)

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path(__file__).with_name("ran").touch()
pathlib.Path({witness!r}).touch()


class CustomConfig(LlamaConfig):
    model_type = "custom_of_a_test"


class CustomForCausalLM(LlamaForCausalLM):
    config_class = CustomConfig
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save a model with custom code, which writes a file "witness" when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    folder = tmp_path / "custom"
    causal_lm("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "custom_of_a_test",
        "architectures": ["CustomForCausalLM"],
        "auto_map": {
            "AutoConfig": "custom_code.CustomConfig",
            "AutoModelForCausalLM": "custom_code.CustomForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom_code.py").write_text(CODE.format(witness=str(tmp_path / "witness")))
    return folder


def test_code_that_a_model_brings_is_not_run(custom: Path) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", custom)
    with pytest.raises(
        mt.errors.TowerError, match=r"tower 'text': .* code of its own.*trust_remote_code=True"
    ):
        graph.compile()
    assert not custom.with_name("witness").exists()


def test_a_model_with_its_own_code_is_a_tower_once_its_user_has_loaded_it(custom: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(custom, trust_remote_code=True)
    witness = custom.with_name("witness")
    assert witness.exists()
    fused, folder = pair(model, gates=True), custom.with_name("fused")
    expected = fused(**BATCH).logits["text"]
    fused.save_pretrained(folder)

    witness.unlink()
    speech = fused.tower("speech")
    with pytest.raises(mt.errors.CheckpointError, match=r"tower 'text': .* code of its own"):
        mt.FusedModel.from_pretrained(folder, towers={"speech": speech})
    assert not witness.exists()

    stored = folder / "towers" / "text"
    assert (stored / "custom_code.py").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(stored, trust_remote_code=True)
    again = mt.FusedModel.from_pretrained(folder, towers={"speech": speech, "text": model})
    assert torch.equal(again(**BATCH).logits["text"], expected)


def test_code_is_not_run_for_a_family_that_transformers_knows(custom: Path) -> None:
    config = json.loads((custom / "config.json").read_text())
    (custom / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    graph = mt.FusionGraph()
    graph.add_tower("text", custom)
    assert type(graph.compile().unimodal("text")) is transformers.LlamaForCausalLM
    assert not custom.with_name("witness").exists()


def test_kernels_that_a_config_asks_for_are_not_fetched(tmp_path: Path) -> None:
    causal_lm("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": "someone/kernels"}))
    graph = mt.FusionGraph()
    graph.add_tower("text", tmp_path)
    with pytest.raises(mt.errors.TowerError, match="asks for the kernels 'someone/kernels'"):
        graph.compile()


def test_pickles_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    graph = mt.FusionGraph()
    graph.add_tower("text", tmp_path)
    with pytest.raises(mt.errors.TowerError, match="cannot load"):
        graph.compile()
