"""Options of links and towers that no tensor's shape shows are compared when a run is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import multitower as mt
from models import causal_lm
from multitower.train.resume import load_training, save_training


def build(memory: str = "all", **options: Any) -> mt.FusedModel:
    graph = mt.FusionGraph()
    graph.add_tower("speech", causal_lm("gpt2", vocab_size=14), train="all", memory=memory)
    graph.add_tower("text", causal_lm("llama"))
    graph.add_link("speech", "text", interleave=1, **options)
    return graph.compile()


@pytest.mark.parametrize("option", [{"relative": False}, {"window": 1}, {"position": None}])
def test_other_options_of_links_and_towers_are_told(tmp_path: Path, option: dict[str, Any]) -> None:
    model = build()
    save_training(tmp_path / "run", model, torch.optim.AdamW(model.parameter_groups(lr=1e-2)))
    ((name, value),) = option.items()
    match = rf"link 'speech->text' was saved with .*, and the model's has {name}={value}"
    with pytest.raises(mt.errors.CheckpointError, match=match) as caught:
        load_training(tmp_path / "run", build(memory="segment", **option))
    assert "tower 'speech' was saved with memory='all'" in str(caught.value)
