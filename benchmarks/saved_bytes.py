"""Count the bytes that a forward saves for its backward, compared with a theoretical count.

    python benchmarks/saved_bytes.py                    # tiny towers, seconds
    python benchmarks/saved_bytes.py --size smollm2

Saved-tensor hooks see every tensor that autograd saves. Each storage is counted once, except those of
parameters, buffers and the batch. A tower reads a frozen one at the policy's layer and at its last layer. The
theoretical count is derived in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import multitower as mt
from measure import begin, options, write
from models import SIZES, ZIPPER, make_batch, make_tower
from multitower.link.cross_attention import default_heads

POLICIES = {  # training of text, its input adapter, place of its first tap (fraction of its layers)
    "all trained": ("all", None, 0.5),
    "frozen, adapter": ("none", "gated", 0.5),
    "frozen, first tap at 1/6": ("none", None, 1 / 6),
    "frozen, first tap at 1/2": ("none", None, 1 / 2),
    "frozen, first tap at the top": ("none", None, 1.0),
}


def main() -> None:
    """Count for each policy."""
    parser = options(__doc__, "saved_bytes")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    chosen = begin(parser)
    results = []
    for policy in POLICIES:
        model, layers = make_policy(chosen.size, policy)
        batch = make_batch(model.to(chosen.device), chosen.rows, chosen.length, targets="last")
        counted = saved(model, batch)
        row: dict[str, Any] = {"policy": policy, "first": layers[0], "taps": len(layers), "bytes": counted}
        if POLICIES[policy][:2] == ("none", None):
            row["paper"] = on_paper(chosen, layers[0], len(layers))
            row["ratio"] = round(counted / row["paper"], 3)
        results.append(row)
        print(row, flush=True)
        write(chosen, results)
    plot(chosen, results)


def make_policy(size: str, policy: str) -> tuple[mt.FusedModel, list[int]]:
    """Return a model with one of ``POLICIES``, and the layers at which its text tower reads."""
    train, adapter, where = POLICIES[policy]
    depth = SIZES[size]["num_hidden_layers"]
    layers = sorted({max(1, round(where * depth)), depth})
    graph = mt.FusionGraph()
    graph.add_tower("source", make_tower(size, 0), adapter=None)
    graph.add_tower("text", make_tower(size, 1), train=train, adapter=adapter)
    graph.add_link("source", "text", taps=[(layer, layer) for layer in layers], **ZIPPER)
    return graph.compile(), layers


def saved(model: mt.FusedModel, batch: mt.batch.Batch) -> int:
    """Count the bytes that a forward saves."""
    return saved_by(lambda: [model(**batch).loss], model, batch)


def saved_by(losses: Callable[[], list[Tensor]], model: mt.FusedModel, batch: mt.batch.Batch) -> int:
    """Count the bytes that computing some losses saves; runs the backward, too."""
    given = [tensor for stream in batch["streams"].values() for tensor in stream.values()]
    own = [*model.parameters(), *model.buffers(), *given]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # keeps addresses of counted storages from being reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = losses()
    torch.autograd.backward(found)
    return sum(sizes.values())


def on_paper(chosen: Any, first: int, taps: int) -> int:
    """Return the theoretical count of docs/performance.md."""
    size = SIZES[chosen.size]
    width, inner, heads = size["hidden_size"], size["intermediate_size"], size["num_attention_heads"]
    keys = width * size["num_key_value_heads"] // heads
    layer = 4 * width + 2 + 2 * keys + heads + 3 * inner
    tap = 25 * width + default_heads(width) + 6
    tokens = chosen.rows * chosen.length
    above = (size["num_hidden_layers"] - first) * layer + taps * tap + width + 1
    mask = chosen.rows * chosen.length**2
    labels = chosen.rows * (chosen.length - 1)
    return 4 * (tokens * above + mask + labels * size["vocab_size"])


def plot(chosen: Any, results: list[dict[str, Any]]) -> None:
    """Plot a bar per policy, with the theoretical count."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.barh([row["policy"] for row in results], [row["bytes"] / 2**20 for row in results], label="counted")
    paper = [row for row in results if "paper" in row]
    needed = [row["paper"] / 2**20 for row in paper]
    axes.plot(needed, [row["policy"] for row in paper], "k|", ms=20, label="on paper")
    axes.invert_yaxis()
    axes.legend()
    title = f"{chosen.size}, {chosen.rows} rows of {chosen.length} tokens"
    axes.set(xlabel="MiB saved for backward", title=title)
    figure.savefig(chosen.out / "bytes.png", dpi=120)


if __name__ == "__main__":
    main()
