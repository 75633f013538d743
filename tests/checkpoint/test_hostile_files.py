"""Malicious checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import multitower as mt
from letters import Letters
from models import causal_lm
from multitower.checkpoint.limits import MODULES, excessive
from multitower.storage import files, fingerprint
from multitower.testing import tiny_model, tiny_tower
from tampering import rewrite_manifest
from victims import Base, at_most


def small(folder: Path) -> mt.FusedModel:
    """Save and load a model whose only tower is stored as a transformers checkpoint."""
    graph = mt.FusionGraph()
    graph.add_tower("text", causal_lm("llama", width=8), train="all", adapter="residual")
    graph.compile().save_pretrained(folder)
    return mt.FusedModel.from_pretrained(folder)


def refused(folder: Path, message: str, **options: Any) -> None:
    with at_most(20), pytest.raises(mt.errors.CheckpointError, match=message):
        mt.FusedModel.from_pretrained(folder, **options)


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("place", ["links.safetensors", "towers", "towers/text/config.json", "fusion.json"])
def test_links_out_of_the_checkpoint_are_not_followed(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "fused"
    small(folder)
    (folder / place).rename(tmp_path / "elsewhere")
    (folder / place).symlink_to("../elsewhere" if "/" not in place else tmp_path / "elsewhere")
    refused(folder, r"is a link to .*elsewhere, and none is followed")


def test_links_to_nowhere_and_pipes_are_refused(tmp_path: Path) -> None:
    small(tmp_path / "fused")
    (tmp_path / "fused/towers/text/merges.txt").symlink_to("merges.txt")
    refused(tmp_path / "fused", "is a link that leads nowhere")
    (tmp_path / "fused/towers/text/merges.txt").unlink()
    (tmp_path / "fused/fusion.json").unlink()
    os.mkfifo(tmp_path / "fused/fusion.json")
    refused(tmp_path / "fused", "is neither a file nor a folder")


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    small(tmp_path / "fused")
    repository = tmp_path / "models--someone--fused"
    folder, blobs = repository / "snapshots/0123", repository / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(path for path in (tmp_path / "fused").rglob("*") if path.is_file()):
        place = folder / file.relative_to(tmp_path / "fused")
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / str(number))
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    mt.FusedModel.from_pretrained(folder)
    config = folder / "towers/text/config.json"
    blob = config.resolve()
    blob.rename(tmp_path / "secret")
    blob.symlink_to(tmp_path / "secret")
    refused(folder, r"config\.json is a link to .*secret, and none is followed")


def test_other_files_beside_a_checkpoint_may_be_links(tmp_path: Path) -> None:
    small(tmp_path / "fused")
    (tmp_path / "fused/README.md").symlink_to("/nowhere")
    mt.FusedModel.from_pretrained(tmp_path / "fused")


def test_what_is_added_or_changed_is_listed(tmp_path: Path) -> None:
    folder = tmp_path / "fused"
    small(folder)
    (folder / "towers/text/adapter_config.json").write_text("{}")
    change(folder / "towers/text/config.json", rope_theta=3.0)
    (folder / "towers/text/generation_config.json").unlink()
    with pytest.raises(mt.errors.CheckpointError) as caught:
        mt.FusedModel.from_pretrained(folder)
    for line in (
        "missing: towers/text/generation_config.json",
        "unexpected: towers/text/adapter_config.json",
        "damaged: towers/text/config.json has ",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize("key", ["multitower", "schedule", "towers", "graph"])
def test_a_manifest_that_was_edited_is_refused(tmp_path: Path, key: str) -> None:
    small(tmp_path / "fused")
    change(tmp_path / "fused/fusion.json", **{key: {}})
    refused(tmp_path / "fused", "its digest differs")


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("part", ["links.safetensors", "towers/text/model.safetensors"])
def test_one_bit_is_noticed(tmp_path: Path, part: str) -> None:
    small(tmp_path / "fused")
    flip(tmp_path / "fused" / part, -1)
    refused(tmp_path / "fused", f"damaged: {part}")


@pytest.mark.parametrize("part", ["links.safetensors", "towers/text/model.safetensors"])
def test_of_large_files_samples_are_read_unless_all_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(files, "SMALL", 0)
    monkeypatch.setattr(files, "BLOCK", 1)
    monkeypatch.setattr(fingerprint, "SAMPLE", 1)
    folder = tmp_path / "fused"
    small(folder)
    file = folder / part
    whole, size = file.read_bytes(), file.stat().st_size
    flip(file, size - size // 128)  # between the last two sampled blocks
    mt.FusedModel.from_pretrained(folder)
    refused(folder, f"damaged: {part}", verify=True)
    with pytest.raises(mt.errors.CheckpointError, match=f"damaged: {part}"):
        mt.Pipeline.from_pretrained(folder, verify=True)
    if part.startswith("towers"):
        with pytest.raises(mt.errors.CheckpointError, match=f"damaged: {part}"):
            mt.load_tower(folder, "text", verify=True)
    file.write_bytes(whole)
    mt.FusedModel.from_pretrained(folder, verify=True)
    flip(file, -1)  # in the last sampled block
    refused(folder, f"damaged: {part}")
    file.write_bytes(whole + b"x")
    refused(folder, f"{part} (has {size + 1} bytes|is damaged)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "recursion"),
        ('{"a": ' * 100_000, "recursion"),
        ('{"format_version": ' + "9" * 100_000 + "}", "digits"),
        ('{"format_version": 1, "format_version": 2}', "'format_version' occurs twice"),
        ('{"format_version": NaN}', "NaN is no number"),
        ('{"format_version": -Infinity}', "-Infinity is no number"),
        ("\xff", "utf-8"),
        ("[]", "expected a JSON object"),
        (" " * (1 << 24) + "{}", "more than 16777216 bytes"),
        ('{"format_version": true}', "True is no version"),
        ('{"format_version": 0}', "0 is no version"),
        ('{"format_version": 2}', "has format version 2"),
        ('{"format_version": 1}', "not as it was saved"),
    ],
)
def test_what_is_no_plain_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "fusion.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, rf"fusion\.json .*{message}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000, but there are only"),
        ("num_labels", 10**9, "num_labels=1000000000"),
        ("vocab_size", 10**9, "is of a model of .* parameters"),
        ("hidden_size", 10**7, "is of a model of .* parameters"),
        ("hidden_size", 10**30, "no model that transformers can build"),
        ("head_dim", 10**8, "is of a model of .* parameters"),
        ("num_attention_heads", 0, r"no model that transformers|ZeroDivision"),
        ("model_type", "x", "no model that transformers can build"),
        ("attn_implementation", "someone/kernels", "asks for the kernels 'someone/kernels'"),
        ("attn_implementation", {"": "someone/kernels"}, "asks for the kernels"),
        ("sub", {"experts_implementation": "someone/kernels"}, "asks for the kernels"),
    ],
)
def test_configs_that_ask_for_too_much_are_refused(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    folder = tmp_path / "fused"
    small(folder)
    change(folder / "towers/text/config.json", **{key: value})
    rewrite_manifest(folder, tensors=True)
    refused(folder, rf"config\.json .*(?s:{message})")


@pytest.mark.parametrize("place", ["../../../secret.safetensors", "/etc/passwd", "", 3])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, place: Any) -> None:
    folder = tmp_path / "fused"
    small(folder)
    weights = folder / "towers/text/model.safetensors"
    keys = list(load_file(weights))
    weights.rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, place)}
    weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    rewrite_manifest(folder, tensors=True)
    refused(folder, r"index\.json is damaged: it does not say in which file each tensor is")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**9}, "asks for rank 1000000000"),
        ({"rank_pattern": {"q_proj": 10**9}}, "asks for rank"),
        ({"target_modules": "((a|.)+)+!"}, "matching may take for ever"),
        ({"target_modules": ".*.*.*.*.*.*.*!"}, "matching may take for ever"),
        ({"rank_pattern": {"(.*)*!": 2}}, "matching may take for ever"),
        ({"peft_type": "XLORA", "adapters": {"a": "someone/adapter"}}, "tower 'text'"),
        ({"megatron_config": {"x": 1}, "megatron_core": "os"}, "runs code of another package"),
    ],
)
@pytest.mark.parametrize("kind", ["lora"])
@pytest.mark.filterwarnings("ignore")  # warnings of transformers and peft about damaged files
def test_adapters_that_ask_for_too_much_are_refused(
    base: Base, changes: dict[str, Any], message: str
) -> None:
    change(base.folder / "towers/text/adapter/adapter_config.json", **changes)
    rewrite_manifest(base.folder, tensors=True)
    refused(base.folder, f"(?s:{message})")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 10**9}, "heads do not divide"),
        ({"interleave": 10**9}, "leaves no tap"),
        ({"interleave": None, "taps": [[1, 10**9]]}, "names layer 1000000000"),
        ({"source": "../../x"}, "there is no tower"),
        ({"name": "../../x"}, "use letters"),
    ],
)
def test_links_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tmp_path / "fused"
    tiny_model().save_pretrained(folder)
    rewrite_manifest(folder, lambda document: document["graph"]["links"][0].update(changes))
    refused(folder, message, towers=tiny_towers())


def test_more_links_than_are_stored_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "fused"
    tiny_model().save_pretrained(folder)
    links = [{"source": "speech", "target": "text", "name": f"l{n}", "interleave": 1} for n in range(10_000)]
    rewrite_manifest(folder, lambda document: document["graph"].update(links=links))
    refused(folder, r"taps, but links\.safetensors has only", towers=tiny_towers())


@pytest.mark.parametrize("name", ["../../x", "/x", "", "a/b", "..", "\0", "x\n"])
def test_names_that_lead_out_of_the_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "fused"
    tiny_model().save_pretrained(folder, modalities={"text": Letters()})

    def renamed(document: dict[str, Any]) -> None:
        document["graph"]["towers"][1]["name"] = name
        document["towers"][name] = document["towers"]["text"]
        document["modalities"][name] = document["modalities"].pop("text")
        for link in document["graph"]["links"]:
            link.update({side: name for side in ("source", "target") if link[side] == "text"})

    rewrite_manifest(folder, renamed)
    refused(folder, "tower name .*use letters", towers={"speech": tiny_towers()["speech"]})
    with pytest.raises(mt.errors.CheckpointError, match=r"tower name .*use letters"):
        mt.Pipeline.from_pretrained(folder)


def test_tensors_of_no_size_and_great_names_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "fused"
    tiny_model().save_pretrained(folder)
    file = folder / "links.safetensors"
    whole = load_file(file)
    save_file({**whole, "links." + "x" * 10**6: torch.zeros(0, 2**40)}, file)
    rewrite_manifest(folder, tensors=True)
    refused(folder, "unexpected: links.xxx", towers=tiny_towers())


def tiny_towers() -> dict[str, torch.nn.Module]:
    """Return towers like those of ``tiny_model``, with other weights."""
    return {"speech": tiny_tower(7, depth=3, width=12), "text": tiny_tower(7, depth=2, width=8)}


def test_no_family_asks_for_too_many_modules_by_default() -> None:
    """Sizes such as Gemma 4's ``vocab_size_per_layer_input`` are not counts of modules."""
    for kind in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        try:
            config = kind().to_dict()
        except Exception:  # needs arguments, or an extra
            continue
        assert not excessive(config, MODULES), kind
