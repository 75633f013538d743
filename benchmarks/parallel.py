"""Count the communication of a distributed training step, and time DDP compared with a single process.

    python benchmarks/parallel.py                       # two processes over gloo, tiny towers, a few minutes

A trained tower and a frozen one read each other. Counted are the full sizes of tensors in all-gathers,
reduce-scatters and all-reduces. For S bytes and n processes in a ring, each process receives (n - 1) / n S in
an all-gather or reduce-scatter, and twice that in an all-reduce. These are compared with a plan computed from
parameter counts:

- DDP all-reduces the gradient of each trained parameter once.
- FSDP2 reduce-scatters the same. It gathers each layer once in the forward and, if it has a gradient, once in
  the backward; the rest of a tower (embeddings, norm, head) and each tap twice in either, because they are
  called twice. For a frozen tower this is the "per_layer" policy; "root" gathers it once, "replicate" never.

The memory of each process after a step of AdamW is also compared with its plan; see benchmarks/formulas.py.

The timing ratio is that of a step with DDP to the same step without, alternating on all processes at once.
For comparison, it is also measured for the two native towers alone, of which the frozen one runs only
forward. Results go to results.json.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import multitower as mt
from formulas import frozen_bytes, held, sent
from measure import begin, interleaved, milliseconds, options, ratio, write
from models import INTERLEAVE, SIZES, make_batch, make_tower
from multitower.batch.collate import Streams
from multitower.train.divide import POLICIES, shard

KINDS = {"allgather": "gathered", "reduce_scatter": "reduced and scattered"}


class Sent(TorchDispatchMode):
    """Adds up the full tensor sizes of collectives, by kind."""

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
    """Measure in spawned processes."""
    parser = options(__doc__, "parallel")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of each tower in a row")
    chosen = begin(parser)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (chosen, folder), chosen.processes)


def measure(rank: int, chosen: argparse.Namespace, folder: str) -> None:
    """Count and time in one process; the first one reports."""
    torch.set_num_threads(chosen.threads)
    where = f"file://{Path(folder).absolute()}/meet"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=chosen.processes)
    results: list[dict[str, Any]] = []
    for engine in ("ddp", *POLICIES):
        model = make(chosen.size)
        expected = sent(model, engine)
        batch = make_batch(model, chosen.rows, chosen.length)
        found = counted(model, batch, engine, chosen.processes)
        results.append({"kind": "bytes", "engine": engine, "sent": dict(found), "plan": dict(expected)})
    results += [kept(chosen, policy) for policy in POLICIES]
    results.append(timed(chosen))
    if rank == 0:
        for result in results:
            show(result)
        write(chosen, results)
    dist.destroy_process_group()


def make(size: str) -> mt.FusedModel:
    """Return a model of a trained and a frozen tower that read each other, equal in all processes."""
    graph, step = mt.FusionGraph(), INTERLEAVE[size]
    graph.add_tower("trained", copy.deepcopy(make_tower(size, 0)), train="all")
    graph.add_tower("frozen", copy.deepcopy(make_tower(size, 1)))
    graph.add_link("trained", "frozen", interleave=step)
    graph.add_link("frozen", "trained", interleave=step)
    torch.manual_seed(0)
    return graph.compile().train()


def counted(model: mt.FusedModel, batch: Any, engine: str, processes: int) -> Counter[str]:
    """Count the communication of the second step; the first sets up buckets and units."""
    reduced: Counter[str] = Counter()
    if engine == "ddp":
        wrapped: nn.Module = DistributedDataParallel(model)

        def noted(group, bucket):  # unannotated, because DDP checks annotations
            reduced["reduced"] += bucket.buffer().nbytes
            return allreduce_hook(group, bucket)

        wrapped.register_comm_hook(None, noted)
    else:
        wrapped = shard(model, init_device_mesh("cpu", (processes,)), frozen=engine)
    wrapped(**batch).loss.backward()
    reduced.clear()
    with Sent() as mode:
        wrapped(**batch).loss.backward()
    return reduced if engine == "ddp" else mode.bytes


def kept(chosen: argparse.Namespace, policy: Any) -> dict[str, Any]:
    """Count the bytes that this process holds after a step of AdamW: parameters, gradients, moments."""
    model, processes = make(chosen.size), chosen.processes
    batch = make_batch(model, chosen.rows, chosen.length)
    count = sum(each.numel() for each in model.parameters() if each.requires_grad)
    expected = held(frozen_bytes(model), count, processes, policy != "replicate")
    wrapped: Any = shard(model, init_device_mesh("cpu", (processes,)), frozen=policy)
    trained = [each for each in wrapped.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    wrapped(**batch).loss.backward()
    optimizer.step()
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    state = [each for each in tree_leaves(list(optimizer.state.values())) if each.dim()]
    tensors = [*wrapped.parameters(), *(each.grad for each in trained), *state]
    found = sum((each.to_local() if isinstance(each, DTensor) else each).nbytes for each in tensors)
    return {"kind": "held", "engine": policy, "found": found, "plan": expected}


class Bare(nn.Module):
    """The native towers of a model, without links, each on its own stream."""

    def __init__(self, model: mt.FusedModel) -> None:
        super().__init__()
        self.natives = nn.ModuleDict({name: model.unimodal(name) for name in model.towers})

    def forward(self, streams: Streams) -> Tensor:
        """Return the sum of their losses."""
        losses = [
            self.natives[name](input_ids=each["tokens"], labels=each["labels"], use_cache=False).loss
            for name, each in streams.items()
        ]
        return torch.stack(losses).sum()


def timed(chosen: argparse.Namespace) -> dict[str, Any]:
    """Time steps with and without DDP, of the fused model and of bare towers, in all processes at once."""
    models = [make(chosen.size) for _ in range(4)]
    streams = make_batch(models[0], chosen.rows, chosen.length)["streams"]
    alone, wrapped = models[0], DistributedDataParallel(models[1])
    bare, bare_wrapped = Bare(models[2]), DistributedDataParallel(Bare(models[3]))

    def step(module: nn.Module) -> None:
        module.zero_grad(set_to_none=True)
        out = module(streams)
        (out if isinstance(out, Tensor) else out.loss).backward()

    modules = {"ddp": wrapped, "alone": alone, "bare ddp": bare_wrapped, "bare": bare}
    runs = {name: partial(step, module) for name, module in modules.items()}
    times = interleaved(runs, chosen.repeats, clock=chosen.clock, before=dist.barrier)
    return {
        "kind": "time",
        "ms": milliseconds(times),
        "ratio": ratio(times["ddp"], times["alone"]),
        "bare_ratio": ratio(times["bare ddp"], times["bare"]),
    }


def show(result: dict[str, Any]) -> None:
    """Print one line."""
    if result["kind"] == "time":
        for key, what in (("ratio", "fused"), ("bare_ratio", "the bare towers")):
            low, median, high = (result[key][each] for each in ("low", "median", "high"))
            print(f"a step under DDP, {what}: {median:.3f} ({low:.3f} to {high:.3f}) of one without")
        print({name: round(each["median"], 1) for name, each in result["ms"].items()}, "ms", flush=True)
        return
    if result["kind"] == "held":
        found, expected = result["found"], result["plan"]
        print(f"{result['engine']:10} {'held':22} {found:>12,} bytes, planned {expected:>12,.0f}", flush=True)
        return
    for kind, expected in result["plan"].items():
        found = result["sent"].get(kind, 0)
        print(f"{result['engine']:10} {kind:22} {found:>12,} bytes, planned {expected:>12,}", flush=True)


if __name__ == "__main__":
    main()
