"""A fused model as a program that runs without this library."""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .batch.collate import Segment, Stream, collate
from .compile.towers import shared_with
from .errors import ExportError
from .run import surgery
from .run.fusion import Fusion
from .tower.probe import evaluated
from .tower.weights import is_offloaded

KEYS = ("tokens", "times", "mask")


def export_tower(model: Fusion, name: str) -> ExportedProgram:
    """Make a program of a fused model that takes streams and gives the logits of one tower.

    >>> import tempfile, multitower as mt
    >>> from multitower.testing import tiny_model
    >>> model = tiny_model()
    >>> program = export_tower(model, "text")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.export.save(program, folder + "/text.pt2")
    ...     run = torch.export.load(folder + "/text.pt2").module()      # needs nothing but torch
    >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 7])]])
    >>> streams = {tower: {key: stream[key] for key in KEYS} for tower, stream in batch["streams"].items()}
    >>> torch.equal(run(streams), model(streams).logits["text"])
    True

    The program is called with one mapping, as ``collate`` gives it without labels: of the tower, and of each
    that it reads, directly or through others, "tokens" and "times", int64, and "mask", bool, of shape (batch,
    length of that stream); padding has mask False and time -1. Batch and lengths may be any. A tower that has
    nothing to say gets a stream of padding. The logits have the shape (batch, length, vocabulary).

    Before it is given, the program is run on streams of other sizes and compared with the model. It stays on
    the model's device and in its dtypes. What the logits do not depend on, as other towers and the heads of
    those that are read, is left out.

    Args:
        model: The model; it is not changed.
        name: The tower whose logits are wanted.

    Raises:
        KeyError: There is no tower of that name.
        ExportError: ``torch.export`` cannot trace a tower, or not for every batch and length; or a tower is
            offloaded.
    """
    model.tower(name)
    graph = model.graph
    read = {*nx.ancestors(graph.to_networkx(), name), name}
    towers = [each for each in graph.towers if each in read]
    offloaded = [each for each in towers if is_offloaded(model.tower(each).native)]
    if offloaded:
        raise ExportError(f"tower {offloaded[0]!r} is offloaded by accelerate; load it whole to export it")
    others = [each for each in graph.towers if each not in read]
    program = _Logits(surgery.drop(model, others) if others else model, name)
    rows = Dim("rows")
    limits = [model.tower(each).hard_limit for each in towers]
    sizes = [{0: rows, 1: Dim(f"length_{number}", max=limit)} for number, limit in enumerate(limits)]
    dynamic = {tower: dict.fromkeys(KEYS, size) for tower, size in zip(towers, sizes, strict=True)}
    with evaluated(model), torch.no_grad():
        try:
            exported = torch.export.export(
                program, (_example(model, towers, 2),), dynamic_shapes=(dynamic,), strict=False
            )
        except Exception as error:  # whatever tracing somebody's model brings up
            same = shared_with({each: model.tower(each) for each in towers})
            raise ExportError(
                f"torch.export cannot trace {_names(model, towers)} for every batch and length: {error}"
                + "".join(
                    f"\n{one!r} and {other!r} share one model, which may be the reason: declare each with a "
                    "model of its own"
                    for one, other in same.items()
                )
            ) from error
        _prove(program, exported, [_example(model, towers, number) for number in (3, 1)])
    _strip(exported)
    return exported


class _Logits(nn.Module):
    """A fused model as a function of streams that gives one tower's logits."""

    def __init__(self, model: Fusion, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, streams: dict[str, Stream]) -> Tensor:
        """Run the towers up to their last layers, and the head of one."""
        states = self.model.run(streams)
        return self.model.tower(self.name).head(states.hidden[self.name], states.contexts[self.name])


def _example(model: Fusion, towers: list[str], rows: int) -> dict[str, Stream]:
    """Make streams of unlike lengths that depend on the number of rows, with padding if there are several."""
    generator = torch.Generator().manual_seed(rows)
    examples = []
    for row in range(rows):
        example = []
        for number, name in enumerate(towers):
            length = 1 if rows == 1 else 2 + number + rows - row
            tokens = torch.randint(model.tower(name).vocab_size, (length,), generator=generator)
            example.append(Segment(name, tokens))
        examples.append(example)
    streams = collate(examples)["streams"]
    return {name: {key: streams[name][key].to(model.tower(name).device) for key in KEYS} for name in towers}


def _prove(program: nn.Module, exported: ExportedProgram, examples: list[dict[str, Stream]]) -> None:
    run: Any = exported.module()
    for streams in examples:
        sizes = {name: tuple(stream["tokens"].shape) for name, stream in streams.items()}
        try:
            found = run(streams)
        except Exception as error:  # a guard that tracing has put in
            raise ExportError(f"the program does not take streams of the shapes {sizes}: {error}") from error
        expected = program(streams)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
            worst = (found - expected).abs().max().item()
            raise ExportError(
                f"the program gives other logits than the model for streams of the shapes {sizes} (largest "
                f"difference {worst:.2g}); a tower looks at sizes or values while it runs"
            )


def _strip(exported: ExportedProgram) -> None:
    """Take out weights that no step uses, and the example inputs, which would be saved as a pickle."""
    unused = {node.name for node in exported.graph.nodes if node.op == "placeholder" and not node.users}
    for entry in exported.graph_signature.input_specs:
        if entry.arg.name in unused and entry.target in exported.state_dict:
            weight = exported.state_dict[entry.target]
            nothing = weight.new_empty(0)
            exported.state_dict[entry.target] = (
                nn.Parameter(nothing, requires_grad=False) if isinstance(weight, nn.Parameter) else nothing
            )
    exported.example_inputs = None


def _names(model: Fusion, towers: list[str]) -> str:
    kinds = (f"{name!r} ({type(model.unimodal(name)).__name__})" for name in towers)
    return f"tower{'s' if len(towers) > 1 else ''} {', '.join(kinds)}"
