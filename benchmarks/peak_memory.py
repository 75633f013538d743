"""Measure the peak memory of a training step under several training policies.

    python benchmarks/peak_memory.py                    # tiny towers, a few minutes
    python benchmarks/peak_memory.py --size smollm2 --rows 2 --length 128

Each figure comes from a new process: the growth of its peak resident set during a step, after a warm-up step
on the same model and batch, with malloc set to return freed memory at once. On a GPU, it is PyTorch's peak
allocation. A step is a forward and a backward; its peak includes tensors saved for the backward, gradients
and temporaries.

The fused model is compared with its parts, the native towers and the links alone: first all forwards, then
all backwards, so that saved tensors of all parts coexist. The inputs of the parts, states that taps read and
update, are allocated before.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from measure import begin, options, spread, write
from models import SIZES, Parts, make_batch
from resident import PLAIN_MALLOC, child, forget_peak, peak, resident
from saved_bytes import POLICIES, make_policy, saved

SUBJECTS = ("fused", "parts")
MIB = 2**20


def main() -> None:
    """Measure each policy in new processes; in such a process, measure one."""
    parser = options(__doc__, "peak_memory")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of each tower in a row")
    parser.add_argument("--policies", choices=tuple(POLICIES), nargs="+", default=list(POLICIES))
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)
    parser.set_defaults(repeats=3)
    chosen = begin(parser)
    if chosen.subject:
        print(json.dumps(measure(chosen)))
        return
    given = [option for option in sys.argv[1:] if option not in ("--policies", *POLICIES)]
    results: list[dict[str, Any]] = []
    for policy in chosen.policies:
        found = {
            subject: [
                child(__file__, [*given, "--policies", policy, "--subject", subject], PLAIN_MALLOC)
                for _ in range(chosen.repeats)
            ]
            for subject in SUBJECTS
        }
        peaks = {subject: spread([one["peak"] for one in each]) for subject, each in found.items()}
        row = {
            "policy": policy,
            "peak": peaks,
            **{key: found["fused"][0][key] for key in ("saved", "gradients")},
        }
        row["ratio"] = peaks["fused"]["median"] / peaks["parts"]["median"]
        results.append(row)
        row["of_first"] = peaks["fused"]["median"] / results[0]["peak"]["fused"]["median"]
        show(row)
        write(chosen, results)
    plot(chosen.out / "peaks.png", results, f"{chosen.size}, {chosen.rows} rows of {chosen.length} tokens")


def measure(chosen: argparse.Namespace) -> dict[str, int]:
    """Return the peak memory growth of a step of the fused model or its parts, in bytes."""
    (policy,) = chosen.policies
    model = make_policy(chosen.size, policy)[0].to(chosen.device)
    batch = make_batch(model, chosen.rows, chosen.length, targets="last")
    counted = saved(model, batch)
    trained = [each for each in model.parameters() if each.requires_grad]
    gradients = sum(each.grad.nbytes for each in trained if each.grad is not None)
    parts = Parts(model, batch) if chosen.subject == "parts" else None

    def step() -> None:
        model.zero_grad(set_to_none=True)
        gc.collect()
        if parts is None:
            model(**batch).loss.backward()
        else:
            parts.at_once()

    return {"peak": most_of(step, chosen.device, model), "saved": counted, "gradients": gradients}


def most_of(step: Any, device: str, model: torch.nn.Module) -> int:
    """Return the peak memory growth of a step in bytes, after a warm-up step."""
    step()
    model.zero_grad(set_to_none=True)
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    forget_peak()
    before = resident()
    step()
    return peak() - before


def show(row: dict[str, Any]) -> None:
    """Print one line."""
    fused, parts = (row["peak"][subject]["median"] / MIB for subject in SUBJECTS)
    print(
        f"{row['policy']:29} peak {fused:.1f} MiB, of its parts {parts:.1f} ({row['ratio']:.3f}); "
        f"saved {row['saved'] / MIB:.1f}, gradients {row['gradients'] / MIB:.1f}; "
        f"{row['of_first']:.2f} of the first policy",
        flush=True,
    )


def plot(file: Path, results: Sequence[dict[str, Any]], title: str) -> None:
    """Plot two bars per policy, with the components of the peak."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.6 * len(results)), layout="constrained")
    axes = figure.subplots()
    for number, subject in enumerate(SUBJECTS):
        each = [row["peak"][subject] for row in results]
        places = [place + 0.38 * number - 0.19 for place in range(len(results))]
        errors = [[abs(one["median"] - one[side]) / MIB for one in each] for side in ("low", "high")]
        axes.barh(places, [one["median"] / MIB for one in each], 0.36, xerr=errors, label=f"peak, {subject}")
    for place, row in enumerate(results):
        marks = {"saved for backward": row["saved"], "saved and gradients": row["saved"] + row["gradients"]}
        for (name, held), mark in zip(marks.items(), ("k|", "r|"), strict=True):
            axes.plot(held / MIB, place - 0.19, mark, ms=18, label="" if place else name)
    axes.set_yticks(range(len(results)), [row["policy"] for row in results])
    axes.set(xlabel="MiB beyond model and batch", title=title, ylim=(len(results) - 0.5, -0.5))
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
