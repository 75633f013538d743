"""Fuse a speech decoder and a text decoder with ``multitower.train.Trainer``.

python examples/train_trainer.py metadata.csv --speech DECODER MODALITY --text DECODER MODALITY
"""

from __future__ import annotations

import transformers

import multitower as mt
from multitower.train import Trainer
from train_data import Recipe, fuse, parse, read


def main(recipe: Recipe) -> list[float]:
    """Train and save; return the loss of every step."""
    model = fuse(recipe)
    arguments = transformers.TrainingArguments(
        recipe.out,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        gradient_accumulation_steps=recipe.accumulate,
        train_sampling_strategy="sequential",  # rows are already in order
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=recipe.warm_up_steps,
        adam_beta2=0.99,
        weight_decay=0.01,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        seed=recipe.seed,
    )
    trainer = Trainer(model, arguments, train_dataset=read(recipe))
    trainer.train()
    mt.Pipeline(model.eval(), recipe.modalities).save_pretrained(recipe.out)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(parse(__doc__))
