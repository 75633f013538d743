"""Options of the Trainer that are refused or have defaults, and what it saves, predicts and logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import multitower as mt
from fused_training import EXAMPLES, arguments, assert_same, make, trainer
from models import causal_lm, pair
from multitower.train import Trainer
from multitower_text import TextModality


def test_predictions_are_logits_and_labels_by_tower(tmp_path: Path) -> None:
    found = trainer(tmp_path, make()).predict(EXAMPLES)
    assert found.predictions.keys() == found.label_ids.keys() == {"speech", "text"}


def test_the_arguments_have_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not Trainer(make(), train_dataset=EXAMPLES).args.remove_unused_columns


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_loss_func": lambda *_: 0}, "override compute_loss"),
        ({"processing_class": object()}, "pass modalities"),
        ({"rates": {"towers": 1.0}, "optimizers": (object(), None)}, "leave out rates, or optimizers"),
        (
            {"rates": {"towers": 1.0}, "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})},
            "leave out rates, or optimizer_cls_and_kwargs",
        ),
        ({"modalities": {"txt": TextModality()}}, "no tower 'txt'; the towers are speech, text"),
        ({"modalities": {"text": TextModality()}}, "give the modality that the tower was trained with"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(make(), arguments(tmp_path), **options)


def test_rates_do_not_hold_where_transformers_makes_the_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Trainer(make(), arguments(tmp_path), train_dataset=EXAMPLES, rates={"towers": {"speech": 1e-4}})
    lomo = (torch.optim.SGD, {"model": run.model})
    monkeypatch.setattr(run, "get_optimizer_cls_and_kwargs", lambda *_: lomo)
    with pytest.raises(ValueError, match="rates: transformers makes the groups of the optimizer"):
        run.create_optimizer()


def test_each_run_logs_its_own_losses(tmp_path: Path) -> None:
    settings = arguments(tmp_path, max_steps=3, logging_steps=2, learning_rate=0.1)
    run = Trainer(make(), settings, train_dataset=EXAMPLES[:1] * 8)  # only text is learnt
    for _ in range(2):
        run.train()
        logged = [entry for entry in run.state.log_history if "loss" in entry]
        assert logged
        assert all(entry["loss_text"] == pytest.approx(entry["loss"], abs=1e-3) for entry in logged)


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    model = make()
    text = TextModality()
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    (tmp_path / "notes.txt").write_text("mine")
    trainer(tmp_path, model).save_model()
    assert_same(mt.FusedModel.from_pretrained(tmp_path), model)
    assert (tmp_path / "notes.txt").exists()
    wide = pair(causal_lm("llama", vocab_size=text.vocab_size), causal_lm("qwen3", depth=4), train="all")
    mt.Pipeline(wide, {"text": text}).save_pretrained(tmp_path / "pipeline")
    trainer(tmp_path / "pipeline", wide).save_model()
    assert list(mt.Pipeline.from_pretrained(tmp_path / "pipeline").modalities) == ["text"]
