"""Processes that save checkpoints, to be killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import multitower as mt
from multitower import atomic
from multitower.testing import tiny_model, tiny_tower

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["multitower.testing", "multitower.checkpoint"])
TOUCHES = ("open", "os.", "shutil.", "tempfile.", "ctypes.", "fcntl.")
"""How the audit events begin of what may change a file system."""


def start(folder: Path, **options: Any) -> tuple[BaseProcess, Connection]:
    """Start a process that saves two models in turn; what it sends first says that it begins."""
    mine, its = CONTEXT.Pipe()
    child = CONTEXT.Process(target=_save, args=(folder, its), kwargs=options, daemon=True)
    child.start()
    its.close()
    return child, mine


def which(folder: Path) -> int:
    """Load a checkpoint; say which of the two models it is, every tensor of it."""
    towers = {"speech": tiny_tower(depth=3, width=12), "text": tiny_tower(depth=2, width=8)}
    found = mt.FusedModel.from_pretrained(folder, towers=towers).state_dict()
    for seed in (0, 1):
        expected = tiny_model(seed).state_dict()
        if all(torch.equal(found[key], value) for key, value in expected.items()):
            return seed
    raise AssertionError("the checkpoint is a mixture")


def _save(
    folder: Path,
    pipe: Connection,
    *,
    exchange: bool = True,
    saves: int | None = None,
    kill_at: int | None = None,
    flush: bool = True,
) -> None:
    torch.set_num_threads(1)
    if not exchange:
        atomic._exchange = lambda one, other: False  # type: ignore[assignment]
    if not flush:
        os.fsync = lambda handle: None  # type: ignore[assignment]
    models = [tiny_model(seed) for seed in (0, 1)]
    rounds = range(saves) if saves is not None else itertools.count()
    pipe.send("begins")
    if kill_at is not None:
        _kill_itself(kill_at)
    for number in rounds:
        models[(number + 1) % 2].save_pretrained(folder)
    pipe.send("is done")


def _kill_itself(after: int) -> None:
    steps = itertools.count()

    def watch(event: str, _: Any) -> None:
        if event.startswith(TOUCHES) and next(steps) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
