from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import multitower as mt
from fake_hub import Download
from models import EXAMPLES, causal_lm, pair
from multitower.storage.fingerprint import fingerprint
from multitower.testing import open_links, tiny_tower
from tampering import rewrite_manifest


@pytest.fixture
def text_folder(downloaded: Download) -> Path:
    return downloaded("org/text-model", causal_lm("llama", seed=3))


@pytest.fixture
def model(text_folder: Path, tmp_path: Path) -> mt.FusedModel:
    """Return a model whose checkpoint stores its speech tower, and refers to its text tower."""
    causal_lm("gpt2", depth=4, vocab_size=14).save_pretrained(tmp_path / "speech-model")
    graph = mt.FusionGraph()
    graph.add_tower("speech", tmp_path / "speech-model", train="all")
    graph.add_tower("text", "org/text-model")
    graph.add_link("speech", "text", interleave=(2, 1))
    graph.add_link("text", "speech", interleave=(1, 2))
    model = open_links(graph.compile().eval())
    with torch.no_grad():
        model.unimodal("speech").lm_head.weight.add_(0.1)
    return model


def logits(model: mt.FusedModel) -> dict[str, torch.Tensor]:
    return model(**mt.collate(EXAMPLES)).logits


def assert_same(model: mt.FusedModel, again: mt.FusedModel) -> None:
    for name, expected in logits(model).items():
        assert torch.equal(logits(again)[name], expected)


def test_loaded_is_saved(model: mt.FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused")
    assert_same(model, again)
    assert again.graph == model.graph
    assert not again.training
    sources = [[mt.Segment("speech", [1, 5, 6, 2])]]
    decoded = [m.generate(sources, output=["text"], max_new_tokens=5)[0][0].tokens for m in (model, again)]
    assert torch.equal(*decoded)


def test_untouched_towers_are_referred_to_and_trained_ones_stored(
    model: mt.FusedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "fused")
    folder = tmp_path / "fused"
    assert sorted(path.name for path in folder.iterdir()) == ["fusion.json", "links.safetensors", "towers"]
    assert [path.name for path in (folder / "towers").iterdir()] == ["speech"]
    assert (folder / "towers/speech/config.json").exists()
    assert all(key.startswith(("links.", "adapters.")) for key in load_file(folder / "links.safetensors"))


def test_embedded_towers_need_no_origin(model: mt.FusedModel, text_folder: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused", embed_towers=True)
    shutil.rmtree(text_folder)
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "fused"))


def test_a_tower_given_as_a_module_is_embedded(tmp_path: Path) -> None:
    model = pair(causal_lm("qwen3"), causal_lm("llama", depth=4, vocab_size=14), gates=True)
    model.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused")
    assert_same(model, again)
    again.save_pretrained(tmp_path / "second")
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "second"))


def test_plain_towers_get_their_weights_back(tmp_path: Path) -> None:
    model = pair(gates=True, train="all")
    model.save_pretrained(tmp_path / "fused")
    fresh = {
        "speech": tiny_tower(9, depth=4, width=12, vocab_size=14),
        "text": tiny_tower(8, depth=2, width=8, vocab_size=20),
    }
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "fused", towers=fresh))
    with pytest.raises(mt.errors.CheckpointError, match="tower 'speech' was declared with a module"):
        mt.FusedModel.from_pretrained(tmp_path / "fused")


def test_a_moved_tower_is_found_by_the_callers_word(
    model: mt.FusedModel, text_folder: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "fused")
    moved = text_folder.rename(tmp_path / "elsewhere")
    with pytest.raises(
        mt.errors.CheckpointError,
        match=r"(?s)tower 'text': cannot load .*towers=\{'text': \.\.\.\}.*embed_towers=True",
    ):
        mt.FusedModel.from_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"text": str(moved)})
    assert_same(model, again)
    assert again.graph.towers["text"].source == str(moved)


def test_another_tower_is_refused(model: mt.FusedModel, text_folder: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused")
    causal_lm("llama", seed=4).save_pretrained(text_folder)
    with pytest.raises(mt.errors.CheckpointError, match=r"tower 'text' .* is not the one"):
        mt.FusedModel.from_pretrained(tmp_path / "fused")


def test_a_given_tower_wins_over_a_stored_one(model: mt.FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused")
    untrained = str(tmp_path / "speech-model")
    with pytest.raises(mt.errors.CheckpointError, match=f"tower 'speech' from {untrained} is not the one"):
        mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"speech": untrained})


def test_fingerprint_sees_the_dtype() -> None:
    tower = tiny_tower()
    before = fingerprint(tower.state_dict())
    assert fingerprint(tower.to(torch.bfloat16).state_dict()) != before


