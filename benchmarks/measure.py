"""What the benchmarks share: paired timing, ratios with their spread, and results on disk."""

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
    """Return a parser with the options that every benchmark has."""
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
    """Read the options and set threads, seed and folder as they say."""
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
    """Time each run once a round, as ``in_turn`` orders them; return seconds by name.

    Args:
        runs: What to time, by name.
        repeats: How many rounds.
        clock: One of ``CLOCKS``.
        before: Called before each run, outside of its time.
        title: Shown beside the progress bar.
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
    """Call each run once a round, in an order that turns from round to round; return what it gave, by name.

    What slows the machine for longer than a round so slows all of them alike. One round more is run first
    and not counted.
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
    """Return tensors on a device, in the dictionaries, lists and tuples that hold them.

    >>> moved({"a": [torch.ones(2)]}, "meta")["a"][0].device.type
    'meta'
    """
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), tensors)


def now(clock: str = "wall") -> float:
    """Return the time in seconds by one of ``CLOCKS``, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCKS[clock]()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    {'median': 3.0, 'low': 2.0, 'high': 4.0}
    """
    several = values if len(values) > 1 else [*values, *values]
    low, median, high = statistics.quantiles(several, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratio(over: Sequence[float], *under: Sequence[float]) -> dict[str, float]:
    """Return the spread of one time over the sum of others, round by round.

    >>> ratio([3.0, 6.0], [1.0, 2.0], [1.0, 2.0])
    {'median': 1.5, 'low': 1.5, 'high': 1.5}
    """
    return spread([first / sum(others) for first, *others in zip(over, *under, strict=True)])


def milliseconds(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return the spread of each of several times, from seconds to milliseconds."""
    return {name: spread([1000 * each for each in seconds]) for name, seconds in times.items()}


def write(
    chosen: argparse.Namespace, results: Sequence[Mapping[str, Any]], packages: Sequence[str] = ()
) -> None:
    """Write results.json: settings, machine, versions (of further packages too), results."""
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
    """Draw ratios and their quartiles for each result, labelled by these keys, beside a limit of 1.10.

    Args:
        file: Where the picture goes.
        results: What was measured.
        keys: What names a result.
        title: Above all.
        label: At the axis.
        ratios: The ratios of a result, each with what it is called; only "ratio" unless given.
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
    """Draw the times of each result side by side, each with its quartiles."""
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
    """Name what the models ran on."""
    device = torch.device(chosen.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{chosen.threads} CPU threads"


def processor() -> str:
    """Name the processor where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
