"""Training and batches of the examples, with the transformers Trainer."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
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
POOL = 16  # batches sorted by length together, to reduce padding
WATCHED = 16  # held-out examples per direction for measuring contributions
FOR_TRAINING = 0.8  # fraction of the remaining time; the rest is for the report
SAVED = 250  # steps between checkpoints
WARM_UP, TIMED = 4, 8  # steps; multiples of the number of alternating tasks (two or four)


@dataclass
class Run:
    """The steps, time and log of a training run: seconds by the clock, and of processor time."""

    steps: int
    seconds: float = 0.0
    processor: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    contributions: list[dict[str, float]] = field(default_factory=list)


class Follow(transformers.TrainerCallback):
    """Adds name and time to each loss in the log; calls ``watch`` about fifty times; shows a progress bar."""

    def __init__(self, run: Run, names: Sequence[str], watch: Callable[[], dict] | None, title: str) -> None:
        self.run, self.names, self.watch, self.shown = run, names, watch, {}
        self.bar = tqdm(total=run.steps, desc=title, unit="step")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        before = state.log_history[-1] if state.log_history else {}
        self.seconds = time.perf_counter() - before.get("seconds", 0.0)
        self.processor = time.process_time() - before.get("processor", 0.0)
        self.bar.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            entry, name = state.log_history[-1], self.names[state.global_step - 1]
            entry["name"] = name
            entry["seconds"] = time.perf_counter() - self.seconds
            entry["processor"] = time.process_time() - self.processor
            self.shown[name] = f"{logs['loss']:.3f}"
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update()

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        step, steps = state.global_step, self.run.steps
        if self.watch and (step % max(1, steps // 50) == 0 or step == steps):
            model.eval()
            self.run.contributions.append({"step": step, **self.watch()})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
        entries = [entry for entry in state.log_history if "name" in entry]
        self.run.history += [{"step": entry["step"], entry["name"]: entry["loss"]} for entry in entries]
        self.run.seconds, self.run.processor = entries[-1]["seconds"], entries[-1]["processor"]


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
    folder: Path | None = None,
) -> Run:
    """Train with AdamW; the learning rate warms up, then decays along a cosine to a tenth.

    The result does not depend on the speed of the machine, nor on how often a run with a folder is cut off.
    torch's random state is restored afterwards.

    Args:
        module: a FusedModel, or any module for ``transformers.Trainer``; in eval mode afterwards.
        batches: an endless iterator.
        groups: optimizer parameter groups, each with its own learning rate.
        steps: number of batches; the schedule is scaled to it.
        title: title of the progress bar.
        collate: converts a batch to the module's inputs.
        named: returns the name under which to record a batch's loss, from its first example.
        watch: returns values by name, recorded as the run's `contributions`; called about fifty times, and
            after the last step, with the module in eval mode. Lost if the run is cut off.
        folder: where to keep a checkpoint, from which the next call with the same arguments goes on. It is
            the caller's to delete.
    """
    taken, run = list(islice(batches, steps)), Run(steps)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: scale(step / steps))
    kind = Trainer if isinstance(module, mt.FusedModel) else transformers.Trainer
    with nullcontext(folder) if folder else TemporaryDirectory() as out, torch.random.fork_rng():
        arguments = transformers.TrainingArguments(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=1,  # items are complete batches
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            max_grad_norm=1.0,
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            report_to="none",
            save_strategy="steps" if folder else "no",
            save_steps=SAVED,
            save_total_limit=1,
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
        done = max(map(saved_step, Path(out).glob("checkpoint-*/trainer_state.json")), default=0)
        for batch in taken[:done]:
            collate(batch)  # so that its noise goes on from where it was cut off
        trainer.train(resume_from_checkpoint=f"{out}/checkpoint-{done}" if done else None)
    module.eval()
    return run


def saved_step(state: Path) -> int:
    """Return the step of a checkpoint from the file that is written last.

    >>> saved_step(Path("runs/checkpoint-250/trainer_state.json"))
    250
    """
    return int(state.parent.name.removeprefix("checkpoint-"))


def scale(progress: float, warmup: float = 0.03) -> float:
    """Return the factor of the learning rate at a fraction of the training, 0 to 1."""
    return min(1.0, progress / warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))


def estimated_steps(
    seconds: float,
    module: nn.Module,
    batches: Iterator[list[Example]],
    make_groups: Callable[[nn.Module], list[dict]],
) -> int:
    """Estimate how many steps of `train` take this many seconds (at least one), by timing a copy.

    Args:
        seconds: time for training.
        module: the module to train; it is not changed.
        batches: a separate iterator; some batches are consumed.
        make_groups: returns `groups` for a copy of the module.
    """
    twin = copy.deepcopy(module)
    train(twin, batches, make_groups(twin), WARM_UP, title="warming up")
    each = train(twin, batches, make_groups(twin), TIMED, title="timing").seconds / TIMED
    steps = max(1, int(seconds / each))
    print(f"a step takes {each:.3f} s here, so {seconds:.0f} s are enough for {steps} steps", flush=True)
    return steps


def watching(model: mt.FusedModel, tasks: Iterable[list[Example]]) -> Callable[[], dict[str, float]]:
    """Return a `watch` function for `train`: the contribution of each tap on examples of each task."""
    batches = [mt.batch.to_device(mt.collate(examples), model.device) for examples in tasks]

    def watch() -> dict[str, float]:
        found: dict[str, float] = {}
        for batch in batches:
            found |= model.contributions(**batch)
        return {name: value for name, value in found.items() if not name.endswith(" adapter")}

    return watch


def in_turn(*supplies: Iterator[list[Example]]) -> Iterator[list[Example]]:
    """Alternate between several iterators."""
    for batches in zip(*supplies, strict=True):
        yield from batches


def endless(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches of examples of similar lengths for ever, shuffled in each epoch."""
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
    """Return a `collate` with noise: in each tower's own history, and in what others read."""
    generator = torch.Generator().manual_seed(seed)

    def collate(examples: list[Example]) -> dict:
        batch = mt.batch.corrupt_history(mt.collate(examples), history, generator=generator)
        return mt.batch.corrupt_sources(batch, sources or {}, generator=generator)

    return collate


