"""A fixture that makes fake installed packages with plugins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from multitower.plugins.entry_points import MODALITIES

Offer = Callable[..., None]

LETTERS = """
import torch
import multitower as mt

class Letters(mt.Modality):
    name, accepts = "letters", (str,)
    vocab_size, begin, end = 14, 1, 2

    def __init__(self, first="a"):
        self.first = first

    def encode(self, raw):
        return torch.tensor([1, *(3 + ord(letter) - ord(self.first) for letter in raw), 2])

    def decode(self, tokens):
        return "".join(chr(ord(self.first) + t - 3) for t in tokens.tolist() if 3 <= t < 14)

    def config(self):
        return {"first": self.first}
"""


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Install a package: ``offer(package, module, code, name="module:object", group=..., version=...)``."""

    def install(
        package: str,
        module: str,
        code: str,
        *,
        group: str = MODALITIES,
        version: str = "1.0",
        metadata: bool = True,
        **entries: str,
    ) -> None:
        site = tmp_path / f"site-{len(list(tmp_path.glob('site-*')))}"
        info = site / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(code)
        if metadata:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        lines = [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, module, raising=False)

    before = set(sys.modules)
    yield install
    for module in set(sys.modules) - before:
        if module.startswith("plugged"):
            del sys.modules[module]
