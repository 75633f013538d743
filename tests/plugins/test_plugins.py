from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from torch import nn

import multitower as mt
from multitower.plugins import entry_points as plugins
from multitower.testing import tiny_tower
from paths import ROOT
from plugin import LETTERS, Offer

BROKEN = "import no_such_library"
GPT = """
from multitower.testing import tiny_tower

def load(source):
    if source == "missing":
        raise FileNotFoundError("no file 'missing'")
    return None if source == "nothing" else tiny_tower(int(source))

sentence = "not a function"
"""


def test_a_plugin_is_found_by_its_name(offer: Offer) -> None:
    offer("multitower-letters", "plugged_letters", LETTERS, version="2.1", letters="plugged_letters:Letters")
    letters = plugins.modality_class("letters")
    assert letters().decode(letters().encode("abc")) == "abc"
    plugin = next(one for one in plugins.installed() if one.name == "letters")
    assert plugin == plugins.Plugin("letters", "multitower-letters", "2.1", letters, None)
    record = {"modality": "letters", "package": "multitower-letters", "version": "2.1"}
    assert plugins.describe(letters()) == record


def test_plugins_are_not_imported_before_they_are_used(offer: Offer) -> None:
    offer("multitower-letters", "plugged_letters", LETTERS, letters="plugged_letters:Letters")
    offer("multitower-other", "plugged_other", LETTERS, other="plugged_other:Letters")
    plugins.modality_class("letters")
    assert "plugged_letters" in sys.modules
    assert "plugged_other" not in sys.modules


def test_the_library_imports_no_plugin() -> None:
    code = "import multitower, sys; print([m for m in sys.modules if m.startswith('multitower_')])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert run.stdout.decode().strip() == "[]"


def test_a_missing_plugin_names_the_package_to_install(offer: Offer) -> None:
    with pytest.raises(mt.errors.PluginError, match="'smell' is not installed: pip install multitower-smell"):
        plugins.modality_class("smell", package="multitower-smell")
    offer("multitower-letters", "plugged_letters", LETTERS, letters="plugged_letters:Letters")
    with pytest.raises(
        mt.errors.PluginError, match=r"no installed package offers the modality 'smell'.*letters"
    ):
        plugins.modality_class("smell")
    with pytest.raises(mt.errors.PluginError, match=r"'smell' is not in multitower-letters 1\.0, which is"):
        plugins.modality_class("smell", package="multitower-letters")


def test_a_broken_plugin_is_named_and_leaves_others_alone(offer: Offer) -> None:
    offer("multitower-bad", "plugged_bad", BROKEN, version="0.3", bad="plugged_bad:Bad")
    offer("multitower-letters", "plugged_letters", LETTERS, letters="plugged_letters:Letters")
    reason = r"'bad' of package multitower-bad 0\.3 cannot be imported: .*No module named 'no_such_library'"
    with pytest.raises(mt.errors.PluginError, match=reason):
        plugins.modality_class("bad")
    assert plugins.modality_class("letters")().vocab_size == 14
    found = {plugin.name: plugin for plugin in plugins.installed()}
    assert found["bad"].value is None
    assert "no_such_library" in found["bad"].error
    assert found["letters"].error is None


def test_two_plugins_of_one_name_are_refused_and_others_are_not(offer: Offer) -> None:
    offer("one-letters", "plugged_one", LETTERS, letters="plugged_one:Letters")
    offer("other-letters", "plugged_other", LETTERS, letters="plugged_other:Letters")
    offer("multitower-bad", "plugged_bad", BROKEN, bad="plugged_bad:Bad")
    reason = "one-letters and other-letters both offer the modality 'letters': pip uninstall one"
    with pytest.raises(mt.errors.PluginError, match=reason):
        plugins.modality_class("letters")
    assert "plugged_one" not in sys.modules
    found = [plugin for plugin in plugins.installed() if plugin.name == "letters"]
    assert [plugin.package for plugin in found] == ["one-letters", "other-letters"]
    assert all(plugin.value is None and reason in plugin.error for plugin in found)
    with pytest.raises(mt.errors.PluginError, match="no_such_library"):
        plugins.modality_class("bad")


