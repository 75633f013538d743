"""Train a fused model with transformers' own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import multitower as mt
from models import EXAMPLES, causal_lm, pair


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_trains_and_evaluates(tmp_path: Path, checkpointing: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="the Trainer needs transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    model = pair(causal_lm("llama"), causal_lm("gpt2", depth=4, vocab_size=14), train="all")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=["streams"],
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **({_checkpointing(transformers): True} if checkpointing else {}),
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES,
        data_collator=mt.collate,
        optimizers=(torch.optim.AdamW(model.parameter_groups(lr=1e-2)), None),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(map(model.is_open, model.links))
    assert model.is_activation_checkpointing == checkpointing
    model.save_pretrained(tmp_path / "fused", embed_towers=True)
    loaded, batch = mt.FusedModel.from_pretrained(tmp_path / "fused").eval(), mt.collate(EXAMPLES)
    assert loaded(**batch).loss == model.eval()(**batch).loss


def _checkpointing(transformers: Any) -> str:
    """Return the name of the setting, which transformers 5.23 renamed."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return next(name for name in names if hasattr(transformers.TrainingArguments, name))
