"""Fuse a speech decoder and a text decoder with a training loop in plain PyTorch.

python examples/train_plain.py metadata.csv --speech DECODER MODALITY --text DECODER MODALITY
"""

from __future__ import annotations

import torch
from tqdm import tqdm

import multitower as mt
from train_data import Recipe, fuse, loader, optimizer_of, parse


def main(recipe: Recipe) -> list[float]:
    """Train and save; return the loss of every step."""
    model = fuse(recipe).to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer, schedule = optimizer_of(model, recipe)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    losses = []
    for batches in tqdm(loader(recipe), unit="step"):
        batches = [mt.batch.to_device(batch, model.device) for batch in batches]
        counts, total = mt.batch.count_targets(batches), 0.0
        for batch in batches:
            loss = model(**batch, logits=False, num_items_in_batch=counts).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    mt.Pipeline(model.eval(), recipe.modalities).save_pretrained(recipe.out)
    return losses


if __name__ == "__main__":
    main(parse(__doc__))
