"""Checkpoints as a stranger may write them: changed, and the manifest too, so that it is not noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from multitower.errors import CheckpointError
from multitower.storage.files import DIGEST, FILES, write_manifest
from multitower.storage.tensors import inventory


def rewrite_manifest(
    folder: Path, change: Callable[[dict[str, Any]], object] = lambda document: None, *, tensors: bool = False
) -> None:
    """Make ``fusion.json`` agree with the files of a checkpoint; before that, change what it says.

    Args:
        folder: The checkpoint.
        change: Changes what ``fusion.json`` says.
        tensors: Whether it shall also agree with which tensors there are.
    """
    document = json.loads((folder / "fusion.json").read_text())
    change(document)
    for key in (DIGEST, FILES):
        document.pop(key, None)
    for part in list(document["tensors"]) if tensors else []:
        with suppress(CheckpointError):
            document["tensors"][part] = inventory(folder / part)
    write_manifest(folder, document)
