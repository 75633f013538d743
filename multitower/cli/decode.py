"""Commands that generate: ``generate``, and its short forms for speech and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from ..base.extras import require
from ..pipeline.pipeline import Pipeline
from .arguments import (
    CheckpointArgument,
    DeviceOption,
    JsonOption,
    OptionOption,
    SaveOption,
    load,
    named_values,
    raw_data,
    read_raw,
    tower_for,
)

typer: Any = require("typer", "cli")

FromOption = Annotated[
    str | None, typer.Option("--from", help="The tower that reads, if several could.", show_default=False)
]
ToOption = Annotated[
    str | None, typer.Option("--to", help="The tower that writes, if several could.", show_default=False)
]


def generate(
    checkpoint: CheckpointArgument,
    given: Annotated[
        list[str],
        typer.Option(
            "--input",
            "-i",
            metavar="TOWER:VALUE",
            help="What is given, in order: speech:clip.wav, text:hello. A file, or a text as it stands.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="TOWER", help="The tower to decode.", show_default=False)
    ],
    option: OptionOption = [],  # noqa: B006  # typer's default for an optional list
    save: SaveOption = None,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Generate with one tower, given inputs of any towers."""
    pipe = load(checkpoint, device)
    example = [raw_data(pipe, each) for each in given]
    answer = pipe(example, output=output, **named_values(option, "--option"))
    _deliver(pipe, output, answer, save, as_json)


def transcribe(
    checkpoint: CheckpointArgument,
    clips: Annotated[list[str], typer.Argument(help="Sound files.", show_default=False)],
    source: FromOption = None,
    target: ToOption = None,
    option: OptionOption = [],  # noqa: B006  # as typer wants it
    batch_size: Annotated[int, typer.Option(min=1, help="How many clips are decoded at once.")] = 8,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Transcribe sound files, one line per file."""
    pipe = load(checkpoint, device)
    reads = tower_for(pipe, "audio", source, "--from")
    writes = tower_for(pipe, "text", target, "--to")
    options = {"do_sample": False, **named_values(option, "--option")}
    examples = [[(reads, read_raw(pipe, reads, clip))] for clip in clips]
    texts = [text.strip() for text in pipe(examples, output=writes, batch_size=batch_size, **options)]
    if as_json:
        rows = [{"file": clip, "text": text} for clip, text in zip(clips, texts, strict=True)]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for clip, text in zip(clips, texts, strict=True):
        print(text if len(clips) == 1 else f"{clip}\t{text}")


def speak(
    checkpoint: CheckpointArgument,
    text: Annotated[str, typer.Argument(help="What to say.", show_default=False)],
    save: Annotated[Path, typer.Option("--save", help="The sound file to write.")] = Path("speech.wav"),
    source: FromOption = None,
    target: ToOption = None,
    option: OptionOption = [],  # noqa: B006  # as typer wants it
    device: DeviceOption = "cpu",
) -> None:
    """Synthesise speech from text, and write it to a file."""
    pipe = load(checkpoint, device)
    reads = tower_for(pipe, "text", source, "--from")
    writes = tower_for(pipe, "audio", target, "--to")
    options = {"do_sample": False, **named_values(option, "--option")}
    _deliver(pipe, writes, pipe([(reads, text)], output=writes, **options), save, as_json=False)


def _deliver(pipe: Pipeline, tower: str, answer: Any, save: Path | None, as_json: bool) -> None:
    """Print a text; write any other raw data to a file."""
    modality = pipe.modalities[tower]
    text = answer if isinstance(answer, str) else None
    if save is None and text is None:
        save = Path(f"{tower}{modality.suffix}")
    if save is not None:
        modality.write_file(answer, save)
    if as_json:
        where = None if save is None else str(save)
        print(json.dumps({"tower": tower, "text": text, "file": where}, ensure_ascii=False))
    elif save is not None:
        print(f"wrote {save}")
    else:
        print(text)
