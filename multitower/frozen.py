"""Towers whose states training never changes, and batches that bring these states with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from .schedule import Layer
from .stream import IGNORE, STATES, values_at_hand

if TYPE_CHECKING:
    from .fused import FusedModel


def why_not_constant(model: FusedModel, name: str) -> str:
    """Say why training changes the states of a tower, as declared; empty where only its tokens do.

    >>> from multitower.testing import tiny_model
    >>> why_not_constant(tiny_model(), "speech")
    "is trained (train='all')"
    """
    spec = model._graph.towers[name]
    if spec.train != "none":
        return f"is trained (train={spec.train!r})"
    if spec.adapter is not None:
        return f"has an input adapter, which is trained (adapter={spec.adapter!r}, not None)"
    links = [link.name for link in model._graph.links.values() if link.target == name]
    return f"reads others through {', '.join(map(repr, links))}" if links else ""


def brought_states(model: FusedModel, streams: Mapping[str, Mapping[str, Tensor]]) -> dict[Layer, Tensor]:
    """Give the states that a batch brings, "layer 2" of a stream being what layer 2 of its tower gives.

    Raises:
        ValueError: The tower's states may change, it has no such layer or another width, or is to predict.
    """
    brought: dict[Layer, Tensor] = {}
    for name, stream in streams.items():
        states = {key: value for key, value in stream.items() if key.startswith(STATES)}
        if not states:
            continue
        what, tower = f"stream {name!r} brings states", model.tower(name)
        reason = why_not_constant(model, name)
        if reason:
            raise ValueError(
                f"{what}, but tower {name!r} {reason}: leave {', '.join(states)} out of the batch"
            )
        if values_at_hand(stream["tokens"]) and has_labels(stream):
            raise ValueError(
                f"{what}, so that tower {name!r} does not run, and has labels; give it one of both"
            )
        layers = {f"{STATES}{layer}": layer for layer in range(tower.depth + 1)}
        for key, value in states.items():
            if key not in layers:
                raise ValueError(f"{what} of {key!r}, but tower {name!r} has layers 0 to {tower.depth}")
            if value.shape[-1] != tower.width:
                raise ValueError(
                    f"{what} of shape {tuple(value.shape)}, but tower {name!r} is {tower.width} wide"
                )
            brought[name, layers[key]] = value
    return brought


def brings_states(stream: Mapping[str, Tensor]) -> bool:
    """Say whether a stream brings states, so that its tower need not run.

    >>> import torch
    >>> brings_states({"tokens": torch.zeros(1, 2)}), brings_states({"layer 3": torch.zeros(1, 2, 8)})
    (False, True)
    """
    return any(key.startswith(STATES) for key in stream)


def has_labels(stream: Mapping[str, Tensor]) -> bool:
    """Say whether something is to be predicted."""
    return "labels" in stream and bool((stream["labels"][:, 1:] != IGNORE).any())
