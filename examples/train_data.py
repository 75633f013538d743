"""Shared by the training recipes: the fusion, the data, the optimizer.

train_plain.py, train_accelerate.py, train_lightning.py and train_trainer.py run the same recipe.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import transformers
from torch.utils.data import DataLoader

import multitower as mt
from multitower.train import Collator, encode_columns
from multitower_speech import SpeechModality
from multitower_text import TextModality


@dataclass(frozen=True)
class Recipe:
    """A fusion, its data and training.

    Attributes:
        metadata: a CSV file with the columns file_name (a sound file) and transcription.
        decoders: folders or Hub ids of the speech and text decoders.
        modalities: their modalities.
        out: output folder of the fused model.
        steps: number of optimizer steps.
        batch: examples per batch.
        accumulate: batches per step.
    """

    metadata: str
    decoders: Mapping[str, str]
    modalities: Mapping[str, mt.Modality]
    out: str = "runs/fused"
    steps: int = 2000
    batch: int = 32
    accumulate: int = 1
    lr: float = 3e-3
    warm_up: float = 0.03
    seed: int = 0
    processes: int | None = None

    @property
    def warm_up_steps(self) -> int:
        """Number of steps in which the learning rate warms up."""
        return math.ceil(self.warm_up * self.steps)


def fuse(recipe: Recipe) -> mt.FusedModel:
    """Link the decoders in both directions; text is frozen."""
    torch.manual_seed(recipe.seed)
    graph = mt.FusionGraph()
    graph.add_tower("speech", recipe.decoders["speech"], train="all")
    graph.add_tower("text", recipe.decoders["text"])
    graph.add_link("speech", "text", interleave=1, embeddings=True)
    graph.add_link("text", "speech", interleave=1, embeddings=True)
    return graph.compile()


def read(recipe: Recipe) -> datasets.Dataset:
    """Encode recognition and synthesis examples; return the mixed rows of all steps, in order."""
    data = datasets.load_dataset("csv", data_files=recipe.metadata, split="train")
    hears, says = {"file_name": "speech"}, {"transcription": "text"}
    options: dict[str, Any] = {"num_proc": recipe.processes}
    asr = encode_columns(data, hears | says, recipe.modalities, targets=says, **options)
    tts = encode_columns(data, says | hears, recipe.modalities, targets=hears, **options)
    both = datasets.interleave_datasets([asr, tts], probabilities=[0.5, 0.5], seed=recipe.seed)
    rows = recipe.steps * recipe.batch * recipe.accumulate
    rounds = [both.shuffle(seed=recipe.seed + each) for each in range(math.ceil(rows / len(both)))]
    return datasets.concatenate_datasets(rounds).select(range(rows))


def loader(recipe: Recipe) -> DataLoader:
    """Return a loader that yields, for each step, the list of its batches."""
    collate, size = Collator(), recipe.batch

    def collate_step(rows: list[dict]) -> list[mt.batch.Batch]:
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    return DataLoader(read(recipe), size * recipe.accumulate, collate_fn=collate_step)


def optimizer_of(model: mt.FusedModel, recipe: Recipe) -> tuple[torch.optim.Optimizer, Any]:
    """Return AdamW, and a schedule with warm-up and cosine decay to a tenth of the learning rate."""
    groups = model.parameter_groups(recipe.lr)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    name, options = "cosine_with_min_lr", {"min_lr_rate": 0.1}
    schedule = transformers.get_scheduler(
        name, optimizer, recipe.warm_up_steps, recipe.steps, scheduler_specific_kwargs=options
    )
    return optimizer, schedule


def parse(description: str | None) -> Recipe:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("metadata", help="a CSV file with the columns file_name and transcription")
    for name in ("speech", "text"):
        parser.add_argument(f"--{name}", nargs=2, required=True, metavar=("DECODER", "MODALITY"))
    for name in ("out", "steps", "batch", "accumulate", "lr", "seed"):
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--processes", type=int, help="how many encode")
    options = vars(parser.parse_args())
    kinds = {"speech": SpeechModality, "text": TextModality}
    folders = {name: options.pop(name) for name in kinds}
    return Recipe(
        decoders={name: folder for name, (folder, _) in folders.items()},
        modalities={name: kinds[name].from_pretrained(folder) for name, (_, folder) in folders.items()},
        **options,
    )
