"""What a tower has proved before it was saved, and need not prove again where nothing has changed."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

import torch

from ..base.extras import require
from ..tower import Tower, TransformersTower
from ..tower.probe import Proof

KINDS = {"path": (str,), "width": (int,), "beyond": (int,), "masked": (bool,), "positions": (int, NoneType)}


def write_proof(tower: Tower) -> dict[str, Any] | None:
    """Return what a manifest says of how a tower runs; None where it is to prove that whenever it is loaded.

    >>> from multitower.testing import tiny_tower
    >>> write_proof(tiny_tower()) is None       # of a tower in plain PyTorch there is nothing to prove
    True
    """
    proof = tower.proof if isinstance(tower, TransformersTower) else None
    return None if proof is None else {**proof._asdict(), "versions": _versions()}


def read_proof(record: Mapping[str, Any]) -> Proof | None:
    """Return what a tower need not prove again: the same releases of torch and transformers have seen it."""
    said = record.get("proof")
    if not isinstance(said, dict) or said.get("versions") != _versions():
        return None
    if any(type(said.get(key)) not in kinds for key, kinds in KINDS.items()) or said["beyond"] < 0:
        return None
    return Proof(**{key: said[key] for key in KINDS})


def _versions() -> dict[str, str]:
    transformers = require("transformers", "transformers")
    return {"torch": str(torch.__version__), "transformers": transformers.__version__}