@pytest.mark.parametrize("missing", ["fusion.json", "links.safetensors", "towers/speech/model.safetensors"])
def test_a_missing_file_is_named(model: mt.FusedModel, tmp_path: Path, missing: str) -> None:
    model.save_pretrained(tmp_path / "fused")
    (tmp_path / "fused" / missing).unlink()
    with pytest.raises(mt.errors.CheckpointError, match=Path(missing).name):
        mt.FusedModel.from_pretrained(tmp_path / "fused")


@pytest.mark.parametrize("damaged", ["fusion.json", "links.safetensors", "towers/speech/model.safetensors"])
def test_a_half_written_file_is_named(model: mt.FusedModel, tmp_path: Path, damaged: str) -> None:
    model.save_pretrained(tmp_path / "fused")
    file = tmp_path / "fused" / damaged
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(mt.errors.CheckpointError, match=rf"{Path(damaged).name} is damaged"):
        mt.FusedModel.from_pretrained(tmp_path / "fused")


def test_tensors_that_do_not_fit_are_all_listed(model: mt.FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused")
    file = tmp_path / "fused/links.safetensors"
    tensors = load_file(file)
    first, second, *_ = sorted(tensors)
    tensors["links.other"] = tensors.pop(first)
    tensors[second] = tensors[second].to(torch.float16)
    save_file(tensors, file)
    rewrite_manifest(tmp_path / "fused")
    with pytest.raises(mt.errors.CheckpointError) as caught:
        mt.FusedModel.from_pretrained(tmp_path / "fused")
    for part in (f"missing: {first}", "unexpected: links.other", f"{second} is F16", "but was saved as F32"):
        assert part in str(caught.value)


def test_towers_for_nobody_are_refused(model: mt.FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused")
    with pytest.raises(mt.errors.CheckpointError, match="the checkpoint has the towers speech, text"):
        mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"txt": "x"})


def test_saving_again_replaces_the_checkpoint_and_keeps_other_files(
    model: mt.FusedModel, tmp_path: Path
) -> None:
    folder = tmp_path / "fused"
    model.save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    (folder / "modalities/text").mkdir(parents=True)
    (folder / "modalities/text/modality.json").write_text("{}")
    with torch.no_grad():
        model.unimodal("speech").lm_head.weight.add_(0.1)
    model.save_pretrained(folder)
    assert_same(model, mt.FusedModel.from_pretrained(folder))
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "modalities/text/modality.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "hub-cache", "speech-model"]


def test_a_save_that_breaks_off_leaves_the_old_checkpoint(
    model: mt.FusedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "fused")
    before = logits(model)
    with torch.no_grad():
        model.unimodal("speech").lm_head.weight.add_(0.1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("multitower.storage.tensors.save_file", full)
    with pytest.raises(mt.errors.CheckpointError, match="no space"):
        model.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused")
    assert torch.equal(logits(again)["speech"], before["speech"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "hub-cache", "speech-model"]


def test_other_peoples_folders_are_left_alone(model: mt.FusedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("one")
    with pytest.raises(mt.errors.CheckpointError, match=r"not empty and contains no fusion\.json"):
        model.save_pretrained(tmp_path / "thesis")
    with pytest.raises(mt.errors.CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "thesis/chapter.txt")
    assert (tmp_path / "thesis/chapter.txt").read_text() == "one"


@pytest.mark.parametrize("inside", [".", "notes"])
def test_the_working_directory_is_not_replaced(
    model: mt.FusedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    model.save_pretrained(tmp_path / "fused")
    (tmp_path / "fused" / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "fused" / inside)
    with pytest.raises(mt.errors.CheckpointError, match="is the working directory, or above it"):
        model.save_pretrained(tmp_path / "fused")


def test_a_tower_that_generates_differently_from_its_origin_is_stored(
    tmp_path: Path, downloaded: Download
) -> None:
    downloaded("me/text", causal_lm("llama", seed=3))
    graph = mt.FusionGraph()
    graph.add_tower("speech", causal_lm("llama"), train="all")
    graph.add_tower("text", "me/text")
    graph.add_link("speech", "text", interleave=1)
    model = graph.compile()
    model.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused/towers/text/config.json").exists()
    model.unimodal("text").generation_config.eos_token_id = [2, 3]
    model.save_pretrained(tmp_path / "fused")
    assert mt.FusedModel.from_pretrained(tmp_path / "fused").tower("text").end == (2, 3)


def test_who_may_read_a_checkpoint_may_read_its_tensors(tmp_path: Path) -> None:
    pair(causal_lm("llama")).save_pretrained(tmp_path / "fused", embed_towers=True)
    modes = {path.stat().st_mode for path in (tmp_path / "fused").rglob("*") if path.is_file()}
    (tmp_path / "ordinary").touch()
    assert modes == {(tmp_path / "ordinary").stat().st_mode}


def test_the_folder_above_names_the_one_inside(model: mt.FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "run/fused")
    with pytest.raises(mt.errors.CheckpointError, match=r"wholly copied\? There is .*fused"):
        mt.FusedModel.from_pretrained(tmp_path / "run")
