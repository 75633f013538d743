"""Change a checkpoint together with its manifest, as an attacker would."""

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
    """Change ``fusion.json``, then make it match the files of the checkpoint.

    Args:
        folder: The checkpoint.
        change: Changes the document in place.
        tensors: Whether to update the list of tensors, too.
    """
    document = json.loads((folder / "fusion.json").read_text())
    change(document)
    for key in (DIGEST, FILES):
        document.pop(key, None)
    for part in list(document["tensors"]) if tensors else []:
        with suppress(CheckpointError):
            document["tensors"][part] = inventory(folder / part)
    write_manifest(folder, document)
