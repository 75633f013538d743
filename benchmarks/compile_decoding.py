"""Count recompilations of compiled decoding over calls of generate, and time it.

    python benchmarks/compile_decoding.py                       # a few minutes, mostly for compiling
    python benchmarks/compile_decoding.py --backend eager       # counts only, faster

``FusedModel.generate`` with a static cache is called repeatedly, with other lengths of sources and prompts
and another number of new tokens each time. The first calls are for warm-up; every later compilation counts as
a recompilation. Then eager and compiled calls alternate on one source; each round gives the median over the
tokens of a call.
"""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import torch
import transformers
from torch._dynamo.utils import counters
from tqdm import tqdm

import multitower as mt
from decode import Clock
from measure import begin, in_turn, milliseconds, options, plot_ratios, ratio, write
from models import SIZES, make_reader, random_tokens


def main() -> None:
    """Compile, count and time."""
    parser = options(__doc__, "compile_decoding")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--calls", type=int, default=20, help="how many calls of unlike lengths")
    parser.add_argument("--longest", type=int, default=1000, help="source of these calls")
    parser.add_argument("--source", type=int, default=1000, help="source of the calls that are timed")
    parser.add_argument("--new", type=int, default=48, help="tokens that each of these decodes")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--interleave", type=int, default=2, help="layers of the text from tap to tap")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--mode", help="of torch.compile")
    chosen = begin(parser)
    depth = SIZES[chosen.size]["num_hidden_layers"]
    taps = [
        (max(1, 6 * place // depth), place)
        for place in range(chosen.interleave, depth + 1, chosen.interleave)
    ]
    model = make_reader(chosen.size, taps, source_size="tiny", adapter="gated").eval().to(chosen.device)
    config = transformers.CompileConfig(backend=chosen.backend, mode=chosen.mode, fullgraph=True)
    config._compile_all_devices = True
    compiled = {"cache_implementation": "static", "compile_config": config}
    draw, results = random.Random(chosen.seed), []
    for rows in chosen.rows:
        torch._dynamo.reset()
        counters.clear()
        started, graphs = time.monotonic(), []
        for number in tqdm(range(chosen.calls), desc=f"{rows} rows", leave=False):
            examples = make_examples(model, rows, draw.randint(8, chosen.longest), draw.randint(0, 20))
            call(model, examples, draw.randint(8, 32), compiled)
            graphs.append(counters["stats"]["unique_graphs"])
            if number + 1 == chosen.warm_up:
                warm_up = time.monotonic() - started
        examples = make_examples(model, rows, chosen.source, 0)
        runs = {
            "compiled": partial(timed, chosen.clock, model, examples, chosen.new, compiled),
            "eager": partial(timed, chosen.clock, model, examples, chosen.new, {}),
        }
        times = in_turn(runs, chosen.repeats, title=f"{rows} rows, warm")
        results.append(
            {
                "rows": f"{rows} rows",
                "graphs": graphs[chosen.warm_up - 1],
                "graph_breaks": sum(counters["graph_break"].values()),
                "recompilations": counters["stats"]["unique_graphs"] - graphs[chosen.warm_up - 1],
                "warm_up_seconds": round(warm_up, 1),
                "ms": milliseconds(times),
                "ratio": ratio(times["compiled"], times["eager"]),
            }
        )
        print(results[-1], flush=True)
        write(chosen, results)
    plot_ratios(chosen.out / "ratios.png", results, ("rows",), "a warm token", "compiled / eager")


def make_examples(model: mt.FusedModel, rows: int, source: int, prompt: int) -> list[list[mt.Segment]]:
    """Return rows of a source segment, after a text prompt unless it is empty."""
    lengths = {"text": prompt, "source0": source}
    return [
        [mt.Segment(name, random_tokens(model, name, length)) for name, length in lengths.items() if length]
        for _ in range(rows)
    ]


def call(model: mt.FusedModel, examples: Any, new: int, choices: dict[str, Any]) -> None:
    """Decode ``new`` tokens."""
    model.generate(examples, ["text"], do_sample=False, eos_token_id=None, max_new_tokens=new, **choices)


def timed(clock: str, model: mt.FusedModel, examples: Any, new: int, choices: dict[str, Any]) -> float:
    """Decode ``new`` tokens; return seconds per token."""
    ticks = Clock(clock)
    call(model, examples, new, {**choices, "logits_processor": [ticks]})
    return ticks.per_token()


if __name__ == "__main__":
    main()
