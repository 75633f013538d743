"""What a batch needs of a model: labels to predict, cached states, and, in parallel training, everything."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch.collate import EXAMPLES, IGNORE, STATES, Streams, values_at_hand
from ..compile.schedule import Layer
from ..declare.graph import FusionGraph
from ..tower import Tower


def why_not_constant(graph: FusionGraph, name: str) -> str:
    """Return why a tower's states may change during training; empty if they depend only on its tokens."""
    spec = graph.towers[name]
    if spec.train != "none":
        return f"is trained (train={spec.train!r})"
    if spec.adapter is not None:
        return f"has an input adapter, which is trained (adapter={spec.adapter!r}, not None)"
    if spec.memory != "all":
        return f"forgets what came before other towers' segments (memory={spec.memory!r})"
    links = [link.name for link in graph.links.values() if link.target == name]
    return f"reads others through {', '.join(map(repr, links))}" if links else ""


def brought_states(graph: FusionGraph, towers: Mapping[str, Tower], streams: Streams) -> dict[Layer, Tensor]:
    """Return the cached states in a batch: "layer 2" in a stream is the output of layer 2 of its tower."""
    brought: dict[Layer, Tensor] = {}
    for name, stream in streams.items():
        states = {key: value for key, value in stream.items() if key.startswith(STATES)}
        if not states:
            continue
        what, tower = f"stream {name!r} brings states", towers[name]
        reason = why_not_constant(graph, name)
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
    """Whether a stream has cached states, so that its tower need not run."""
    return any(key.startswith(STATES) for key in stream)


def has_labels(stream: Mapping[str, Tensor]) -> bool:
    """Whether a stream has a label to predict."""
    return "labels" in stream and bool((stream["labels"][:, 1:] != IGNORE).any())


def may_have_labels(stream: Mapping[str, Tensor]) -> bool:
    """Whether a stream may have a label to predict; True if it has "labels" that cannot be inspected."""
    return "labels" in stream and (not values_at_hand(stream["labels"]) or has_labels(stream))


def with_labels(streams: Streams) -> Collection[str]:
    """Return the names of streams that may have labels to predict; if none, of those with "labels"."""
    labelled = [name for name, stream in streams.items() if "labels" in stream]
    return [name for name in labelled if may_have_labels(streams[name])] or labelled


def check_wanted(towers: Mapping[str, Tower], streams: Streams, wanted: Mapping[str, int]) -> None:
    """Check that the wanted layers exist, in towers that are in the batch."""
    for name, layer in wanted.items():
        if name not in streams:
            raise ValueError(
                f"layer {layer} of {name!r} is wanted, but the batch has streams for {', '.join(streams)} "
                "alone"
            )
        depth = towers[name].depth
        if not 0 <= layer <= depth + 1:
            raise ValueError(
                f"layer {layer} of {name!r} is wanted, which has the layers 1 to {depth} (0 is what enters "
                f"layer 1, {depth + 1} the state that enters the head)"
            )


def check_counts(counts: object, streams: Streams) -> None:
    """Check that ``num_items_in_batch`` has a number for each tower that has labels."""
    if not isinstance(counts, Mapping):
        raise TypeError(
            "num_items_in_batch is a number for each tower, as batch.count_targets returns them, not "
            f"{type(counts).__name__}"
        )
    if lacking := [name for name, each in streams.items() if "labels" in each and name not in counts]:
        raise ValueError(
            f"num_items_in_batch has no number for {', '.join(map(repr, lacking))}, which has labels; count "
            "all batches of the step by batch.count_targets"
        )


def trains_in_parallel() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def with_all(streams: Streams, towers: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Return a batch with a stream for each tower, of one padding token where it was missing.

    >>> import multitower as mt
    >>> batch = mt.collate([[mt.Segment("text", [1, 5, 2], target=True)]])
    >>> found = with_all(batch["streams"], ["speech", "text"])
    >>> [found["speech"][key].tolist() for key in ("tokens", "mask", "labels")]
    [[[0]], [[False]], [[-100]]]

    Streams without labels get labels that are all ignored, so that their loss and its gradients are zero.
    """
    some = next(iter(streams.values()))["tokens"]
    zeros = some.new_zeros(len(some), 1)
    padding = {"tokens": zeros, "times": zeros, "mask": zeros.bool()}
    if any(EXAMPLES in stream for stream in streams.values()):
        padding[EXAMPLES] = zeros
    full = {name: dict(streams.get(name, padding)) for name in towers}
    for stream in full.values():
        if not brings_states(stream):
            stream.setdefault("labels", torch.full_like(stream["tokens"], IGNORE))
    return full
