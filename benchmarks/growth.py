"""Measure how time and memory grow with the number of towers, taps, source tokens and rows.

    python benchmarks/growth.py                         # tiny towers, a few minutes
    python benchmarks/growth.py --axes source --sources 128 1024 4096

Each axis varies one number. In training steps on the axis of towers, these form a ring in which each reads
the next, so there are as many links as towers; in decoding, one tower reads all others. Taps are added from
layer 1 up, so the backward always reaches layer 1. On the other axes, one tower reads one other. Measured are
milliseconds and bytes of a training step (tensors saved for the backward) and of a decoded token (the cache
of the taps), for the fused model and its parts as in train_step.py and decode.py. All points of an axis
alternate in one process.

A line and a power law are fitted to the medians, minimising relative errors. Also reported are R^2, the worst
relative error, and the share of the quadratic term of a parabola at the last point: a tower's self-attention
is quadratic in its tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import multitower as mt
from decode import Decoding
from measure import begin, in_turn, interleaved, milliseconds, options, ratio, write
from models import SIZES, Parts, make_batch, make_model, make_reader
from saved_bytes import saved
from train_step import runs as step_runs

AXES = {"towers": "towers", "taps": "taps", "source": "tokens of the source", "rows": "rows"}


def main() -> None:
    """Measure along each axis."""
    parser = options(__doc__, "growth")
    parser.add_argument("--axes", choices=tuple(AXES), nargs="+", default=list(AXES))
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--train", choices=("none", "all"), default="none", help="of the towers that read")
    parser.add_argument("--towers", type=int, nargs="+", default=list(range(2, 9)))
    parser.add_argument("--taps", type=int, nargs="+", help="default: 1 to all layers")
    parser.add_argument("--sources", type=int, nargs="+", default=[2**power for power in range(7, 13)])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument(
        "--length", type=int, default=64, help="tokens of a tower in a row, where not measured"
    )
    parser.add_argument("--batch", type=int, default=4, help="rows, where not measured")
    parser.add_argument("--new", type=int, default=16, help="tokens that each round decodes")
    chosen = begin(parser)
    depth = SIZES[chosen.size]["num_hidden_layers"]
    points = {
        "towers": chosen.towers,
        "taps": chosen.taps or list(range(1, depth + 1)),
        "source": chosen.sources,
        "rows": chosen.rows,
    }
    results = []
    for axis in chosen.axes:
        for measure in (step, decoding):
            results.append(measure(chosen, axis, points[axis]))
            show(results[-1])
            write(chosen, results)
        plot(chosen.out / f"{axis}.png", axis, results[-2:], chosen.size)


def step(chosen: argparse.Namespace, axis: str, points: Sequence[int]) -> dict[str, Any]:
    """Measure training steps along an axis."""
    runs: dict[int, dict[str, Callable[[], object]]] = {}
    held, models = [], []
    for x in points:
        if axis == "towers":
            model = make_model(chosen.size, x, train=chosen.train)
            batch = make_batch(model.to(chosen.device), chosen.batch, chosen.length)
        else:
            model = reader(chosen, axis, x).to(chosen.device)
            lengths = {"source0": x if axis == "source" else chosen.length, "text": chosen.length}
            rows = x if axis == "rows" else chosen.batch
            batch = make_batch(model, rows, lengths, "last", turning=False)
        held.append(saved(model, batch))
        runs[x] = step_runs(model, batch, Parts(model, batch), backward=True)
        models.append(model)

    def clear() -> None:
        for model in models:
            model.zero_grad(set_to_none=True)

    times = interleaved(flat(runs), chosen.repeats, clock=chosen.clock, before=clear, title=f"{axis}, step")
    return result("step", axis, points, times, ("towers", "links"), {"saved": held})


def decoding(chosen: argparse.Namespace, axis: str, points: Sequence[int]) -> dict[str, Any]:
    """Measure decoding along an axis; among the towers, one reads all others."""
    points = [x - 1 for x in points] if axis == "towers" else points
    settings = [
        Decoding(
            reader(chosen, axis, x).eval().to(chosen.device),
            x if axis == "rows" else chosen.batch,
            x if axis == "source" else chosen.length,
            chosen.new,
            chosen.clock,
        )
        for x in points
    ]
    runs = {x: setting.runs() for x, setting in zip(points, settings, strict=True)}
    times = in_turn(flat(runs), chosen.repeats, title=f"{axis}, decoding")
    kept = [setting.cache_bytes() for setting in settings]
    return result("token", axis, points, times, ("alternating",), {"cache": kept})


def reader(chosen: argparse.Namespace, axis: str, x: int) -> mt.FusedModel:
    """Return a model of a tower that reads others; on the axes of towers and taps, x is their number."""
    depth = SIZES[chosen.size]["num_hidden_layers"]
    layers = range(1, x + 1) if axis == "taps" else range(2, depth + 1, 2)
    sources = x if axis == "towers" else 1
    return make_reader(chosen.size, [(layer, layer) for layer in layers], sources=sources, train=chosen.train)


def flat(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Flatten the runs; names are part and point on the axis."""
    return {f"{part} {x}": run for x, parts in runs.items() for part, run in parts.items()}


