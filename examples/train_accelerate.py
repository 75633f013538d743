"""Fuse a speech decoder and a text decoder with accelerate, on one or several processes.

accelerate launch examples/train_accelerate.py metadata.csv --speech DECODER MODALITY --text DECODER MODALITY
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from tqdm import tqdm

import multitower as mt
from train_data import Recipe, fuse, loader, optimizer_of, parse


def main(recipe: Recipe) -> list[float]:
    """Train and save; return the loss of every step."""
    accelerator = Accelerator()
    model, processes = fuse(recipe), accelerator.num_processes
    model, *others = accelerator.prepare(model, *optimizer_of(model, recipe), loader(recipe))
    optimizer, schedule, steps = others
    losses = []
    for batches in tqdm(steps, unit="step", disable=not accelerator.is_main_process):
        found = mt.batch.count_targets(batches)
        zero = torch.zeros((), dtype=torch.long, device=accelerator.device)
        counts = {name: accelerator.reduce(found.get(name, zero)) for name in recipe.decoders}
        total = zero.float()
        for batch in batches:
            loss = model(**batch, logits=False, num_items_in_batch=counts).loss
            accelerator.backward(loss * processes)  # DDP averages gradients
            total += loss.detach()
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(total).item())
    if accelerator.is_main_process:
        fused = accelerator.unwrap_model(model).eval()
        mt.Pipeline(fused, recipe.modalities).save_pretrained(recipe.out)
    return losses


if __name__ == "__main__":
    main(parse(__doc__))
