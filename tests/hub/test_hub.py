from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import multitower as mt
from fake_hub import COMMIT, Download, FakeHub
from models import EXAMPLES, causal_lm, pair
from multitower.hub.card import is_generated
from multitower.testing import tiny_model
from multitower.tower.peft_tower import base_model
from plugin import LETTERS, Offer

REPO = "me/fused"


@pytest.fixture
def model() -> mt.FusedModel:
    return pair(causal_lm("qwen3"), causal_lm("llama", depth=4, vocab_size=14), gates=True)


def assert_same(model: mt.FusedModel, again: mt.FusedModel) -> None:
    for name, expected in model(**mt.collate(EXAMPLES)).logits.items():
        assert torch.equal(again(**mt.collate(EXAMPLES)).logits[name], expected)


def readme(hub: FakeHub) -> Path:
    return hub.head(REPO) / "README.md"


def test_pushed_is_loaded(model: mt.FusedModel, hub: FakeHub, tmp_path: Path) -> None:
    url = model.push_to_hub(REPO, private=True, token="secret")
    assert url == "https://huggingface.co/me/fused/commit/1"
    assert (hub.commits, hub.private, hub.tokens) == (1, {REPO: True}, ["secret"])
    again = mt.FusedModel.from_pretrained(REPO, token="secret", cache_dir=tmp_path / "mine")
    assert_same(model, again)
    assert (tmp_path / "mine").is_dir()
    assert hub.tokens[-1] == "secret"


def test_large_files_are_pushed_in_shards(model: mt.FusedModel, hub: FakeHub) -> None:
    model.push_to_hub(REPO, embed_towers=True, max_shard_size="10KB")
    assert (hub.head(REPO) / "links.safetensors.index.json").is_file()
    assert_same(model, mt.FusedModel.from_pretrained(REPO))


def test_a_pipeline_is_pushed_with_its_modalities(hub: FakeHub, offer: Offer) -> None:
    offer("multitower-letters", "multitower_letters", LETTERS, letters="multitower_letters:Letters")
    from multitower_letters import Letters

    model = pair(causal_lm("qwen3"), causal_lm("llama", depth=4, vocab_size=14), gates=True)
    pipe = mt.Pipeline(model, {"text": Letters("b")})
    pipe.push_to_hub(REPO)
    again = mt.Pipeline.from_pretrained(REPO)
    assert again.modalities["text"].first == "b"
    assert_same(model, again.model)
    assert "| `text` | letters | multitower-letters | 1.0 |" in readme(hub).read_text()


def test_pushing_again_replaces_the_checkpoint_and_leaves_other_files(
    model: mt.FusedModel, hub: FakeHub
) -> None:
    model.push_to_hub(REPO)
    (hub.head(REPO) / "samples").mkdir()
    (hub.head(REPO) / "samples/towers.txt").write_text("mine")
    smaller = model.drop("speech")
    smaller.push_to_hub(REPO)
    assert not any(file.startswith("towers/speech/") for file in hub.files(REPO))
    assert (hub.head(REPO) / "samples/towers.txt").exists()
    assert hub.commits == 2
    assert list(mt.FusedModel.from_pretrained(REPO).towers) == ["text"]


def test_only_files_of_a_checkpoint_are_downloaded(model: mt.FusedModel, hub: FakeHub) -> None:
    model.push_to_hub(REPO)
    (hub.head(REPO) / "evil.py").write_text("raise SystemExit")
    mt.FusedModel.from_pretrained(REPO)
    found = {path.name for path in (hub.root / "cache").rglob("*")}
    assert "fusion.json" in found
    assert not found & {"evil.py", "README.md"}


def test_an_edited_card_is_kept_and_a_generated_one_renewed(model: mt.FusedModel, hub: FakeHub) -> None:
    model.push_to_hub(REPO)
    assert "license: " not in readme(hub).read_text()
    model.push_to_hub(REPO, license="apache-2.0")
    assert "license: apache-2.0" in readme(hub).read_text()
    assert is_generated(readme(hub).read_text())
    edited = readme(hub).read_text().replace("# fused", "# Our model")
    readme(hub).write_text(edited)
    model.push_to_hub(REPO, license="mit")
    assert readme(hub).read_text() == edited


def test_files_of_a_model_that_is_no_more_are_deleted_and_no_others(
    model: mt.FusedModel, hub: FakeHub
) -> None:
    model.push_to_hub(REPO)
    assert any("towers/speech" in each for each in hub.files(REPO))
    for name in ("links.png", "linksammlung.md", "notes.md"):
        readme(hub).with_name(name).write_text("mine")
    model.drop("speech").push_to_hub(REPO)
    left = hub.files(REPO)
    assert {"links.png", "linksammlung.md", "notes.md"} <= set(left)
    assert not any("towers/speech" in each for each in left)


