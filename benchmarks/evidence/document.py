"""Write the tables and the plot of the comparison on real words into ``docs/evidence.md``.

    export PYTHONPATH=benchmarks:benchmarks/learning:examples
    python benchmarks/evidence/document.py --data runs/evidence/words

Each table is between comments, the first of which names it. Only the tables are replaced.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from data import Corpus, load_corpus
from reductions import Rows, against, reductions
from summary import Run, cell, filled, group, rate, table
from train import TASKS, read_results

from judge import word_errors

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.jsonl"
REUSE = HERE / "reuse.jsonl"
DOCUMENT = ROOT / "docs/evidence.md"
METHODS = HERE / "methods"
LINKS = METHODS / "links"
LENGTHS = (1, 20, 40, 60, 150)  # characters
DEFAULT, BASE = "zipper", "zipper-absolute"
"""The library's default links, and those of which each other method in ``LINKS`` changes one thing."""
CLEAN = "expansion-8-clean"
"""Expansion without noise in its history, which the longest runs are compared with, too."""

COLOURS = {
    "zipper": "#009e73",
    "zipper-frozen": "#56b4e9",
    "expansion": "#d55e00",
    "expansion-lora": "#cc79a7",
    "expansion-new": "#999999",
}
STEPS = {1: 4000, 0.3: 4000, 0.1: 4000, 0.03: 2000, 0.01: 2000}
"""Length of the runs that are compared, by the share of the pairs."""


def tables(
    runs: Sequence[Run],
    corpus: Corpus,
    steps: int | None,
    reuses: Sequence[Run] = (),
    large: Sequence[Run] = (),
) -> dict[str, str]:
    """Return each table of the document by its name; ``steps`` replaces the lengths of the runs."""
    full, large = ([run for run in each if run["pairs"] == len(corpus.train)] for each in (runs, large))
    usual = steps or STEPS[1]
    methods = of_methods(full, METHODS, CLEAN)
    longer = [run for run in methods if run["steps"] > usual]
    return {
        "words": words(corpus),
        "floor and ceiling": floor_and_ceiling(corpus),
        "pairs": by_pairs(compared(runs, len(corpus.train), steps)),
        "longer": by_pairs(longer),
        "steps": by_pairs(
            run
            for run in of_methods(runs, METHODS)
            if run["pairs"] == round(0.1 * len(corpus.train)) and run["variant"] in ("zipper", "expansion")
        ),
        "fewer errors": reductions(rows_of([*compared(runs, len(corpus.train), steps), *longer])),
        "links compared": against(BASE, rows_of(of_methods(runs, LINKS, DEFAULT))),
        "links": by_pairs(run for run in of_methods(full, LINKS, DEFAULT) if run["steps"] == usual),
        "kept": kept([*methods, *of_methods(full, LINKS)]),
        "chosen": by_pairs(runs, split="dev"),
        "length": by_length(methods, corpus),
        "reuse": reused(reuses),
        "large": by_pairs(large),
        "large kept": kept(large),
        "large length": by_length(large, corpus),
    }


def of_methods(runs: Iterable[Run], folder: Path, *others: str) -> list[Run]:
    """Return the runs of the methods in a folder, and of ``others``."""
    methods = {*others, *(file.stem for file in folder.glob("*.toml"))}
    return [run for run in runs if run["variant"] in methods]


def compared(runs: Iterable[Run], count: int, steps: int | None) -> list[Run]:
    """Return the runs whose methods are compared at shares of ``count`` pairs."""
    lengths = {round(share * count): steps or length for share, length in STEPS.items()}
    return [run for run in of_methods(runs, METHODS) if run["steps"] == lengths.get(run["pairs"])]


def words(corpus: Corpus) -> str:
    """Return the size of the training data, and the share of test words that are new."""
    known = {word for pair in corpus.train for word in pair.transcript.split()}
    asked = [word for pair in corpus.test for word in pair.transcript.split()]
    tokens = sum(len(pair.speech) - 2 for pair in corpus.train)
    hours = tokens / corpus.speech.rate / 3600
    new = 100 * sum(word not in known for word in asked) / len(asked)
    rows = [[str(len(corpus.train)), f"{hours:.1f}", str(len(known)), f"{new:.0f}"]]
    return table(["pairs", "hours of speech", "vocabulary", "out-of-vocabulary test words, %"], rows)


