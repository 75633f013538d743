"""Hub ids and paths: recognise them, and download checkpoints from the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..base.extras import require
from ..errors import CheckpointError
from .atomic import current
from .files import FUSION

PARTS = [FUSION, "links*", "towers/*", "modalities/*"]
"""The files of a checkpoint as glob patterns of the Hub, where ``*`` also matches ``/``."""

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"


def hub_id(source: str | None) -> str | None:
    """Return the source if it may be a Hub id, else None; an existing path is not an id.

    >>> hub_id("HuggingFaceTB/SmolLM2-135M"), hub_id("gpt2"), hub_id("/models/text"), hub_id("loader://text")
    ('HuggingFaceTB/SmolLM2-135M', 'gpt2', None, None)
    """
    found = source is not None and re.fullmatch(f"{_PART}(/{_PART})?", source)
    return source if found and not os.path.exists(source or "") else None


def is_path(source: str | None) -> bool:
    """Whether a tower's source is a path, rather than a Hub id or the URL of a plugin's loader.

    >>> is_path("/models/text"), is_path("./text"), is_path("gpt2"), is_path("loader://text"), is_path(None)
    (True, True, False, False, False)
    """
    return source is not None and "://" not in source and hub_id(source) is None


def as_declared(source: str | os.PathLike[str]) -> str:
    """Return a tower's source as recorded in graphs: "./" is added to a folder that looks like a Hub id.

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
    """Return the folder of a checkpoint; a Hub id is downloaded first.

    >>> find_checkpoint("/")
    PosixPath('/')

    Only the files of a checkpoint are downloaded. An existing folder takes precedence over a Hub id.

    Args:
        source: A folder, or a Hub id, "owner/name".
        revision: A branch, tag or commit on the Hub.
        token: Access token for a private repository; by default that of the machine's login.
        cache_dir: Download folder; by default the Hub's cache.

    Raises:
        CheckpointError: The Hub has no such repository or revision, or cannot be reached.
        ValueError: A revision is given, but the source is a local path.
        ImportError: The source is not a folder, and huggingface_hub is not installed.
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
    except (OSError, ValueError) as error:  # all errors of huggingface_hub derive from one of these
        at = "" if revision is None else f" at revision {revision!r}"
        raise CheckpointError(
            f"there is no folder {source!r}, and the Hub does not give a checkpoint of that name{at}: {error}"
        ) from error
