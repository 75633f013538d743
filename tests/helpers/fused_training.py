"""A fused model, examples and a Trainer for tests of the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import multitower as mt
from models import causal_lm, pair, segment

transformers = pytest.importorskip("transformers", reason="the Trainer needs transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

from multitower.train import Trainer  # an extra

EXAMPLES = [
    [segment("speech", 5), segment("text", 3, target=True)],
    [segment("text", 9, target=True)],
    [segment("text", 4), segment("speech", 12, target=True)],
    [segment("speech", 3, target=True)],
    [segment("speech", 6), segment("text", 2, target=True)],
    [segment("text", 3), segment("speech", 4, target=True)],
    [segment("speech", 9), segment("text", 7, target=True)],
    [segment("text", 6, target=True)],
]


def arguments(folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "data_seed": 3,
    }
    return transformers.TrainingArguments(str(folder), **{**settings, **options})


def trainer(folder: Path, model: mt.FusedModel, **options: Any) -> Trainer:
    own = {
        name: options.pop(name)
        for name in (
            "rates",
            "history_noise",
            "source_noise",
            "score",
            "decoding",
            "compute_metrics",
            "modalities",
        )
        if name in options
    }
    return Trainer(model, arguments(folder, **options), train_dataset=EXAMPLES, eval_dataset=EXAMPLES, **own)


def make(**options: Any) -> mt.FusedModel:
    torch.manual_seed(0)
    return pair(causal_lm("llama"), causal_lm("qwen3", depth=4, vocab_size=14), train="all", **options)


def assert_same(one: mt.FusedModel, other: mt.FusedModel, **tolerance: float) -> None:
    state = other.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, state[name], **tolerance or {"rtol": 0, "atol": 0})
