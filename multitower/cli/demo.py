"""A Gradio demo page for a checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any

import networkx as nx
import torch

from ..base.extras import require
from ..batch.collate import Segment, collate
from ..inspect.draw import as_svg, draw_attention, draw_graph
from ..pipeline.pipeline import Pipeline
from .arguments import CheckpointArgument, DeviceOption, load

typer: Any = require("typer", "cli")

Answer = tuple[Any, Any]
"""Raw data to show, and a figure of the attention, or None."""


def demo(
    checkpoint: CheckpointArgument,
    port: Annotated[int, typer.Option(help="Where the page listens.")] = 7860,
    host: Annotated[str, typer.Option(help="0.0.0.0 to be seen from other machines.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="Get a public link from Gradio.")] = False,
    device: DeviceOption = "cpu",
) -> None:
    """Serve a demo page: speak or type, read or listen, and see the attention."""
    make_page(load(checkpoint, device)).launch(server_name=host, server_port=port, share=share)


def make_page(pipe: Pipeline) -> Any:
    """Return a Gradio page with a tab for each pair of linked towers, and one for the graph.

    Towers without a modality are left out. A modality's ``media`` determines the widget.
    """
    gradio: Any = require("gradio", "demo")
    pairs = joined(pipe)
    if not pairs:
        raise ValueError(
            "there is nothing to try: no two towers that links join have modalities; save the checkpoint "
            "from a Pipeline"
        )
    with gradio.Blocks(title="multitower") as page:
        for source, target in pairs:
            with gradio.Tab(f"{source} → {target}"), gradio.Row():
                with gradio.Column():
                    given = _widget(gradio, pipe.modalities[source].media, source, given=True)
                    limit = gradio.Slider(1, 1000, 200, step=1, label="longest answer, in tokens")
                    button = gradio.Button(f"Decode {target}", variant="primary")
                with gradio.Column():
                    answer = _widget(gradio, pipe.modalities[target].media, target, given=False)
                    looked = gradio.Plot(show_label=False)
            button.click(
                partial(answers, pipe, source, target),
                [given, limit],
                [answer, looked],
                api_name=f"{source}_to_{target}",
            )
        with gradio.Tab("graph"):
            gradio.HTML(as_svg(draw_graph(pipe.model)))
    return page


def joined(pipe: Pipeline) -> list[tuple[str, str]]:
    """Return pairs (source, target) of towers with modalities, joined by a path of links."""
    graph = pipe.model.graph.to_networkx()
    return [
        (source, target)
        for source, target in permutations(pipe.modalities, 2)
        if nx.has_path(graph, source, target)
    ]


def answers(pipe: Pipeline, source: str, target: str, given: Any, limit: float) -> Iterator[Answer]:
    """Generate the target from the page's input; yield partial text, and at the end the attention, too."""
    if not given:
        raise require("gradio", "demo").Error(f"give some {pipe.modalities[source].media} first")
    modality = pipe.modalities[target]
    text = pipe.modalities[source].media == "text"
    raw = given if text else pipe.modalities[source].read_file(given)
    options = {"max_new_tokens": int(limit), "do_sample": False}
    if modality.media == "text":
        written = ""
        for piece in pipe.stream([(source, raw)], output=target, **options):
            written += piece
            yield written, None
    encoded = Segment(source, pipe.modalities[source].encode(raw))
    segment = pipe([encoded], output=target, return_segments=True, **options)
    shown = pipe.decode(segment)
    if modality.media != "text":
        path = Path(tempfile.mkdtemp(), f"{target}{modality.suffix}")
        modality.write_file(shown, path)
        shown = str(path)
    yield shown, attention(pipe, encoded, segment)


@torch.no_grad()
def attention(pipe: Pipeline, given: Segment, answer: Segment) -> Any:
    """Draw the attention from an answer to the input, averaged over taps; None if no link joins them."""
    batch = collate([[given, answer]])
    streams = {
        name: {key: tensor.to(pipe.device) for key, tensor in stream.items()}
        for name, stream in batch["streams"].items()
    }
    found = pipe.model(streams, output_attentions=True).attentions
    links = [
        link.name
        for link in pipe.model.graph.links.values()
        if (link.source, link.target) == (given.tower, answer.tower) and link.name in found
    ]
    if not links:
        return None
    weights = torch.stack([tap.mean(1)[0] for link in links for tap in found[link].values()]).mean(0)
    return draw_attention(
        weights,
        sources=_labels(pipe, given),
        targets=_labels(pipe, answer),
        title=f"where {answer.tower} looked in {given.tower}",
    )


def _labels(pipe: Pipeline, segment: Segment) -> list[str]:
    """Return labels for tokens of text; none for other data."""
    modality = pipe.modalities[segment.tower]
    if modality.media != "text":
        return []
    return [modality.decode(token[None]) or "·" for token in torch.as_tensor(segment.tokens)]


def _widget(gradio: Any, media: str, label: str, *, given: bool) -> Any:
    """Return a widget that shows or takes raw data of a kind."""
    if media == "text":
        return gradio.Textbox(label=label, lines=3, interactive=given)
    kind = {"audio": gradio.Audio, "image": gradio.Image}.get(media, gradio.File)
    return kind(label=label, type="filepath", interactive=given)
