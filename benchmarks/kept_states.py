"""Time a training step with cached states of a frozen source, compared with one that runs the source.

    python benchmarks/kept_states.py                     # tiny towers, seconds
    python benchmarks/kept_states.py --size smollm2      # towers of the shape of SmolLM2-135M, minutes
    python benchmarks/kept_states.py --size smollm2 --reader tiny

A tower with labels reads a frozen source without input adapter; both have random weights. A step is a forward
with logits=False, in which the source runs up to the last layer that is read, without its head, and a
backward. "kept" includes looking up the rows and reading them from the mapped files, which a data loader can
do in parallel; "reading" is this part alone. The files are in the page cache. The steps alternate in one
process; each round gives one ratio. Medians and quartiles go to results.json and ratios.png.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import multitower as mt
from measure import begin, interleaved, milliseconds, options, plot_ratios, ratio, write
from models import INTERLEAVE, SIZES, ZIPPER, make_batch, make_tower


def main() -> None:
    """Measure each setting."""
    parser = options(__doc__, "kept_states")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument(
        "--reader", choices=tuple(SIZES), help="size of the tower that reads; --size if not given"
    )
    parser.add_argument("--train", choices=("none", "all"), nargs="+", default=["none", "all"])
    parser.add_argument("--interleave", type=int, help="layers of the reader between taps")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of each tower in a row")
    parser.add_argument("--batches", type=int, default=8, help="how many batches are kept")
    chosen = begin(parser)
    chosen.reader = chosen.reader or chosen.size
    results = []
    for train in chosen.train:
        model = make_pair(chosen, train).to(chosen.device)
        batches = [make_batch(model, chosen.rows, chosen.length, "last") for _ in range(chosen.batches)]
        with tempfile.TemporaryDirectory(dir=chosen.out) as folder:
            started = time.perf_counter()
            kept = mt.train.KeptStates.compute(model, tqdm(batches, desc="keeping", leave=False), folder)
            seconds = time.perf_counter() - started
            disk = sum(file.stat().st_size for file in Path(folder).iterdir())
            times = interleaved(
                runs(model, batches, kept),
                chosen.repeats,
                clock=chosen.clock,
                before=lambda model=model: model.zero_grad(set_to_none=True),
                title=f"train={train}",
            )
        tokens = sum(int(batch["streams"]["source"]["mask"].sum()) for batch in batches)
        results.append(
            {
                "size": f"{chosen.reader} reads {chosen.size}",
                "train": f"train={train}",
                "ms": milliseconds(times),
                "ratio": ratio(times["kept"], times["run"]),
                "layers": len({tap.source_layer for tap in model.schedule.taps}),
                "bytes_per_token": round(disk / tokens, 1),
                "seconds_to_keep": round(seconds, 2),
                "tokens": tokens,
            }
        )
        show(results[-1])
        write(chosen, results)
    title = f"{chosen.rows} rows of {chosen.length} tokens of each tower"
    plot_ratios(chosen.out / "ratios.png", results, ("size", "train"), title, "kept / run")


def make_pair(chosen: Any, train: str) -> mt.FusedModel:
    """Return a model of a tower that reads a frozen source."""
    graph = mt.FusionGraph()
    graph.add_tower("source", make_tower(chosen.size, 0), adapter=None)
    graph.add_tower("text", make_tower(chosen.reader, 1), train=train, adapter=None)
    interleave = chosen.interleave or INTERLEAVE[chosen.reader]
    graph.add_link("source", "text", interleave=interleave, **ZIPPER)
    return graph.compile()


def runs(model: mt.FusedModel, batches: list[Any], kept: mt.train.KeptStates) -> dict[str, Any]:
    """Return the runs to compare; every call takes the next batch."""
    run, ready, read = (itertools.cycle(batches) for _ in range(3))
    return {
        "run": lambda: step(model, next(run)),
        "kept": lambda: step(model, kept(next(ready))),
        "reading": lambda: kept(next(read)),
    }


def step(model: mt.FusedModel, batch: Any) -> None:
    """Run forward and backward."""
    loss = model(**batch, logits=False).loss
    assert loss is not None
    loss.backward()


def show(result: dict[str, Any]) -> None:
    """Print one line."""
    ms = {name: round(each["median"], 2) for name, each in result["ms"].items()}
    low, median, high = (result["ratio"][key] for key in ("low", "median", "high"))
    print(
        f"{result['size']} {result['train']:10} {ms} ms, {median:.3f} ({low:.3f} to {high:.3f}) of a step "
        f"that runs the source; {result['bytes_per_token']} bytes a token ({result['layers']} layers), kept "
        f"in {result['seconds_to_keep']} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
