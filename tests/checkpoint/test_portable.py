"""A checkpoint refers only to towers that can be loaded from anywhere, and stores all others."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import multitower as mt
from fake_hub import COMMIT, Download
from models import EXAMPLES, causal_lm
from multitower.plugins.entry_points import TOWERS
from multitower.testing import open_links
from multitower.train.resume import save_training
from plugin import Offer

LOADER = """
import torch
from multitower.testing import tiny_tower

def load(rest):
    return tiny_tower(seed=int(rest), vocab_size=20)
"""


def fused(speech: Any, text: Any, train: Any = "all") -> mt.FusedModel:
    graph = mt.FusionGraph()
    graph.add_tower("speech", speech, train=train)
    graph.add_tower("text", text)
    graph.add_link("speech", "text", interleave=1)
    return open_links(graph.compile().eval())


def assert_same(model: mt.FusedModel, again: mt.FusedModel) -> None:
    assert model.state_dict().keys() == again.state_dict().keys()
    for key, expected in model.state_dict().items():
        found = again.state_dict()[key]
        assert found.dtype == expected.dtype, key
        assert torch.equal(found, expected), key


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save two towers at relative paths that look like ids on the Hub."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    causal_lm("gpt2", vocab_size=14).save_pretrained("models/speech")
    causal_lm("llama", seed=3).save_pretrained("models/text")
    return tmp_path / "here"


@pytest.fixture
def never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", refuse)


@pytest.mark.usefixtures("never_asked")
@pytest.mark.parametrize("train", ["none", "all", "lora"])
def test_local_towers_go_where_the_checkpoint_goes(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str
) -> None:
    model = fused("models/speech", Path("models/text"), train)
    assert [spec.source for spec in model.graph.towers.values()] == ["./models/speech", "./models/text"]
    model.save_pretrained("fused")
    shutil.move("fused", tmp_path / "moved")
    shutil.rmtree("models")
    monkeypatch.chdir(tmp_path)
    again = mt.FusedModel.from_pretrained("moved")
    assert_same(model, again)
    again.save_pretrained("second")
    assert_same(model, mt.FusedModel.from_pretrained("second"))


def test_paths_are_taken_wherever_text_is(folders: Path) -> None:
    model = fused("models/speech", "models/text")
    model.save_pretrained(Path("fused"))
    text = Path("models/text")
    again = mt.FusedModel.from_pretrained(Path("fused"), towers={"text": text})
    assert_same(model, again)
    assert again.graph.towers["text"].source == "./models/text"
    assert_same(model, mt.Pipeline.from_pretrained(Path("fused"), towers={"text": text}).model)
    assert isinstance(mt.load_tower(Path("fused"), "text", tower=text), nn.Module)
    save_training(Path("run"), model, torch.optim.SGD(model.parameter_groups(lr=0.1)))
    assert_same(model, mt.FusedModel.from_training(Path("run"), towers={"text": text}))
    with pytest.raises(TypeError, match=r"'text'.* not a int"):
        mt.FusedModel.from_pretrained(Path("fused"), towers={"text": 3})  # type: ignore[dict-item]  # that is refused


def test_a_save_says_what_it_stored(
    folders: Path, downloaded: Download, caplog: pytest.LogCaptureFixture
) -> None:
    downloaded("org/text", causal_lm("llama", seed=3))
    graph = mt.FusionGraph()
    for name, source in {"speech": "models/speech", "ask": "org/text", "answer": "org/text"}.items():
        graph.add_tower(name, source)
    with caplog.at_level(logging.INFO, "multitower"):
        graph.compile().save_pretrained("fused")
    assert [each.message for each in caplog.records if each.name == "multitower"] == [
        f"saved to {folders}/fused: speech is stored; ask is referred to, org/text at {COMMIT}; answer is ask"
    ]


def halve(model: mt.FusedModel) -> None:
    model.half()


def to_bfloat16(model: mt.FusedModel) -> None:
    model.to(torch.bfloat16)


def train(model: mt.FusedModel) -> None:
    text = model.unimodal("text").requires_grad_(True)
    optimizer = torch.optim.SGD(text.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**mt.collate(EXAMPLES)).loss.backward()
        optimizer.step()
    text.requires_grad_(False)


def change_one_value(model: mt.FusedModel) -> None:
    next(model.unimodal("text").parameters()).data.view(-1)[17] += 1


@pytest.mark.parametrize("change", [halve, to_bfloat16, train, change_one_value])
@pytest.mark.parametrize("source", ["models/text", "org/text", "letters://3"])
def test_a_tower_that_is_not_as_its_origin_is_stored(
    folders: Path, downloaded: Download, offer: Offer, source: str, change: Callable[[mt.FusedModel], None]
) -> None:
    downloaded("org/text", causal_lm("llama", seed=3))
    offer("tower-letters", "tower_letters", LOADER, group=TOWERS, letters="tower_letters:load")
    model = fused("models/speech", source, "none")
    model.save_pretrained("fused")
    assert Path("fused/towers/text").exists() == (source == "models/text")
    change(model)
    model.save_pretrained("fused")
    assert Path("fused/towers/text").exists()
    assert_same(model, mt.FusedModel.from_pretrained("fused"))


def test_what_was_loaded_in_another_dtype_is_stored(downloaded: Download, tmp_path: Path) -> None:
    downloaded("org/text", causal_lm("llama", seed=3))
    fused(causal_lm("gpt2", vocab_size=14), "org/text").save_pretrained(tmp_path / "fused")
    half = mt.FusedModel.from_pretrained(tmp_path / "fused", dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    assert_same(half, mt.FusedModel.from_pretrained(tmp_path / "half"))


def test_what_cannot_be_read_anew_is_stored(downloaded: Download, tmp_path: Path) -> None:
    place = downloaded("org/text", causal_lm("llama", seed=3))
    model = fused(causal_lm("gpt2", vocab_size=14), "org/text")
    shutil.rmtree(place)
    model.save_pretrained(tmp_path / "fused")
    assert_same(model, mt.FusedModel.from_pretrained(tmp_path / "fused"))
