"""Pictures of a fusion."""

from __future__ import annotations

from typing import Any

from ..base.extras import require
from ..declare.graph import FusionGraph
from ..errors import GraphError
from ..run.fusion import Fusion
from .estimate import empty_model

LAYER_HEIGHT, COLUMN_WIDTH = 1.0, 3.6


def draw_graph(model: Fusion | FusionGraph) -> Any:
    """Draw towers as columns of layers and every tap as an arrow.

    >>> from multitower.testing import tiny_model
    >>> figure = draw_graph(tiny_model())
    >>> figure.savefig("/dev/null", format="png")

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
    if isinstance(model, FusionGraph):
        if not model.towers:
            raise GraphError("the graph has no towers to draw; call add_tower first")
        model = empty_model(model)
    figure_module = require("matplotlib.figure", "draw")
    patches = require("matplotlib.patches", "draw")
    colormaps = require("matplotlib", "draw").colormaps
    names = list(model.graph.towers)
    deepest = max(model.tower(name).depth for name in names)
    figure = figure_module.Figure(
        figsize=(1.2 + 2.4 * len(names), 1.9 + 0.45 * deepest), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set_axis_off()
    centre = {name: column * COLUMN_WIDTH for column, name in enumerate(names)}
    for name in names:
        tower, spec = model.tower(name), model.graph.towers[name]
        trained = spec.train != "none"
        for layer in range(tower.depth + 1):
            corner = (centre[name] - 0.8, layer * LAYER_HEIGHT - 0.32)
            box = patches.FancyBboxPatch(
                corner,
                1.6,
                0.64,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=("#fde9c8" if trained else "#e4eaf1") if layer else "white",
                edgecolor="#c98a1b" if trained else "#7d8ea3",
            )
            axes.add_patch(box)
            words = f"layer {layer}" if layer else "embedding"
            axes.text(centre[name], layer * LAYER_HEIGHT, words, ha="center", va="center", size=8)
        adapter = f", {spec.adapter} adapter" if spec.adapter else ""
        label = f"{name}\nwidth {tower.width}, {'trained' if trained else 'frozen'}{adapter}"
        axes.text(centre[name], -0.5 * LAYER_HEIGHT, label, ha="center", va="top", size=9)
    colours = colormaps["tab10"]
    handles = []
    for number, link in enumerate(model.graph.links):
        colour = colours(number % 10)
        taps = [tap for tap in model.schedule.taps if tap.link == link]
        for tap in taps:
            side = 1 if centre[tap.target] > centre[tap.source] else -1
            start = (centre[tap.source] + 0.8 * side, tap.source_layer * LAYER_HEIGHT)
            stop = (centre[tap.target] - 0.8 * side, tap.target_layer * LAYER_HEIGHT + 0.36)
            bend = "arc3,rad=-0.12" if side > 0 else "arc3,rad=0.12"
            neighbours = abs(centre[tap.target] - centre[tap.source]) == COLUMN_WIDTH
            arrow = patches.FancyArrowPatch(
                start,
                stop,
                arrowstyle="-|>",
                mutation_scale=10,
                color=colour,
                connectionstyle=bend,
                lw=1.3,
                zorder=2 if neighbours else 0,  # others pass behind the towers between
            )
            axes.add_patch(arrow)
        handles.append(patches.Patch(color=colour, label=f"{link}: {len(taps)} taps"))
    axes.set_xlim(-1.4, centre[names[-1]] + 1.4)
    axes.set_ylim(-1.3, (deepest + 1) * LAYER_HEIGHT)
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure
