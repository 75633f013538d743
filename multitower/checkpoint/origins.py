"""Whether a tower is had again from where it came, or has to be stored."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PluginError, TowerError
from ..run.fusion import Fusion
from ..storage.find import hub_id, is_path
from ..tower import Tower
from ..tower.load import from_source, revision_of
from ..tower.peft_tower import base_model, base_state
from ..tower.weights import quantisation_of
from .layout import whole


def is_to_be_stored(model: Fusion, name: str, embed_towers: bool) -> bool:
    """Return whether a checkpoint is to hold the weights of a tower.

    >>> from multitower.testing import tiny_model
    >>> is_to_be_stored(tiny_model(), "text", embed_towers=False)
    True

    Referred to are commits of the Hub and what plugins load, and these only where they give, read anew, each
    tensor that the tower has now. Quantised towers can be neither trained nor converted, so are not read.
    """
    spec, native = model.graph.towers[name], whole(model.tower(name))
    source, revision = spec.source, revision_of(base_model(native))
    if embed_towers or spec.train == "all" or source is None or is_path(source):
        return True
    if hub_id(source) and revision is None:
        return True
    if quantisation_of(base_model(native)):
        return False
    try:
        origin = from_source(name, source, revision=revision, cached=True)
    except (TowerError, PluginError):
        return True
    found = base_state(whole(origin) if isinstance(origin, Tower) else origin)
    state = base_state(native)
    return found.keys() != state.keys() or not all(_same(found[key], state[key]) for key in state)


def ways_out(name: str) -> str:
    """Return what to do where a tower is not found."""
    return (
        f"say where it is with towers={{{name!r}: ...}}, or have it in the checkpoint: save with "
        "embed_towers=True where it can be loaded"
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
