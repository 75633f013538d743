"""Training with a process that is killed: torchrun --nproc-per-node 2 killed_training.py PART FOLDER.

In the parts "trainer" and "loop", the process is killed. "resumed" resumes both runs and compares the results
with those of uninterrupted runs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh

import multitower as mt
from models import EXAMPLES, causal_lm, pair
from multitower.train import Trainer
from multitower.train.divide import shard
from multitower.train.resume import load_training, save_training
from parallel_training import whole

SAVED, LOST, LAST = 2, 3, 4
"""The step after which a checkpoint is saved, the one after which a process is killed, the last one."""


def make() -> mt.FusedModel:
    torch.manual_seed(0)
    return pair(causal_lm("llama"), causal_lm("llama", depth=4, vocab_size=14, seed=4), train="all")


def die(folder: Path) -> None:
    (folder / "died").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(transformers.TrainerCallback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == LOST and args.process_index == 1:
            die(self.folder)


def by_trainer(
    folder: Path, resume: str | None = None, callbacks: Sequence[Any] = ()
) -> dict[str, torch.Tensor]:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=LAST,
        save_steps=SAVED,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = make()
    trainer = Trainer(model, arguments, train_dataset=EXAMPLES * 4, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return whole(model)


def by_loop(folder: Path, *, resume: bool = False, kill: bool = False) -> dict[str, torch.Tensor]:
    model = shard(make(), init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameter_groups(lr=1e-2))
    rank = dist.get_rank()
    begin = load_training(folder / "run", model, optimizer) if resume else 0
    for step in range(begin + 1, LAST + 1):
        optimizer.zero_grad()
        model.train()(**mt.collate([EXAMPLES[(2 * step + rank) % len(EXAMPLES)]])).loss.backward()
        optimizer.step()
        if step == SAVED and not resume:
            save_training(folder / "run", model, optimizer, step=step)
        if step == LOST and kill and rank == 1:
            die(folder)
    return whole(model)


def main(part: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    if part == "trainer":
        by_trainer(folder / "trainer", callbacks=[Killer(folder)])
    elif part == "loop":
        by_loop(folder, kill=True)
    else:
        found = by_trainer(folder / "trainer", resume=str(folder / "trainer" / f"checkpoint-{SAVED}"))
        torch.testing.assert_close(found, by_trainer(folder / "other"), rtol=0, atol=0)
        torch.testing.assert_close(by_loop(folder, resume=True), by_loop(folder), rtol=0, atol=0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
