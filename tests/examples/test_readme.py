"""The Python of README.md, pasted block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import causal_lm
from paths import ROOT

transformers = pytest.importorskip("transformers", reason="the README takes towers from transformers")
soundfile = pytest.importorskip("soundfile", reason="the README speaks, which needs the speech extra")
pytest.importorskip("librosa", reason="the README speaks, which needs the speech extra")

HUB_ID = '"HuggingFaceTB/SmolLM2-135M"'


@pytest.fixture
def pretrained(tmp_path: Path) -> str:
    """Return a small decoder and its tokenizer, in place of those that would be downloaded."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "four": 3, "two": 4, "nine": 5}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path / "lm")
    causal_lm("llama", vocab_size=80, depth=4).save_pretrained(tmp_path / "lm")
    return f'"{tmp_path / "lm"}"'


def test_what_the_readme_shows_runs(
    pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).normal(scale=0.1, size=160_000)
    soundfile.write("clip.wav", noise, 16_000)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    assert HUB_ID in blocks[0]
    names: dict[str, Any] = {}
    for block in blocks:
        shorter = re.sub(r"(output=[^)]*?)(, max_new_tokens=60)?\)", r"\1, max_new_tokens=5)", block)
        shorter = shorter.replace("units=64", "units=64, refine_steps=1").replace(HUB_ID, pretrained)
        exec(compile(shorter, "README.md", "exec"), names)
    assert "interleave (1, 2) and embeddings" in capsys.readouterr().out
    assert names["pipe"].modalities.keys() == {"text", "speech"}
