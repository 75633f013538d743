"""One of two processes of which one cannot save: python failing_training.py RANK PROCESSES FOLDER."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter

import multitower as mt
from multitower.storage import atomic
from multitower.testing import tiny_model
from multitower.train.resume import load_training, save_training

STEPS = (
    (0, tempfile, "mkdtemp"),
    (0, Path, "write_text"),
    (1, HuggingFaceStorageWriter, "write_data"),
    (0, atomic, "_flush"),
    (0, Path, "rename"),
)
"""Which process fails, and in what."""


@contextmanager
def failing(fails: bool, owner: Any, step: str) -> Iterator[None]:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    with mock.patch.object(owner, step, refuse) if fails else mock.MagicMock():
        yield


def main(rank: int, processes: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2))
    for who, owner, step in STEPS:
        with (
            failing(rank == who, owner, step),
            pytest.raises(mt.errors.CheckpointError, match="No space left on device"),
        ):
            save_training(folder / "run", model, optimizer, step=1)
        dist.barrier()
        assert not list(folder.glob("*run*")), step
        dist.barrier()
    if rank == 0:
        (folder / "thesis").mkdir()
        (folder / "thesis/chapter").touch()
    dist.barrier()
    with pytest.raises(mt.errors.CheckpointError, match="save to a folder of its own"):
        save_training(folder / "thesis", model, optimizer)
    save_training(folder / "run", model, optimizer, step=3)
    assert load_training(folder / "run", tiny_model()) == 3
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
