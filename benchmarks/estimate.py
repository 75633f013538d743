r"""Compare estimated costs of a batch, without weights, with measurements.

    python benchmarks/estimate.py                       # tiny towers, a minute
    python benchmarks/estimate.py --size smollm2        # towers of the shape of SmolLM2-135M

Two towers read each other. The estimate is for towers on the meta device. The measurements are for random
towers on the CPU: saved bytes by saved-tensor hooks, cache bytes from real caches, FLOPs by torch's counter
on a real step, memory by the peak growth of the resident set in the first step. That memory includes
gradients, saved tensors and temporaries: compare it with the sum of the first two. It is measured with
glibc's malloc, and with one that returns freed memory at once, for the fused model and for its towers run
with transformers and peft alone. Estimate and measurements run in new processes for each setting; the memory
growth of the estimate is reported as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import multitower as mt
from measure import begin, now, options, write
from models import INTERLEAVE, SIZES, ZIPPER, make_model, make_tower
from multitower.generate.tap_cache import TapCache
from multitower.inspect.estimate import FORMULAS
from resident import PLAIN_MALLOC, child, forget_peak, peak, resident
from saved_bytes import saved, saved_by

POLICIES: dict[str, dict[str, Any]] = {  # training and input adapters of both towers
    "frozen": {"train": "none", "adapter": None},
    "frozen, adapters": {"train": "none", "adapter": "gated"},
    "lora": {"train": "lora", "adapter": None},
    "all trained": {"train": "all", "adapter": "gated"},
}
NAMES = ("source", "text")
COMPARED = ("parameters", "trained", "forward_flops", "step_flops", "saved_bytes", "cache_bytes")
MALLOCS: dict[str, dict[str, str]] = {"plain": PLAIN_MALLOC, "glibc": {}}
MIB = 2**20


def main() -> None:
    """Estimate and measure for each policy."""
    parser = options(__doc__, "estimate")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of each tower in a row")
    parser.add_argument("--policy", choices=tuple(POLICIES), help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=tuple(TASKS), help=argparse.SUPPRESS)
    chosen = begin(parser)
    if chosen.device != "cpu":
        parser.error("resident sets say nothing about the memory of other devices than the CPU")
    if chosen.task:
        print(json.dumps(TASKS[chosen.task](chosen)))
        return
    results = []
    for policy in POLICIES:
        given = [*sys.argv[1:], "--policy", policy, "--task"]
        row = {
            "policy": policy,
            **{task: child(__file__, [*given, task]) for task in ("estimated", "measured")},
        }
        subjects = ("fused",) if POLICIES[policy]["train"] == "none" else ("fused", "native")
        row["memory"] = {
            f"{subject}, {malloc}": child(__file__, [*given, subject], MALLOCS[malloc])
            for subject, malloc in product(subjects, MALLOCS)
        }
        row["ratio"] = {key: row["estimated"][key] / row["measured"][key] for key in COMPARED}
        results.append(row)
        show(row)
        write(chosen, results)


def estimated(chosen: argparse.Namespace) -> dict[str, Any]:
    """Estimate a step with towers on the meta device."""
    graph, batch = declared(chosen, empty=True), batch_of(chosen)
    before, started = peak(), time.perf_counter()
    total = mt.inspect.estimate(graph, batch).total
    seconds = time.perf_counter() - started
    figures = dataclasses.asdict(total) | {"step_flops": total.step_flops}
    return figures | {"seconds": seconds, "grown_bytes": peak() - before}


def measured(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure real steps."""
    model, batch = declared(chosen, empty=False).compile(), batch_of(chosen)
    model(**batch).loss.backward()
    seconds = []
    for _ in range(chosen.repeats):
        model.zero_grad(set_to_none=True)
        started = now(chosen.clock)
        model(**batch).loss.backward()
        seconds.append(now(chosen.clock) - started)
    counts = [each.numel() for each in model.parameters()]
    figures = {
        "parameters": sum(counts),
        "trained": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "saved_bytes": saved(model, batch),
        "forward_flops": flops(model, batch, backward=False),
        "step_flops": flops(model, batch, backward=True),
        "cache_bytes": cache_bytes(model, batch),
    }
    step = statistics.median(seconds)
    return figures | {"step_seconds": step, "flops_per_second": figures["step_flops"] / step}


def fused(chosen: argparse.Namespace) -> dict[str, int]:
    """Measure the memory of the first step of the fused model."""
    model, batch = ready(chosen)
    return memory(model, batch, lambda: [model(**batch).loss])


