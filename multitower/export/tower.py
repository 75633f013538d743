"""Export a tower and its sources as one program without caches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..batch.collate import Example, Segment, Stream
from ..errors import ExportError
from ..run.fusion import Fusion
from ..tower.probe import evaluated
from .trace import Part, part_of, placed, run, sizes_of, strip, traced


def export_tower(model: Fusion, name: str) -> ExportedProgram:
    """Export a fused model as a program that maps streams to the logits of one tower.

    >>> import tempfile, multitower as mt
    >>> from multitower.testing import tiny_model
    >>> model = tiny_model()
    >>> program = export_tower(model, "text")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.export.save(program, folder + "/text.pt2")
    ...     run = torch.export.load(folder + "/text.pt2").module()      # needs nothing but torch
    >>> batch = mt.collate([[mt.Segment("speech", [1, 5, 6, 2]), mt.Segment("text", [1, 7])]])
    >>> keys = ("tokens", "times", "mask")
    >>> streams = {name: {key: stream[key] for key in keys} for name, stream in batch["streams"].items()}
    >>> torch.equal(run(streams), model(streams).logits["text"])
    True

    The program takes one mapping, as made by ``collate`` but without labels. For the tower and for each that
    it reads, directly or through others, it has "tokens" and "times", int64, and "mask", bool, of shape
    (batch, length of that stream); padding has mask False and time -1. Batch size and lengths are dynamic. A
    tower without tokens gets a stream of padding. The logits have shape (batch, length, vocabulary).

    The program is checked against the model on streams of other sizes before it is returned. It has the
    model's devices and dtypes. Whatever does not influence the logits is left out, such as other towers and
    the heads of sources.

    Args:
        model: The model; it is not changed.
        name: The tower whose logits are computed.

    Raises:
        KeyError: There is no tower of that name.
        ExportError: ``torch.export`` cannot trace a tower for every batch size and length; or a tower is
            offloaded.
    """
    part = part_of(model, name)
    program = Logits(part.model, name)
    with evaluated(model), torch.no_grad():
        exported = traced(program, (_example(part, 2),), (part.dynamic(),), part)
        _prove(program, exported, [_example(part, number) for number in (3, 1)])
    strip(exported)
    return exported


class Logits(nn.Module):
    """Maps streams to the logits of one tower."""

    def __init__(self, model: Fusion, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, streams: dict[str, Stream]) -> Tensor:
        """Run the layers of all towers, and the head of one."""
        states = self.model.run(streams)
        return self.model.tower(self.name).head(states.hidden[self.name], states.contexts[self.name])


def _example(part: Part, rows: int) -> dict[str, Stream]:
    """Make streams whose lengths depend on the number of rows, with padding if there are several rows."""
    generator = torch.Generator().manual_seed(rows)
    examples: list[Example] = []
    for row in range(rows):
        example: list[Segment] = []
        for number, name in enumerate(part.towers):
            length = 1 if rows == 1 else 2 + number + rows - row
            tokens = torch.randint(part.model.tower(name).vocab_size, (length,), generator=generator)
            example.append(Segment(name, tokens))
        examples.append(example)
    return placed(examples, part)


def _prove(program: nn.Module, exported: ExportedProgram, examples: list[dict[str, Stream]]) -> None:
    for streams in examples:
        sizes = sizes_of(streams)
        found, expected = run(exported, (streams,), sizes), program(streams)
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
            worst = (found - expected).abs().max().item()
            raise ExportError(
                f"the program gives other logits than the model for streams of the shapes {sizes} (largest "
                f"difference {worst:.2g}); a tower looks at sizes or values while it runs"
            )
