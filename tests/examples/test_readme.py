"""Run the Python of README.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from models import causal_lm
from paths import ROOT

pytest.importorskip("transformers", reason="the README needs transformers")

HUB_ID = '"HuggingFaceTB/SmolLM2-135M"'


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    """Save a small decoder, to use instead of the one to download; return its path as a literal."""
    causal_lm("llama", vocab_size=80, depth=4).save_pretrained(tmp_path / "lm")
    return f'"{tmp_path / "lm"}"'


def test_what_the_readme_shows_runs(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert HUB_ID in blocks[0]
    shorter = blocks[0].replace("max_new_tokens=20", "max_new_tokens=5").replace(HUB_ID, pretrained)
    names: dict[str, Any] = {}
    exec(compile(shorter, "README.md", "exec"), names)
    assert "text->speech: interleave 1 and embeddings" in capsys.readouterr().out
    assert list(names["model"].towers) == ["speech", "text"]