@pytest.mark.parametrize("again", ["multitower-letters", "Multitower_Letters"])
def test_a_package_that_is_installed_twice_is_one(offer: Offer, again: str) -> None:
    offer("multitower-letters", "plugged_letters", LETTERS, letters="plugged_letters:Letters")
    offer(again, "plugged_letters", LETTERS, version="1.1", letters="plugged_letters:Letters")
    assert plugins.modality_class("letters").name == "letters"
    assert [one.version for one in plugins.installed() if one.name == "letters"] == ["1.1"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("plugged_odd:mt", "not a subclass of multitower.Modality"),
        ("plugged_odd:Letters", "calls itself 'letters': its name and its entry point must be the same"),
        ("plugged_odd:Nothing", "has no attribute 'Nothing'"),
        ("plugged odd", "cannot be imported"),
    ],
)
def test_what_is_no_modality_of_its_name_is_refused(offer: Offer, value: str, reason: str) -> None:
    offer("multitower-odd", "plugged_odd", LETTERS, odd=value)
    with pytest.raises(mt.errors.PluginError, match=rf"modality 'odd' of package multitower-odd .*{reason}"):
        plugins.modality_class("odd")


def test_an_installation_without_metadata_can_be_listed(offer: Offer) -> None:
    offer("multitower-odd", "plugged_odd", LETTERS, metadata=False, letters="plugged_odd:Letters")
    plugin = next(one for one in plugins.installed() if one.name == "letters")
    assert "damaged installation" in plugin.package


def test_a_class_that_no_package_offers_is_described_by_name(offer: Offer) -> None:
    offer("multitower-letters", "plugged_letters", LETTERS, letters="plugged_letters:Letters")

    class Letters(plugins.modality_class("letters")):
        pass

    assert plugins.describe(Letters()) == {"modality": "letters", "package": None, "version": None}


def test_the_reference_modalities_are_offered() -> None:
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    for name, value in project["entry-points"][plugins.MODALITIES].items():
        module, _, attribute = value.partition(":")
        assert getattr(import_module(module), attribute).name == name


@pytest.fixture
def graph() -> mt.FusionGraph:
    graph = mt.FusionGraph()
    graph.add_tower("text", tiny_tower())
    return graph


def test_a_tower_comes_from_a_loader(offer: Offer, graph: mt.FusionGraph, tmp_path: Path) -> None:
    offer("multitower-gpt", "plugged_gpt", GPT, group=plugins.TOWERS, gpt="plugged_gpt:load")
    graph.add_tower("music", "gpt://3", train="all")
    graph.add_tower("dance", "gpt://4")
    model = graph.compile()
    assert (model.tower("dance").table.weight == tiny_tower(4).table.weight).all()
    nn.init.ones_(model.tower("music").table.weight)
    model.save_pretrained(tmp_path / "fused")
    again = mt.FusedModel.from_pretrained(tmp_path / "fused", towers={"text": tiny_tower()})
    assert again.graph.towers["dance"].source == "gpt://4"
    assert (again.tower("music").table.weight == 1).all()
    assert not (tmp_path / "fused/towers/dance").exists()


@pytest.mark.parametrize(
    ("source", "error", "reason"),
    [
        (
            "rwkv://x",
            mt.errors.PluginError,
            "no installed package offers the tower loader 'rwkv'; there are: gpt",
        ),
        ("https://huggingface.co/gpt2", mt.errors.PluginError, "tower loader 'https'"),
        (
            "gpt://missing",
            mt.errors.TowerError,
            "'gpt' cannot load 'missing': FileNotFoundError: no file 'missing'",
        ),
        ("gpt://nothing", mt.errors.TowerError, "'gpt' returned a NoneType for 'nothing'"),
        ("sentence://x", mt.errors.PluginError, "is 'not a function', not a function that loads a tower"),
    ],
)
def test_a_loader_that_fails_is_named(
    offer: Offer, graph: mt.FusionGraph, source: str, error: type[Exception], reason: str
) -> None:
    entries = {"gpt": "plugged_gpt:load", "sentence": "plugged_gpt:sentence"}
    offer("multitower-gpt", "plugged_gpt", GPT, group=plugins.TOWERS, **entries)
    graph.add_tower("music", source)
    with pytest.raises(error, match=rf"tower 'music': .*{reason}"):
        graph.compile()
