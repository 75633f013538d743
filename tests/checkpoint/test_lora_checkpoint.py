from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import multitower as mt
from adapted import CONFIGS, assert_same, fused, logits, ready, trainable
from fake_hub import Download
from models import EXAMPLES, causal_lm
from tampering import rewrite_manifest

# peft 0.21 uses a deprecated attribute of transformers 5.23 when tests call it directly.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


TEXT = "org/text-model"


@pytest.fixture
def origin(downloaded: Download) -> Path:
    return downloaded(TEXT, causal_lm("llama", seed=3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fused"


def test_a_model_with_an_origin_is_referred_to(origin: Path, folder: Path) -> None:
    model = fused(TEXT)
    model.save_pretrained(folder)
    stored = sorted(str(path.relative_to(folder)) for path in (folder / "towers/text").rglob("*.*"))
    assert stored == [
        f"towers/text/adapter/{file}"
        for file in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    ]
    for _ in range(2):
        again = mt.FusedModel.from_pretrained(folder)
        assert_same(model, again)
        assert again.graph == model.graph
        assert trainable(again) == trainable(model)
        assert again.unimodal("text").peft_config == model.unimodal("text").peft_config
        again.save_pretrained(folder)


@pytest.mark.parametrize("given", ["path", "module"])
def test_the_origin_may_be_given(origin: Path, folder: Path, given: str) -> None:
    model = fused(TEXT)
    model.save_pretrained(folder)
    moved = origin.rename(origin.with_name("moved"))
    with pytest.raises(mt.errors.CheckpointError, match="tower 'text': cannot load"):
        mt.FusedModel.from_pretrained(folder)
    text = str(moved) if given == "path" else causal_lm("llama", seed=3)
    again = mt.FusedModel.from_pretrained(folder, towers={"text": text})
    assert_same(model, again)
    again.save_pretrained(folder)
    assert (folder / "towers/text/model.safetensors").exists()
    shutil.rmtree(moved) if given == "module" else None
    assert_same(model, mt.FusedModel.from_pretrained(folder))


@pytest.mark.parametrize("why", ["a module", "embed_towers"])
def test_an_embedded_model_is_stored_as_if_without_peft(origin: Path, folder: Path, why: str) -> None:
    import transformers

    model = fused(causal_lm("llama", seed=3) if why == "a module" else TEXT)
    model.save_pretrained(folder, embed_towers=why == "embed_towers")
    assert load_file(folder / "towers/text/model.safetensors").keys() == (
        load_file(origin / "model.safetensors").keys()
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "towers/text")
    for name, tensor in causal_lm("llama", seed=3).state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)
    alone, tokens = (
        peft.PeftModel.from_pretrained(plain, folder / "towers/text/adapter"),
        torch.tensor([[0, 4]]),
    )
    assert torch.equal(alone(tokens).logits, model.unimodal("text")(tokens).logits)
    shutil.rmtree(origin)
    again = mt.FusedModel.from_pretrained(folder)
    assert_same(model, again)
    again.save_pretrained(folder, embed_towers=True)
    assert_same(model, mt.FusedModel.from_pretrained(folder))


def test_a_tied_head_with_adapters_is_stored(folder: Path) -> None:
    model = fused(causal_lm("gpt2"), peft.LoraConfig(target_modules=["c_attn", "wte"], fan_in_fan_out=True))
    model.save_pretrained(folder)
    again = mt.FusedModel.from_pretrained(folder)
    assert_same(model, again)
    inner = again.tower("text").model
    assert inner.lm_head.weight is inner.transformer.wte.base_layer.weight
    with pytest.raises(
        mt.errors.TowerError, match=r"tower 'text': .*wte\.weight and lm_head\.weight are tied"
    ):
        again.merge_and_unload("text")
    assert_same(model, again)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_kept(folder: Path, autocast: bool) -> None:
    import transformers

    causal_lm("llama").bfloat16().save_pretrained(folder.with_name("half"))
    half = transformers.AutoModelForCausalLM.from_pretrained(folder.with_name("half"))
    text = peft.get_peft_model(half, peft.LoraConfig(), autocast_adapter_dtype=autocast)
    model = fused(text)
    model.save_pretrained(folder)
    again = mt.FusedModel.from_pretrained(folder)
    assert_same(model, again)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name: parameter.dtype for name, parameter in again.named_parameters()} == dtypes
    assert (torch.float32 in dtypes.values()) or not autocast


def test_plain_peft_loads_the_adapters(origin: Path, folder: Path) -> None:
    import transformers

    model, tokens = fused(TEXT), torch.tensor([[0, 4, 5, 6]])
    model.save_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(origin)
    alone = peft.PeftModel.from_pretrained(base, folder / "towers/text/adapter")
    assert torch.equal(alone(tokens).logits, model.unimodal("text")(tokens).logits)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "towers/text/adapter")
    assert torch.equal(auto(tokens).logits, alone(tokens).logits)


