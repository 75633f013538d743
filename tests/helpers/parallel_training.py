"""Distributed training, one process of several: python parallel_training.py RANK PROCESSES FOLDER.

Each process trains with every engine on its share of the batches of each step, and writes the weights. A
single process would get all batches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

import multitower as mt
from models import causal_lm, segment
from multitower.run.gathered import is_divided
from multitower.storage.fingerprint import sampled_fingerprint
from multitower.train.divide import shard
from processes import join

LR = 0.1
PROMPTS = [[segment("speech", 5, 6, 7)]]
STEPS = (
    (  # each batch lacks a different tower
        [[segment("speech", 5, 6), segment("text", 3, 4, 5, 6, target=True)]],
        [[segment("music", 9, 3), segment("text", 9, target=True)], [segment("music", 3, target=True)]],
        [[segment("music", 4), segment("speech", 12, target=True)]],
        [[segment("speech", 6, target=True)]],
    ),
    (  # all batches lack the same tower
        [[segment("speech", 5, 6), segment("text", 3, 4, target=True)]],
        [[segment("text", 9, 8, 7), segment("speech", 9, target=True)]],
        [[segment("speech", 4), segment("text", 12, target=True)]],
        [[segment("text", 6), segment("speech", 6, 6, 6, target=True)]],
    ),
)
"""The batches of each step."""


def make(towers: str) -> mt.FusedModel:
    """Link three towers. "frozen": one is frozen. "shared": two share a model, one has LoRA in bfloat16."""
    torch.manual_seed(0)
    graph = mt.FusionGraph()
    tied = causal_lm("llama", seed=1, config={"tie_word_embeddings": True})
    text = causal_lm("llama", seed=3)
    graph.add_tower("speech", tied, train="all")
    if towers == "shared":
        graph.add_tower("music", tied, train="all")
        graph.add_tower("text", text.bfloat16(), train="lora")
    else:
        graph.add_tower("music", causal_lm("llama", depth=1, seed=2), train="all")
        graph.add_tower("text", text)
    for source, target in (("speech", "text"), ("text", "music"), ("music", "speech"), ("speech", "music")):
        graph.add_link(source, target, taps=[(1, 1)])
    return graph.compile()


def with_ddp(model: mt.FusedModel) -> nn.Module:
    return DistributedDataParallel(model)


def with_root(model: mt.FusedModel) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def with_layers(model: mt.FusedModel) -> nn.Module:
    return shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), frozen="per_layer")


def with_whole_frozen(model: mt.FusedModel) -> nn.Module:
    return shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), frozen="root")


def with_replicated_frozen(model: mt.FusedModel) -> nn.Module:
    return shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), frozen="replicate")


def within_halves(model: mt.FusedModel) -> nn.Module:
    sizes = (2, dist.get_world_size() // 2)
    return shard(model, init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")))


def with_accelerate(model: mt.FusedModel) -> nn.Module:
    """Shard with accelerate as from its launcher; all processes get the weights of the first."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP  # accelerate does not offer it on the CPU
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=True, auto_wrap_policy="transformer_based_wrap"
    )
    wrapped, _ = accelerator.prepare(model, sgd(model))
    return wrapped


def checkpointed(model: mt.FusedModel) -> nn.Module:
    model.gradient_checkpointing_enable()
    return with_layers(model)


def with_wrapped_layers(model: mt.FusedModel) -> nn.Module:
    apply_activation_checkpointing(model, check_fn=lambda each: type(each).__name__ == "LlamaDecoderLayer")
    return with_layers(model)


def compiled(model: mt.FusedModel) -> nn.Module:
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            module.compile(backend="aot_eager")
    return with_layers(model)


Case = tuple[str, str]
ENGINES: dict[str, Callable[[mt.FusedModel], nn.Module]] = {
    "ddp": with_ddp,
    "fsdp": with_root,
    "per_layer": with_layers,
    "root": with_whole_frozen,
    "replicate": with_replicated_frozen,
    "hybrid": within_halves,
    "accelerate": with_accelerate,
    "checkpointed": checkpointed,
    "wrapped": with_wrapped_layers,
    "compiled": compiled,
}
CASES: dict[int, list[Case]] = {
    2: [
        *(("frozen", engine) for engine in ("ddp", "fsdp", "per_layer", "replicate")),
        ("shared", "per_layer"),
    ],
    4: [
        *(("frozen", engine) for engine in ("ddp", "root", "replicate", "accelerate")),
        *(("frozen", engine) for engine in ("checkpointed", "wrapped", "compiled")),
        *(("shared", engine) for engine in ("ddp", "fsdp", "per_layer", "hybrid")),
    ],
}
"""The towers and engines to train, by number of processes."""


def counted(batches: list[dict]) -> dict[str, int]:
    """Count the tokens to predict by tower."""
    counts = {"speech": 0, "music": 0, "text": 0}
    for batch in batches:
        for name, stream in batch["streams"].items():
            counts[name] += int((stream["labels"][:, 1:] != -100).sum()) if "labels" in stream else 0
    return {name: max(1, count) for name, count in counts.items()}


def train(
    wrapped: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence, rank: int = 0, processes: int = 1
) -> None:
    for rows in steps:
        batches = [mt.collate(each) for each in rows]
        share = batches[rank::processes]
        optimizer.zero_grad()
        for number, batch in enumerate(share):
            if isinstance(wrapped, DistributedDataParallel):
                wrapped.require_backward_grad_sync = number == len(share) - 1
            loss = wrapped(**batch, num_items_in_batch=counted(batches)).loss
            (loss * processes).backward()
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=LR)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone().contiguous()
        for name, tensor in state.items()
    }


def answer(model: mt.FusedModel, tokens: int) -> torch.Tensor:
    (row,) = model.generate(PROMPTS, ["text"], max_new_tokens=tokens)
    return torch.as_tensor(row[0].tokens)


def main(rank: int, processes: int, folder: Path) -> None:
    join(rank, processes, folder)
    for towers, engine in CASES[processes]:
        model, place = make(towers), folder / f"{towers}, {engine}"
        wrapped = ENGINES[engine](model)
        optimizer = sgd(wrapped)
        train(wrapped, optimizer, STEPS, rank, processes)
        found = whole(model)
        with CommDebugMode() as sent:
            assert sampled_fingerprint(model.state_dict()) == sampled_fingerprint(found)
        assert not any("gather" in str(each) for each in sent.get_comm_counts())
        decoded = answer(model, 2 + rank)  # some processes decode longer than others
        if rank == 0 or is_divided(model):
            model.save_pretrained(place)
        train(wrapped, optimizer, STEPS[:1], rank, processes)  # continues training
        later = {f"later.{name}": tensor for name, tensor in whole(model).items()}
        save_file({**found, **later, "answer": decoded}, folder / f"{towers}, {engine}.{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