def by_method(runs: Iterable[Run], split: str = "test") -> list[tuple[str, int, int, list[Run]]]:
    """Return method, pairs, steps and runs of each row, in the order of the legend, most pairs first."""
    order = list(COLOURS)
    found = [(key[4], key[1], key[3], seeds) for key, seeds in group(runs).items() if key[2] == split]
    place = {name: number for number, name in enumerate(order)}
    return sorted(found, key=lambda row: (place.get(row[0], len(order)), row[0], -row[1], row[2]))


def rows_of(runs: Iterable[Run]) -> Rows:
    """Return the seeds of each method, number of pairs and number of steps."""
    return {(method, pairs, steps): seeds for method, pairs, steps, seeds in by_method(runs)}


def by_pairs(runs: Iterable[Run], split: str = "test") -> str:
    """Return the errors of each method at each number of pairs, with the time on each processor."""
    runs, rows = list(runs), []
    processors = sorted({run["machine"]["processor"] for run in runs if run["split"] == split})
    for method, pairs, steps, seeds in by_method(runs, split):
        rates = [each for task in TASKS for each in (cell(seeds, task), correct(seeds, task))]
        losses = [
            f"{np.mean([run['held-out loss'][task] for run in seeds]):.2f} "
            f"({np.mean([run['curve'][target][-1] for run in seeds]):.2f})"
            for task, (_, target) in TASKS.items()
        ]
        times = [
            [run["seconds"] for run in seeds if run["machine"]["processor"] == name] for name in processors
        ]
        rows.append(
            [
                method,
                str(pairs),
                *rates,
                *losses,
                str(steps),
                *(f"{np.mean(seconds):.0f}" if seconds else "" for seconds in times),
                f"{np.mean([run['MiB'] for run in seeds]):.0f}",
                f"{seeds[0]['trained'] / 1e6:.2f}",
                str(len(seeds)),
            ]
        )
    errors = ["ASR WER %", "correct %", "TTS WER %", "correct %", "ASR loss", "TTS loss"]
    short = [name.replace("(R)", "").removesuffix(" Processor") for name in processors]
    costs = [*(f"s, {name}" for name in short), "MiB", "M trained"]
    return table(["", "pairs", *errors, "steps", *costs, "seeds"], rows)


def correct(runs: Sequence[Run], task: str) -> str:
    """Return how many of the words are neither substituted nor skipped, in per cent, over all seeds."""
    wrong = sum(run[task][kind] for run in runs for kind in ("substituted", "skipped"))
    return f"{100 - 100 * wrong / sum(sum(run[task]['words']) for run in runs):.1f}"


def reused(runs: Iterable[Run]) -> str:
    """Return the errors of links with another decoder than their own."""
    rows = []
    grouped: dict[tuple[str, int, int, int], list[Run]] = {}
    for run in runs:
        key = (run["links"], run["pairs"], run["steps"], run["first steps"])
        grouped.setdefault(key, []).append(run)
    for (links, pairs, steps, _), seeds in grouped.items():
        rates = [cell(seeds, task) for task in TASKS]
        losses = [f"{np.mean([run['held-out loss'][task] for run in seeds]):.2f}" for task in TASKS]
        rows.append([links, str(pairs), str(steps if pairs else 0), *rates, *losses, str(len(seeds))])
    heads = ["links", "pairs", "steps", "ASR WER %", "TTS WER %", "ASR loss", "TTS loss", "seeds"]
    return table(heads, rows)


def kept(runs: Iterable[Run]) -> str:
    """Return perplexities and cloze accuracy before and after training by each method."""
    rows, digits = [], {"text perplexity": 4, "speech perplexity": 1, "cloze": 1}
    for method, _, steps, seeds in by_method(runs):
        means = [
            f"{np.mean([run[when][name] for run in seeds]):.{places}f}"
            for name, places in digits.items()
            for when in ("before", "kept")
        ]
        if method.startswith("expansion") or "speech" in seeds[0]["settings"].get("random", ()):
            means[2] = ""  # its decoder has never seen speech
        rows.append([f"{method}, {steps} steps", *means, str(len(seeds))])
    heads = (head for name in digits for head in (f"{name} before", "after"))
    return table(["", *heads, "seeds"], rows)