@pytest.mark.parametrize("kind", CONFIGS)
# peft warns about VeRA without its projections.
@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A")
def test_other_configs(tmp_path: Path, folder: Path, kind: str) -> None:
    config = CONFIGS[kind]()
    family = "gpt2" if kind == "bias" else "llama"
    causal_lm(family, seed=3).save_pretrained(tmp_path / "model")
    before = config.to_dict()
    model = fused(tmp_path / "model", config)
    assert config.to_dict() == before
    assert 0 < len(trainable(model.tower("text"))) < len(list(model.tower("text").parameters()))
    model(**mt.collate(EXAMPLES)).loss.backward()
    assert mt.FusionGraph.from_json(model.graph.to_json()) == model.graph
    model.save_pretrained(folder)
    again = mt.FusedModel.from_pretrained(folder)
    assert_same(model, again)
    assert trainable(again) == trainable(model)
    model.save_pretrained(folder, embed_towers=True)
    assert_same(model, mt.FusedModel.from_pretrained(folder))
    expected = logits(model)
    again.merge_and_unload("text")
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("vectors", [8, 300])
def test_logits_of_which_only_the_top_is_stored_come_back_as_pefts(folder: Path, vectors: int) -> None:
    config = peft.VBLoRAConfig(
        target_modules="all-linear",
        vector_length=4,
        num_vectors=vectors,
        topk=3,
        save_only_topk_weights=True,
    )
    model = fused(causal_lm("llama", seed=3), config)
    model.save_pretrained(folder)
    again = mt.FusedModel.from_pretrained(folder)
    adapter, tokens = folder / "towers/text/adapter", torch.tensor([[0, 4, 5]])
    alone = peft.PeftModel.from_pretrained(causal_lm("llama", seed=3), adapter)
    assert torch.equal(again.unimodal("text")(tokens).logits, alone(tokens).logits)
    torch.testing.assert_close(logits(again), logits(model))
    again.save_pretrained(folder)
    torch.testing.assert_close(logits(mt.FusedModel.from_pretrained(folder)), logits(model))
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    bank = next(key for key in tensors if "vector_bank" in key)
    save_file({**tensors, bank: tensors[bank] + 1}, file)
    with pytest.raises(mt.errors.CheckpointError, match=r"damaged: .*adapter_model\.safetensors"):
        mt.FusedModel.from_pretrained(folder)


def test_adapters_merged_in_place_are_not_saved(origin: Path, folder: Path) -> None:
    model = fused(TEXT)
    model.unimodal("text").merge_adapter()
    with pytest.raises(mt.errors.CheckpointError, match="tower 'text' has merged adapters"):
        model.save_pretrained(folder)
    assert not folder.exists()
    model.unimodal("text").unmerge_adapter()


def test_several_adapters_may_be_active(folder: Path) -> None:
    text = peft.get_peft_model(causal_lm("llama"), peft.LoraConfig(r=2))
    text.add_adapter("second", peft.LoraConfig(target_modules=["gate_proj"], r=3))
    text.base_model.set_adapter(["default", "second"])
    model = fused(text)
    model.save_pretrained(folder)
    assert_same(model, mt.FusedModel.from_pretrained(folder))


def test_another_model_is_refused(origin: Path, folder: Path) -> None:
    fused(TEXT).save_pretrained(folder)
    causal_lm("llama", seed=4).save_pretrained(origin)
    with pytest.raises(mt.errors.CheckpointError, match=f"tower 'text' from {TEXT} is not the one"):
        mt.FusedModel.from_pretrained(folder)
    causal_lm("llama", width=8).save_pretrained(origin)
    with pytest.raises(mt.errors.CheckpointError, match=r"tower 'text': .* does not fit the model"):
        mt.FusedModel.from_pretrained(folder)
    with pytest.raises(mt.errors.CheckpointError, match="tower 'text': it has peft adapters"):
        mt.FusedModel.from_pretrained(folder, towers={"text": ready()})


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(origin: Path, folder: Path, missing: str) -> None:
    fused(TEXT).save_pretrained(folder)
    (folder / "towers/text/adapter" / missing).unlink()
    rewrite_manifest(folder)
    with pytest.raises(mt.errors.CheckpointError, match=f"{missing} is missing"):
        mt.FusedModel.from_pretrained(folder)