def test_a_pull_request_is_proposed(model: mt.FusedModel, hub: FakeHub) -> None:
    model.push_to_hub(REPO)
    before = hub.files(REPO)
    assert model.drop("speech").push_to_hub(REPO, create_pr=True) == "https://huggingface.co/me/fused/pr/1"
    assert hub.files(REPO) == before
    assert hub.files(REPO, "refs-pr-1") < before


def test_revisions(model: mt.FusedModel, hub: FakeHub) -> None:
    model.push_to_hub(REPO)
    (hub.root / REPO / "next").mkdir()
    model.drop("speech").push_to_hub(REPO, revision="next")
    assert list(mt.FusedModel.from_pretrained(REPO, revision="next").towers) == ["text"]
    assert list(mt.FusedModel.from_pretrained(REPO).towers) == ["speech", "text"]
    assert mt.load_tower(REPO, "text", revision="next") is not None
    with pytest.raises(mt.errors.CheckpointError, match="has no tower 'speech'"):
        mt.load_tower(REPO, "speech", revision="next")
    with pytest.raises(
        mt.errors.CheckpointError, match=r"'me/fused', and the Hub .* at revision 'v9': no revision"
    ):
        mt.FusedModel.from_pretrained(REPO, revision="v9")


def test_a_folder_wins_over_an_id(
    model: mt.FusedModel, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.drop("speech").push_to_hub(REPO)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(REPO)
    assert list(mt.FusedModel.from_pretrained(REPO).towers) == ["speech", "text"]
    with pytest.raises(ValueError, match="revision='main' is for the Hub, but me/fused is a path here"):
        mt.FusedModel.from_pretrained(REPO, revision="main")


def test_what_is_nowhere(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(
        mt.errors.CheckpointError, match="there is no folder 'me/none', and the Hub does not give"
    ):
        mt.FusedModel.from_pretrained("me/none")
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none", "none", Path("me/none")):
        with pytest.raises(mt.errors.CheckpointError, match=r"fusion\.json is missing"):
            mt.FusedModel.from_pretrained(path)
    assert hub.tokens == [None]


@pytest.mark.parametrize("train", ["none", "lora"])
def test_a_path_is_no_reference_for_others(hub: FakeHub, tmp_path: Path, train: str) -> None:
    causal_lm("llama").save_pretrained(tmp_path / "text-model")
    graph = mt.FusionGraph()
    graph.add_tower("text", tmp_path / "text-model", train=train)
    graph.add_tower("loud", tmp_path / "text-model", train="all")
    graph.add_link("loud", "text", interleave=1)
    model = graph.compile().eval()
    with pytest.raises(mt.errors.CheckpointError, match=rf"towers 'text' \({tmp_path}.*embed_towers=True"):
        model.push_to_hub(REPO)
    assert not hub.private
    model.push_to_hub(REPO, embed_towers=True)
    card = readme(hub).read_text()
    assert not [
        name for name in hub.files(REPO) if str(tmp_path).encode() in (hub.head(REPO) / name).read_bytes()
    ]
    assert model.graph.towers["text"].source == str(tmp_path / "text-model")
    assert base_model(model.unimodal("text")).config._name_or_path == str(tmp_path / "text-model")
    assert "| `text` | a local folder, stored here |" in card
    assert list(mt.FusedModel.from_pretrained(REPO).towers) == ["text", "loud"]


def test_no_path_of_a_module_is_published(hub: FakeHub, tmp_path: Path) -> None:
    import transformers

    causal_lm("llama").save_pretrained(tmp_path / "text-model")
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text-model")
    graph = mt.FusionGraph()
    graph.add_tower("text", text, train="lora")
    graph.compile().push_to_hub(REPO)
    published = [(hub.head(REPO) / name).read_bytes() for name in hub.files(REPO)]
    assert not any(str(tmp_path).encode() in content for content in published)
    assert text.name_or_path == str(tmp_path / "text-model")


def test_towers_of_the_hub_are_named_with_their_licences(hub: FakeHub, downloaded: Download) -> None:
    downloaded("org/text-model", causal_lm("llama"))
    graph = mt.FusionGraph()
    graph.add_tower("text", "org/text-model")
    graph.add_tower("other", causal_lm("gpt2"))
    model = graph.compile().eval()
    hub.licenses["org/text-model"] = "apache-2.0"
    model.push_to_hub(REPO)
    card = readme(hub).read_text()
    assert "base_model:\n- org/text-model" in card
    assert f"[org/text-model](https://huggingface.co/org/text-model) | `{COMMIT}` | apache-2.0 |" in card
    assert "| `other` | its author's module, stored here |  | not known |" in card
    del hub.licenses["org/text-model"]
    with pytest.warns(UserWarning, match=r"tower 'text' comes from 'org/text-model', which the Hub does not"):
        model.push_to_hub(REPO)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"multitower\[hub\]") as caught:
        mt.FusedModel.from_pretrained("me/none")
    assert caught.value.__notes__ == ["there is no folder 'me/none', and it may be an id on the Hub"]
    with pytest.raises(ImportError, match=r"multitower\[hub\]"):
        tiny_model().push_to_hub("me/tiny")
