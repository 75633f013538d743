"""The command line, and the template that it writes for a modality's package."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import multitower
from fake_hub import Download
from letters import Letters
from models import causal_lm
from multitower.cli import main, plugins
from multitower.plugins.entry_points import modality_class
from multitower.testing import tiny_model

ROOT = Path(multitower.__file__).parents[1]

SMELL = """
import multitower as mt

class Smell(mt.Modality):
    name, accepts = "smell", (bytes, list)
    encode = decode = None

def load(source):
    raise NotImplementedError
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that fakes an installed package with plugins: modules and metadata."""

    def install(package: str, entry_points: str, **modules: str) -> None:
        site = tmp_path / "site" / package
        metadata = site / f"{package}-1.2.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(entry_points)
        for name, source in modules.items():
            (site / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(site)

    return install


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 1
    return capsys.readouterr().err


def test_modalities_and_tower_loaders_are_listed(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    offers = "[multitower.modalities]\nsmell = aromas:Smell\n[multitower.towers]\nnose = aromas:load\n"
    install("aromas", offers, aromas=SMELL)
    assert main(["modalities"]) == 0
    lines = lines_of(capsys)
    assert ["modality", "package", "version", "accepts"] in lines
    assert ["smell", "aromas", "1.2", "bytes, list"] in lines
    assert ["tower", "loader", "package", "version  for sources"] in lines
    assert ["nose", "aromas", "1.2", "nose://..."] in lines


def test_a_broken_plugin_is_listed_with_the_reason(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("aromas", "[multitower.modalities]\nsmell = aromas:Smell\n", aromas=SMELL)
    install("typo", "[multitower.modalities]\ntouch = nowhere_at_all:Touch\n")
    install(
        "odd", "[multitower.modalities]\ntaste = odd:taste\n", odd="taste = 1\nraise OSError('no\\nsalt')"
    )
    assert main(["modalities"]) == 0
    lines = {line[0]: line for line in lines_of(capsys) if line}
    assert lines["smell"][3] == "bytes, list"
    assert lines["touch"][:3] == ["touch", "typo", "1.2"]
    assert "cannot be used: " in lines["touch"][3]
    assert "No module named 'nowhere_at_all'" in lines["touch"][3]
    assert lines["taste"][3].endswith("OSError: no salt")


def test_a_modality_that_does_not_say_what_it_accepts_is_listed(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SMELL.replace('name, accepts = "smell", (bytes, list)', 'name = "smell"')
    install("aromas", "[multitower.modalities]\nsmell = aromas:Smell\n", aromas=source)
    main(["modalities"])
    assert ["smell", "aromas", "1.2", "(its class does not say)"] in lines_of(capsys)


def test_columns_are_aligned(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("aromas", "[multitower.modalities]\nsmell = aromas:Smell\n", aromas=SMELL)
    main(["modalities"])
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    (row,) = [line for line in table if line.startswith("smell")]
    assert row.index("bytes") == table[0].index("accepts")
    assert row.index("1.2") == table[0].index("version")


def test_that_there_is_none_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plugins, "installed", lambda group: [])
    assert main(["modalities"]) == 0
    out = capsys.readouterr().out
    assert out == "no installed package offers a modality\n\nno installed package offers a tower loader\n"


def test_the_new_package_passes_its_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my smell"
    assert main(["new-modality", "smell", "--folder", str(folder)]) == 0
    assert f"cd '{folder}' && pip install -e '.[dev]' && pytest" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [folder]
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5 passed" in run.stdout  # four tests, and the example in the docstring


def test_the_new_package_is_found_when_it_is_installed(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["new-modality", "brain_waves"])
    folder = tmp_path / "multitower-brain-waves"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "multitower-brain-waves"
    assert project["dependencies"] == [f"multitower>={multitower.__version__}"]
    (offer,) = project["entry-points"]["multitower.modalities"].items()
    install("multitower-brain-waves", "[multitower.modalities]\n{} = {}\n".format(*offer))
    monkeypatch.syspath_prepend(folder)
    assert modality_class("brain_waves").__name__ == "BrainWavesModality"
    capsys.readouterr()
    main(["modalities"])
    assert ["brain_waves", "multitower-brain-waves", "1.2", "bytes"] in lines_of(capsys)


@pytest.mark.parametrize(
    "name", ["Smell", "brain-waves", "2d", "_smell", "smell_", "brain__waves", "", "é", "a b", "lambda"]
)
def test_a_name_that_cannot_be_one_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{name!r} cannot be the name of a modality" in refusal(capsys, "new-modality", name)
    assert not list(tmp_path.iterdir())


def test_the_template_leaves_no_name_behind(tmp_path: Path) -> None:
    assert main(["new-modality", "smell", "--folder", str(tmp_path / "smell")]) == 0
    texts = {path: path.read_text() for path in (tmp_path / "smell").rglob("*") if path.is_file()}
    assert len(texts) == 5
    assert not [path for path, text in texts.items() if "octets" in f"{path}{text}".lower()]


def test_a_name_that_is_taken_is_refused(
    tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("aromas", "[multitower.modalities]\nsmell = nowhere:Smell\n", multitower_touch="")
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    taken = refusal(capsys, "new-modality", "smell")
    assert "the modality 'smell' is that of aromas, which is installed: choose another name" in taken
    assert "there is a module multitower_touch already" in refusal(capsys, "new-modality", "touch")
    assert not list(place.iterdir())


def test_what_is_there_is_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        message = refusal(capsys, "new-modality", "smell", "--folder", str(tmp_path / name))
        assert f"{tmp_path / name} is there already: remove it, or give another folder" in message
    message = refusal(capsys, "new-modality", "smell", "--folder", str(tmp_path / "deep" / "smell"))
    assert f"{tmp_path / 'deep'} is no folder: make it first" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert not list((tmp_path / "folder").iterdir())


def test_nothing_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Path.write_text

    def fills_up(file: Path, *arguments: str, **options: str) -> int:
        if file.name == "modality.py":
            raise OSError(28, "No space left on device")
        return write(file, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fills_up)
    message = refusal(capsys, "new-modality", "smell", "--folder", str(tmp_path / "smell"))
    assert "No space left on device" in message
    assert not list(tmp_path.iterdir())


def test_python_m_multitower_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["multitower", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("multitower", run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"multitower {multitower.__version__}\n"


def test_the_command_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    entry = EntryPoint("multitower", scripts["multitower"], "console_scripts")
    assert entry.load() is main


def test_without_a_command_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "new-modality" in capsys.readouterr().out


def test_a_checkpoint_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "fused"
    tiny_model().save_pretrained(folder, modalities={"text": Letters()})
    assert main(["verify", str(folder)]) == 0
    assert re.search(r"fused is as it was saved, every byte of \d files", capsys.readouterr().out)
    (folder / "modalities/text/modality.json").write_text("{}")
    assert main(["verify", str(folder)]) == 1
    assert "damaged: modalities/text/modality.json" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 1
    assert "fusion.json is missing" in capsys.readouterr().err


def test_towers_that_are_referred_to_are_named(
    downloaded: Download, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    downloaded("org/text", causal_lm("llama", seed=3))
    graph = multitower.FusionGraph()
    graph.add_tower("text", "org/text")
    graph.compile().save_pretrained(tmp_path / "fused")
    assert main(["verify", str(tmp_path / "fused")]) == 0
    assert "not in it, and compared by from_pretrained(folder, verify=True): text" in capsys.readouterr().out
