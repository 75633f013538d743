"""Do the runs that a table lacks, and print it.

    export PYTHONPATH=benchmarks/learning:examples
    python benchmarks/evidence/table.py pairs --data runs/evidence/words
    python benchmarks/evidence/table.py pairs --data runs/evidence/words --no-runs      # existing results

The methods are files in ``methods``. Two runs are done at a time, with one thread each; interrupted runs
resume. Each result is a line of ``results.jsonl``; ``document.py`` writes them into ``docs/evidence.md``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from data import load_corpus
from document import LINKS, METHODS, RESULTS, ROOT, STEPS, results_on, tables
from summary import Run

FILES = {
    "pairs": sorted(METHODS.glob("*.toml")),
    "links": [METHODS / "zipper.toml", *sorted(LINKS.glob("*.toml"))],
}
SHARES = {"pairs": (1, 0.3, 0.1, 0.03, 0.01), "links": (1,)}


def wanted(name: str, count: int) -> list[tuple[str, int]]:
    """Return each method of a table with each number of pairs, for ``count`` pairs in total."""
    return [(method.stem, round(share * count)) for share in SHARES[name] for method in FILES[name]]


def missing(
    name: str, runs: Sequence[Run], count: int, steps: int, seeds: Sequence[int]
) -> list[tuple[str, int, int]]:
    """Return method, pairs and seed of each run that a table lacks, seed by seed."""
    there = {(run["variant"], run["pairs"], run["seed"]) for run in runs if run["steps"] == steps}
    asked = [(method, pairs, seed) for seed in seeds for method, pairs in wanted(name, count)]
    return [each for each in asked if each not in there]


def foreseen(runs: Sequence[Run], steps: int) -> str:
    """Return an estimate of the time for some steps on two cores, from existing runs."""
    if not runs:
        return "; the bar tells how long they take after the first"
    seconds = np.mean([run["seconds"] / run["steps"] for run in runs])
    return f", about {steps * seconds / 2 / 3600:.1f} hours of two cores without decoding"


def main() -> None:
    """Parse the command line, do the missing runs and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=FILES)
    parser.add_argument("--data", type=Path, required=True, help="a folder that words.py made")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-runs", action="store_true", help="only print what is there")
    options = parser.parse_args()
    runs, corpus = results_on(options.data, options.results), load_corpus(options.data)
    lacking = missing(options.name, runs, len(corpus.train), options.steps, options.seeds)
    if lacking and not options.no_runs:
        print(f"{len(lacking)} runs{foreseen(runs, len(lacking) * options.steps)}", file=sys.stderr)
        command = [
            sys.executable,
            str(ROOT / "benchmarks/learning/sweep.py"),
            *("--data", str(options.data), "--results", str(options.results), "--steps", str(options.steps)),
            *("--variants", *map(str, FILES[options.name])),
            *("--pairs", *(str(round(share * len(corpus.train))) for share in SHARES[options.name])),
            *("--seeds", *map(str, options.seeds)),
        ]
        subprocess.run(command, check=True)
        runs = results_on(options.data, options.results)
    for name, text in tables(runs, corpus, options.steps).items():
        print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    main()
