"""Build, install and use a package with a modality; without it, the error names it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest

import multitower as mt
from paths import ROOT

if not any(importlib.metadata.distributions(name="pip")):  # importing pip changes distutils for all tests
    pytest.skip("needs pip", allow_module_level=True)

MUSIC = ROOT / "examples" / "plugins" / "multitower_music"

FUSE_AND_SAVE = """
import multitower as mt
from models import causal_lm
from multitower.plugins import Plugin, describe, installed, modality_class
from multitower.testing import check_modality

TUNE = "X:1\\nM:6/8\\nK:Gm\\n|: ^F2G {a}g>d :|\\n"
MusicModality = modality_class("music")
assert Plugin("music", "multitower-music", "0.1.0", MusicModality, None) in installed()
music = MusicModality.fit([TUNE])
assert describe(music) == {"modality": "music", "package": "multitower-music", "version": "0.1.0"}
check_modality(music, ["", TUNE])

graph = mt.FusionGraph()
graph.add_tower("speech", causal_lm("llama", seed=1))
graph.add_tower("text", causal_lm("llama", seed=2))
graph.add_tower("music", causal_lm("llama", vocab_size=music.vocab_size, seed=3), train="all")
graph.add_link("music", "text", interleave=1)
graph.add_link("speech", "music", interleave=1)
model = graph.compile()
example = [mt.Segment("speech", [1, 5, 2]), mt.Segment("music", music.encode(TUNE), target=True)]
model(**mt.collate([example])).loss.backward()
model.save_pretrained("fused", modalities={"music": music})
"""

LOAD_AND_USE = """
import multitower as mt

pipe = mt.Pipeline.from_pretrained("fused")
music = pipe.modalities["music"]
assert type(music).__module__ == "multitower_music.modality"
assert "^F2" in music.signs

example, tune = [mt.Segment("speech", [1, 5, 2])], "M:6/8\\n|: ^F2G :|\\n"
written = pipe([*example, ("music", tune)], output="music", max_new_tokens=20)
edges = {"bos_token_id": music.begin, "eos_token_id": music.end}
given = [*example, mt.Segment("music", music.encode(tune))]
((segment,),) = pipe.model.generate([given], output=["music"], max_new_tokens=20, **edges)
assert len(segment.tokens) > 1
assert written == music.decode(segment.tokens)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the music package as users do, and install it into a folder."""
    folder = tmp_path_factory.mktemp("packages")
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    built = _pip("wheel", "--no-deps", *isolation, "--wheel-dir", folder, MUSIC)
    if built.returncode and "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("needs hatchling, installed or from a package index")
    assert not built.returncode, built.stdout + built.stderr
    (wheel,) = folder.glob("multitower_music-*.whl")
    done = _pip("install", "--no-deps", "--no-index", "--target", folder / "site", wheel)
    assert not done.returncode, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def saved(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a fused model by a process with the package; return its parent folder."""
    folder = tmp_path_factory.mktemp("work")
    done = _python(FUSE_AND_SAVE, folder, site, ROOT / "tests" / "helpers")
    assert not done.returncode, done.stderr
    return folder


def test_the_package_holds_what_it_should(site: Path) -> None:
    found = {file.name for file in (site / "multitower_music").iterdir()} - {"__pycache__"}
    assert found == {"__init__.py", "modality.py", "py.typed"}
    assert not (site / "tests").exists()


def test_a_checkpoint_names_the_package_that_is_missing(saved: Path) -> None:
    if entry_points(group="multitower.modalities", name="music"):
        pytest.skip("multitower-music is installed here, so it cannot be missing")
    assert list(mt.FusedModel.from_pretrained(saved / "fused").towers) == ["speech", "text", "music"]
    reason = "tower 'music': modality 'music' is not installed: pip install multitower-music"
    with pytest.raises(mt.errors.PluginError, match=reason):
        mt.Pipeline.from_pretrained(saved / "fused")


def test_a_pipeline_takes_and_gives_what_the_package_knows(saved: Path, site: Path) -> None:
    done = _python(LOAD_AND_USE, saved, site)
    assert not done.returncode, done.stderr


def _pip(command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True)


def _python(code: str, folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a folder, by a process with the library and ``paths`` on its import path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))}
    line = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
