"""Memory and communication of distributed training, computed from parameter counts."""

from __future__ import annotations

from collections import Counter

from torch import nn

import multitower as mt

TRAINED_BYTES = 16
"""Bytes per trained parameter: value, gradient and AdamW's two moments, in float32."""


def size(module: nn.Module) -> int:
    """Return the size of a module's parameters in bytes."""
    return sum(each.nbytes for each in module.parameters())


def frozen_bytes(model: nn.Module) -> int:
    """Return the size of the frozen parameters in bytes."""
    return sum(each.nbytes for each in model.parameters() if not each.requires_grad)


def held(frozen: float, trained: float, processes: int, frozen_divided: bool) -> float:
    """Return the bytes that each process holds between steps.

    Args:
        frozen: Bytes of frozen parameters.
        trained: Number of parameters trained in float32 by AdamW.
        processes: Number of processes over which they are sharded.
        frozen_divided: Whether frozen parameters are sharded too.
    """
    return trained * TRAINED_BYTES / processes + (frozen / processes if frozen_divided else frozen)


def received(whole: float, processes: int) -> float:
    """Return the bytes that each process receives in an all-gather or reduce-scatter of ``whole`` bytes."""
    return whole * (processes - 1) / processes


def sent(model: mt.FusedModel, engine: str) -> Counter[str]:
    """Return the full sizes of the tensors communicated in a step, by kind; see benchmarks/parallel.py.

    Args:
        model: A fusion of Llama-like towers.
        engine: "ddp", or the argument ``frozen`` of ``multitower.train.shard``.
    """
    trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    if engine == "ddp":
        return Counter({"reduced": trained})
    gathered = 4 * sum(map(size, model.taps().values()))
    fed = {link.target for link in model.graph.links.values()}
    for name, spec in model.graph.towers.items():
        whole = size(model.tower(name))
        layers = sum(map(size, model.unimodal(name).model.layers))
        if spec.train != "none" or engine == "per_layer":
            passes = 1 + (spec.train != "none" or name in fed)  # second: backward
            gathered += passes * (layers + 2 * (whole - layers))
        elif engine == "root":
            gathered += whole
    return Counter({"gathered": gathered, "reduced and scattered": trained})
