"""Estimate memory, communication and throughput of training a large fusion on many GPUs.

    python benchmarks/scaling.py                        # the tables of docs/scaling.md, a minute

Towers have the shapes of Llama 3 70B, Llama 3 8B and Llama 3.2 3B, on the meta device. FLOPs and saved bytes
are those of ``multitower.inspect.estimate`` for one row in bfloat16. Everything else is computed from
parameter counts by benchmarks/formulas.py, which benchmarks/parallel.py compares with measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import multitower as mt
from formulas import frozen_bytes, held, received, sent, size
from multitower.inspect.estimate import empty_model
from multitower.train.divide import POLICIES

GB = 1e9
SHAPES: dict[str, dict[str, Any]] = {
    "text": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "speech": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "image": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
}
TRAINED = {"speech": "all"}
LINKS = {("speech", "text"): 8, ("text", "speech"): 4, ("image", "text"): 8}
TOKENS = {"text": 512, "speech": 1024, "image": 256}
"""Tokens of each tower in a row."""

NODES, PER_NODE = 8, 8
GPUS = NODES * PER_NODE
MEMORY, USABLE = 80 * GB, 0.9
FLOPS, MFU = 989e12, 0.4
NVLINK, INFINIBAND, EFFICIENCY = 450 * GB, 50 * GB, 0.8
"""Bytes per second and direction of a GPU: NVLink within a node, a 400 Gb/s network card between nodes; and
the fraction of these that is achieved."""


@dataclass(frozen=True)
class Sizes:
    """The inputs of the formulas.

    Attributes:
        frozen: Bytes of frozen parameters, in their storage dtype.
        trained: Number of trained parameters.
        gathered: By policy, the bytes gathered in a step, in the compute dtype.
        units: Bytes of the two largest units in the compute dtype: one in use, one prefetched.
        saved: Bytes that a row saves for the backward.
        passing: Bytes of a row's logits and their gradient, in float32.
        flops: FLOPs of a step on one row.
        crossing: Bytes of a row's states and gradients that cross between towers.
    """

    frozen: int
    trained: int
    gathered: dict[str, int]
    units: int
    saved: int
    passing: int
    flops: int
    crossing: int


@dataclass(frozen=True)
class Plan:
    """A strategy of parallelism; bytes are per rank.

    Attributes:
        name: Its name.
        held: Bytes held between steps: parameters, gradients, AdamW's moments.
        whole: Bytes gathered at the peak of a step.
        row: Bytes per row.
        near: Bytes received in a step over NVLink, or over a ring across nodes.
        far: Bytes received over the rank's own network card.
        speed: Bandwidth of ``near``, in bytes per second.
        share: Fraction of GPUs that compute at the same time.
    """

    name: str
    held: float
    whole: float
    row: float
    near: float
    far: float
    speed: float
    share: float = 1.0

    @property
    def rows(self) -> int:
        """The number of rows that fit on a rank, possibly 0."""
        return max(0, int((MEMORY * USABLE - self.held - self.whole) / self.row))

    def seconds(self, flops: int) -> tuple[float, float]:
        """Return the times of computation and of communication in a step."""
        compute = self.rows * flops / (FLOPS * MFU * self.share)
        return compute, (self.near / self.speed + self.far / INFINIBAND) / EFFICIENCY


def plans(sizes: Sizes) -> list[Plan]:
    """Return the possible strategies on ``GPUS``."""
    gradients, ring = 4 * sizes.trained, min(NVLINK, PER_NODE * INFINIBAND)
    row = sizes.saved + sizes.passing
    found = []
    for policy in ("replicate", "root", "per_layer"):
        near = received(sizes.gathered[policy] + gradients, GPUS)
        whole = sizes.units + (sizes.frozen if policy == "root" else 0)
        rest = held(sizes.frozen, sizes.trained, GPUS, policy != "replicate")
        found.append(Plan(f'"{policy}" over {GPUS}', rest, whole, row, near, 0, ring))
    near = received(sizes.gathered["per_layer"] + gradients, PER_NODE)
    far = 2 * received(gradients / PER_NODE, NODES)
    rest = held(sizes.frozen, sizes.trained, PER_NODE, True)
    found.append(Plan(f'"per_layer" in {NODES} x {PER_NODE}', rest, sizes.units, row, near, far, NVLINK))
    spread = Plan(
        f"towers on devices, {NODES} times",
        held=rest,  # at best: evenly distributed
        whole=0,
        row=row / PER_NODE,
        near=0,
        far=far,
        speed=NVLINK,
        share=1 / PER_NODE,
    )
    found.append(replace(spread, near=spread.rows * sizes.crossing / PER_NODE))
    return found


def fusion() -> mt.FusedModel:
    """Return the fusion on the meta device, in bfloat16, the compute dtype."""
    graph = mt.FusionGraph()
    for name, shape in SHAPES.items():
        config = LlamaConfig(
            vocab_size=128256,
            num_key_value_heads=8,
            bos_token_id=1,
            eos_token_id=2,
            dtype="bfloat16",
            **shape,
        )
        with torch.device("meta"):
            graph.add_tower(name, LlamaForCausalLM(config), train=TRAINED.get(name, "none"))
    for (source, target), interleave in LINKS.items():
        graph.add_link(source, target, interleave=interleave)
    return empty_model(graph).to(torch.bfloat16).train()


def row() -> mt.batch.Batch:
    """Return a row: an image and a spoken question, answered in text and speech."""
    half = [3] * (TOKENS["speech"] // 2)
    segments = [
        mt.Segment("image", [3] * TOKENS["image"]),
        mt.Segment("speech", half),
        mt.Segment("text", [3] * TOKENS["text"], target=True),
        mt.Segment("speech", half, target=True),
    ]
    return mt.collate([segments])


def crossing(model: mt.FusedModel) -> int:
    """Return the bytes of states read by taps in a row, and of their gradients, in bfloat16."""
    reads = {(tap.source, tap.source_layer, tap.target) for tap in model.schedule.taps}
    fed = {link.target for link in model.graph.links.values()} | TRAINED.keys()
    return sum(2 * TOKENS[name] * model.tower(name).width * (2 if name in fed else 1) for name, _, _ in reads)


def units(model: mt.FusedModel) -> list[int]:
    """Return the sizes of the units of ``shard`` in bytes."""
    layers = {name: list(model.unimodal(name).model.layers) for name in model.towers}
    rests = [size(model.tower(name)) - sum(map(size, layers[name])) for name in model.towers]
    return [
        *map(size, [layer for each in layers.values() for layer in each]),
        *rests,
        *map(size, model.taps().values()),
    ]


def sized(model: mt.FusedModel) -> tuple[Sizes, mt.inspect.Estimate]:
    """Return the sizes of a fusion, and the estimate of one row."""
    estimate = mt.inspect.estimate(model, row())
    total = estimate.total
    frozen = frozen_bytes(model)
    logits = 4 * max(TOKENS.values()) * 128256
    gathered = {policy: sent(model, policy)["gathered"] for policy in POLICIES}
    largest = sum(sorted(units(model))[-2:])
    return (
        Sizes(
            frozen,
            total.trained,
            gathered,
            largest,
            total.saved_bytes,
            2 * logits,
            total.step_flops,
            crossing(model),
        ),
        estimate,
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paper() -> str:
    """Return the tables of docs/scaling.md."""
    model = fusion()
    sizes, estimate = sized(model)
    parts = [(f"tower {name}", cost) for name, cost in estimate.towers.items()]
    parts += [(f"link {name}", cost) for name, cost in estimate.links.items()]
    parts += [("loss", estimate.loss), ("all", estimate.total)]
    first = table(
        ["part", "parameters, 10^9", "trained, 10^9", "TFLOP per row", "saved activations per row, GB"],
        [
            [
                name,
                *(f"{each / 1e9:.2f}" for each in (cost.parameters, cost.trained)),
                *(f"{cost.step_flops / 1e12:.1f}", f"{cost.saved_bytes / GB:.2f}"),
            ]
            for name, cost in parts
        ],
    )
    made = plans(sizes)
    second = table(
        ["plan", "held, GB", "gathered, GB", "per row, GB", "rows that fit"],
        [
            [
                plan.name,
                *(f"{each / GB:.1f}" for each in (plan.held, plan.whole, plan.row)),
                str(plan.rows or "none"),
            ]
            for plan in made
        ],
    )
    return "\n\n".join([first, second, table(HEAD, [timing(plan, sizes) for plan in made if plan.rows])])


HEAD = [
    "plan",
    "received within node, GB",
    "between nodes, GB",
    "compute, s",
    "communication, s",
    "step, s",
    "rows per second, all GPUs",
]


def timing(plan: Plan, sizes: Sizes) -> list[str]:
    """Return the table row of a plan; a step takes the maximum of both times at best, their sum at worst."""
    compute, wire = plan.seconds(sizes.flops)
    best, worst = max(compute, wire), compute + wire
    rows = plan.rows * GPUS * plan.share
    speeds = f"{rows / worst:.0f} to {rows / best:.0f}"
    return [
        plan.name,
        *(f"{each / GB:.1f}" for each in (plan.near, plan.far)),
        *(f"{each:.2f}" for each in (compute, wire)),
        f"{best:.2f} to {worst:.2f}",
        speeds,
    ]


if __name__ == "__main__":
    print(paper())
