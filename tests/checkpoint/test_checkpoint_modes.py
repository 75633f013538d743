"""Options of loading: changed towers, revisions, dtypes, devices, and single, tied or shared towers."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import multitower as mt
from fake_hub import COMMIT, Download
from models import causal_lm, pair
from multitower.testing import open_links, tiny_tower
from tampering import rewrite_manifest
from test_checkpoint_format import BLANKS, assert_same, blanks, document

# peft 0.21 uses a deprecated attribute of transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def origin(downloaded: Download) -> Path:
    return downloaded("org/text-model", causal_lm("llama", seed=3))


@pytest.fixture
def model(origin: Path) -> mt.FusedModel:
    """Return a model whose checkpoint stores its speech tower, and refers to its text tower."""
    graph = mt.FusionGraph()
    speech = causal_lm("gpt2", depth=4, vocab_size=14)
    graph.add_tower("speech", speech, train="all", adapter="residual")
    graph.add_tower("text", "org/text-model", adapter="gated")
    graph.add_link("speech", "text", interleave=(2, 1))
    graph.add_link("text", "speech", interleave=(1, 2), gate="tanh")
    return open_links(graph.compile().eval(), seed=7)


def test_one_changed_value_is_noticed_where_all_are_compared(
    model: mt.FusedModel, origin: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "fused")
    tensors = load_file(origin / "model.safetensors")
    changed = {key: value.clone() for key, value in tensors.items()}
    changed["model.embed_tokens.weight"][7, 3] += 1e-3  # not in the samples of start, middle and end
    save_file(changed, origin / "model.safetensors", metadata={"format": "pt"})
    mt.FusedModel.from_pretrained(tmp_path / "fused")
    with pytest.raises(mt.errors.CheckpointError, match=r"is not the one .* allow_changed_towers=\['text'\]"):
        mt.FusedModel.from_pretrained(tmp_path / "fused", verify=True)
    changed["model.embed_tokens.weight"][-1, -1] += 1e-3
    save_file(changed, origin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(mt.errors.CheckpointError, match=r"is not the one .* allow_changed_towers=\['text'\]"):
        mt.FusedModel.from_pretrained(tmp_path / "fused")


@pytest.mark.parametrize(
    ("given", "allowed"), [("path", True), ("module", True), ("origin", True), ("path", ["text"])]
)
def test_a_changed_tower_is_taken_when_told_so(
    model: mt.FusedModel, origin: Path, tmp_path: Path, allowed: Any, given: str
) -> None:
    model.save_pretrained(tmp_path / "fused")
    other = causal_lm("llama", seed=4)
    place = origin if given == "origin" else tmp_path / "later"
    other.save_pretrained(place)
    towers: dict[str, Any] = {"path": {"text": str(place)}, "module": {"text": other}}.get(given, {})
    with pytest.raises(mt.errors.CheckpointError, match=r"tower 'text' .* is not the one"):
        mt.FusedModel.from_pretrained(tmp_path / "fused", towers=towers, allow_changed_towers=["speech"])
    with pytest.warns(UserWarning, match="tower 'text' .* trained with another") as warned:
        again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers=towers, allow_changed_towers=allowed)
    assert warned[0].filename == __file__
    assert torch.equal(again.unimodal("text").lm_head.weight, other.lm_head.weight)
    assert all(map(torch.equal, model.links.state_dict().values(), again.links.state_dict().values()))


def test_a_stored_tower_is_never_a_changed_one(model: mt.FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused")
    file = tmp_path / "fused/towers/speech/model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, min(tensors): tensors[min(tensors)] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(mt.errors.CheckpointError, match=r"damaged: towers/speech/model\.safetensors"):
        mt.FusedModel.from_pretrained(tmp_path / "fused", allow_changed_towers=True)
    rewrite_manifest(tmp_path / "fused")
    with pytest.raises(mt.errors.CheckpointError, match=r"tower 'speech' .* is not the one"):
        mt.FusedModel.from_pretrained(tmp_path / "fused", allow_changed_towers=True)


def test_towers_of_another_size_are_refused(model: mt.FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused")
    towers = {"text": causal_lm("llama", width=8, depth=3), "speech": causal_lm("llama", width=8)}
    with pytest.raises(mt.errors.CheckpointError) as caught:
        mt.FusedModel.from_pretrained(tmp_path / "fused", towers=towers, allow_changed_towers=True)
    assert "tower 'text' has depth 3, not 2 and width 8, not 16" in str(caught.value)
    assert "tower 'speech' has depth 2, not 4 and width 8, not 16" in str(caught.value)


@pytest.mark.parametrize("allowed", ["text", ["smell"]])
def test_unknown_names_are_refused(model: mt.FusedModel, tmp_path: Path, allowed: Any) -> None:
    model.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="allow_changed_towers"):
        mt.FusedModel.from_pretrained(tmp_path / "fused", allow_changed_towers=allowed)


def test_the_revision_of_the_hub_is_kept(
    origin: Path, downloaded: Download, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def from_hub(source: str, *, revision: str, **options: Any) -> nn.Module:
        asked.append((revision, options["local_files_only"]))
        return load(source, revision=revision, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_hub)
    graph = mt.FusionGraph()
    graph.add_tower("text", "org/text-model")
    fused = graph.compile().eval()
    for _ in range(2):
        fused.save_pretrained(tmp_path / "fused")
        assert document(tmp_path / "fused")["towers"]["text"]["revision"] == COMMIT
        fused = mt.FusedModel.from_pretrained(tmp_path / "fused")
    assert asked == [("main", False), (COMMIT, True), (COMMIT, False), (COMMIT, True), (COMMIT, False)]
    downloaded("other/text-model", causal_lm("llama", seed=3))
    fused = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"text": "other/text-model"})
    assert asked[-1] == ("main", False)


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "bfloat16"), ("llama", torch.float16), ("gemma3_text", "bfloat16")]
)
def test_weights_are_converted_as_transformers_does(tmp_path: Path, family: str, dtype: Any) -> None:
    causal_lm(family).save_pretrained(tmp_path / "text-model")
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text-model", dtype=dtype)
    graph = mt.FusionGraph()
    graph.add_tower("text", tmp_path / "text-model")
    graph.add_tower("speech", tiny_tower(1), train="all")
    graph.add_link("speech", "text", interleave=1)
    graph.compile().save_pretrained(tmp_path / "fused")
    given = tiny_tower(2)
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"speech": given}, dtype=dtype)
    text = again.unimodal("text")
    assert text.dtype == expected.dtype == text.config.dtype
    for name, tensor in expected.state_dict().items():
        assert text.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(text.state_dict()[name], tensor), name
    if family == "llama":
        assert text.model.rotary_emb.inv_freq.dtype == torch.float32
    tokens = torch.tensor([[0, 4, 5]])
    assert torch.equal(text(tokens).logits, expected(tokens).logits)
    assert {each.dtype for each in again.parameters()} == {expected.dtype}
    assert torch.equal(given.table.weight, tiny_tower(1).table.weight.to(expected.dtype))
    again(**mt.collate([[mt.Segment("speech", [1, 2]), mt.Segment("text", [1, 3], target=True)]]))


def test_links_keep_a_dtype_of_their_own(model: mt.FusedModel, tmp_path: Path) -> None:
    model.links.double()
    model.save_pretrained(tmp_path / "fused")
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "fused"))


@pytest.mark.parametrize("device_map", ["meta", {"text": "meta"}, {"speech": torch.device("meta")}])
def test_each_link_goes_where_its_target_is(model: mt.FusedModel, tmp_path: Path, device_map: Any) -> None:
    model.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", device_map=device_map)
    for name in ("speech", "text"):
        chosen = device_map.get(name, "cpu") if isinstance(device_map, dict) else device_map
        modules = [again.tower(name), again.adapters[name]]
        modules += [again.links[link.name] for link in again.graph.links.values() if link.target == name]
        devices = {tensor.device for module in modules for tensor in module.state_dict().values()}
        assert devices == {torch.device(chosen)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"dtype": "float33"}, "dtype='float33'"),
        ({"device_map": "auto"}, "device_map='auto'"),
        ({"device_map": "cuda:99"}, "device_map='cuda:99': give a device that is there"),
        ({"device_map": {"smell": "cpu"}}, r"the checkpoint has the towers speech, text"),
    ],
)
def test_unknown_dtypes_and_devices_are_refused(
    model: mt.FusedModel, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model.save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match=message):
        mt.FusedModel.from_pretrained(tmp_path / "fused", **options)


def test_one_tower_is_loaded_without_the_rest(model: mt.FusedModel, origin: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused")
    (tmp_path / "fused/links.safetensors").unlink()
    text = mt.load_tower(tmp_path / "fused", "text", dtype="bfloat16", device_map="cpu")
    assert type(text).__name__ == "LlamaForCausalLM"
    assert torch.equal(text.lm_head.weight, model.unimodal("text").lm_head.weight.bfloat16())
    shutil.rmtree(origin)
    speech, tokens = mt.load_tower(tmp_path / "fused", "speech"), torch.tensor([[0, 4, 5]])
    assert torch.equal(speech(tokens).logits, model.unimodal("speech")(tokens).logits)
    with pytest.raises(mt.errors.CheckpointError, match="cannot load"):
        mt.load_tower(tmp_path / "fused", "text")
    (tmp_path / "fused/towers/speech/model.safetensors").unlink()
    with pytest.raises(mt.errors.CheckpointError, match=r"speech/model\.safetensors is missing"):
        mt.load_tower(tmp_path / "fused", "speech")
    with pytest.raises(mt.errors.CheckpointError, match="no tower 'smell'; the towers are speech, text"):
        mt.load_tower(tmp_path / "fused", "smell")


def test_one_tower_comes_with_its_adapters(tmp_path: Path) -> None:
    graph, module = mt.FusionGraph(), causal_lm("llama")
    graph.add_tower("ask", module, train="lora")
    graph.add_tower("answer", module, train="lora")
    model = graph.compile().eval()
    with torch.no_grad():
        for parameter in model.tower("ask").parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    tokens = torch.tensor([[0, 4, 5]])
    for name in ("ask", "answer"):
        alone = mt.load_tower(tmp_path, name)
        assert isinstance(alone, peft.PeftModel)
        assert torch.equal(alone(tokens).logits, model.unimodal(name)(tokens).logits)


def test_one_tower_in_plain_pytorch_is_given_again(tmp_path: Path) -> None:
    model = pair(gates=True, train="all")
    model.save_pretrained(tmp_path)
    given = BLANKS["speech"]()
    assert mt.load_tower(tmp_path, "speech", tower=given) is given
    assert all(map(torch.equal, given.state_dict().values(), model.tower("speech").state_dict().values()))
    with pytest.raises(mt.errors.CheckpointError, match="tower 'speech' was declared with a module"):
        mt.load_tower(tmp_path, "speech")


def test_a_tower_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    model = pair(gates=True, train="all")
    model.save_pretrained(tmp_path, max_shard_size=1000)
    with torch.device("meta"):
        given = blanks()
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path, towers=given))
    assert not any(each.is_meta for tower in given.values() for each in tower.parameters())


def tied(seed: int) -> mt.Tower:
    tower = tiny_tower(seed)
    tower.twin = copy.deepcopy(tower.table)
    tower.twin.weight = tower.table.weight
    return tower


@pytest.mark.parametrize("meta", [False, True])
def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path, meta: bool) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", tied(1), train="all")
    model = graph.compile()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "towers/text/model.safetensors")
    assert ("twin.weight" in stored) + ("table.weight" in stored) == 1
    with torch.device("meta" if meta else "cpu"):
        given = tied(2)
    again = mt.FusedModel.from_pretrained(tmp_path, towers={"text": given})
    assert given.twin.weight is given.table.weight
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    untied = tiny_tower(3)
    untied.twin = copy.deepcopy(untied.table)
    with pytest.raises(mt.errors.CheckpointError, match=r"missing: (twin|table)\.weight"):
        mt.FusedModel.from_pretrained(tmp_path, towers={"text": untied})


@pytest.mark.parametrize(
    ("dtype", "embed"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True), (torch.float64, False)],
)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, embed: bool) -> None:
    for name, depth, vocab_size in (("speech", 4, 14), ("text", 2, 20)):
        causal_lm("llama", depth=depth, vocab_size=vocab_size).to(dtype).save_pretrained(tmp_path / name)
    graph = mt.FusionGraph()
    graph.add_tower("speech", tmp_path / "speech", train="all")
    graph.add_tower("text", tmp_path / "text")
    graph.add_link("speech", "text", interleave=(2, 1))
    model = open_links(graph.compile().eval())
    with torch.no_grad():
        model.unimodal("speech").lm_head.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "fused", embed_towers=embed)
    assert {each.dtype for each in model.towers.parameters()} == {dtype}
    assert {each.dtype for each in model.links.parameters()} == {torch.promote_types(dtype, torch.float32)}
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "fused"))


def test_tensors_of_several_dtypes_come_back_bit_for_bit(tmp_path: Path) -> None:
    text = causal_lm("mamba").bfloat16()
    for name, parameter in text.named_parameters():
        if name.endswith("A_log"):
            parameter.data = parameter.data.float() + 1e-4
    model = pair(text, causal_lm("gpt2", depth=4, vocab_size=14), gates=True)
    model.save_pretrained(tmp_path)
    again = mt.FusedModel.from_pretrained(tmp_path)
    assert_same(model, again)
    assert {each.dtype for each in again.tower("text").parameters()} == {torch.bfloat16, torch.float32}


def test_either_name_of_a_shared_model_may_be_allowed_to_change(origin: Path, tmp_path: Path) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("ask", "org/text-model")
    graph.add_tower("answer", "org/text-model")
    graph.compile().save_pretrained(tmp_path / "fused")
    causal_lm("llama", seed=4).save_pretrained(origin)
    for name in ("ask", "answer"):
        with pytest.warns(UserWarning, match="is not the one"):
            again = mt.FusedModel.from_pretrained(tmp_path / "fused", allow_changed_towers=[name])
        assert again.unimodal("ask") is again.unimodal("answer")


def test_a_tower_on_the_meta_device_takes_adapters(tmp_path: Path) -> None:
    graph = mt.FusionGraph()
    graph.add_tower("text", tiny_tower(1), train=peft.LoraConfig(target_modules=["attention"]))
    model = graph.compile().eval()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        given = tiny_tower(1)
    again = mt.FusedModel.from_pretrained(tmp_path, towers={"text": given})
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


def test_a_tower_without_values_is_refused(model: mt.FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused")
    with torch.device("meta"):
        empty = causal_lm("llama", seed=3)
    with pytest.raises(mt.errors.CheckpointError, match="tower 'text' is on the meta device"):
        mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"text": empty})
