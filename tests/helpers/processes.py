"""Start the processes of distributed training."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist


def environment(**more: str) -> Mapping[str, str]:
    """Return environment variables that give a process this one's import path and a single thread."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **more}


def join(rank: int, processes: int, folder: Path) -> None:
    """Join the gloo process group, and set the environment variables of torchrun, for accelerate."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{processes}", rank=rank, world_size=processes
    )


def together(script: str, processes: int, folder: Path, limit: float = 300) -> None:
    """Run ``script RANK PROCESSES FOLDER`` in all processes; if one fails or times out, kill all."""
    command = [sys.executable, "-W", "error::UserWarning:multitower", script]
    children = [
        subprocess.Popen([*command, str(rank), str(processes), str(folder)], env=environment())
        for rank in range(processes)
    ]
    end = time.monotonic() + limit
    try:
        while any(child.poll() is None for child in children):
            assert time.monotonic() < end, f"{script} took more than {limit} s on {processes} processes"
            assert not any(child.returncode for child in children), [each.returncode for each in children]
            time.sleep(0.1)
        assert [child.returncode for child in children] == [0] * processes
    finally:
        for child in children:
            child.kill()
            child.wait()
