r"""Estimate what a batch costs before there are weights, beside what is measured with them.

    python benchmarks/estimate.py                       # tiny towers, a minute
    python benchmarks/estimate.py --size smollm2        # towers of the shape of SmolLM2-135M

Two towers read each other. The estimate is made of towers on the meta device, the measurements of random ones
on the CPU: bytes by saved-tensor hooks and by the tensors of real caches, FLOPs by torch's counter on a real
step, memory by how much the largest resident set of the process grew in its first step. That holds gradients,
what is saved for the backward, and what passes: compare it with the sum of the first two. Estimate and
measurement have a process of their own for each setting; by how much the estimate's grew is given as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import multitower as mt
from measure import begin, now, options, write
from models import INTERLEAVE, SIZES, make_model, make_tower
from multitower.cache import TapCache
from multitower.estimate import FORMULAS
from saved_bytes import saved

POLICIES: dict[str, dict[str, Any]] = {  # how both towers are trained, and their input adapters
    "frozen": {"train": "none", "adapter": None},
    "frozen, adapters": {"train": "none", "adapter": "gated"},
    "lora": {"train": "lora", "adapter": None},
    "all trained": {"train": "all", "adapter": "gated"},
}
NAMES = ("source", "text")
COMPARED = ("parameters", "trained", "forward_flops", "step_flops", "saved_bytes", "cache_bytes")
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def main() -> None:
    """Estimate and measure for each policy."""
    parser = options(__doc__, "estimate")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of each tower in a row")
    parser.add_argument("--policy", choices=tuple(POLICIES), help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=("estimated", "measured"), help=argparse.SUPPRESS)
    chosen = begin(parser)
    if chosen.device != "cpu":
        parser.error("resident sets say nothing about the memory of other devices than the CPU")
    if chosen.task:
        print(json.dumps({"estimated": estimated, "measured": measured}[chosen.task](chosen)))
        return
    results = []
    for policy in POLICIES:
        row = {"policy": policy, **{task: child(policy, task) for task in ("estimated", "measured")}}
        row["ratio"] = {key: row["estimated"][key] / row["measured"][key] for key in COMPARED}
        results.append(row)
        show(row)
        write(chosen, results)


def child(policy: str, task: str) -> dict[str, Any]:
    """Do a task in a new process; give its figures."""
    command = [sys.executable, *sys.argv, "--policy", policy, "--task", task]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def estimated(chosen: argparse.Namespace) -> dict[str, Any]:
    """Estimate a step of towers without weights."""
    graph, batch = declared(chosen, empty=True), batch_of(chosen)
    before, started = peak(), time.perf_counter()
    total = graph.estimate(batch).total
    seconds = time.perf_counter() - started
    figures = dataclasses.asdict(total) | {"step_flops": total.step_flops}
    return figures | {"seconds": seconds, "grown_bytes": peak() - before}


def measured(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure real steps."""
    first = make_model("tiny", 2)  # loads what torch loads late
    first(**make_batch(("tower0", "tower1"), SIZES["tiny"]["vocab_size"], 2, 8)).loss.backward()
    model, batch = declared(chosen, empty=False).compile(), batch_of(chosen)
    before = peak()
    model(**batch).loss.backward()
    grown = peak() - before
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
        "gradient_bytes": sum(each.nbytes for each in model.parameters() if each.requires_grad),
        "saved_bytes": saved(model, batch),
        "forward_flops": flops(model, batch, backward=False),
        "step_flops": flops(model, batch, backward=True),
        "cache_bytes": cache_bytes(model, batch),
        "grown_bytes": grown,
    }
    step = statistics.median(seconds)
    return figures | {"step_seconds": step, "flops_per_second": figures["step_flops"] / step}


def declared(chosen: argparse.Namespace, *, empty: bool) -> mt.FusionGraph:
    """Declare two towers that read each other."""
    graph = mt.FusionGraph()
    for number, name in enumerate(NAMES):
        with torch.device("meta") if empty else nullcontext():
            graph.add_tower(name, make_tower(chosen.size, number), **POLICIES[chosen.policy])
    for source, target in (NAMES, NAMES[::-1]):
        graph.add_link(source, target, interleave=INTERLEAVE[chosen.size])
    return graph


def batch_of(chosen: argparse.Namespace) -> mt.stream.Batch:
    """Give the batch that is estimated and measured."""
    return make_batch(NAMES, SIZES[chosen.size]["vocab_size"], chosen.rows, chosen.length)


def make_batch(names: tuple[str, str], vocabulary: int, rows: int, length: int) -> mt.stream.Batch:
    """Give rows of a segment of each tower, the second of which, turn about, is the target."""
    tokens = torch.randint(3, vocabulary, (rows, 2, length))
    examples = []
    for row, pair in enumerate(tokens):
        one, other = names if row % 2 else names[::-1]
        examples.append([mt.Segment(one, pair[0]), mt.Segment(other, pair[1], target=True)])
    return mt.collate(examples)


def flops(model: mt.FusedModel, batch: mt.stream.Batch, *, backward: bool) -> int:
    """Count the FLOPs of a real run."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        loss = model(**batch).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


@torch.no_grad()
def cache_bytes(model: mt.FusedModel, batch: mt.stream.Batch) -> int:
    """Count the keys and values that decoding keeps of a batch."""
    taps = TapCache.fill(model, batch["streams"], list(model.towers)).entries
    held = [tuple(entry.source) for entry in taps.values()]
    for name, stream in batch["streams"].items():
        native: Any = model.unimodal(name)
        cache = native(input_ids=stream["tokens"], use_cache=True).past_key_values
        held += [(layer.keys, layer.values) for layer in cache.layers]
    return sum(tensor.nbytes for pair in held for tensor in pair)


def peak() -> int:
    """Give the bytes of the largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def show(row: dict[str, Any]) -> None:
    """Print a table."""
    estimate, real = row["estimated"], row["measured"]
    print(f"\n{row['policy']}: {'estimated':>20} {'measured':>20} {'ratio':>8}")
    for key in COMPARED:
        print(f"{key:20} {estimate[key]:>20,} {real[key]:>20,} {row['ratio'][key]:>8.4f}")
    expected = (estimate["saved_bytes"] + real["gradient_bytes"]) / 2**20
    step, speed = real["step_seconds"], real["flops_per_second"] / 1e9
    grown, own = real["grown_bytes"] / 2**20, estimate["grown_bytes"] / 2**20
    print(f"A step took {step:.3f} s, {speed:.1f} GFLOP/s. Memory grew by {grown:.0f} MiB;")
    print(f"gradients and what is saved are {expected:.0f} MiB.")
    print(f"The estimate took {estimate['seconds']:.1f} s and {own:.0f} MiB.", flush=True)


if __name__ == "__main__":
    main()
