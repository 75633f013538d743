"""Time a training step and a forward of a fused model, compared with the sum of its parts.

    python benchmarks/train_step.py                     # tiny towers, a minute or two
    python benchmarks/train_step.py --size smollm2 --rows 2 --length 32     # the shape of SmolLM2-135M

The parts are each native tower alone, including loss and backward, and each tap alone on detached states.
Whole and parts alternate in one process; each round gives one ratio. Medians and quartiles go to results.json
and ratios.png. The towers form a ring and have random weights; all have labels unless --targets is given. A
step is a forward and a backward, without the optimizer, which costs the same in both. Each result also has
the peak resident set so far.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from measure import begin, interleaved, milliseconds, options, plot_ratios, ratio, write
from models import SIZES, Parts, make_batch, make_model
from resident import peak


def main() -> None:
    """Measure each setting."""
    parser = options(__doc__, "train_step")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--towers", type=int, nargs="+", default=[2, 3, 6])
    parser.add_argument("--train", choices=("none", "all"), nargs="+", default=["none", "all"])
    parser.add_argument("--targets", choices=("all", "last"), default="all", help="towers that have labels")
    parser.add_argument("--adapter", action="store_true", help="give towers their input adapters")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of each tower in a row")
    chosen = begin(parser)
    results = []
    for towers, train in itertools.product(chosen.towers, chosen.train):
        adapter = "gated" if chosen.adapter else None
        model = make_model(chosen.size, towers, train=train, adapter=adapter).to(chosen.device)
        batch = make_batch(model, chosen.rows, chosen.length, chosen.targets)
        parts = Parts(model, batch)

        def clear(model: torch.nn.Module = model) -> None:
            model.zero_grad(set_to_none=True)

        for kind in ("step", "forward"):
            with torch.set_grad_enabled(kind == "step"):
                times = interleaved(
                    runs(model, batch, parts, backward=kind == "step"),
                    chosen.repeats,
                    clock=chosen.clock,
                    before=clear,
                    title=f"{towers} towers, train={train}, {kind}",
                )
            results.append(
                {
                    "kind": kind,
                    "towers": f"{towers} towers",
                    "train": f"train={train}",
                    "ms": milliseconds(times),
                    "ratio": ratio(times["fused"], times["towers"], times["links"]),
                    "peak_bytes": peak(),
                }
            )
            show(results[-1])
            write(chosen, results)
    title = f"{chosen.size}: {chosen.rows} rows of {chosen.length} tokens of each tower"
    plot_ratios(chosen.out / "ratios.png", results, ("kind", "towers", "train"), title)


def runs(model: Any, batch: Any, parts: Parts, *, backward: bool) -> dict[str, Any]:
    """Return the runs to compare."""

    def fused() -> None:
        loss = model(**batch).loss
        if backward:
            loss.backward()

    return {
        "fused": fused,
        "towers": lambda: parts.towers(backward),
        "links": lambda: parts.links(backward),
    }


def show(result: dict[str, Any]) -> None:
    """Print one line."""
    ms = {name: round(each["median"], 2) for name, each in result["ms"].items()}
    low, median, high = (result["ratio"][key] for key in ("low", "median", "high"))
    print(
        f"{result['kind']:8} {result['towers']} {result['train']:10} {ms} ms, "
        f"{median:.3f} ({low:.3f} to {high:.3f}) of its parts, "
        f"{result['peak_bytes'] / 2**30:.1f} GiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
