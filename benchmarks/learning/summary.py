"""Write the results into the tables of ``docs/learning.md``, and plot ``docs/images/learning.png``.

    export PYTHONPATH=benchmarks:examples
    python benchmarks/learning/summary.py

Each table is between comments, the first of which names it. Only the tables are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from score import KINDS, interval
from train import RESULTS, TASKS, read_results
from variants import VARIANTS

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/learning.md"
IMAGES = ROOT / "docs/images"
BEST = {
    "base": "fusion",
    "shared time": "fusion, positions of the shared time",
    "before": "fusion as it was",
    "expansion all, lr 0.003": "vocabulary expansion",
}
COLOURS = {
    "base": "#009e73",
    "shared": "#0072b2",
    "before": "#e69f00",
    "all": "#d55e00",
    "lora": "#cc79a7",
    "new": "#999999",
}

Run = Mapping[str, Any]


def group(runs: Iterable[Run]) -> dict[tuple[Any, ...], list[Run]]:
    """Group runs that differ only in their seed."""
    grouped: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        key = tuple(run[name] for name in ("data", "pairs", "split", "steps", "variant"))
        grouped.setdefault(key, []).append(run)
    return grouped


def rate(runs: Sequence[Run], task: str) -> tuple[float, float, float]:
    """Return the word error rate of all seeds together, in per cent, and its 95 % interval."""
    errors, words = ([run[task][key] for run in runs] for key in ("errors", "words"))
    return 100 * np.sum(errors) / np.sum(words), *interval(errors, words)


def cell(runs: Sequence[Run], task: str) -> str:
    """Return the word error rate of all seeds together with its interval, as a cell of a table."""
    return "{:.1f} ({:.1f} to {:.1f})".format(*rate(runs, task))


def cells(runs: Sequence[Run]) -> list[str]:
    """Return the cells of a table row for the seeds of one variant."""
    rates = [cell(runs, task) for task in TASKS]
    seconds = np.mean([run["seconds"] for run in runs])
    perplexity = np.mean([run["text perplexity"] for run in runs])
    trained = runs[0]["trained"] / 1e6
    return [*rates, f"{seconds:.0f}", f"{trained:.2f}", f"{perplexity:.2f}", str(len(runs))]


HEADS = ["", "ASR WER %", "TTS WER %", "s", "M trained", "text perplexity", "seeds"]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    aligned = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, aligned, *rows))


def by_variant(runs: Sequence[Run], names: Iterable[str], *, steps: int) -> str:
    """Return the table of some variants at one number of steps, trained on all short phrases."""
    found = group(runs)
    keys = [("short", None, "test", steps, name) for name in names]
    return table(HEADS, ([key[-1], *cells(found[key])] for key in keys if key in found))


def by_steps(
    runs: Sequence[Run],
    names: Iterable[str],
    *,
    data: str = "short",
    pairs: int | None = None,
    split: str = "test",
) -> str:
    """Return the table of some variants at all numbers of steps."""
    names = list(names)
    found = group(run for run in runs if run["split"] == split)
    keys = sorted(key for key in found if key[:2] == (data, pairs) and key[-1] in names)
    keys.sort(key=lambda key: (names.index(key[-1]), key[3]))
    return table(["", "steps", *HEADS[1:]], ([key[-1], str(key[3]), *cells(found[key])] for key in keys))


def by_length(runs: Sequence[Run], names: Sequence[str], *, data: str) -> str:
    """Return word error rates by the number of words of a phrase, and the kinds of errors."""
    rows = []
    for (_, _, _, steps, name), seeds in group(run for run in runs if run["data"] == data).items():
        if name not in names:
            continue
        for task in TASKS:
            words = np.concatenate([run[task]["words"] for run in seeds])
            errors = np.concatenate([run[task]["errors"] for run in seeds])
            edges = [(1, 5), (6, 10), (11, 20), (21, 30)]
            rates = [
                f"{100 * errors[chosen].sum() / words[chosen].sum():.1f}" if chosen.any() else ""
                for low, high in edges
                for chosen in [(words >= low) & (words <= high)]
            ]
            shares = [f"{100 * sum(run[task][kind] for run in seeds) / words.sum():.1f}" for kind in KINDS]
            rows.append([f"{name}, {task.upper()}", str(steps), *rates, *shares])
    heads = ["", "steps", "1 to 5 words", "6 to 10", "11 to 20", "21 to 30", *(f"% {kind}" for kind in KINDS)]
    return table(heads, rows)


def draw_progress(runs: Sequence[Run], names: Mapping[str, str], file: Path) -> None:
    """Plot errors against steps and against processor time."""
    figure, panels = plt.subplots(2, 2, figsize=(9, 6), sharey="row", layout="constrained")
    axes: Mapping[str, Callable[[Run], float]] = {
        "steps": lambda run: run["steps"],
        "seconds of one core": lambda run: run["seconds"],
    }
    chosen = [run for run in runs if (run["data"], run["pairs"], run["split"]) == ("short", None, "test")]
    for row, task in zip(panels, TASKS, strict=True):
        for panel, (label, x) in zip(row, axes.items(), strict=True):
            for name, title in names.items():
                found = [seeds for key, seeds in sorted(group(chosen).items()) if key[-1] == name]
                if found:
                    places = [np.mean([x(run) for run in seeds]) for seeds in found]
                    rates = np.array([rate(seeds, task) for seeds in found])
                    colour = next(value for key, value in COLOURS.items() if key in name)
                    panel.plot(places, rates[:, 0], "o-", color=colour, label=title)
                    panel.fill_between(places, rates[:, 1], rates[:, 2], color=colour, alpha=0.2)
            panel.set(xlabel=label, ylim=(0, 60))
        row[0].set_ylabel(f"{task.upper()} WER %")
    panels[0, 0].legend(frameon=False)
    figure.savefig(file, dpi=130)


def filled(document: str, found: Mapping[str, str]) -> str:
    """Insert each table between its comments."""
    for name, text in found.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        pattern = f"{re.escape(begin)}.*?{end}"
        document, count = re.subn(pattern, lambda _, new=f"{begin}{text}\n{end}": new, document, flags=re.S)
        if count != 1:
            raise ValueError(f"the document has {count} places for the table {name!r}")
    return document


def tables(runs: Sequence[Run]) -> dict[str, str]:
    """Return each table of the document by its name."""
    earlier = [name for name in VARIANTS if name.startswith("shared time")]
    today = [name for name in VARIANTS if name not in earlier and "expansion" not in name]
    return {
        "methods": by_steps(runs, BEST),
        "rates": by_steps(runs, (name for name in VARIANTS if "expansion" in name), split="dev"),
        "switches": by_variant(runs, today, steps=200),
        "switches of shared time": by_variant(runs, ["base", "before", "no positions", *earlier], steps=800),
        "few pairs, chosen by": by_steps(runs, VARIANTS, pairs=250, split="dev"),
        "few pairs": by_steps(runs, VARIANTS, pairs=250),
        "length": by_length(runs, list(VARIANTS), data="long"),
    }


def main() -> None:
    """Write the tables into the document, and plot."""
    runs = read_results(RESULTS)
    DOCUMENT.write_text(filled(DOCUMENT.read_text(), tables(runs)))
    draw_progress(runs, BEST, IMAGES / "learning.png")


if __name__ == "__main__":
    main()
