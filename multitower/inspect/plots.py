"""Plots of what a fusion attends to, what it costs, and how it learnt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.extras import require
from .cost import Cost, Estimate

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw_attention(
    weights: Tensor, *, sources: Sequence[str] = (), targets: Sequence[str] = (), title: str = ""
) -> Any:
    """Draw where each token of a target looks in its source.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7, 2], target=True)]])
    >>> out = tiny_model()(**batch, output_attentions=True)
    >>> figure = draw_attention(out.attentions["speech->text"]["1-1"][0], targets=["begin", "a", "end"])

    Args:
        weights: Of one example: shape (target length, source length), or (heads, target length, source
            length), whose heads are averaged.
        sources: A label for each source token, if any.
        targets: A label for each target token, if any.
        title: What stands above.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ValueError: The weights have another shape, or there are not as many labels as tokens.
        ImportError: matplotlib is not installed; the extra "draw" brings it.
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
    shown = axes.imshow(grid.numpy(), aspect="auto", interpolation="nearest", cmap="cividis", vmin=0)
    if sources:
        axes.set_xticks(range(columns), sources, rotation=90, fontsize="small", parse_math=False)
    if targets:
        axes.set_yticks(range(rows), targets, fontsize="small", parse_math=False)
    figure.colorbar(shown, ax=axes, label="attention")
    return figure


def draw_estimate(estimate: Estimate) -> Any:
    """Draw what each part of a model costs: FLOPs of a step, and memory.

    >>> import multitower as mt
    >>> from multitower.testing import tiny_model
    >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 2]), mt.Segment("text", [1, 7, 2], target=True)]])
    >>> figure = draw_estimate(tiny_model().estimate(batch))

    Args:
        estimate: What ``estimate`` returned.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed; the extra "draw" brings it.
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
    """Draw the losses of a run: those of training as lines, those of evaluations as dots.

    >>> figure = draw_history([{"step": 1, "loss_text": 2.0}, {"step": 2, "loss_text": 1.5}])

    Args:
        history: The log of the ``Trainer``, ``trainer.state.log_history``.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ValueError: It holds no loss.
        ImportError: matplotlib is not installed; the extra "draw" brings it.
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
