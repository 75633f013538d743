"""The training loop that the examples use for everything they train, and batches for it."""

from __future__ import annotations

import copy
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import multitower as mt

Example = list[mt.Segment]
POOL = 16  # batches that are sorted by length together, so that little is padded
WATCHED = 16  # held-out examples of each direction on which contributions are watched
FOR_TRAINING = 0.8  # of the time that is left before training; the rest is for the report
WARM_UP, TIMED = 4, 8  # steps; where two or four tasks take turns, each has as many of them as another


@dataclass
class Run:
    """What a training run left behind: its steps and seconds, and what was logged on the way."""

    steps: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    contributions: list[dict[str, float]] = field(default_factory=list)


def train(
    module: nn.Module,
    losses: Callable[[dict], dict[str, Tensor]],
    batches: Iterator[dict],
    groups: list[dict],
    steps: int,
    *,
    title: str,
    clip: float = 1.0,
    warmup: float = 0.03,
    watch: Callable[[], dict[str, float]] | None = None,
) -> Run:
    """Train with AdamW; the learning rate warms up, then falls along a cosine to a tenth.

    Nothing depends on how long a step takes, so that a busy machine finds the same as an idle one.

    Args:
        module: what is trained; in train mode while it lasts, in eval mode afterwards.
        losses: returns the losses of a batch by name; their sum is minimised.
        batches: an endless supply.
        groups: optimizer parameter groups, each with its own learning rate.
        steps: how many batches are taken; the schedule is stretched over them.
        title: stands before the progress bar.
        clip: largest norm of the gradient.
        warmup: share of the steps in which the learning rate rises.
        watch: returns values by name, kept as the run's `contributions`; called about fifty times in all, and
            after the last step, with the module in eval mode.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    run, started, shown = Run(), time.monotonic(), {}
    module.train()
    with tqdm(total=steps, desc=title, unit="step") as bar:
        while run.steps < steps:
            progress = run.steps / steps
            scale = min(1.0, progress / warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * scale
            parts = losses(next(batches))
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(parts.values())).sum().backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            run.steps += 1
            values = {name: loss.item() for name, loss in parts.items()}
            run.history.append({"step": run.steps, **values})
            if watch and (run.steps % max(1, steps // 50) == 0 or run.steps == steps):
                module.eval()
                run.contributions.append({"step": run.steps, **watch()})
                module.train()
            shown |= {name: f"{value:.3f}" for name, value in values.items()}
            bar.set_postfix(shown, refresh=False)
            bar.update()
    run.seconds = time.monotonic() - started
    module.eval()
    return run


def estimated_steps(
    seconds: float,
    module: nn.Module,
    make_losses: Callable[[nn.Module], Callable[[dict], dict[str, Tensor]]],
    batches: Iterator[dict],
    make_groups: Callable[[nn.Module], list[dict]],
) -> int:
    """Return how many steps of `train` fit into so many seconds, at least one, by timing some on a copy.

    Args:
        seconds: how long training may take.
        module: what is to be trained; it stays as it is.
        make_losses: returns `losses` for a copy of the module.
        batches: a supply of their own: some are used up.
        make_groups: returns `groups` for a copy of the module.
    """
    twin = copy.deepcopy(module)
    losses = make_losses(twin)
    with torch.random.fork_rng():
        train(twin, losses, batches, make_groups(twin), WARM_UP, title="warming up")
        timed = train(twin, losses, batches, make_groups(twin), TIMED, title="timing")
    each = timed.seconds / TIMED
    steps = max(1, int(seconds / each))
    print(f"a step takes {each:.3f} s here, so {seconds:.0f} s are enough for {steps} steps", flush=True)
    return steps


def watching(model: mt.FusedModel, batches: Sequence[dict]) -> Callable[[], dict[str, float]]:
    """Return what `train` may watch: how much each tap of each link contributes on these batches."""

    def watch() -> dict[str, float]:
        found: dict[str, float] = {}
        for batch in batches:
            found |= model.contributions(**batch)
        return {name: value for name, value in found.items() if not name.endswith(" adapter")}

    return watch


def in_turn(*supplies: Iterator[dict]) -> Iterator[dict]:
    """Take a batch from each supply in turn."""
    for batches in zip(*supplies, strict=True):
        yield from batches


def endless(examples: Sequence[Example], size: int, seed: int, device: str) -> Iterator[dict]:
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
                yield to_device(mt.collate([examples[place] for place in pool[start : start + size]]), device)


def to_device(batch: dict, device: str) -> dict:
    """Move a batch of nested dicts of tensors."""
    return {
        key: to_device(value, device) if isinstance(value, dict) else value.to(device)
        for key, value in batch.items()
    }


def directed(pairs: Iterable[tuple[Tensor, Tensor]], source: str, target: str) -> list[Example]:
    """Make examples in which the target tower answers to the source tower."""
    return [[mt.Segment(source, given), mt.Segment(target, asked, target=True)] for given, asked in pairs]


def target_losses(model: nn.Module) -> Callable[[dict], dict[str, Tensor]]:
    """Return what `train` asks for: the loss of each tower that a batch has targets for."""
    lean = {"logits": False} if isinstance(model, mt.FusedModel) else {}  # only what the losses need is run

    def losses(batch: dict) -> dict[str, Tensor]:
        found = model(**batch, **lean).losses
        return {
            name: found[name] for name, stream in batch["streams"].items() if (stream["labels"] >= 0).any()
        }

    return losses


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
        pretrain(model, name, rows, steps, lr=2e-3, batch=batch, seed=seed, device=device)
        folders[name] = str(out / f"{name}-decoder")
        model.save_pretrained(folders[name])
    return folders


def pretrain(model: nn.Module, name: str, rows: Sequence[Tensor], steps: int, **options) -> Run:
    """Teach a decoder to predict its own modality: rows of tokens, nothing paired."""
    examples = [[mt.Segment(name, row, target=True)] for row in rows]
    batches = endless(examples, options["batch"], options["seed"], options["device"])

    def losses(batch: dict) -> dict[str, Tensor]:
        stream = batch["streams"][name]
        return {name: model(input_ids=stream["tokens"], labels=stream["labels"], use_cache=False).loss}

    groups = [{"params": list(model.parameters()), "lr": options["lr"]}]
    return train(model, losses, batches, groups, steps, title=f"pretraining {name}")


@torch.no_grad()
def perplexity(model: nn.Module, rows: Sequence[Tensor], device: str) -> float:
    """Return the perplexity per token of rows of tokens, the first of each being given."""
    total, count = 0.0, 0
    for row in rows:
        tokens = row[None].to(device)
        total += model(input_ids=tokens, labels=tokens, use_cache=False).loss.item() * (len(row) - 1)
        count += len(row) - 1
    return math.exp(total / count)
