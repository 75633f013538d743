"""Count what processes send each other in a step of training, and time DDP beside one process alone.

    python benchmarks/parallel.py                       # two processes over gloo, tiny towers, a few minutes

A trained tower and a frozen one read each other. Counted is the size of the whole tensors that are gathered,
reduced and scattered, or reduced: of S bytes among n processes over a ring, each receives (n - 1) / n S in a
gather, as much in a reduction that scatters, and twice that in one that does not. Beside it stands the plan,
from parameter counts alone:

- DDP reduces the gradient of each trained parameter once.
- FSDP2 reduces and scatters the same. It gathers each layer once in the forward and once in the backward;
  what else a tower has (embeddings, norm, head) and each tap twice in either, since they are called twice. Of
  a frozen tower that is the most that there is to gather: "root" gathers it once, "replicate" never.

The ratio is that of a step under DDP and of the same step without, both on all processes at once, in turn.
Results go to results.json.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import multitower as mt
from measure import begin, interleaved, milliseconds, options, ratio, write
from models import INTERLEAVE, SIZES, make_batch, make_tower
from multitower.train.divide import POLICIES, shard

KINDS = {"allgather": "gathered", "reduce_scatter": "reduced and scattered"}


class Sent(TorchDispatchMode):
    """Adds up the sizes of the whole tensors of collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            sizes = [each.nbytes for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            kind = next((kind for key, kind in KINDS.items() if key in name), name)
            self.bytes[kind] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Measure in processes of their own."""
    parser = options(__doc__, "parallel")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of each tower in a row")
    chosen = begin(parser)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (chosen, folder), chosen.processes)


def measure(rank: int, chosen: argparse.Namespace, folder: str) -> None:
    """Count and time in one of the processes; the first one tells."""
    torch.set_num_threads(chosen.threads)
    where = f"file://{Path(folder).absolute()}/meet"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=chosen.processes)
    results: list[dict[str, Any]] = []
    for engine in ("ddp", *POLICIES):
        model = make(chosen.size)
        expected = planned(model, engine)
        batch = make_batch(model, chosen.rows, chosen.length)
        found = counted(model, batch, engine, chosen.processes)
        results.append({"kind": "bytes", "engine": engine, "sent": dict(found), "plan": dict(expected)})
    results.append(timed(chosen))
    if rank == 0:
        for result in results:
            show(result)
        write(chosen, results)
    dist.destroy_process_group()


def make(size: str) -> mt.FusedModel:
    """Return a trained and a frozen tower that read each other, the same in each process."""
    graph, step = mt.FusionGraph(), INTERLEAVE[size]
    graph.add_tower("trained", copy.deepcopy(make_tower(size, 0)), train="all")
    graph.add_tower("frozen", copy.deepcopy(make_tower(size, 1)))
    graph.add_link("trained", "frozen", interleave=step)
    graph.add_link("frozen", "trained", interleave=step)
    torch.manual_seed(0)
    return graph.compile().train()


def planned(model: mt.FusedModel, engine: str) -> Counter[str]:
    """Return what is to be sent, from parameter counts."""
    trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    if engine == "ddp":
        return Counter({"reduced": trained})
    layers = {name: sum(map(size, model.unimodal(name).model.layers)) for name in model.towers}
    rest = {name: size(model.tower(name)) - layers[name] for name in model.towers}
    gathered = 2 * layers["trained"] + 4 * rest["trained"] + 4 * sum(map(size, model.taps().values()))
    gathered += {
        "per_layer": 2 * layers["frozen"] + 4 * rest["frozen"],
        "root": size(model.tower("frozen")),
        "replicate": 0,
    }[engine]
    return Counter({"gathered": gathered, "reduced and scattered": trained})


def size(module: nn.Module) -> int:
    """Return the bytes of a module's parameters."""
    return sum(each.nbytes for each in module.parameters())


def counted(model: mt.FusedModel, batch: Any, engine: str, processes: int) -> Counter[str]:
    """Count what is sent in a step, the second, for the first one makes buckets and units."""
    sent: Counter[str] = Counter()
    if engine == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)

        def noted(group, bucket):  # whose annotations DDP would read
            sent["reduced"] += bucket.buffer().nbytes
            return allreduce_hook(group, bucket)

        wrapped.register_comm_hook(None, noted)
    else:
        wrapped = shard(model, init_device_mesh("cpu", (processes,)), frozen=engine)
    wrapped(**batch).loss.backward()
    sent.clear()
    with Sent() as mode:
        wrapped(**batch).loss.backward()
    return sent if engine == "ddp" else mode.bytes


def timed(chosen: argparse.Namespace) -> dict[str, Any]:
    """Time a step with DDP and without, which takes the same time in all processes."""
    alone, model = make(chosen.size), make(chosen.size)
    batch, wrapped = make_batch(alone, chosen.rows, chosen.length), DistributedDataParallel(model)

    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        module(**batch).loss.backward()

    runs = {"ddp": lambda: step(wrapped), "alone": lambda: step(alone)}
    times = interleaved(runs, chosen.repeats, clock=chosen.clock, before=dist.barrier)
    return {"kind": "time", "ms": milliseconds(times), "ratio": ratio(times["ddp"], times["alone"])}


def show(result: dict[str, Any]) -> None:
    """Print one line."""
    if result["kind"] == "time":
        low, median, high = (result["ratio"][key] for key in ("low", "median", "high"))
        print(f"a step under DDP: {median:.3f} ({low:.3f} to {high:.3f}) of one without", flush=True)
        return
    for kind, expected in result["plan"].items():
        found = result["sent"].get(kind, 0)
        print(f"{result['engine']:10} {kind:22} {found:>12,} bytes, planned {expected:>12,}", flush=True)


if __name__ == "__main__":
    main()
