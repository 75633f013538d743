"""Fixtures: a checkpoint of speech and text, and its parts; the clips are noise."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import multitower as mt
from models import causal_lm
from multitower.testing import open_links

RATE = 16_000


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save decoders and modalities, each in a folder, and a few clips with transcripts."""
    soundfile = pytest.importorskip("soundfile", reason="needs soundfile")
    from multitower_speech import SpeechModality
    from multitower_text import TextModality

    root = tmp_path_factory.mktemp("parts")
    speech = SpeechModality(torch.randn(1, 16, 160, generator=torch.Generator().manual_seed(0)))
    speech.save_pretrained(root / "units")
    for name, size in (("speech", speech.vocab_size), ("text", 258)):
        causal_lm("llama", vocab_size=size).save_pretrained(root / name)
    TextModality().save_pretrained(root / "letters")
    (root / "clips").mkdir()
    with (root / "clips" / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "transcription"])
        noise = np.random.default_rng(0)
        for number, words in enumerate(["one", "two", "three two", "nine"]):
            soundfile.write(root / "clips" / f"{number}.wav", noise.normal(0, 0.1, RATE // 4), RATE)
            table.writerow([f"{number}.wav", words])
    return root


@pytest.fixture(scope="module")
def fused(parts: Path) -> Path:
    from multitower_speech import SpeechModality
    from multitower_text import TextModality

    graph = mt.FusionGraph()
    graph.add_tower("speech", parts / "speech", train="all")
    graph.add_tower("text", parts / "text")
    graph.add_link("speech", "text", interleave=1, gate="tanh", feed_forward=True)
    graph.add_link("text", "speech", interleave=1, embeddings=True)
    model = open_links(graph.compile(), seed=1)
    modalities = {
        "speech": SpeechModality.from_pretrained(parts / "units"),
        "text": TextModality(),
    }
    mt.Pipeline(model, modalities).save_pretrained(parts / "fused")
    return parts / "fused"
