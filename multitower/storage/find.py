"""Checkpoints and towers on the Hugging Face Hub: what is an id, and where its files are."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..base.extras import require
from ..errors import CheckpointError
from .atomic import current
from .files import FUSION

PARTS = [FUSION, "links*", "towers/*", "modalities/*"]
"""The files of a checkpoint, as patterns of the Hub, whose ``*`` stands for folders, too."""

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


def hub_id(source: str | None) -> str | None:
    """Return the id of a tower's source if it may be one on the Hub; a path that exists is none.

    >>> hub_id("HuggingFaceTB/SmolLM2-135M"), hub_id("gpt2"), hub_id("/models/text"), hub_id("loader://text")
    ('HuggingFaceTB/SmolLM2-135M', 'gpt2', None, None)
    """
    found = source is not None and re.fullmatch(f"{_PART}(/{_PART})?", source)
    return source if found and not os.path.exists(source or "") else None


def is_path(source: str | None) -> bool:
    """Return whether a tower's source is a path: no id on the Hub, and nothing that a plugin loads.

    >>> is_path("/models/text"), is_path("./text"), is_path("gpt2"), is_path("loader://text"), is_path(None)
    (True, True, False, False, False)
    """
    return source is not None and "://" not in source and hub_id(source) is None


def as_declared(source: str | os.PathLike[str]) -> str:
    """Return a tower's source as graphs name it: a folder that is here in a form that no id on the Hub has.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory(dir=".") as folder:
    ...     as_declared(os.path.basename(folder)) == f"./{os.path.basename(folder)}"
    True
    >>> as_declared(Path("/models/text")), as_declared("gpt2")
    ('/models/text', 'gpt2')
    """
    name = os.fspath(source)
    return f"./{name}" if os.path.isdir(name) and re.fullmatch(f"{_PART}(/{_PART})?", name) else name


def find_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the folder of a checkpoint: the one that is named, or what the Hub has under that id.

    >>> find_checkpoint("/")
    PosixPath('/')

    Only files of a checkpoint are downloaded, whatever else is there. A folder that exists wins over an id.

    Args:
        source: A folder, or an id on the Hub, "owner/name".
        revision: A branch, tag or commit on the Hub.
        token: What opens a private repository; None for the one that this machine is logged in with.
        cache_dir: Where downloads are kept, where the Hub's own cache is not wanted.

    Raises:
        CheckpointError: The Hub has no such repository or revision, or cannot be reached.
        ValueError: A revision is given, but the source is a path here.
        ImportError: The source is no folder, and huggingface_hub is not installed.
    """
    folder = Path(source)
    if current(folder).exists() or not (isinstance(source, str) and re.fullmatch(f"{_PART}/{_PART}", source)):
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for the Hub, but {source} is a path here; leave it out"
            )
        return folder
    try:
        hub = require("huggingface_hub", "hub")
    except ImportError as error:
        error.add_note(f"there is no folder {source!r}, and it may be an id on the Hub")
        raise
    try:
        return Path(
            hub.snapshot_download(
                source, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=PARTS
            )
        )
    except (OSError, ValueError) as error:  # what huggingface_hub raises is one or the other
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"there is no folder {source!r}, and the Hub does not give a checkpoint of that name{at}: {error}"
        ) from error
