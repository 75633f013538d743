"""Run docs/own_modality.md from the first line to the last."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from multitower.cli import main
from paths import ROOT
from plugin import Offer

BLOCKS = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "docs/own_modality.md").read_text(), re.DOTALL)


PLUGINS = {"multitower-colour": "colour", "multitower_image": "image"}


def forget() -> None:
    for module in [name for name in sys.modules if name.startswith("multitower_colour")]:
        del sys.modules[module]
    importlib.invalidate_caches()


def shell(code: str, offer: Offer, capsys: pytest.CaptureFixture) -> None:
    """Run each line, but instead of running pip only register the plugin."""
    for line in code.splitlines():
        command = shlex.split(line, comments=True)
        if command[0] == "multitower":
            assert main(command[1:]) == 0
            assert "colour" in capsys.readouterr().out
        elif command[0] == "pytest":
            path = os.pathsep.join([str(Path.cwd() / "multitower-colour"), *sys.path])
            run = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *command[1:]],
                env={**os.environ, "PYTHONPATH": path},
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, run.stdout + run.stderr
        else:
            assert command[:3] == ["pip", "install", "-e"]
            folder = Path(command[3]).name
            if folder in PLUGINS:
                name, package = PLUGINS[folder], folder.replace("_", "-")
                module = package.replace("-", "_")
                sys.path.insert(0, str(Path.cwd() / folder))
                offer(package, f"no_{module}", "", **{name: f"{module}:{name.title()}Modality"})


def follow(shorter: bool, offer: Offer, capsys: pytest.CaptureFixture) -> dict:
    """Follow the tutorial; return the variables of its script."""
    script: dict = {}
    for kind, code in BLOCKS:
        named = re.match(r"# (multitower-colour/\S+)\n", code)
        if kind == "sh":
            shell(code, offer, capsys)
        elif named:
            (Path.cwd() / named[1]).write_text(code.split("\n", 1)[1])
            forget()
        else:
            exec(re.sub(r"steps=\d+", "steps=12", code) if shorter else code, script)
    return script


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    forget()


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # there may be no accelerator
@pytest.mark.usefixtures("elsewhere")
def test_the_tutorial_runs(offer: Offer, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with matplotlib.rc_context({"backend": "agg"}):
        script = follow(True, offer, capsys)
    assert (tmp_path / "colours.png").stat().st_size > 1000
    assert sorted(script["again"].modalities) == ["colour", "image", "text"]
    assert script["by_name"].shape == (95, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # there may be no accelerator
@pytest.mark.usefixtures("elsewhere")
def test_the_tutorial_teaches(offer: Offer, capsys: pytest.CaptureFixture) -> None:
    with matplotlib.rc_context({"backend": "agg"}):
        script = follow(False, offer, capsys)
    off = abs(script["by_name"] - script["right"]).mean()
    assert off < 0.9 * abs(script["mean"] - script["right"]).mean()
    assert abs(script["zero_shot"] - script["luma"]).mean() < 0.95 * script["guess"]
