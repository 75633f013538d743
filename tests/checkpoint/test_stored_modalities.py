from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import multitower as mt
from letters import STEPS, Letters, Tune
from models import causal_lm, pair
from multitower.plugins import entry_points as plugins
from plugin import LETTERS, Offer
from tampering import rewrite_manifest


@pytest.fixture
def model(tmp_path: Path) -> mt.FusedModel:
    return pair(causal_lm("llama"), causal_lm("gpt2", depth=4, vocab_size=14), gates=True)


@pytest.fixture
def letters(offer: Offer) -> type[mt.Modality]:
    offer("multitower-letters", "plugged_letters", LETTERS, version="2.1", letters="plugged_letters:Letters")
    return plugins.modality_class("letters")


def test_a_pipeline_is_saved_and_loaded(
    model: mt.FusedModel, letters: type[mt.Modality], tmp_path: Path
) -> None:
    pipe = mt.Pipeline(model, {"text": letters("c"), "speech": letters()})
    pipe.save_pretrained(tmp_path / "fused")
    record = {"modality": "letters", "package": "multitower-letters", "version": "2.1"}
    document = json.loads((tmp_path / "fused/fusion.json").read_text())
    assert document["modalities"] == {"text": record, "speech": record}
    again = mt.Pipeline.from_pretrained(tmp_path / "fused")
    assert again.modalities["text"].first == "c"
    given = [("speech", "abc"), ("text", "cde")]
    assert again(given, ["text", "speech"], **STEPS) == pipe(given, ["text", "speech"], **STEPS)


def test_a_missing_plugin_is_named_and_the_model_loads_without(
    model: mt.FusedModel, letters: type[mt.Modality], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "fused"
    model.save_pretrained(folder, modalities={"speech": letters()})
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    monkeypatch.setattr(plugins, "version", _not_installed)
    reason = (
        r"tower 'speech': modality 'letters' is not installed: pip install multitower-letters.*\{'speech'"
    )
    with pytest.raises(mt.errors.PluginError, match=reason):
        mt.Pipeline.from_pretrained(folder)
    assert mt.FusedModel.from_pretrained(folder).graph == model.graph
    pipe = mt.Pipeline.from_pretrained(folder, modalities={"speech": Tune(), "text": Letters()})
    assert pipe([("speech", [5])], "text", **STEPS)


def _not_installed(package: str) -> str:
    raise plugins.PackageNotFoundError(package)


def test_a_modality_of_no_package_is_given_again(model: mt.FusedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "fused", modalities={"text": Letters()})
    with pytest.raises(
        mt.errors.PluginError, match=r"tower 'text': no installed package offers .*'letters'.*give"
    ):
        mt.Pipeline.from_pretrained(tmp_path / "fused")
    own = Letters.from_pretrained(tmp_path / "fused/modalities/text")
    assert mt.Pipeline.from_pretrained(tmp_path / "fused", modalities={"text": own}).modalities["text"] is own


@pytest.mark.parametrize("modalities", [{"smell": Letters()}, {"text": "letters"}])
def test_unfit_modalities_are_refused_before_anything_is_written(
    model: mt.FusedModel, tmp_path: Path, modalities: Any
) -> None:
    with pytest.raises((ValueError, TypeError), match="tower"):
        model.save_pretrained(tmp_path / "fused", modalities=modalities)
    assert list(tmp_path.iterdir()) == []


def test_saving_again_keeps_the_modalities_of_towers_that_are_still_there(
    model: mt.FusedModel, letters: type[mt.Modality], tmp_path: Path
) -> None:
    folder = tmp_path / "fused"
    model.save_pretrained(folder, modalities={"text": letters("c")})
    model.save_pretrained(folder, modalities={"speech": letters("b")})
    assert set(mt.Pipeline.from_pretrained(folder).modalities) == {"speech", "text"}
    (folder / "modalities/README.md").write_text("mine")
    (folder / "modalities/speech/old").write_text("of the old one")
    model.save_pretrained(folder, modalities={"speech": letters("d")})
    pipe = mt.Pipeline.from_pretrained(folder)
    assert {name: modality.first for name, modality in pipe.modalities.items()} == {
        "speech": "d",
        "text": "c",
    }
    assert not (folder / "modalities/speech/old").exists()
    model.drop("speech").save_pretrained(folder)
    assert list(mt.Pipeline.from_pretrained(folder).modalities) == ["text"]
    assert sorted(path.name for path in (folder / "modalities").iterdir()) == ["README.md", "text"]


@pytest.mark.parametrize(
    "damage",
    [
        [],
        {"text": "letters"},
        {"text": {"modality": "letters"}},
        {"text": {"modality": None, "package": None, "version": None}},
        {"text": {"modality": "letters", "package": 3, "version": None}},
        {"../text": {"modality": "letters", "package": None, "version": None}},
    ],
)
def test_damaged_records_are_named(
    model: mt.FusedModel, letters: type[mt.Modality], tmp_path: Path, damage: Any
) -> None:
    model.save_pretrained(tmp_path / "fused", modalities={"text": letters()})
    rewrite_manifest(tmp_path / "fused", lambda document: document.update(modalities=damage))
    with pytest.raises(mt.errors.CheckpointError, match=r"fusion\.json is damaged"):
        mt.Pipeline.from_pretrained(tmp_path / "fused")


def test_a_missing_modality_folder_is_named(
    model: mt.FusedModel, letters: type[mt.Modality], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "fused", modalities={"text": letters()})
    shutil.rmtree(tmp_path / "fused/modalities/text")
    rewrite_manifest(tmp_path / "fused")
    with pytest.raises(mt.errors.CheckpointError, match=r"modalities/text/modality\.json is missing"):
        mt.Pipeline.from_pretrained(tmp_path / "fused")


def test_a_checkpoint_without_modalities_makes_a_pipeline_of_tokens(
    model: mt.FusedModel, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "fused")
    assert mt.Pipeline.from_pretrained(tmp_path / "fused").modalities == {}
