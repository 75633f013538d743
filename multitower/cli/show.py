"""Commands that show a checkpoint or a graph: summary, drawing, and cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from ..base.extras import require
from ..batch.collate import Segment, collate
from ..checkpoint.manifest import open_checkpoint
from ..declare.graph import FusionGraph
from ..inspect.draw import draw_graph
from ..inspect.estimate import estimate as estimate_batch
from ..inspect.summary import summarize
from ..model import FusedModel
from ..storage.find import find_checkpoint
from .arguments import CheckpointArgument, JsonOption, quiet

typer: Any = require("typer", "cli")
rich_console: Any = require("rich.console", "cli")
rich_table: Any = require("rich.table", "cli")

GraphArgument = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT|GRAPH.json",
        help="A checkpoint, or a graph that FusionGraph.to_json wrote.",
        show_default=False,
    ),
]


def inspect(
    checkpoint: CheckpointArgument,
    schedule: Annotated[bool, typer.Option("--schedule", help="Also say what runs when.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the towers and links of a checkpoint: sizes, origins, and how open each link is."""
    quiet()
    root = find_checkpoint(checkpoint)
    records, modalities = (found := open_checkpoint(root)).records, found.modalities
    model = FusedModel.from_pretrained(root)
    summary = summarize(model)
    for name, tower in summary["towers"].items():
        tower["revision"] = records[name].get("revision")
        tower["stored"] = bool(records[name].get("embedded"))
        tower["modality"] = modalities.get(name, {}).get("modality")
    if schedule:
        summary["schedule"] = model.schedule.explain()
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    console = rich_console.Console()
    console.print(_towers(summary))
    console.print(*_origins(summary), "", sep="\n", highlight=False, markup=False, soft_wrap=True)
    if summary["links"]:
        console.print(_links(summary))
    share = summary["trained"] / max(1, summary["parameters"])
    console.print(
        f"{summary['parameters']:,} parameters, of which {summary['trained']:,} ({share:.1%}) train"
    )
    if schedule:
        console.print(f"\n{summary['schedule']}", highlight=False, markup=False)


def draw(
    graph: GraphArgument,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The file to draw: .svg, .png, .pdf, or .mmd (Mermaid)."),
    ] = Path("graph.svg"),
) -> None:
    """Draw the graph: towers as columns of layers, taps as arrows coloured by how open they are."""
    model = _graph_or_model(graph)
    if output.suffix == ".mmd":
        declared = model if isinstance(model, FusionGraph) else model.graph
        output.write_text(declared.to_mermaid() + "\n", encoding="utf-8")
    else:
        draw_graph(model).savefig(output, bbox_inches="tight", dpi=150)
    print(f"wrote {output}")


def estimate(
    graph: GraphArgument,
    tokens: Annotated[
        list[str],
        typer.Option(
            "--tokens",
            metavar="TOWER=LENGTH",
            help="A segment of a tower, in the order of an example; may be repeated.",
            show_default=False,
        ),
    ],
    rows: Annotated[int, typer.Option(min=1, help="How many such examples a batch has.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Estimate parameters, FLOPs and memory of a batch, without loading weights."""
    model = _graph_or_model(graph)
    example = []
    for each in tokens:
        tower, _, length = each.partition("=")
        if not length.isdecimal() or int(length) < 1 or tower not in model.towers:
            raise typer.BadParameter(
                f"{each!r} is not of the form TOWER=LENGTH with one of the towers {', '.join(model.towers)}",
                param_hint="--tokens",
            )
        example.append(Segment(tower, [0] * int(length), target=True))
    found = estimate_batch(model, collate([example] * rows))
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


def _graph_or_model(source: str) -> FusionGraph | FusedModel:
    """Load the graph in a JSON file, or the model of a checkpoint."""
    if source.endswith(".json"):
        return FusionGraph.from_json(Path(source).read_text(encoding="utf-8"))
    quiet()
    return FusedModel.from_pretrained(source)


def _towers(summary: dict[str, Any]) -> Any:
    table = rich_table.Table("tower", "decoder", box=None, header_style="bold")
    for heading in ("layers", "width", "vocab", "parameters", "trained"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("modality")
    for name, tower in summary["towers"].items():
        numbers = [f"{tower[key]:,}" for key in ("layers", "width", "vocabulary")]
        sizes = [short(tower[key]) for key in ("parameters", "trained")]
        table.add_row(name, tower["decoder"], *numbers, *sizes, tower["modality"] or "none")
    return table


def _origins(summary: dict[str, Any]) -> list[str]:
    lines = []
    for name, tower in summary["towers"].items():
        origin = tower["source"] or "a module"
        origin += f" at {tower['revision'][:12]}" if tower["revision"] else ""
        lines.append(f" {name} is from {origin}{', and stored here' if tower['stored'] else ''}")
    return lines


def short(count: int) -> str:
    """Format a number of parameters with few digits."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)


def _links(summary: dict[str, Any]) -> Any:
    table = rich_table.Table("link", box=None, header_style="bold")
    for heading in ("taps", "parameters", "trained", "open"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("form")
    for name, link in summary["links"].items():
        opened = list(link["taps"].values())
        spread = f"{min(opened):.2f} to {max(opened):.2f}" if any(opened) else "closed"
        form = [f"gate {link['gate']}"] if link["gate"] else []
        form += [f"projection {link['projection']}"] if link["projection"] != "none" else []
        form += ["feed_forward"] if link["feed_forward"] else []
        form += [] if link["relative"] else ["not relative"]
        form += [f"positions {link['position'] or 'none'}"]
        sizes = [short(link[key]) for key in ("parameters", "trained")]
        table.add_row(name, str(len(opened)), *sizes, spread, ", ".join(form))
    return table
