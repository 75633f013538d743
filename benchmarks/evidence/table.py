"""Run what a table still lacks, print all tables, and draw the curve beside the results.

    export PYTHONPATH=benchmarks/learning:examples      # in this order, as each has a report.py
    python benchmarks/evidence/table.py pairs --data runs/evidence/words
    python benchmarks/evidence/table.py pairs --data runs/evidence/words --no-runs      # what is there by now

The methods are the files in ``methods``: to compare another one, add a file. Runs go on where they were
stopped, two at a time, a thread each, and each is a line of ``results.jsonl``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from data import load_corpus
from train import TASKS, read_results

from judge import word_errors
from report import HEADS, Run, by_length, cells, group, rate, table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.jsonl"
METHODS = ("zipper", "zipper-frozen", "expansion", "expansion-lora", "expansion-new")
COLOURS = dict(zip(METHODS, ("#009e73", "#56b4e9", "#d55e00", "#cc79a7", "#999999"), strict=True))
TABLES: dict[str, dict[str, Sequence[Any]]] = {
    "pairs": {"methods": METHODS, "pairs": (16_000, 4_800, 1_600, 480, 160)},
    "links": {"methods": ("zipper", "zipper-paper"), "pairs": (16_000,)},
}


def missing(name: str, runs: Sequence[Run], data: str, steps: int, seeds: Sequence[int]) -> int:
    """Return how many runs a table lacks."""
    keys = ("data", "variant", "steps", "pairs", "seed")
    there = {tuple(run[key] for key in keys) for run in runs}
    wanted = TABLES[name]
    return sum(
        (data, method, steps, pairs, seed) not in there
        for method in wanted["methods"]
        for pairs in wanted["pairs"]
        for seed in seeds
    )


def foreseen(runs: Sequence[Run], steps: int) -> str:
    """Return how long so many steps take on two cores, going by the runs that are there."""
    if not runs:
        return "; the bar tells how long they take after the first"
    seconds = np.mean([run["seconds"] / run["steps"] for run in runs])
    return f", about {steps * seconds / 2 / 3600:.1f} hours of two cores without decoding"


def by_pairs(runs: Sequence[Run], name: str) -> str:
    """Return the errors of each method at each number of pairs."""
    found = group(runs)
    rows = [
        [method, str(pairs), str(key[3]), *cells(found[key])]
        for method in TABLES[name]["methods"]
        for pairs in TABLES[name]["pairs"]
        for key in sorted(found, key=str)
        if key[1] == pairs and key[-1] == method
    ]
    return table(["", "pairs", "steps", *HEADS[1:]], rows)


def floor_and_ceiling(data: Path) -> str:
    """Return what the judge makes of the original audio, and of audio made from the true units."""
    corpus = load_corpus(data)
    rows = [
        [name, str(word_errors([pair.transcript for pair in corpus.test[: len(heard)]], heard))]
        for name, heard in corpus.heard.items()
    ]
    return table(["", "WER %"], rows)


def draw(runs: Sequence[Run], file: Path) -> None:
    """Draw errors against the number of pairs."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    found = group(runs)
    for panel, task in zip(panels, TASKS, strict=True):
        for method, colour in COLOURS.items():
            keys = sorted((key for key in found if key[-1] == method), key=lambda key: key[1])
            if keys:
                rates = np.array([rate(found[key], task) for key in keys])
                places = [key[1] for key in keys]
                panel.plot(places, rates[:, 0], "o-", color=colour, label=method)
                panel.fill_between(places, rates[:, 1], rates[:, 2], color=colour, alpha=0.2)
        panel.set(xscale="log", xlabel="pairs", title=task.upper(), ylim=(0, 110))
    panels[0].set_ylabel("WER %")
    panels[0].legend(frameon=False)
    figure.savefig(file, dpi=130)


def main() -> None:
    """Run and print what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=TABLES)
    parser.add_argument("--data", type=Path, required=True, help="a folder that words.py made")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-runs", action="store_true", help="only print what is there")
    options = parser.parse_args()
    runs = read_results(options.results)
    count = missing(options.name, runs, options.data.name, options.steps, options.seeds)
    if count and not options.no_runs:
        print(f"{count} runs{foreseen(runs, count * options.steps)}", file=sys.stderr)
        wanted = TABLES[options.name]
        command = [
            sys.executable,
            str(ROOT / "benchmarks/learning/sweep.py"),
            *("--data", str(options.data), "--results", str(options.results), "--steps", str(options.steps)),
            *("--variants", *(str(HERE / "methods" / f"{each}.toml") for each in wanted["methods"])),
            *("--pairs", *map(str, wanted["pairs"]), "--seeds", *map(str, options.seeds)),
        ]
        subprocess.run(command, check=True)
        runs = read_results(options.results)
    runs = [run for run in runs if run["data"] == options.data.name]
    tables = {
        "floor and ceiling": floor_and_ceiling(options.data),
        **{name: by_pairs(runs, name) for name in TABLES},
        "length": by_length(runs, list(METHODS), data=options.data.name),
    }
    for name, text in tables.items():
        print(f"\n{name}\n\n{text}")
    draw(runs, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
