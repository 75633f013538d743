"""Run the first example of docs/training.md on small decoders and noise."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import multitower as mt
from models import causal_lm
from paths import ROOT

for needed in ("accelerate", "datasets", "soundfile", "tokenizers", "transformers"):
    pytest.importorskip(needed, reason="the page trains speech and text with transformers' Trainer")

SHORTER = {
    "num_proc=8": "num_proc=1",
    "max_steps=2000": "max_steps=2",
    "save_steps=500": "save_steps=2, use_cpu=True, dataloader_pin_memory=False, report_to='none'",
    "batch_size=32": "batch_size=2",
    "checkpoint-2000": "checkpoint-2",
}


@pytest.fixture
def material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the files that the page uses."""
    import datasets
    import soundfile
    import tokenizers
    import transformers

    from multitower_speech import SpeechModality

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    speech = SpeechModality(torch.randn(1, 16, 160))
    speech.save_pretrained("path/to/speech-modality")
    causal_lm("llama", vocab_size=speech.vocab_size).save_pretrained("path/to/speech-decoder")
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "four": 3, "two": 4}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    fast.save_pretrained("path/to/text-decoder")
    causal_lm("qwen3").save_pretrained("path/to/text-decoder")
    draw = np.random.default_rng(0)
    for name in ("one", "two"):
        soundfile.write(f"{name}.wav", draw.normal(scale=0.1, size=8_000), 16_000)
    Path("metadata.csv").write_text("file,sentence\none.wav,four two\ntwo.wav,two\n")


@pytest.mark.usefixtures("material")
def test_what_the_page_shows_runs() -> None:
    first = re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)[0]
    for long, short in SHORTER.items():
        assert long in first
        first = first.replace(long, short)
    names: dict[str, Any] = {}
    exec(compile(first, "docs/training.md", "exec"), names)
    pipe = mt.Pipeline.from_pretrained("runs/fused/checkpoint-2")
    assert pipe.modalities.keys() == {"speech", "text"}
    assert any(map(pipe.model.is_open, pipe.model.links))
