"""Shared by all exports: reduce a model to what a tower needs, and trace it with dynamic shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import networkx as nx
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..batch.collate import Example, Stream, collate
from ..compile.modules import shared_with
from ..errors import ExportError
from ..run import surgery
from ..run.fusion import Fusion
from ..tower.weights import is_offloaded

KEYS = ("tokens", "times", "mask")


class Part(NamedTuple):
    """The part of a model that a program contains.

    Attributes:
        model: The reduced model.
        towers: The exported tower and all that it reads, in the graph's order.
        rows: The dynamic batch size.
        lengths: The dynamic length of each tower's stream.
    """

    model: Fusion
    towers: list[str]
    rows: Any
    lengths: dict[str, Any]

    def dynamic(self) -> dict[str, dict[str, dict[int, Any]]]:
        """Return the dynamic shapes of streams."""
        return {
            name: {key: {0: self.rows, 1: length} for key in KEYS} for name, length in self.lengths.items()
        }


def part_of(model: Fusion, name: str) -> Part:
    """Return the part of a model that one tower needs."""
    model.tower(name)
    graph = model.graph
    read = {*nx.ancestors(graph.to_networkx(), name), name}
    towers = [each for each in graph.towers if each in read]
    offloaded = [each for each in towers if is_offloaded(model.tower(each).native)]
    if offloaded:
        raise ExportError(f"tower {offloaded[0]!r} is offloaded by accelerate; load it whole to export it")
    others = [each for each in graph.towers if each not in read]
    lengths = {
        each: Dim(f"length_{number}", max=model.tower(each).hard_limit) for number, each in enumerate(towers)
    }
    return Part(surgery.drop(model, others) if others else model, towers, Dim("rows"), lengths)


def traced(
    program: nn.Module, args: tuple[Any, ...], dynamic: tuple[Any, ...], part: Part
) -> ExportedProgram:
    """Trace a module with dynamic shapes."""
    try:
        return torch.export.export(program, args, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # tracing a foreign model may raise anything
        same = shared_with({each: part.model.tower(each) for each in part.towers})
        raise ExportError(
            f"torch.export cannot trace {_names(part)} for every batch and length: {error}"
            + "".join(
                f"\n{one!r} and {other!r} share one model, which may be the reason: declare each with a "
                "model of its own"
                for one, other in same.items()
            )
        ) from error


def run(exported: ExportedProgram, args: tuple[Any, ...], sizes: dict[str, tuple[int, ...]]) -> Any:
    """Run a program on streams of other sizes than it was traced with."""
    program: Any = exported.module()
    try:
        return program(*args)
    except Exception as error:  # a failed guard
        raise ExportError(f"the program does not take streams of the shapes {sizes}: {error}") from error


def placed(examples: list[Example], part: Part) -> dict[str, Stream]:
    """Collate examples; return the streams, each on its tower's device."""
    streams = collate(examples)["streams"]
    return {
        name: {key: streams[name][key].to(part.model.tower(name).device) for key in KEYS}
        for name in part.towers
    }


def sizes_of(streams: dict[str, Stream]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each stream."""
    return {name: tuple(stream["tokens"].shape) for name, stream in streams.items()}


def strip(exported: ExportedProgram) -> None:
    """Remove unused weights, and the example inputs, which would be pickled."""
    unused = {node.name for node in exported.graph.nodes if node.op == "placeholder" and not node.users}
    for entry in exported.graph_signature.input_specs:
        if entry.arg.name in unused and entry.target in exported.state_dict:
            weight = exported.state_dict[entry.target]
            nothing = weight.new_empty(0)
            exported.state_dict[entry.target] = (
                nn.Parameter(nothing, requires_grad=False) if isinstance(weight, nn.Parameter) else nothing
            )
    exported.example_inputs = None


def _names(part: Part) -> str:
    kinds = (f"{name!r} ({type(part.model.unimodal(name)).__name__})" for name in part.towers)
    return f"tower{'s' if len(part.towers) > 1 else ''} {', '.join(kinds)}"
