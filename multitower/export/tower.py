"""A tower and all that it reads as one program, which runs everything at each call."""

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
    """Make a program of a fused model that takes streams and gives the logits of one tower.

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
    part = part_of(model, name)
    program = Logits(part.model, name)
    with evaluated(model), torch.no_grad():
        exported = traced(program, (_example(part, 2),), (part.dynamic(),), part)
        _prove(program, exported, [_example(part, number) for number in (3, 1)])
    strip(exported)
    return exported


class Logits(nn.Module):
    """A fused model as a function of streams that gives one tower's logits."""

    def __init__(self, model: Fusion, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, streams: dict[str, Stream]) -> Tensor:
        """Run the towers up to their last layers, and the head of one."""
        states = self.model.run(streams)
        return self.model.tower(self.name).head(states.hidden[self.name], states.contexts[self.name])


def _example(part: Part, rows: int) -> dict[str, Stream]:
    """Make streams of unlike lengths that depend on the number of rows, with padding if there are several."""
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
