"""Processes that save checkpoints, and are killed or cannot write."""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import multitower as mt
from multitower.testing import tiny_model, tiny_tower

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["multitower.testing", "multitower.checkpoint"])
Report = tuple[str, int, list[str]]
TOUCHES = ("open", "os.", "shutil.", "tempfile.", "ctypes.", "fcntl.")
"""Prefixes of the audit events of operations that may change a file system."""


def start(folder: Path, **options: Any) -> tuple[BaseProcess, Connection]:
    """Start a process that saves two models in turn; it sends a message before the first save."""
    mine, its = CONTEXT.Pipe()
    child = CONTEXT.Process(target=_save, args=(folder, its), kwargs=options, daemon=True)
    child.start()
    its.close()
    return child, mine


def which(folder: Path) -> int:
    """Load a checkpoint; return which of the two models all its tensors are from."""
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
    saves: int | None = None,
    kill_at: int | None = None,
    flush: bool = True,
) -> None:
    torch.set_num_threads(1)
    if not flush:
        os.fsync = lambda handle: None  # type: ignore[assignment]  # on purpose
    models = [tiny_model(seed) for seed in (0, 1)]
    rounds = range(saves) if saves is not None else itertools.count()
    pipe.send("begins")
    if kill_at is not None:
        _kill_itself(kill_at)
    try:
        for number in rounds:
            models[(number + 1) % 2].save_pretrained(folder)
    except mt.errors.CheckpointError as error:
        pipe.send(str(error))
    else:
        pipe.send("is done")


def _kill_itself(after: int) -> None:
    steps = itertools.count()

    def watch(event: str, _: Any) -> None:
        if event.startswith(TOUCHES) and next(steps) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def save_where_it_cannot(folder: Path, limit: str) -> list[Report] | None:
    """Save the second model over the first in a new process without permission or with too little space.

    Args:
        folder: A checkpoint of the first model.
        limit: "file" limits the size of files, "disk" saves to a full disk; both add space until the save
            succeeds. "read-only" saves to a folder without permission.

    Returns:
        For each save: "saved" or the error, which model the folder holds, and the names in its parent
        folder. None if no disk can be mounted.
    """
    mine, its = CONTEXT.Pipe(duplex=False)
    child = CONTEXT.Process(target=_save_with_less, args=(folder, limit, its), daemon=True)
    child.start()
    its.close()
    reports: list[Report] | None = mine.recv()
    child.join()
    return reports


def _save_with_less(folder: Path, limit: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if limit == "read-only":
        if os.geteuid() == 0:
            with tempfile.TemporaryDirectory() as place:
                _try(Path(place, "fused"))  # import all modules, which another user may not read
            os.setuid(65534)
        pipe.send([_try(folder)])
        return
    disk = folder.parent.parent
    if limit == "disk" and not _fill(disk, folder):
        pipe.send(None)
        return
    reports: list[Report] = []
    for space in itertools.count(1000, 4000):
        if limit == "disk":
            os.truncate(disk / "filler", (disk / "filler").stat().st_size - 5000)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (space, resource.RLIM_INFINITY))
        reports.append(_try(folder))
        if reports[-1][0] == "saved":
            break
    pipe.send(reports)


def _try(folder: Path) -> Report:
    try:
        tiny_model(1).save_pretrained(folder)
        said = "saved"
    except mt.errors.CheckpointError as error:
        said = str(error)
    return said, which(folder), os.listdir(folder.parent)


def _fill(disk: Path, folder: Path) -> bool:
    """Mount a small disk that only this process sees, save the first model on it, and fill it."""
    clone_newns = 0x20000
    if ctypes.CDLL(None).unshare(clone_newns):
        return False
    commands = (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", "size=1m", "tmpfs", disk])
    if any(subprocess.run(["mount", *command], capture_output=True).returncode for command in commands):
        return False
    folder.parent.mkdir()
    tiny_model(0).save_pretrained(folder)
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    return True
