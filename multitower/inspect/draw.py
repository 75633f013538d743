"""Figures of a fusion: layers and taps, attention weights, costs, and training curves."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.extras import require
from ..compile.schedule import Tap
from ..declare.graph import FusionGraph
from ..errors import GraphError
from ..run.fusion import Fusion
from .cost import Cost, Estimate
from .estimate import empty_model
from .openness import openness

COLUMN_WIDTH, BOX = 3.6, (1.6, 0.64)
LAYER_INCHES, MOST_INCHES = 0.45, 12.0
FILLS = {"none": "#dfe3e8", "all": "#f6d9a8", "lora": "#cfe8dc"}
EDGES = {"none": "#6b7785", "all": "#b5760a", "lora": "#1f7a58"}
HATCHES = {"none": "", "all": "", "lora": "///"}
WORDS = {"none": "frozen", "all": "trained", "lora": "adapters trained"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, safe for colour blindness."""


def draw_graph(model: Fusion | FusionGraph) -> Any:
    """Draw towers as columns of layers and taps as arrows, coloured by how open they are.

    >>> from multitower.testing import tiny_model
    >>> figure = draw_graph(tiny_model())
    >>> figure.savefig("/dev/null", format="png")

    If all taps are closed, as in an untrained model, each link has a colour of its own instead. Frozen towers
    are grey, trained ones orange, those with adapters green and hatched.

    Args:
        model: The fused model; or a graph, for whose folders and Hub ids only the configs are read.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        GraphError: The graph cannot be compiled; see ``FusionGraph.compile``.
        TowerError: See there; or a folder or Hub id contains a quantised model.
        ImportError: matplotlib is not installed; install the extra "draw".
    """
    opened: Mapping[str, float] = {}
    if isinstance(model, FusionGraph):
        if not model.towers:
            raise GraphError("the graph has no towers to draw; call add_tower first")
        model = empty_model(model)
    else:
        opened = openness(model)
    figure_module = require("matplotlib.figure", "draw")
    names = list(model.graph.towers)
    deepest = max(model.tower(name).depth for name in names)
    height = 1.9 + min(LAYER_INCHES * deepest, MOST_INCHES)
    figure = figure_module.Figure(figsize=(1.2 + 2.4 * len(names), height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    centre = {name: column * COLUMN_WIDTH for column, name in enumerate(names)}
    size = 8 * min(1.0, MOST_INCHES / (LAYER_INCHES * deepest))
    for name in names:
        _draw_tower(axes, model, name, centre[name], size)
    shown = {name: value for name, value in opened.items() if not name.endswith(" adapter")}
    colour_of, legend = _colours(model, shown, figure, axes)
    for tap in model.schedule.taps:
        _draw_tap(axes, tap, centre, colour_of(tap))
    axes.set_xlim(-1.4, centre[names[-1]] + 1.4)
    axes.set_ylim(-1.3, deepest + 1)
    if legend:
        figure.legend(handles=legend, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def as_svg(figure: Any) -> str:
    """Return a figure as SVG whose text has the colour of the surrounding text (``currentColor``)."""
    with require("matplotlib", "draw").rc_context({"svg.fonttype": "none", "svg.hashsalt": "multitower"}):
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    svg = written.getvalue()
    return svg[svg.index("<svg") :].replace("<svg", '<svg fill="currentColor"', 1)


def _draw_tower(axes: Any, model: Fusion, name: str, centre: float, size: float) -> None:
    patches = require("matplotlib.patches", "draw")
    tower, spec = model.tower(name), model.graph.towers[name]
    for layer in range(tower.depth + 1):
        box = patches.FancyBboxPatch(
            (centre - BOX[0] / 2, layer - BOX[1] / 2),
            *BOX,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=FILLS[spec.train] if layer else "white",
            edgecolor=EDGES[spec.train],
            hatch=HATCHES[spec.train] if layer else "",
            linewidth=1,
        )
        axes.add_patch(box)
        words = f"layer {layer}" if layer else "embedding"
        plain = {"facecolor": FILLS[spec.train] if layer else "white", "edgecolor": "none", "pad": 1.0}
        axes.text(
            centre, layer, words, ha="center", va="center", size=size, color="#1b1f24", bbox=plain, zorder=3
        )
    adapter = f", {spec.adapter} adapter" if spec.adapter else ""
    label = f"{name}\nwidth {tower.width}, {WORDS[spec.train]}{adapter}"
    axes.text(centre, -0.5, label, ha="center", va="top", size=9)


def _colours(model: Fusion, opened: Mapping[str, float], figure: Any, axes: Any) -> tuple[Any, list[Any]]:
    """Return a function from a tap to its colour, and the handles of the legend."""
    patches = require("matplotlib.patches", "draw")
    links = list(model.graph.links)
    counts = {link: sum(tap.link == link for tap in model.schedule.taps) for link in links}
    if not any(opened.values()):
        shades = {link: COLOURS[place % len(COLOURS)] for place, link in enumerate(links)}
        legend = [patches.Patch(color=shades[link], label=f"{link}: {counts[link]} taps") for link in links]
        return lambda tap: shades[tap.link], legend
    colours, cm = require("matplotlib.colors", "draw"), require("matplotlib.cm", "draw")
    scale = cm.ScalarMappable(colours.Normalize(0, max(opened.values())), "cividis_r")
    figure.colorbar(scale, ax=axes, shrink=0.5, pad=0.02, label="how open a tap is", location="right")
    return lambda tap: scale.to_rgba(opened[f"{tap.link} {tap.key}"]), []


def _draw_tap(axes: Any, tap: Tap, centre: Mapping[str, float], colour: Any) -> None:
    patches = require("matplotlib.patches", "draw")
    side = 1 if centre[tap.target] > centre[tap.source] else -1
    neighbours = abs(centre[tap.target] - centre[tap.source]) == COLUMN_WIDTH
    arrow = patches.FancyArrowPatch(
        (centre[tap.source] + side * BOX[0] / 2, tap.source_layer),
        (centre[tap.target] - side * BOX[0] / 2, tap.target_layer + 0.36),
        arrowstyle="-|>",
        mutation_scale=10,
        color=colour,
        connectionstyle=f"arc3,rad={-0.12 * side}",
        lw=1.4,
        zorder=2 if neighbours else 0,  # longer arrows pass behind the towers in between
    )
    axes.add_patch(arrow)


def draw_attention(
    weights: Tensor, *, sources: Sequence[str] = (), targets: Sequence[str] = (), title: str = ""
) -> Any:
    """Draw the attention of each target token over the source tokens.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7, 2], target=True)]])
    >>> out = tiny_model()(**batch, output_attentions=True)
    >>> figure = draw_attention(out.attentions["speech->text"]["1-1"][0], targets=["begin", "a", "end"])

    Args:
        weights: Attention weights of one example, shape (target length, source length), or (heads, target
            length, source length); heads are averaged.
        sources: Optional labels of the source tokens.
        targets: Optional labels of the target tokens.
        title: Title of the figure.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ValueError: The weights have another shape, or the number of labels is not that of the tokens.
        ImportError: matplotlib is not installed; install the extra "draw".
    """
    grid = weights.detach().float().cpu()
    grid = grid.mean(0) if grid.dim() == 3 else grid
    for side, labels, size in (("target", targets, 0), ("source", sources, 1)):
        if grid.dim() != 2 or (labels and len(labels) != grid.shape[size]):
            raise ValueError(
                f"weights of shape {tuple(weights.shape)} with {len(labels)} {side} labels: give those of "
                "one example, and a label for each token"
            )
    rows, columns = grid.shape
    figure = _figure(min(2.5 + 0.22 * columns, 12), min(1.8 + 0.24 * rows, 10))
    axes = figure.add_subplot(title=title, xlabel="source", ylabel="target")
    axes.locator_params(integer=True)
    shown = axes.imshow(grid.numpy(), aspect="auto", interpolation="nearest", cmap="cividis", vmin=0)
    if sources:
        axes.set_xticks(range(columns), sources, rotation=90, fontsize="small", parse_math=False)
    if targets:
        axes.set_yticks(range(rows), targets, fontsize="small", parse_math=False)
    figure.colorbar(shown, ax=axes, label="attention")
    return figure


def draw_estimate(estimate: Estimate) -> Any:
    """Draw the FLOPs of a step and the memory of each part of a model.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7, 2], target=True)]])
    >>> figure = draw_estimate(tiny_model().estimate(batch))

    Args:
        estimate: The result of ``estimate``.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed; install the extra "draw".
    """
    kinds = (("tower", estimate.towers), ("adapter", estimate.adapters), ("link", estimate.links))
    parts = {f"{kind} {name}": cost for kind, costs in kinds for name, cost in costs.items()}
    parts["loss"] = estimate.loss
    names = list(parts)
    figure = _figure(10, 1.4 + 0.4 * len(names))
    work, memory = figure.subplots(1, 2, sharey=True)
    _bars(work, parts, {"forward": "forward_flops", "backward": "backward_flops"}, 1e9)
    _bars(
        memory,
        parts,
        {"parameters": "parameter_bytes", "saved for the backward": "saved_bytes", "caches": "cache_bytes"},
        2**20,
    )
    work.set(xlabel="GFLOP")
    memory.set(xlabel="MiB")
    work.set_yticks(range(len(names)), names)
    work.invert_yaxis()
    return figure


def draw_history(history: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the losses of a run: training losses as lines, evaluation losses as dots.

    >>> figure = draw_history([{"step": 1, "loss_text": 2.0}, {"step": 2, "loss_text": 1.5}])

    Args:
        history: The ``Trainer``'s log, ``trainer.state.log_history``.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ValueError: The log contains no loss.
        ImportError: matplotlib is not installed; install the extra "draw".
    """
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name.startswith("loss_") or name == "eval_loss" or re.fullmatch("eval_.+_loss", name):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(entry["step"])
                values.append(value)
    if not curves:
        raise ValueError("there is no loss in this history; give trainer.state.log_history")
    figure = _figure(7, 4)
    axes = figure.add_subplot(xlabel="step", ylabel="cross-entropy (nats per token)")
    for place, (name, (steps, values)) in enumerate(sorted(curves.items())):
        style = {"linestyle": "none", "marker": "o"} if name.startswith("eval_") else {}
        axes.plot(steps, values, color=COLOURS[place % len(COLOURS)], label=name, **style)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def _bars(axes: Any, parts: Mapping[str, Cost], fields: Mapping[str, str], unit: float) -> None:
    left = torch.zeros(len(parts))
    for (label, field), colour in zip(fields.items(), COLOURS, strict=False):
        values = torch.tensor([getattr(cost, field) / unit for cost in parts.values()])
        axes.barh(range(len(parts)), values, left=left, color=colour, label=label)
        left = left + values
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


def _figure(width: float, height: float) -> Any:
    figure_module = require("matplotlib.figure", "draw")
    return figure_module.Figure(figsize=(width, height), layout="constrained", dpi=150)
