"""What processes that train together hold and send each other, from parameter counts alone."""

from __future__ import annotations

from collections import Counter

from torch import nn

import multitower as mt

TRAINED_BYTES = 16
"""Of a trained parameter: itself, its gradient and AdamW's two moments, in float32."""


def size(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(each.nbytes for each in module.parameters())


def frozen_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters that are not trained."""
    return sum(each.nbytes for each in model.parameters() if not each.requires_grad)


def held(frozen: float, trained: float, processes: int, frozen_divided: bool) -> float:
    """Return the bytes that each process holds between steps.

    Args:
        frozen: Bytes of parameters that are not trained.
        trained: How many parameters are trained, in float32 by AdamW.
        processes: Over how many they are divided.
        frozen_divided: Whether those that are not trained are divided too.
    """
    return trained * TRAINED_BYTES / processes + (frozen / processes if frozen_divided else frozen)


def received(whole: float, processes: int) -> float:
    """Return what each process receives when so many bytes are gathered, or reduced and scattered."""
    return whole * (processes - 1) / processes


def sent(model: mt.FusedModel, engine: str) -> Counter[str]:
    """Return the sizes of the whole tensors that are sent in a step, by kind; see benchmarks/parallel.py.

    Args:
        model: Towers of the make of Llama.
        engine: "ddp", or what ``multitower.train.shard`` takes as ``frozen``.
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
            passes = 1 + (spec.train != "none" or name in fed)  # the second of a gradient, where there is one
            gathered += passes * (layers + 2 * (whole - layers))
        elif engine == "root":
            gathered += whole
    return Counter({"gathered": gathered, "reduced and scattered": trained})
