"""What stands on disk: format versions, shards, and how all that is wrong is said at once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import multitower as mt
from adapted import fused
from models import EXAMPLES, causal_lm, pair
from multitower.testing import tiny_tower
from multitower.tower.peft_tower import base_state
from tampering import reseal

BLANKS = {
    "speech": lambda: tiny_tower(9, depth=4, width=12, vocab_size=14),
    "text": lambda: tiny_tower(8, depth=2, width=8, vocab_size=20),
}


def blanks() -> dict[str, mt.Tower]:
    return {name: make() for name, make in BLANKS.items()}


def assert_same(model: mt.FusedModel, again: mt.FusedModel) -> None:
    assert again.graph == model.graph
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype, key
        assert torch.equal(value, after[key]), key
    batch = mt.collate(EXAMPLES)
    for name, expected in model(**batch).logits.items():
        assert torch.equal(again(**batch).logits[name], expected)


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "fusion.json").read_text())
    return found


def rewrite(folder: Path, **changes: Any) -> None:
    reseal(folder, lambda saved: saved.update(changes))


def test_fusion_json_says_what_the_format_asks(tmp_path: Path) -> None:
    model = pair(causal_lm("llama"), gates=True, train="all")
    model.save_pretrained(tmp_path)
    said = document(tmp_path)
    assert list(said) == [
        "format_version",
        "multitower",
        "graph",
        "schedule",
        "towers",
        "modalities",
        "tensors",
        "files",
        "digest",
    ]
    assert said["format_version"] == 2
    assert said["multitower"] == mt.__version__
    assert mt.FusionGraph.from_dict(said["graph"]) == model.graph
    assert said["schedule"] == {"fingerprint": model.schedule.fingerprint}
    record = said["towers"]["text"]
    assert record.pop("fingerprint").startswith("sha256:")
    assert record == {
        "class": "LlamaForCausalLM",
        "depth": 2,
        "width": 16,
        "revision": None,
        "embedded": True,
    }
    parts = ["links.safetensors", "towers/speech/model.safetensors", "towers/text/model.safetensors"]
    assert list(said["tensors"]) == parts
    assert said["tensors"]["links.safetensors"]["links.speech->text.2-1.norm.weight"] == "F32 [16]"
    assert set(said["tensors"][parts[1]]) == set(model.tower("speech").state_dict())


@pytest.mark.parametrize("size", [1, 5000, "2KB"])
def test_large_weights_are_split(tmp_path: Path, size: int | str) -> None:
    model = pair(causal_lm("llama"), gates=True, train="all")
    model.save_pretrained(tmp_path, max_shard_size=size)
    for stem in ("links", "towers/speech/model", "towers/text/model"):
        index = json.loads((tmp_path / f"{stem}.safetensors.index.json").read_text())
        shards = sorted((tmp_path / stem).parent.glob(f"{Path(stem).name}-*.safetensors"))
        assert len(shards) > 1
        assert {path.name for path in shards} == set(index["weight_map"].values())
        tensors = {key: value for path in shards for key, value in load_file(path).items()}
        assert tensors.keys() == index["weight_map"].keys()
        assert index["metadata"]["total_size"] == sum(each.nbytes for each in tensors.values())
    given = {"speech": BLANKS["speech"]()}
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path, towers=given))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "towers/text")
    assert torch.equal(plain.lm_head.weight, model.unimodal("text").lm_head.weight)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.index.json"))
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path, towers={"speech": BLANKS["speech"]()}))


@pytest.mark.parametrize("size", [0, -1, True, "5", "5 MiB", None])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        pair().save_pretrained(tmp_path / "fused", max_shard_size=size)
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("damage", ["lost", "moved", "stray", "both", "outside", "emptied"])
def test_damaged_shards_are_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "fused"
    pair(gates=True, train="all").save_pretrained(folder, max_shard_size=4000)
    index = folder / "links.safetensors.index.json"
    said = json.loads(index.read_text())
    first, second, *_ = sorted(folder.glob("links-*.safetensors"))
    if damage == "lost":
        first.unlink()
    elif damage == "moved":
        tensors = load_file(first)
        moved = sorted(tensors)[0]
        save_file({**load_file(second), moved: tensors.pop(moved)}, second)
        save_file(tensors, first)
    elif damage == "stray":
        first.with_name("links-00099-of-00099.safetensors").write_bytes(first.read_bytes())
    elif damage == "both":
        (folder / "links.safetensors").write_bytes(first.read_bytes())
    elif damage == "outside":
        (tmp_path / first.name).write_bytes(first.read_bytes())
        places = {key: f"../{name}" for key, name in said["weight_map"].items()}
        index.write_text(json.dumps({**said, "weight_map": places}))
    else:
        index.write_text(json.dumps({**said, "weight_map": {}}))
    with pytest.raises(mt.errors.CheckpointError, match="links"):
        mt.FusedModel.from_pretrained(folder, towers=blanks())


def test_all_that_is_wrong_in_any_file_is_listed(tmp_path: Path) -> None:
    fused_model = pair(causal_lm("llama"), gates=True, train="all")
    fused_model.save_pretrained(tmp_path)
    expected = []
    for part in ("links", "towers/speech/model", "towers/text/model"):
        file = tmp_path / f"{part}.safetensors"
        tensors = load_file(file)
        one, two, three, *_ = sorted(tensors)
        tensors["other"] = tensors.pop(one)
        tensors[two] = tensors[two].half()
        tensors[three] = torch.zeros(2, 7)
        save_file(tensors, file)
        expected += [f"{part}.safetensors: missing: {one}", f"{part}.safetensors: unexpected: other"]
        expected += [
            f"{part}.safetensors: {two} is F16",
            f"{part}.safetensors: {three} is F32 [2, 7], but was",
        ]
    with pytest.raises(mt.errors.CheckpointError) as caught:
        mt.FusedModel.from_pretrained(tmp_path, towers={"speech": BLANKS["speech"]()})
    for line in expected:
        assert line in str(caught.value)


def test_a_link_of_another_graph_is_listed_tap_by_tap(tmp_path: Path) -> None:
    pair(gates=True, train="all").save_pretrained(tmp_path)
    said = document(tmp_path)
    said["graph"]["links"][0]["taps"] = [[1, 2], [2, 1]]
    said["graph"]["links"][0] |= {"interleave": None, "embeddings": False}
    said["schedule"] = None
    rewrite(tmp_path, **said)
    with pytest.raises(mt.errors.CheckpointError) as caught:
        mt.FusedModel.from_pretrained(tmp_path, towers=blanks())
    assert "missing: links.speech->text.1-2.norm.weight" in str(caught.value)
    assert "unexpected: links.speech->text.4-2.norm.weight" in str(caught.value)


def test_taps_between_other_layers_are_refused(tmp_path: Path) -> None:
    pair(gates=True, train="all").save_pretrained(tmp_path)
    rewrite(tmp_path, schedule={"fingerprint": "sha256:0"})
    with pytest.raises(
        mt.errors.CheckpointError, match=r"fusion\.json is damaged: the links were trained between"
    ):
        mt.FusedModel.from_pretrained(tmp_path, towers=blanks())


@pytest.mark.parametrize("version", [0, -1, True, "1", None, 1.5])
def test_a_version_that_is_none_is_refused(tmp_path: Path, version: Any) -> None:
    pair().save_pretrained(tmp_path)
    rewrite(tmp_path, format_version=version)
    with pytest.raises(mt.errors.CheckpointError, match="is no version of the format"):
        mt.FusedModel.from_pretrained(tmp_path, towers=blanks())


def test_a_newer_version_says_what_to_upgrade_to(tmp_path: Path) -> None:
    pair().save_pretrained(tmp_path)
    rewrite(tmp_path, format_version=3, multitower="0.9.1")
    with pytest.raises(mt.errors.CheckpointError, match=r"version 3.*pip install -U 'multitower>=0\.9\.1'"):
        mt.FusedModel.from_pretrained(tmp_path, towers=blanks())


def save_version_1(model: mt.FusedModel, folder: Path) -> None:
    """Write a checkpoint as version 1 was written, models with adapters referred to, all others stored."""

    def fingerprint(tensors: dict[str, Tensor]) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // 64)].cpu()
            digest.update(bytes(sample.contiguous().view(torch.uint8).tolist()))
        return digest.hexdigest()[:32]

    records: dict[str, Any] = {}
    for name in model.graph.towers:
        native, place = model.unimodal(name), folder / "towers" / name
        adapted = isinstance(native, peft.PeftModel)
        state = base_state(native)
        records[name] = {
            "class": type(native).__name__,
            "embedded": not adapted,
            "fingerprint": fingerprint(state),
        }
        if adapted:
            native.save_pretrained(place / "adapter", save_embedding_layers=False)
            stored = peft.get_peft_model_state_dict(native, save_embedding_layers=False)
            records[name] |= {"adapters": {"default": fingerprint(stored)}, "active_adapters": ["default"]}
        elif isinstance(native, mt.Tower):
            place.mkdir(parents=True)
            save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        else:
            native.save_pretrained(place)
    folder.mkdir(exist_ok=True)
    links = {key: value for key, value in model.state_dict().items() if not key.startswith("towers.")}
    save_file(links, folder / "links.safetensors", metadata={"format": "pt"})
    said = {"format_version": 1, "graph": model.graph.to_dict(), "towers": records}
    (folder / "fusion.json").write_text(json.dumps(said, indent=2) + "\n")


def test_version_1_is_read_and_saved_as_the_newest(tmp_path: Path) -> None:
    model = pair(causal_lm("llama"), gates=True, train="all")
    save_version_1(model, tmp_path / "old")
    given = {"speech": BLANKS["speech"]()}
    again = mt.FusedModel.from_pretrained(tmp_path / "old", towers=given)
    assert_same(model, again)
    again.save_pretrained(tmp_path / "old")
    assert document(tmp_path / "old")["format_version"] == 2
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "old", towers={"speech": BLANKS["speech"]()}))


def test_adapters_of_version_1_are_read(tmp_path: Path) -> None:
    causal_lm("llama", seed=3).save_pretrained(tmp_path / "text-model")
    model = fused(tmp_path / "text-model")
    save_version_1(model, tmp_path / "old")
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "old"))
    adapter = tmp_path / "old/towers/text/adapter/adapter_model.safetensors"
    tensors = load_file(adapter)
    save_file({**tensors, min(tensors): tensors[min(tensors)] + 1}, adapter)
    with pytest.raises(mt.errors.CheckpointError, match="holds other values"):
        mt.FusedModel.from_pretrained(tmp_path / "old")


@pytest.mark.parametrize("change", ["links", "tower", "plain", "other"])
def test_version_1_is_held_to_what_it_says(tmp_path: Path, change: str) -> None:
    save_version_1(pair(causal_lm("llama"), gates=True), tmp_path)
    parts = {"links": "links.safetensors", "plain": "towers/speech/model.safetensors"}
    file = tmp_path / parts.get(change, "towers/text/model.safetensors")
    tensors = load_file(file)
    first = sorted(tensors)[0]
    if change == "links":
        tensors[first] = tensors[first].half()
    else:
        tensors[first] = tensors[first] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    if change == "other":
        rewrite(tmp_path, towers={"text": 3})
    with pytest.raises(
        mt.errors.CheckpointError,
        match=r"float16|tower 'text' .* is not the one|for tower 'speech'|is damaged",
    ):
        mt.FusedModel.from_pretrained(tmp_path, towers={"speech": BLANKS["speech"]()})


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {}},
        {"tensors": {"../links.safetensors": {}}},
        {"tensors": 3},
        {"schedule": 3},
        {"schedule": {}},
        {"towers": {"speech": {}, "text": {}}},
        {"graph": None},
    ],
)
def test_damaged_documents_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    pair(gates=True, train="all").save_pretrained(tmp_path)
    rewrite(tmp_path, **change)
    with pytest.raises(mt.errors.CheckpointError, match=r"fusion\.json is damaged"):
        mt.FusedModel.from_pretrained(tmp_path, towers=blanks())


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ""])
def test_adapters_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    causal_lm("llama", seed=3).save_pretrained(tmp_path / "text-model")
    fused(tmp_path / "text-model").save_pretrained(tmp_path / "fused")
    said = document(tmp_path / "fused")
    said["towers"]["text"]["adapters"] = {name: said["towers"]["text"]["adapters"]["default"]}
    rewrite(tmp_path / "fused", **said)
    with pytest.raises(mt.errors.CheckpointError, match="cannot have adapters"):
        mt.FusedModel.from_pretrained(tmp_path / "fused")