def directed(pairs: Iterable[tuple[Tensor, Tensor]], source: str, target: str) -> list[Example]:
    """Make examples with the source tower's segment as prompt and the target tower's as target."""
    return [[mt.Segment(source, given), mt.Segment(target, asked, target=True)] for given, asked in pairs]


def small_decoder(modality: mt.Modality, *, width: int, depth: int) -> transformers.PreTrainedModel:
    """Return a randomly initialised Llama decoder for the tokens of a modality."""
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
    """Pretrain a small decoder of each modality on unpaired rows of tokens.

    Returns:
        The folder of each decoder's transformers checkpoint, by name.
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
    """Pretrain a decoder on rows of tokens of its modality."""

    def collate(examples: list[Example]) -> dict:
        stream = mt.collate(examples)["streams"][name]
        return {"input_ids": stream["tokens"], "labels": stream["labels"], "use_cache": False}

    batches = endless([[mt.Segment(name, row, target=True)] for row in rows], batch, seed)
    groups = [{"params": list(model.parameters()), "lr": lr}]
    return train(model, batches, groups, steps, title=f"pretraining {name}", collate=collate)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Sequence[Tensor], device: str) -> float:
    """Return the perplexity per token of rows of tokens, given the first token of each."""
    total, count = 0.0, 0
    for row in rows:
        tokens = row[None].to(device)
        total += model(input_ids=tokens, labels=tokens, use_cache=False).loss.item() * (len(row) - 1)
        count += len(row) - 1
    return math.exp(total / count)
