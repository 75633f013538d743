"""Train in two processes, one of which fails to save: python failing_training.py RANK PROCESSES FOLDER."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import multitower as mt
from models import segment
from multitower.storage import atomic
from multitower.testing import tiny_model
from multitower.train import Trainer
from multitower.train.divide import shard
from multitower.train.resume import load_training, save_training
from processes import join

EXAMPLES = [[segment("speech", 5), segment("text", 3, target=True)], [segment("text", 9, target=True)]]

TRAINING = (
    (0, tempfile, "mkdtemp"),
    (0, Path, "write_text"),
    (1, HuggingFaceStorageWriter, "write_data"),
    (0, atomic, "_flush"),
    (0, Path, "rename"),
)
"""The rank that fails, and the function in which it fails."""
FUSED = ((0, tempfile, "mkdtemp"), (0, Path, "write_text"), (0, Path, "rename"))


def trainer(folder: Path, model: mt.FusedModel) -> Trainer:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model, arguments, train_dataset=EXAMPLES * 2)


@contextmanager
def failing(fails: bool, owner: Any, step: str) -> Iterator[None]:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    with mock.patch.object(owner, step, refuse) if fails else mock.MagicMock():
        yield


def main(rank: int, processes: int, folder: Path) -> None:
    join(rank, processes, folder)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2))
    for who, owner, step in TRAINING:
        with (
            failing(rank == who, owner, step),
            pytest.raises(mt.errors.CheckpointError, match="No space left on device"),
        ):
            save_training(folder / "run", model, optimizer, step=1)
        dist.barrier()
        assert not list(folder.glob("*run*")), step
        dist.barrier()
    divided = shard(tiny_model(), init_device_mesh("cpu", (processes,)))
    for who, owner, step in FUSED:
        with (
            failing(rank == who, owner, step),
            pytest.raises(mt.errors.CheckpointError, match="No space left on device"),
        ):
            divided.save_pretrained(folder / "run")
        dist.barrier()
        assert not list(folder.glob("*run*")), step
        dist.barrier()
    for owner, step in ((tempfile, "mkdtemp"), (torch, "save")):
        run = trainer(folder / "trained", tiny_model())
        assert run.args.should_save == (rank == 0)
        with failing(rank == 0, owner, step), pytest.raises(OSError, match="No space left on device"):
            run.train()
    if rank == 0:
        (folder / "thesis").mkdir()
        (folder / "thesis/chapter").touch()
    dist.barrier()
    with pytest.raises(mt.errors.CheckpointError, match="save to a folder of its own"):
        save_training(folder / "thesis", model, optimizer)
    save_training(folder / "run", model, optimizer, step=3)
    assert load_training(folder / "run", tiny_model()) == 3
    while_others_evaluate(rank, processes)
    dist.destroy_process_group()


def while_others_evaluate(rank: int, processes: int) -> None:
    """Check that a training step on one process alone fails after the timeout of its group."""
    group = dist.new_group(timeout=timedelta(seconds=5))
    assert isinstance(group, dist.ProcessGroup)
    model = shard(tiny_model(), DeviceMesh.from_group(group, "cpu"))
    batch = mt.collate(EXAMPLES)
    with torch.no_grad():
        model.eval()(**batch)
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"(?i)timed out|closed"):
            model.train()(**batch).loss.backward()
    dist.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