def floor_and_ceiling(corpus: Corpus) -> str:
    """Return the judge's error rates on the original audio, and on audio decoded from the true units."""
    rows = [
        [name, str(word_errors([pair.transcript for pair in corpus.test[: len(heard)]], heard))]
        for name, heard in corpus.heard.items()
    ]
    return table(["", "WER %"], rows)


def by_length(runs: Iterable[Run], corpus: Corpus) -> str:
    """Return errors by the length of a transcript in characters, and on human recordings."""
    rows = []
    for method, _, steps, seeds in by_method(runs):
        for task in TASKS:
            words, errors = (np.concatenate([run[task][key] for run in seeds]) for key in ("words", "errors"))
            count = len(words) // len(seeds)
            sizes = np.tile([len(pair.transcript) for pair in corpus.test[:count]], len(seeds))
            chosen = [(sizes > low) & (sizes <= high) for low, high in pairwise(LENGTHS)]
            rates = [
                f"{100 * errors[each].sum() / words[each].sum():.1f}" if each.any() else "" for each in chosen
            ]
            heard = task == "asr" and all("human" in run for run in seeds)
            human = cell(seeds, "human") if heard else ""
            rows.append([f"{method}, {steps} steps, {task.upper()}", *rates, human])
    spans = [f"to {high} characters" for high in LENGTHS[1:]]
    return table(["", *spans, "human recordings"], rows)


def draw(runs: Iterable[Run], file: Path) -> None:
    """Plot word error rates and held-out losses against the number of pairs."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.4), sharex=True, layout="constrained")
    found = by_method(runs)
    for column, task in enumerate(TASKS):
        for method in dict.fromkeys(name for name, *_ in found):
            rows = sorted((pairs, seeds) for name, pairs, _, seeds in found if name == method)
            places = [pairs for pairs, _ in rows]
            rates, low, high = np.array([rate(seeds, task) for _, seeds in rows]).T
            line, *_ = panels[0, column].errorbar(
                places,
                rates,
                yerr=[rates - low, high - rates],
                fmt="o-",
                capsize=3,
                color=COLOURS.get(method),
                label=method,
            )
            losses = [np.mean([run["held-out loss"][task] for run in seeds]) for _, seeds in rows]
            panels[1, column].plot(places, losses, "o-", color=line.get_color())
        panels[0, column].set(title=task.upper(), ylim=(0, 140))
        panels[1, column].set(xscale="log", xlabel="pairs")
        counts = sorted({pairs for _, pairs, _, _ in found})
        panels[1, column].set_xticks(counts, map(str, counts))
        panels[1, column].minorticks_off()
    panels[0, 0].set_ylabel("WER %")
    panels[1, 0].set_ylabel("held-out loss, nats per token")
    panels[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=130)


def results_on(data: Path, file: Path, corpus: Corpus) -> list[dict[str, Any]]:
    """Return the results of runs on one corpus, with their numbers of pairs."""
    runs = [run for run in read_results(file) if run["data"] == data.name]
    return [run if run["pairs"] is not None else {**run, "pairs": len(corpus.train)} for run in runs]


def large_of(data: Path) -> Path:
    """Return the folder of the same data for a larger text decoder."""
    return data.with_name(f"{data.name}-large")


def write(document: Path, found: Mapping[str, str]) -> None:
    """Write the tables into a document."""
    document.write_text(filled(document.read_text(), found))


def main() -> None:
    """Write the tables into the document, and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a folder that words.py made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--reuse", type=Path, default=REUSE, help="results of reuse.py")
    parser.add_argument("--steps", type=int, help="of the runs that are compared, if not those of STEPS")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    corpus = load_corpus(options.data)
    runs = results_on(options.data, options.results, corpus)
    reuses = results_on(options.data, options.reuse, corpus)
    large = results_on(large_of(options.data), options.results, corpus)
    write(options.document, tables(runs, corpus, options.steps, reuses, large))
    drawn = compared(runs, len(corpus.train), options.steps)
    draw(drawn, options.document.parent / "images/evidence.png")


if __name__ == "__main__":
    main()
