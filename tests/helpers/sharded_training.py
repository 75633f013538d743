"""Training of a sharded model, one process: python sharded_training.py RANK PROCESSES FOLDER."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import multitower as mt
from models import EXAMPLES, causal_lm
from multitower.train.resume import load_training, save_training
from processes import join


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
    join(rank, processes, folder)
    if (folder / "run").exists():
        check(folder)
    else:
        train_and_save(rank, folder)
    dist.destroy_process_group()


def check(folder: Path) -> None:
    """Load what an earlier run has saved, possibly with another number of processes."""
    expected = load_file(folder / "saved.safetensors")
    model, optimizer = start()
    with warnings.catch_warnings():
        # Of a process that was not there.
        warnings.filterwarnings("ignore", message="the checkpoint has no random")
        assert load_training(folder / "run", model, optimizer) == 1
    same(whole(model), expected)
    train(model, optimizer)
    torch.testing.assert_close(whole(model), load_file(folder / "after.safetensors"))
    fused = mt.FusedModel.from_pretrained(folder / "fused")
    same(whole(fused), expected)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def train_and_save(rank: int, folder: Path) -> None:
    model, optimizer = start()
    train(model, optimizer)
    save_training(folder / "run", model, optimizer, step=1)
    save_training(folder / "run", model, optimizer, step=1)
    model.save_pretrained(folder / "fused")
    saved = whole(model)
    train(model, optimizer)
    again, fresh = start()
    assert load_training(folder / "run", again, fresh) == 1
    train(again, fresh)
    last = whole(model)
    same(whole(again), last)
    if rank == 0:
        save_file(saved, folder / "saved.safetensors")
        save_file(last, folder / "after.safetensors")
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
