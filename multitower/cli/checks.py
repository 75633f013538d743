"""Commands that check a checkpoint: its bytes, and the guarantees of its model."""

from __future__ import annotations

import json
from typing import Annotated, Any

import torch

from ..base.extras import require
from ..batch.collate import Segment
from ..checkpoint.manifest import open_checkpoint
from ..model import FusedModel
from ..storage.files import check_files
from ..storage.find import find_checkpoint
from ..testing.model.check_model import MODEL_PROMISES, model_report
from .arguments import CheckpointArgument, JsonOption, quiet

typer: Any = require("typer", "cli")


def check(
    checkpoint: CheckpointArgument,
    promise: Annotated[
        list[str],
        typer.Option("--promise", help="One of those to check; may be repeated. All by default."),
    ] = [],  # noqa: B006  # as typer wants it
    length: Annotated[int, typer.Option(min=1, help="How many random tokens a segment has.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check a fused model's guarantees on random tokens: identity, causality, caches, saving, ..."""
    quiet()
    model = FusedModel.from_pretrained(checkpoint)
    names = promise or list(MODEL_PROMISES)
    report = model_report(model, _examples(model, length, seed), promises=names)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        for name, problem in report.items():
            print(f"{name:12} {problem or 'holds'}")
    if any(report.values()):
        raise typer.Exit(1)


def verify(checkpoint: CheckpointArgument) -> None:
    """Compare every file of a checkpoint with its checksum."""
    found = open_checkpoint(find_checkpoint(checkpoint))
    found.check(found.records, links=True, verify=True)
    check_files(found.root, found.files, ("modalities/",), verify=True)
    print(f"{found.root} is as it was saved, every byte of {len(found.files)} files")
    records = found.records.items()
    if others := [name for name, record in records if not record.get("embedded", True)]:
        print(f"not in it, and compared by from_pretrained(folder, verify=True): {', '.join(others)}")


def _examples(model: FusedModel, length: int, seed: int) -> list[Any]:
    """Make examples of random tokens: towers in sequence, reversed, in parallel, and each alone."""
    generator = torch.Generator().manual_seed(seed)

    def segment(name: str, size: int) -> Segment:
        most = model.tower(name).vocab_size
        return Segment(name, torch.randint(most, (size,), generator=generator), target=True)

    names = list(model.towers)
    return [
        [segment(name, length) for name in names],
        [segment(name, length + place) for place, name in enumerate(reversed(names))],
        [tuple(segment(name, length) for name in names)],
        *([segment(name, length)] for name in names),
    ]
