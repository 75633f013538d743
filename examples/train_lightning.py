"""Fuse a speech decoder and a text decoder with Lightning (pip install lightning).

python examples/train_lightning.py metadata.csv --speech DECODER MODALITY --text DECODER MODALITY
"""

from __future__ import annotations

from typing import Any

import lightning
import torch

import multitower as mt
from train_data import Recipe, fuse, loader, optimizer_of, parse


class Fusing(lightning.LightningModule):
    """Trains a fused model, with manual optimisation: losses are normalised by all tokens of a step."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.model, self.losses = recipe, fuse(recipe), []
        self.automatic_optimization = False

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer, schedule = optimizer_of(self.model, self.recipe)
        return [optimizer], [schedule]

    def training_step(self, batches: list[Any], number: int) -> None:
        optimizer, counts = self.optimizers(), mt.batch.count_targets(batches)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.model(**batch, logits=False, num_items_in_batch=counts).loss
            self.manual_backward(loss)
            total += loss.detach()
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.lr_schedulers().step()
        optimizer.zero_grad()
        self.log("loss", total, prog_bar=True)
        self.losses.append(total.item())


def main(recipe: Recipe) -> list[float]:
    """Train and save; return the loss of every step."""
    module = Fusing(recipe)
    trainer = lightning.Trainer(max_epochs=1, devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(module, loader(recipe))
    mt.Pipeline(module.model.eval(), recipe.modalities).save_pretrained(recipe.out)
    return module.losses


if __name__ == "__main__":
    main(parse(__doc__))
