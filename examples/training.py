"""How the examples train: by transformers' Trainer, all by one recipe, and batches for it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import multitower as mt
from multitower.train import Trainer

Example = list[mt.Segment]
POOL = 16  # batches that are sorted by length together, so that little is padded
WATCHED = 16  # held-out examples of each direction on which contributions are watched
FOR_TRAINING = 0.8  # of the time that is left before training; the rest is for the report
WARM_UP, TIMED = 4, 8  # steps; where two or four tasks take turns, each has as many of them as another


@dataclass
class Run:
    """What a training run left behind: its steps and seconds, and what was logged on the way."""

    steps: int
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    contributions: list[dict[str, float]] = field(default_factory=list)


class Follow(transformers.TrainerCallback):
    """Keeps the loss of every step and what is watched about fifty times, and shows a progress bar."""

    def __init__(self, run: Run, names: Sequence[str], watch: Callable[[], dict] | None, title: str) -> None:
        self.run, self.names, self.watch, self.shown = run, names, watch, {}
        self.bar = tqdm(total=run.steps, desc=title, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            name = self.names[state.global_step - 1]
            self.run.history.append({"step": state.global_step, name: logs["loss"]})
            self.shown[name] = f"{logs['loss']:.3f}"
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update()

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        step, steps = state.global_step, self.run.steps
        if self.watch and (step % max(1, steps // 50) == 0 or step == steps):
            model.eval()
            self.run.contributions.append({"step": step, **self.watch()})

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.bar.close()


def train(
    module: nn.Module,
    batches: Iterator[list[Example]],
    groups: list[dict],
    steps: int,
    *,
    title: str,
    collate: Callable[[list[Example]], dict] = mt.collate,
    named: Callable[[Example], str] = lambda example: example[-1].tower,
    watch: Callable[[], dict[str, float]] | None = None,
) -> Run:
    """Train with AdamW; the learning rate warms up, then falls along a cosine to a tenth.

    Nothing depends on how long a step takes, so that a busy machine finds the same as an idle one. The state
    of torch's random numbers is afterwards what it was before.

    Args:
        module: a FusedModel, or anything else that ``transformers.Trainer`` trains; in eval mode afterwards.
        batches: an endless supply.
        groups: optimizer parameter groups, each with its own learning rate.
        steps: how many batches are taken; the schedule is stretched over them.
        title: stands before the progress bar.
        collate: makes of a batch what the module takes.
        named: under which name the loss of a batch is kept, asked of its first example.
        watch: returns values by name, kept as the run's `contributions`; called about fifty times in all, and
            after the last step, with the module in eval mode.
    """
    taken, run = list(islice(batches, steps)), Run(steps)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale(step / steps))
    kind = Trainer if isinstance(module, mt.FusedModel) else transformers.Trainer
    with TemporaryDirectory() as folder, torch.random.fork_rng():
        arguments = transformers.TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=1,  # batch: they are ready made, of unlike sizes
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            max_grad_norm=1.0,
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            use_cache=True,
            use_cpu=next(module.parameters()).device.type == "cpu",
            dataloader_pin_memory=False,
        )
        trainer = kind(
            module,
            arguments,
            train_dataset=taken,
            data_collator=lambda rows: collate(rows[0]),
            optimizers=(optimizer, rates),
            callbacks=[Follow(run, [named(batch[0]) for batch in taken], watch, title)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        run.seconds = trainer.train().metrics["train_runtime"]
    module.eval()
    return run


def scale(progress: float, warmup: float = 0.03) -> float:
    """Return what the learning rate is multiplied by where so much of the training, 0 to 1, is behind."""
    return min(1.0, progress / warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))


def estimated_steps(
    seconds: float,
    module: nn.Module,
    batches: Iterator[list[Example]],
    make_groups: Callable[[nn.Module], list[dict]],
) -> int:
    """Return how many steps of `train` fit into so many seconds, at least one, by timing some on a copy.

    Args:
        seconds: how long training may take.
        module: what is to be trained; it stays as it is.
        batches: a supply of their own: some are used up.
        make_groups: returns `groups` for a copy of the module.
    """
    twin = copy.deepcopy(module)
    train(twin, batches, make_groups(twin), WARM_UP, title="warming up")
    each = train(twin, batches, make_groups(twin), TIMED, title="timing").seconds / TIMED
    steps = max(1, int(seconds / each))
    print(f"a step takes {each:.3f} s here, so {seconds:.0f} s are enough for {steps} steps", flush=True)
    return steps


def watching(model: mt.FusedModel, tasks: Iterable[list[Example]]) -> Callable[[], dict[str, float]]:
    """Return what `train` may watch: how much each tap of each link contributes on examples of each task."""
    batches = [mt.batch.to_device(mt.collate(examples), model.device) for examples in tasks]

    def watch() -> dict[str, float]:
        found: dict[str, float] = {}
        for batch in batches:
            found |= model.contributions(**batch)
        return {name: value for name, value in found.items() if not name.endswith(" adapter")}

    return watch


def in_turn(*supplies: Iterator[list[Example]]) -> Iterator[list[Example]]:
    """Take a batch from each supply in turn."""
    for batches in zip(*supplies, strict=True):
        yield from batches


def endless(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches of about equally long examples for ever, in a new order each time round."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(range(len(examples)), len(examples))
        pools = iter(order)
        while pool := list(islice(pools, POOL * size)):
            pool.sort(key=lambda place: sum(len(segment.tokens) for segment in examples[place]))
            starts = list(range(0, len(pool), size))
            rng.shuffle(starts)
            for start in starts:
                yield [examples[place] for place in pool[start : start + size]]


def noisy(
    history: Mapping[str, float], seed: int, sources: Mapping[str, float] | None = None
) -> Callable[[list[Example]], dict]:
    """Return a `collate` that replaces tokens of each tower: of its own past, and of what others read."""
    generator = torch.Generator().manual_seed(seed)

    def collate(examples: list[Example]) -> dict:
        batch = mt.batch.corrupt_history(mt.collate(examples), history, generator=generator)
        return mt.batch.corrupt_sources(batch, sources or {}, generator=generator)

    return collate


def directed(pairs: Iterable[tuple[Tensor, Tensor]], source: str, target: str) -> list[Example]:
    """Make examples in which the target tower answers to the source tower."""
    return [[mt.Segment(source, given), mt.Segment(target, asked, target=True)] for given, asked in pairs]


def small_decoder(modality: mt.Modality, *, width: int, depth: int) -> transformers.PreTrainedModel:
    """Make a new decoder of the Llama type for the tokens of a modality."""
    config = transformers.LlamaConfig(
        vocab_size=modality.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=modality.begin,
        eos_token_id=modality.end,
    )
    return transformers.LlamaForCausalLM(config)


def pretrain_decoders(
    jobs: Mapping[str, tuple[mt.Modality, Sequence[Tensor]]],
    steps: int,
    out: Path,
    *,
    width: int,
    depth: int,
    batch: int,
    seed: int,
    device: str,
) -> dict[str, str]:
    """Make a small decoder of each modality from its own rows of tokens; nothing here is paired.

    Returns:
        For each name the folder of an ordinary transformers checkpoint.
    """
    folders = {}
    for name, (modality, rows) in jobs.items():
        model = small_decoder(modality, width=width, depth=depth).to(device)
        pretrain(model, name, rows, steps, lr=2e-3, batch=batch, seed=seed)
        folders[name] = str(out / f"{name}-decoder")
        model.save_pretrained(folders[name])
    return folders


def pretrain(
    model: nn.Module, name: str, rows: Sequence[Tensor], steps: int, *, lr: float, batch: int, seed: int
) -> Run:
    """Teach a decoder to predict its own modality: rows of tokens, nothing paired."""

    def collate(examples: list[Example]) -> dict:
        stream = mt.collate(examples)["streams"][name]
        return {"input_ids": stream["tokens"], "labels": stream["labels"], "use_cache": False}

    batches = endless([[mt.Segment(name, row, target=True)] for row in rows], batch, seed)
    groups = [{"params": list(model.parameters()), "lr": lr}]
    return train(model, batches, groups, steps, title=f"pretraining {name}", collate=collate)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Sequence[Tensor], device: str) -> float:
    """Return the perplexity per token of rows of tokens, the first of each being given."""
    total, count = 0.0, 0
    for row in rows:
        tokens = row[None].to(device)
        total += model(input_ids=tokens, labels=tokens, use_cache=False).loss.item() * (len(row) - 1)
        count += len(row) - 1
    return math.exp(total / count)
