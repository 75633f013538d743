"""One of several processes that divide a model: python sharded_training.py RANK PROCESSES FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import multitower as mt
from models import EXAMPLES, causal_lm
from multitower.train.resume import load_training, save_training


def start() -> tuple[mt.FusedModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    graph = mt.FusionGraph()
    graph.add_tower("speech", causal_lm("llama", depth=4, vocab_size=14), train="all")
    graph.add_tower("text", causal_lm("llama", seed=3), train="lora")
    graph.add_link("speech", "text", interleave=(2, 1))
    model = graph.compile()
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameter_groups(lr=1e-2))


def train(model: mt.FusedModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(**mt.collate(EXAMPLES)).loss.backward()
    optimizer.step()


def whole(model: mt.FusedModel) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in state.items()
    }


def main(rank: int, processes: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    model, optimizer = start()
    train(model, optimizer)
    save_training(folder / "run", model, optimizer, step=1)
    save_training(folder / "run", model, optimizer, step=1)
    saved = whole(model)
    train(model, optimizer)
    again, fresh = start()
    assert load_training(folder / "run", again, fresh) == 1
    train(again, fresh)
    found, last = whole(again), whole(model)
    for name, expected in last.items():
        assert torch.equal(found[name], expected), name
    if rank == 0:
        save_file(saved, folder / "saved.safetensors")
        save_file(last, folder / "after.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