def test_pickles_are_never_read(origin: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused(TEXT).save_pretrained(folder, embed_towers=True)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    adapter = folder / "towers/text/adapter/adapter_model.safetensors"
    torch.save(load_file(adapter), adapter.with_suffix(".bin"))
    values = adapter.read_bytes()
    adapter.unlink()
    rewrite_manifest(folder)
    with pytest.raises(mt.errors.CheckpointError, match=r"adapter_model\.safetensors is missing"):
        mt.FusedModel.from_pretrained(folder)
    adapter.write_bytes(values)
    shutil.copy(adapter.with_name("adapter_config.json"), folder / "towers/text")
    adapter.with_suffix(".bin").rename(folder / "towers/text/adapter_model.bin")
    rewrite_manifest(folder)
    with pytest.raises(mt.errors.CheckpointError, match=r"adapter_config\.json has no place there"):
        mt.FusedModel.from_pretrained(folder)
    (folder / "towers/text/adapter_config.json").unlink()
    model = folder / "towers/text/model.safetensors"
    torch.save(load_file(model), model.with_name("pytorch_model.bin"))
    model.unlink()
    rewrite_manifest(folder)
    with pytest.raises(mt.errors.CheckpointError, match=r"model\.safetensors is missing"):
        mt.FusedModel.from_pretrained(folder)


def test_adapters_of_another_model_are_refused(origin: Path, folder: Path) -> None:
    fused(TEXT).save_pretrained(folder)
    file = folder / "towers/text/adapter/adapter_model.safetensors"
    tensors = load_file(file)
    first, second, third, *_ = sorted(tensors)
    save_file({**tensors, first: tensors[first] + 1}, file)
    with pytest.raises(mt.errors.CheckpointError, match=r"damaged: .*adapter_model\.safetensors"):
        mt.FusedModel.from_pretrained(folder)
    tensors["other"] = tensors.pop(first)
    tensors[second] = tensors[second][:1].clone()
    tensors[third] = tensors[third].half()
    save_file(tensors, file)
    rewrite_manifest(folder)
    with pytest.raises(mt.errors.CheckpointError) as caught:
        mt.FusedModel.from_pretrained(folder)
    for part in ("towers/text/adapter", f"missing: {first}", "unexpected: other", f"{third} is F16"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("towers/text/adapter/adapter_config.json", {"peft_type": "NEW"}, "this is no config of peft"),
        (
            "towers/text/adapter/adapter_config.json",
            {"peft_type": "PROMPT_TUNING", "r": 3},
            "no place",
        ),
        ("towers/text/adapter/adapter_config.json", {"r": 3}, "does not fit the model"),
        ("towers/text/adapter/adapter_config.json", {"target_modules": ["none"]}, "Target modules"),
        ("fusion.json", {"adapters": None}, "does not say which peft adapters"),
        ("fusion.json", {"active_adapters": []}, "does not say which peft adapters"),
        ("fusion.json", {"active_adapters": ["other"]}, "cannot have adapters 'other'"),
    ],
)
# peft warns about a damaged config before the error.
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_damaged_files_are_refused(
    origin: Path, folder: Path, file: str, change: dict[str, Any], message: str
) -> None:
    fused(TEXT).save_pretrained(folder)
    data = json.loads((folder / file).read_text())
    (data["towers"]["text"] if file == "fusion.json" else data).update(change)
    (folder / file).write_text(json.dumps(data))
    rewrite_manifest(folder)
    with pytest.raises(mt.errors.CheckpointError, match=f"tower 'text'.*(?s:{message})"):
        mt.FusedModel.from_pretrained(folder)


def test_adapters_may_have_the_names_that_peft_allows(folder: Path) -> None:
    adapted = peft.get_peft_model(
        causal_lm("llama", seed=3), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="asr+tts (v2)"
    )
    fused(adapted).save_pretrained(folder)
    assert list(mt.FusedModel.from_pretrained(folder).unimodal("text").peft_config) == ["asr+tts (v2)"]


def test_what_could_not_be_loaded_is_not_saved(folder: Path) -> None:
    config = peft.LoraConfig(target_modules=r"model\.(\w+\.)*(q_proj|v_proj)")
    with pytest.raises(mt.errors.CheckpointError, match=r"'text' could not be loaded again.*by name"):
        fused(peft.get_peft_model(causal_lm("llama", seed=3), config)).save_pretrained(folder)
    assert not folder.exists()


def test_adapters_that_are_switched_off_are_not_saved(folder: Path) -> None:
    adapted = peft.get_peft_model(causal_lm("llama", seed=3), peft.LoraConfig(target_modules=["q_proj"]))
    model = fused(adapted)
    with adapted.disable_adapter(), pytest.raises(mt.errors.CheckpointError, match="switched off"):
        model.save_pretrained(folder)
    model.save_pretrained(folder)
