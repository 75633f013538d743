"""Checkpoints for tests that damage them, on purpose or at random."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import multitower as mt
from models import causal_lm
from multitower.plugins import entry_points as plugins
from multitower.testing import tiny_model, tiny_tower
from plugin import LETTERS, Offer


@dataclass
class Base:
    """A checkpoint, and a function that loads it."""

    folder: Path
    load: Callable[[], mt.FusedModel]


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def base(kind: str, tmp_path: Path, offer: Offer, _offline: None) -> Base:
    folder = tmp_path / "fused"
    if kind in ("plain", "modality"):
        given: dict[str, Any] = {}
        if kind == "modality":
            offer("plugged-letters", "plugged_letters", LETTERS, letters="plugged_letters:Letters")
            given = {name: plugins.modality_class("letters")() for name in ("speech", "text")}
        tiny_model().save_pretrained(folder, modalities=given)

        def load() -> mt.FusedModel:
            towers = {"speech": tiny_tower(depth=3, width=12), "text": tiny_tower(depth=2, width=8)}
            return mt.Pipeline.from_pretrained(folder, towers=towers).model

        return Base(folder, load)
    graph = mt.FusionGraph()
    train: Any = "all"
    if kind == "lora":
        import peft

        train = peft.LoraConfig(r=2, target_modules=["q_proj"])
    graph.add_tower("text", causal_lm("llama", width=8, depth=2), train=train, adapter="residual")
    graph.add_tower("speech", causal_lm("llama", width=8, depth=1), adapter="residual")
    graph.add_link("speech", "text", interleave=1, window=9, feed_forward=True, projection="mlp")
    graph.compile().save_pretrained(folder)
    return Base(folder, lambda: mt.FusedModel.from_pretrained(folder))


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