def result(
    kind: str,
    axis: str,
    points: Sequence[int],
    times: dict[str, list[float]],
    parts: tuple[str, ...],
    held: dict[str, list[int]],
) -> dict[str, Any]:
    """Collect the measurements along an axis, and fit them."""
    ms = milliseconds(times)
    names = dict.fromkeys(name.rpartition(" ")[0] for name in times)
    series = {name: [ms[f"{name} {x}"] for x in points] for name in names}
    medians = {part: [each["median"] for each in spreads] for part, spreads in series.items()}
    return {
        "kind": kind,
        "axis": axis,
        "x": list(points),
        "ms": series,
        "ratio": [ratio(times[f"fused {x}"], *(times[f"{part} {x}"] for part in parts)) for x in points],
        "bytes": held,
        "fits": {name: fit(points, y) for name, y in (medians | held).items()},
    }


def fit(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Fit a line and a power.

    >>> fit([1, 2, 4], [3.0, 5.0, 9.0])["slope"]
    2.0

    Returns:
        "slope", "intercept" and "r2" of the line; "worst", its largest relative error; "exponent" and
        "exponent_r2" of the power law; "bend", the share of the quadratic term at the last point.
    """
    at, values = np.asarray(x, float), np.asarray(y, float)
    slope, intercept = np.polyfit(at, values, 1, w=1 / values)
    line = slope * at + intercept
    exponent, scale = np.polyfit(np.log(at), np.log(values), 1)
    bend = np.polyfit(at, values, 2, w=1 / values)[0] * at[-1] ** 2 / values[-1] if len(at) > 2 else 0.0
    found = {
        "slope": slope,
        "intercept": intercept,
        "r2": r_squared(values, line),
        "worst": np.abs(line / values - 1).max(),
        "exponent": exponent,
        "exponent_r2": r_squared(np.log(values), exponent * np.log(at) + scale),
        "bend": bend,
    }
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def r_squared(values: Any, fitted: Any) -> float:
    """Return the fraction of the variance that a fit explains."""
    around = ((values - values.mean()) ** 2).sum()
    return 1 - float(((values - fitted) ** 2).sum() / around) if around else 1.0


def show(found: dict[str, Any]) -> None:
    """Print a line for each series."""
    for name, each in found["fits"].items():
        print(
            f"{found['axis']:6} {found['kind']:5} {name:7} R2 {each['r2']:.4f}, worst {each['worst']:.0%}, "
            f"bend {each['bend']:+.0%}, exponent {each['exponent']:.2f}",
            flush=True,
        )
    medians = ", ".join(f"{each['median']:.2f}" for each in found["ratio"])
    print(f"{found['axis']:6} {found['kind']:5} of its parts: {medians}", flush=True)


def plot(file: Path, axis: str, results: Sequence[dict[str, Any]], size: str) -> None:
    """Plot time and memory of a step and of a decoded token along an axis, with fitted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 10), layout="constrained")
    for column, found in zip(figure.subplots(2, 2).T, results, strict=True):
        what = "step of training" if found["kind"] == "step" else "decoded token"
        for part, spreads in found["ms"].items():
            draw(column[0], found, part, [each["median"] for each in spreads], spreads)
        column[0].set(title=what, ylabel="ms")
        for name, values in found["bytes"].items():
            draw(column[1], found, name, [each / 2**20 for each in values], [], scale=2**20)
        kept = "saved for backward" if found["kind"] == "step" else "keys and values of taps"
        column[1].set(ylabel=f"MiB, {kept}")
        for axes in column:
            place(axes, axis, found)
    figure.suptitle(f"{size} towers: growth with {AXES[axis]}")
    figure.savefig(file, dpi=120)


def place(axes: Any, axis: str, found: dict[str, Any]) -> None:
    """Set scales and labels; axes with doubling points are logarithmic."""
    from matplotlib.ticker import LogLocator

    reads = axis == "towers" and found["kind"] == "token"
    axes.set(xlabel="towers that are read" if reads else AXES[axis])
    if axis in ("source", "rows"):
        axes.set(xscale="log", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(found["x"], [str(x) for x in found["x"]], minor=False)
    axes.minorticks_off()
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15))


def draw(
    axes: Any,
    found: dict[str, Any],
    name: str,
    values: Sequence[float],
    spreads: Sequence[Any],
    scale: float = 1,
) -> None:
    """Plot one series with its quartiles and line."""
    each = found["fits"][name]
    low, high = ([abs(one["median"] - one[key]) for one in spreads] or 0 for key in ("low", "high"))
    slope, intercept = each["slope"] / scale, each["intercept"] / scale
    line = f"{slope:.3g} x {round(intercept, 6) + 0.0:+.3g}"
    label = f"{name}: {line}, R² {each['r2']:.3f}, power {each['exponent']:.2f}"
    drawn = axes.errorbar(
        found["x"], values, yerr=[low, high] if spreads else None, fmt="o", ms=4, label=label
    )
    x = np.linspace(found["x"][0], found["x"][-1], 200)
    y = slope * x + intercept
    axes.plot(x[y > 0], y[y > 0], color=drawn[0].get_color(), lw=1)


if __name__ == "__main__":
    main()
