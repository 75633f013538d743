"""Do the runs that a table lacks, and print it.

    export PYTHONPATH=benchmarks:benchmarks/learning:examples OMP_NUM_THREADS=1
    python benchmarks/evidence/table.py pairs --data runs/evidence/words --wordnet /usr/share/wordnet
    python benchmarks/evidence/table.py pairs --data runs/evidence/words --no-runs      # existing results
    python benchmarks/evidence/table.py large --data runs/evidence/words --model HuggingFaceTB/SmolLM2-135M
    python benchmarks/evidence/table.py pairs --data runs/evidence/quick --wordnet /usr/share/wordnet --quick

If the data are not complete, ``words.py`` makes what is missing, with its default sizes; for the table
"large", ``retext.py`` makes them again for a larger text decoder, in the folder ``words-large`` beside them.
``--quick`` does the same in minutes, at sizes too small to learn anything, and keeps the results in the
folder of the data. The methods are files in ``methods``. Two runs are done at a time, with one thread each;
interrupted runs resume. Each result is a line of ``results.jsonl``; ``document.py`` writes them into
``docs/evidence.md``.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from data import CORPUS, load_corpus
from document import DEFAULT, LINKS, METHODS, RESULTS, STEPS, large_of, results_on, tables
from summary import Run
from sweep import Planned, do, missing
from words import OTHER

FILES = {
    "pairs": sorted(METHODS.glob("*.toml")),
    "links": [METHODS / f"{DEFAULT}.toml", *sorted(LINKS.glob("*.toml"))],
    "large": sorted((METHODS / "large").glob("*.toml")),
}
SHARES = {"pairs": tuple(STEPS), "links": (1,), "large": (1,)}

QUICK = "--pairs 8 --unpaired 6 --dev 2 --test 3 --units 16 --width 16 --depth 4 --pretraining 2"
"""Options of words.py."""


def planned(name: str, count: int, options: argparse.Namespace) -> list[Planned]:
    """Return the runs of a table, for ``count`` pairs in all; seed by seed."""
    return [
        {
            "variant": str(method),
            "steps": options.steps or STEPS[share],
            "pairs": round(share * count),
            "seed": seed,
            "split": "test",
        }
        for seed, share, method in itertools.product(
            options.seeds, options.shares or SHARES[name], FILES[name]
        )
    ]


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
    parser.add_argument("--wordnet", type=Path, help="WordNet's data files, to make the data from")
    parser.add_argument("--asterisk", type=Path, help="/, for human recordings in the data")
    parser.add_argument("--model", help="for the table large: a text decoder, by folder or Hub id")
    parser.add_argument("--quick", action="store_true", help="tiny data, two steps, one share, one seed")
    parser.add_argument("--shares", nargs="+", type=float, choices=STEPS, help="of the pairs (default: all)")
    parser.add_argument("--steps", type=int, help="of each run (default: by share)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--no-runs", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if options.shares and options.name != "pairs":
        parser.error(f"--shares is for the table pairs: the table {options.name} has all pairs")
    if options.model and options.name != "large":
        parser.error("--model is for the table large")
    if options.quick:
        options.shares, options.steps, options.seeds = [1], 2, [0]
        options.results = options.data / RESULTS.name
    if not (options.data / f"{OTHER}-decoder/config.json").exists():  # what words.py makes last
        if options.wordnet is None:
            parser.error(f"the data {options.data} are not complete; with --wordnet they are made")
        command = [sys.executable, Path(__file__).with_name("words.py"), options.data]
        command += ["--wordnet", options.wordnet, *(QUICK.split() if options.quick else [])]
        command += ["--asterisk", options.asterisk] if options.asterisk else []
        subprocess.run(list(map(str, command)), check=True)
    data = options.data
    if options.name == "large":
        data = large_of(data)
        if not (data / CORPUS).exists():
            if options.model is None:
                parser.error(f"the data {data} do not exist; with --model they are made")
            command = [sys.executable, Path(__file__).with_name("retext.py"), options.data, data]
            subprocess.run([*map(str, command), "--model", options.model], check=True)
        elif options.model is not None:
            parser.error(f"the data {data} exist; leave out --model, or remove the folder to make them anew")
    corpus = load_corpus(data)
    runs = results_on(data, options.results, corpus)
    lacking = missing(planned(options.name, len(corpus.train), options), data, options.results)
    if lacking and not options.no_runs:
        steps = sum(run["steps"] for run in lacking)
        print(f"{len(lacking)} runs{foreseen(runs, steps)}", file=sys.stderr)
        do(lacking, data, options.results)
        runs = results_on(data, options.results, corpus)
    found = tables(runs, corpus, options.steps, large=runs)
    print(found["floor and ceiling"], found[options.name], sep="\n\n")


if __name__ == "__main__":
    main()
