"""Count graph breaks and recompilations of a compiled training step, and time it.

    python benchmarks/compile.py                        # a few minutes, mostly for compiling
    python benchmarks/compile.py --backend aot_eager    # counts only, faster

The step, ``torch.compile(model, dynamic=True)`` and its backward, runs on batches with different lengths. Two
of them are for warm-up; every later compilation counts as a recompilation.
"""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters
from tqdm import tqdm

from measure import begin, interleaved, milliseconds, options, plot_ratios, ratio, write
from models import SIZES, make_batch, make_model


def main() -> None:
    """Compile, count and time."""
    parser = options(__doc__, "compile")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--towers", type=int, default=2)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--lengths", type=int, default=50, help="how many batches of unlike lengths")
    parser.add_argument("--longest", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=2)
    chosen = begin(parser)
    results = []
    for train in ("none", "all"):
        torch._dynamo.reset()
        counters.clear()
        model = make_model(chosen.size, chosen.towers, train=train).to(chosen.device)
        compiled = torch.compile(model, dynamic=True, backend=chosen.backend)
        draw = random.Random(chosen.seed)
        lengths = draw.sample(range(8, chosen.longest), chosen.lengths)
        batches = [make_batch(model, draw.randint(2, 5), length) for length in lengths]
        started, graphs = time.monotonic(), []
        for number, batch in enumerate(tqdm(batches, desc=f"train={train}", leave=False)):
            step(compiled, batch)
            graphs.append(counters["stats"]["unique_graphs"])
            if number + 1 == chosen.warm_up:
                warm_up = time.monotonic() - started
        times = interleaved(
            {"compiled": partial(step, compiled, batches[0]), "eager": partial(step, model, batches[0])},
            chosen.repeats,
            clock=chosen.clock,
            title=f"train={train}, warm",
        )
        results.append(
            {
                "train": f"train={train}",
                "graphs": graphs[chosen.warm_up - 1],
                "graph_breaks": sum(counters["graph_break"].values()),
                "reasons": dict(counters["graph_break"]),
                "recompilations": graphs[-1] - graphs[chosen.warm_up - 1],
                "warm_up_seconds": round(warm_up, 1),
                "ms": milliseconds(times),
                "ratio": ratio(times["compiled"], times["eager"]),
            }
        )
        print(results[-1], flush=True)
        write(chosen, results)
    plot_ratios(chosen.out / "ratios.png", results, ("train",), "warm step", "compiled / eager")


def step(model: Any, batch: Any) -> None:
    """Run forward and backward."""
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()


if __name__ == "__main__":
    main()
