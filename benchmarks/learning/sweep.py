"""Train many variants, two at a time with one thread each, except those that have results already.

    export PYTHONPATH=benchmarks:examples
    python benchmarks/learning/sweep.py --data runs/learning/short --variants base "tanh gates" --seeds 0 1 2

It can be stopped at any time; started again, it continues with the missing runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm
from train import RESULTS, has_result
from variants import read_variant

TRAIN = Path(__file__).with_name("train.py")

Planned = dict[str, Any]
"""The options of a run by name: variant, steps, pairs (None: all), seed and split."""


def missing(runs: Iterable[Planned], data: Path, results: Path) -> list[Planned]:
    """Return the runs that have no result."""
    lacking = []
    for run in runs:
        name, variant = read_variant(run["variant"])
        if not has_result({**run, "data": data.name, "variant": name}, variant, results):
            lacking.append(run)
    return lacking


def do(runs: Sequence[Planned], data: Path, results: Path, jobs: int = 2) -> None:
    """Do the runs, ``jobs`` at a time with one thread each."""

    def start(run: Planned) -> None:
        given = {"data": data, "results": results, **run}
        options = [f"--{key}={value}" for key, value in given.items() if value is not None]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        command = [sys.executable, str(TRAIN), *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
        if done.returncode:
            raise SystemExit(f"the run {run} failed:\n{done.stderr}")

    with ThreadPoolExecutor(jobs) as pool:
        list(tqdm(pool.map(start, runs), total=len(runs), unit="run"))


def main() -> None:
    """Do the missing runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", metavar="VARIANT", required=True)
    parser.add_argument("--steps", nargs="+", type=int, default=[800])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--pairs", nargs="+", type=int, default=[None], help="the first so many; default: all"
    )
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    runs = [
        {"variant": variant, "steps": steps, "pairs": pairs, "seed": seed, "split": options.split}
        for seed, steps, pairs, variant in itertools.product(
            options.seeds, options.steps, options.pairs, options.variants
        )
    ]
    do(missing(runs, options.data, options.results), options.data, options.results, options.jobs)


if __name__ == "__main__":
    main()
