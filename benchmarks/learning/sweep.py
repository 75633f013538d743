"""Train many variants, two at a time with one thread each, except those that have results already.

    export PYTHONPATH=examples
    python benchmarks/learning/sweep.py --data runs/learning/short --variants base "tanh gates" --seeds 0 1 2

It can be stopped at any time; started again, it continues with the missing runs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm
from train import RESULTS, key_of, read_results
from variants import read_variant

TRAIN = Path(__file__).with_name("train.py")


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
    there = set(map(key_of, read_results(options.results)))
    runs = [
        {"variant": variant, "steps": steps, "pairs": pairs, "seed": seed, "split": options.split}
        for seed, steps, pairs, variant in itertools.product(
            options.seeds, options.steps, options.pairs, options.variants
        )
    ]
    named = {variant: read_variant(variant)[0] for variant in options.variants}
    missing = [
        run
        for run in runs
        if key_of({"data": options.data.name, **run, "variant": named[run["variant"]]}) not in there
    ]

    def start(run: dict[str, object]) -> None:
        given = [f"--{key}={value}" for key, value in run.items() if value is not None]
        command = [
            sys.executable,
            str(TRAIN),
            f"--data={options.data}",
            f"--results={options.results}",
            *given,
        ]
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **threads})

    with ThreadPoolExecutor(options.jobs) as pool:
        list(tqdm(pool.map(start, missing), total=len(missing), unit="run"))


if __name__ == "__main__":
    main()
