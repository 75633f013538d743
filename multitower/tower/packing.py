"""Whether a transformers model tells the examples in one row apart."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .probe import evaluated, probe_tokens, rounding


@torch.no_grad()
def tells_examples_apart(tower: Any) -> bool:
    """Whether a ``TransformersTower`` scores examples that share a row as it scores each alone.

    Families do so that make their masks from "position_ids"; recurrent ones, and those that place tokens in
    another way, do not. Without values to compare, those that take the argument are believed.
    """
    model = tower.model
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in model.parameters()):
        return True
    tokens = probe_tokens(model)
    rows = [
        [tokens[0], tokens[1, :3], tokens[1, :1], tokens[2]],
        [tokens[2, :2], tokens[0], tokens[0, :2], tokens[1]],
    ]
    positions = torch.stack([torch.cat([torch.arange(len(each)) for each in row]) for row in rows])
    try:
        with evaluated(model):
            packed = torch.stack([torch.cat(row) for row in rows])
            hidden, context = tower.embed(packed, positions=positions.to(tokens.device))
            for index in range(1, tower.depth + 1):
                hidden = tower.layer(index, hidden, context)
            together = tower.head(hidden, context)
            alone = torch.cat([torch.cat([tower(each[None]) for each in row], 1) for row in rows])
    except Exception:  # whatever stops it, rows of several examples are out of the question
        return False
    return bool((together - alone).abs().max() <= rounding(alone))
