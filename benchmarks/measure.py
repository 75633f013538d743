"""Shared by the benchmarks: interleaved timing, ratios with quartiles, and result files."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PACKAGES = ("torch", "transformers", "multitower")


def options(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser with the common options."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9, help="rounds of measurement of each setting")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu: only the time that this process was given, for a busy machine (1 thread, no GPU)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options; set threads and seed, and create the output folder."""
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(chosen.seed)
    chosen.out.mkdir(parents=True, exist_ok=True)
    return chosen


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    clock: str = "wall",
    before: Callable[[], object] = lambda: None,
    title: str = "",
) -> dict[str, list[float]]:
    """Time each run once per round, in the order of ``in_turn``; return seconds by name.

    Args:
        runs: The runs, by name.
        repeats: Number of rounds.
        clock: One of ``CLOCKS``.
        before: Called before each run, not timed.
        title: Title of the progress bar.
    """

    def seconds(run: Callable[[], object]) -> float:
        before()
        started = now(clock)
        run()
        return now(clock) - started

    return in_turn({name: partial(seconds, run) for name, run in runs.items()}, repeats, title=title)


def in_turn(
    runs: Mapping[str, Callable[[], float]], repeats: int, *, title: str = ""
) -> dict[str, list[float]]:
    """Call each run once per round, in rotating order; return their results by name.

    Disturbances that last longer than a round thus affect all runs. The first round is a warm-up and not
    counted.
    """
    names, given = list(runs), dict[str, list[float]]({name: [] for name in runs})
    for number in tqdm(range(repeats + 1), desc=title, leave=False):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            value = runs[name]()
            if number:
                given[name].append(value)
    return given


def moved(tensors: Any, device: str) -> Any:
    """Move all tensors in nested dicts, lists and tuples to a device.

    >>> moved({"a": [torch.ones(2)]}, "meta")["a"][0].device.type
    'meta'
    """
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tensors)


def now(clock: str = "wall") -> float:
    """Return the time in seconds by one of ``CLOCKS``, after synchronising with the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCKS[clock]()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    {'median': 3.0, 'low': 2.0, 'high': 4.0}
    """
    several = values if len(values) > 1 else [*values, *values]
    low, median, high = statistics.quantiles(several, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratio(over: Sequence[float], *under: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratio of one time to the sum of others in the same round.

    >>> ratio([3.0, 6.0], [1.0, 2.0], [1.0, 2.0])
    {'median': 1.5, 'low': 1.5, 'high': 1.5}
    """
    return spread([first / sum(others) for first, *others in zip(over, *under, strict=True)])


def milliseconds(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return the spread of each series of seconds, in milliseconds."""
    return {name: spread([1000 * each for each in seconds]) for name, seconds in times.items()}


def write(
    chosen: argparse.Namespace, results: Sequence[Mapping[str, Any]], packages: Sequence[str] = ()
) -> None:
    """Write results.json: settings, machine, versions (also of further ``packages``), results."""
    document = {
        "settings": vars(chosen),
        "machine": {"processor": processor(), "machine": platform.machine(), "device": device_name(chosen)},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in (*PACKAGES, *packages)},
        "results": list(results),
    }
    written = json.dumps(document, indent=2, default=str) + "\n"
    (chosen.out / "results.json").write_text(written, encoding="utf-8")


def plot_ratios(
    file: Path,
    results: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    title: str,
    label: str = "fused / sum of its parts",
    ratios: Mapping[str, str] | None = None,
) -> None:
    """Plot ratios with quartiles for each result, and a line at 1.10.

    Args:
        file: The output file.
        results: The results.
        keys: The keys of a result that form its label.
        title: Title of the figure.
        label: Label of the axis.
        ratios: The keys of ratios and their labels; by default only "ratio".
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.5 + 0.35 * len(results)), layout="constrained")
    axes = figure.subplots()
    for number, (name, called) in enumerate((ratios or {"ratio": label}).items()):
        each = [result[name] for result in results]
        medians = [one["median"] for one in each]
        errors = [[abs(one["median"] - one[side]) for one in each] for side in ("low", "high")]
        places = [place + 0.2 * number for place in range(len(results))]
        axes.errorbar(medians, places, xerr=errors, fmt="o", color=f"C{number}", capsize=3, label=called)
    labels = [", ".join(str(result[key]) for key in keys) for result in results]
    axes.set_yticks(range(len(results)), labels)
    axes.axvline(1.0, color="grey")
    axes.axvline(1.1, color="grey", linestyle=":")
    axes.set(xlabel=label, title=title, ylim=(len(results) - 0.5, -0.5))
    if ratios:
        figure.legend(loc="outside lower center", ncols=len(ratios), fontsize="small")
    figure.savefig(file, dpi=120)


def plot_times(file: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Plot the times of each result side by side, with quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(results), 3.5), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        medians = [each["median"] for each in result["ms"].values()]
        low, high = ([each[key] for each in result["ms"].values()] for key in ("low", "high"))
        errors = [
            [middle - one for middle, one in zip(medians, low, strict=True)],
            [one - middle for middle, one in zip(medians, high, strict=True)],
        ]
        axes.bar(list(result["ms"]), medians, yerr=errors, capsize=3)
        axes.set_xticks(range(len(medians)), list(result["ms"]), rotation=25, ha="right")
        axes.set(ylabel="ms", title=result["kind"])
    figure.savefig(file, dpi=120)


def device_name(chosen: argparse.Namespace) -> str:
    """Return the name of the GPU, or the number of CPU threads."""
    device = torch.device(chosen.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{chosen.threads} CPU threads"


def processor() -> str:
    """Return the name of the processor, from /proc/cpuinfo if available."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
