"""Pictures of a fusion: its towers, layers and taps."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ..base.extras import require
from ..compile.schedule import Tap
from ..declare.graph import FusionGraph
from ..errors import GraphError
from ..run.fusion import Fusion
from .estimate import empty_model
from .openness import openness

COLUMN_WIDTH, BOX = 3.6, (1.6, 0.64)
LAYER_INCHES, MOST_INCHES = 0.45, 12.0
FILLS = {"none": "#dfe3e8", "all": "#f6d9a8", "lora": "#cfe8dc"}
EDGES = {"none": "#6b7785", "all": "#b5760a", "lora": "#1f7a58"}
HATCHES = {"none": "", "all": "", "lora": "///"}
WORDS = {"none": "frozen", "all": "trained", "lora": "adapters trained"}
LINK_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which people who see colours differently can tell apart."""


def draw_graph(model: Fusion | FusionGraph) -> Any:
    """Draw towers as columns of layers and every tap as an arrow, in the colour of how open it is.

    >>> from multitower.testing import tiny_model
    >>> figure = draw_graph(tiny_model())
    >>> figure.savefig("/dev/null", format="png")

    While all taps are closed, as in a model that is not trained, colours tell the links apart instead. Frozen
    towers are grey, trained ones orange, those with adapters green and hatched.

    Args:
        model: The fused model, or a graph: of its towers that are folders or Hub ids only the configs are
            read then.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        GraphError: A graph cannot be compiled; see ``FusionGraph.compile``.
        TowerError: See there; or a folder or Hub id is of a quantised model.
        ImportError: matplotlib is not installed; the extra "draw" brings it.
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
    """Return a figure as SVG, whose words take the colour of the text around it.

    >>> from multitower.testing import tiny_model
    >>> as_svg(draw_graph(tiny_model()))[:4]
    '<svg'

    Args:
        figure: A ``matplotlib.figure.Figure``.
    """
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
    """Return what gives a tap its colour, and what a legend is to hold."""
    patches = require("matplotlib.patches", "draw")
    links = list(model.graph.links)
    counts = {link: sum(tap.link == link for tap in model.schedule.taps) for link in links}
    if not any(opened.values()):
        shades = {link: LINK_COLOURS[place % len(LINK_COLOURS)] for place, link in enumerate(links)}
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
        zorder=2 if neighbours else 0,  # others pass behind the towers between
    )
    axes.add_patch(arrow)