def native(chosen: argparse.Namespace) -> dict[str, int]:
    """Measure the memory of the first step of its towers alone: all forwards, then all backwards."""
    model, batch = ready(chosen)

    def losses() -> list[Tensor]:
        return [
            model.unimodal(name)(input_ids=each["tokens"], labels=each["labels"], use_cache=False).loss
            for name, each in batch["streams"].items()
        ]

    return memory(model, batch, losses)


def ready(chosen: argparse.Namespace) -> tuple[mt.FusedModel, mt.batch.Batch]:
    """Return model and batch, after a step of another model as warm-up of torch."""
    first = make_model("tiny", 2)
    first(**make_batch(("tower0", "tower1"), SIZES["tiny"]["vocab_size"], 2, 8)).loss.backward()
    return declared(chosen, empty=False).compile(), batch_of(chosen)


def memory(model: mt.FusedModel, batch: mt.batch.Batch, losses: Callable[[], list[Tensor]]) -> dict[str, int]:
    """Measure the memory of a step, the bytes it saves for the backward, and those of gradients."""
    forget_peak()
    before = resident()
    torch.autograd.backward(losses())
    grown = peak() - before
    gradients = sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)
    return {"grown_bytes": grown, "expected_bytes": saved_by(losses, model, batch) + gradients}


TASKS = {"estimated": estimated, "measured": measured, "fused": fused, "native": native}


def declared(chosen: argparse.Namespace, *, empty: bool) -> mt.FusionGraph:
    """Declare two towers that read each other."""
    graph = mt.FusionGraph()
    for number, name in enumerate(NAMES):
        with torch.device("meta") if empty else nullcontext():
            graph.add_tower(name, make_tower(chosen.size, number), **POLICIES[chosen.policy])
    for source, target in (NAMES, NAMES[::-1]):
        graph.add_link(source, target, interleave=INTERLEAVE[chosen.size], **ZIPPER)
    return graph


def batch_of(chosen: argparse.Namespace) -> mt.batch.Batch:
    """Return the batch to estimate and measure."""
    return make_batch(NAMES, SIZES[chosen.size]["vocab_size"], chosen.rows, chosen.length)


def make_batch(names: tuple[str, str], vocabulary: int, rows: int, length: int) -> mt.batch.Batch:
    """Return rows of one segment of each tower, in alternating order; the second segment is the target."""
    tokens = torch.randint(3, vocabulary, (rows, 2, length))
    examples = []
    for row, pair in enumerate(tokens):
        one, other = names if row % 2 else names[::-1]
        examples.append([mt.Segment(one, pair[0]), mt.Segment(other, pair[1], target=True)])
    return mt.collate(examples)


def flops(model: mt.FusedModel, batch: mt.batch.Batch, *, backward: bool) -> int:
    """Count the FLOPs of a real run."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss = model(**batch).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


@torch.no_grad()
def cache_bytes(model: mt.FusedModel, batch: mt.batch.Batch) -> int:
    """Return the size of the decoding caches for a batch, in bytes."""
    taps = TapCache.fill(model, batch["streams"], list(model.towers)).entries
    held = [tuple(entry.source) for entry in taps.values()]
    for name, stream in batch["streams"].items():
        native: Any = model.unimodal(name)
        cache = native(input_ids=stream["tokens"], use_cache=True).past_key_values
        held += [(layer.keys, layer.values) for layer in cache.layers]
    return sum(tensor.nbytes for pair in held for tensor in pair)


def show(row: dict[str, Any]) -> None:
    """Print a table."""
    estimate, real = row["estimated"], row["measured"]
    print(f"\n{row['policy']}: {'estimated':>20} {'measured':>20} {'ratio':>8}")
    for key in COMPARED:
        print(f"{key:20} {estimate[key]:>20,} {real[key]:>20,} {row['ratio'][key]:>8.4f}")
    print(f"A step took {real['step_seconds']:.3f} s, {real['flops_per_second'] / 1e9:.1f} GFLOP/s.")
    for name, found in row["memory"].items():
        grown, expected = found["grown_bytes"], found["expected_bytes"]
        print(f"{name}: memory grew by {grown / MIB:.0f} MiB; saved and gradients {expected / MIB:.0f}")
    own = estimate["grown_bytes"] / MIB
    print(f"The estimate took {estimate['seconds']:.1f} s and {own:.0f} MiB.", flush=True)


if __name__ == "__main__":
    main()
