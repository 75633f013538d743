"""The files of a checkpoint: format versions, shards, and errors that list everything wrong at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import multitower as mt
from adapted import fused
from models import EXAMPLES, causal_lm, pair
from multitower.storage import files as storage_files
from multitower.testing import tiny_tower
from tampering import rewrite_manifest

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
    rewrite_manifest(folder, lambda saved: saved.update(changes))


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
    assert said["format_version"] == 1
    assert said["multitower"] == mt.__version__
    assert mt.FusionGraph.from_dict(said["graph"]) == model.graph
    assert said["schedule"] == {"fingerprint": model.schedule.fingerprint}
    record = said["towers"]["text"]
    assert record.pop("fingerprint").startswith("sha256:")
    assert record.pop("values").startswith("sha256:")
    assert record == {
        "class": "LlamaForCausalLM",
        "depth": 2,
        "width": 16,
        "revision": None,
        "embedded": True,
        "proof": {
            "path": "model.layers",
            "width": 16,
            "beyond": 0,
            "masked": True,
            "positions": None,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        },
    }
    assert said["towers"]["speech"]["proof"] is None
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
            f"{part}.safetensors: {three} is F32 [2, 7], but was saved as",
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
    rewrite(tmp_path, format_version=2, multitower="0.9.1")
    with pytest.raises(mt.errors.CheckpointError, match=r"version 2.*pip install -U 'multitower>=0\.9\.1'"):
        mt.FusedModel.from_pretrained(tmp_path, towers=blanks())


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {}},
        {"tensors": {"../links.safetensors": {}}},
        {"tensors": 3},
        {"modalities": None},
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


@pytest.mark.parametrize(
    "files", [None, 3, {"links.safetensors": None}, {"links.safetensors": {"bytes": "1"}}]
)
def test_a_manifest_that_names_no_files_is_refused(tmp_path: Path, files: Any) -> None:
    pair(gates=True, train="all").save_pretrained(tmp_path)
    said = {**document(tmp_path), "files": files}
    (tmp_path / "fusion.json").write_text(json.dumps({**said, "digest": storage_files._digest(said)}))
    with pytest.raises(mt.errors.CheckpointError, match="does not say which files the checkpoint has"):
        mt.FusedModel.from_pretrained(tmp_path, towers=blanks())


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ""])
def test_adapters_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    causal_lm("llama", seed=3).save_pretrained(tmp_path / "text-model")
    fused(tmp_path / "text-model").save_pretrained(tmp_path / "fused")
    said = document(tmp_path / "fused")
    said["towers"]["text"] |= {"adapters": [name], "active_adapters": [name]}
    rewrite(tmp_path / "fused", **said)
    with pytest.raises(mt.errors.CheckpointError, match="cannot have adapters"):
        mt.FusedModel.from_pretrained(tmp_path / "fused")
