"""Drawings of a model, an output, an estimate and a run."""

from __future__ import annotations

import sys

import pytest
import torch

import multitower as mt
from models import EXAMPLES, causal_lm, pair
from multitower.inspect import draw_attention, draw_estimate, draw_graph, draw_history, openness

pytest.importorskip("matplotlib", reason="needs matplotlib")

from matplotlib.patches import FancyArrowPatch, FancyBboxPatch  # optional dependency


def arrows(figure) -> list[FancyArrowPatch]:
    return [each for each in figure.axes[0].patches if isinstance(each, FancyArrowPatch)]


def test_layers_and_taps_stand_where_they_are() -> None:
    model = pair(gates=True)
    figure = draw_graph(model)
    boxes = [each for each in figure.axes[0].patches if isinstance(each, FancyBboxPatch)]
    assert len(boxes) == sum(model.tower(name).depth + 1 for name in model.towers)
    assert len(arrows(figure)) == len(model.schedule.taps)
    heights = [arrow._posA_posB[0][1] for arrow in arrows(figure)]
    assert heights == [tap.source_layer for tap in model.schedule.taps]


def test_open_taps_are_coloured_by_how_open_they_are() -> None:
    model = pair(gates=True)
    figure = draw_graph(model)
    assert [axes.get_ylabel() for axes in figure.axes[1:]] == ["how open a tap is"]
    opened = openness(model)
    darkness = {}
    for tap, arrow in zip(model.schedule.taps, arrows(figure), strict=True):
        darkness[opened[f"{tap.link} {tap.key}"]] = -sum(arrow.get_edgecolor()[:3])
    assert [darkness[each] for each in sorted(darkness)] == sorted(darkness.values())
    assert len(draw_graph(pair()).axes) == 1


def test_towers_tell_by_colour_and_pattern_what_is_trained() -> None:
    pytest.importorskip("peft", reason="adapters need the lora extra")
    graph = mt.FusionGraph()
    for name, train in (("a", "none"), ("b", "all"), ("c", "lora")):
        graph.add_tower(name, causal_lm("llama"), train=train)
    graph.add_link("a", "b", interleave=1)
    boxes = [each for each in draw_graph(graph.compile()).axes[0].patches if isinstance(each, FancyBboxPatch)]
    layers = [box for box in boxes if box.get_y() > 0]
    assert len({box.get_facecolor() for box in layers}) == 3
    assert [box.get_hatch() or "" for box in layers] == ["", "", "", "", "///", "///"]


def test_notebooks_show_a_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair()
    html = model._repr_html_()
    assert html.startswith('<svg fill="currentColor"')
    assert "speech" in html
    assert html == model._repr_html_()
    bundle = model.graph._repr_mimebundle_()
    assert bundle["text/plain"] == repr(model.graph)
    assert bundle["text/vnd.mermaid"].startswith("flowchart LR")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert model._repr_html_() is None


def test_attention_without_labels_is_counted_in_whole_tokens() -> None:
    figure = draw_attention(torch.rand(3, 4))
    figure.canvas.draw()
    (axes, _) = figure.axes
    assert all(tick == int(tick) for tick in (*axes.get_xticks(), *axes.get_yticks()))


def test_attention_is_drawn_by_token() -> None:
    out = pair(gates=True)(**mt.collate(EXAMPLES[:1]), output_attentions=True)
    weights = out.attentions["speech->text"]["2-1"][0]
    targets = ["begin", "9", "3", "end"]
    figure = draw_attention(weights, targets=targets)
    (image,) = figure.axes[0].images
    torch.testing.assert_close(torch.as_tensor(image.get_array()), weights.mean(0))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == targets
    with pytest.raises(ValueError, match="with 1 target labels"):
        draw_attention(weights, targets=["begin"])
    with pytest.raises(ValueError, match=r"weights of shape \(1, 1, 4, 6\)"):
        draw_attention(weights[None])


def test_an_estimate_is_drawn_by_part() -> None:
    estimate = pair(train="all").train().estimate(mt.collate(EXAMPLES))
    work, memory = draw_estimate(estimate).axes
    lengths = [bar.get_width() * 1e9 for bar in work.patches]
    assert sum(lengths) == pytest.approx(estimate.total.step_flops, rel=1e-4)
    held = estimate.total.parameter_bytes + estimate.total.saved_bytes + estimate.total.cache_bytes
    assert sum(bar.get_width() * 2**20 for bar in memory.patches) == pytest.approx(held, rel=1e-4)
    assert [label.get_text() for label in work.get_yticklabels()][-1] == "loss"


def test_a_run_is_drawn_by_loss() -> None:
    history = [
        {"step": 10, "loss": 3.0, "loss_text": 1.0, "loss_speech": 2.0, "learning_rate": 0.1},
        {"step": 20, "loss": 2.0, "loss_text": 0.5, "loss_speech": 1.5},
        {"step": 20, "eval_loss": 2.2, "eval_text_loss": 0.7, "eval_runtime": 1.0},
        {"step": 20, "train_loss": 2.5},
    ]
    (axes,) = draw_history(history).axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines == {
        "loss_text": ([10, 20], [1.0, 0.5]),
        "loss_speech": ([10, 20], [2.0, 1.5]),
        "eval_loss": ([20], [2.2]),
        "eval_text_loss": ([20], [0.7]),
    }
    with pytest.raises(ValueError, match="there is no loss in this history"):
        draw_history([{"step": 1}])
