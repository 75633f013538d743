"""Checkpoints as a stranger may write them: changed, and sealed again so that the change is not noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from multitower.seal import DIGEST, FILES, write_sealed

PARTS = ("links.safetensors", "towers", "modalities")


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda document: None) -> None:
    """Make ``fusion.json`` agree with the files of a checkpoint; before that, change what it says."""
    document = json.loads((folder / "fusion.json").read_text())
    change(document)
    for key in (DIGEST, FILES):
        document.pop(key, None)
    write_sealed(folder, document, PARTS)
