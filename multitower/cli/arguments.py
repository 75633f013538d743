"""Arguments and options shared by several commands, and parsing of their values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from ..base.extras import require
from ..pipeline.pipeline import Pipeline

typer: Any = require("typer", "cli")

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A folder, or an id on the Hub.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OptionOption = Annotated[
    list[str],
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="An option of generate, as max_new_tokens=200 or num_beams=4; may be repeated.",
        show_default=False,
    ),
]
SaveOption = Annotated[
    Path | None, typer.Option("--save", help="A file to write the answer to.", show_default=False)
]
DeviceOption = Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")]


def load(checkpoint: str, device: str) -> Pipeline:
    """Load a checkpoint with its modalities, without progress bars."""
    quiet()
    return Pipeline.from_pretrained(checkpoint, device_map=device)


def quiet() -> None:
    """Disable the progress bars of transformers."""
    require("transformers", "cli").utils.logging.disable_progress_bar()


def named_values(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """Parse NAME=VALUE pairs; values that are not valid JSON are strings.

    >>> named_values(["max_new_tokens=5", "do_sample=true", "text=[1, 2]", "mode=fast"], "--option")
    {'max_new_tokens': 5, 'do_sample': True, 'text': [1, 2], 'mode': 'fast'}
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{pair!r} is not of the form NAME=VALUE", param_hint=option)
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def raw_data(pipe: Pipeline, given: str) -> tuple[str, Any]:
    """Parse ``TOWER:VALUE`` into a tower and its raw data, see ``read_raw``."""
    tower, colon, value = given.partition(":")
    if not colon or tower not in pipe.modalities:
        raise typer.BadParameter(
            f"{given!r} is not of the form TOWER:VALUE with one of the towers {', '.join(pipe.modalities)}",
            param_hint="--input",
        )
    return tower, read_raw(pipe, tower, value)


def read_raw(pipe: Pipeline, tower: str, value: str) -> Any:
    """Return raw data for a tower: the value itself if it takes text, else the content of that file."""
    modality = pipe.modalities[tower]
    if modality.media == "text":
        return value
    if not Path(value).is_file():
        raise FileNotFoundError(f"tower {tower!r} takes a file, and there is none at {value!r}")
    return modality.read_file(value)


def tower_for(pipe: Pipeline, media: str, chosen: str | None, option: str) -> str:
    """Return the chosen tower, or the only tower of a kind of media."""
    fitting = [name for name, modality in pipe.modalities.items() if modality.media == media]
    if chosen is not None:
        if chosen not in pipe.modalities:
            raise typer.BadParameter(
                f"there is no tower {chosen!r} with a modality; there are {', '.join(pipe.modalities)}",
                param_hint=option,
            )
        return chosen
    if len(fitting) != 1:
        what = f"{len(fitting)} towers are of {media}: {', '.join(fitting)}" if fitting else f"no {media}"
        raise typer.BadParameter(
            f"the checkpoint has {what}; name a tower, one of {', '.join(pipe.modalities) or 'none'}",
            param_hint=option,
        )
    return fitting[0]
